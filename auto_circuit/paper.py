"""The tables and figures of Miller et al. 2024 that this library can make, as data.

- `verdicts`: what each of six choices does to the verdict on the published circuit of a task,
  one changed at a time (the paper's table 1; see `robustness`).
- `grid`: the published circuit, tested with nodes or edges, positions told apart or not, and
  three ablations, and how its single prompts spread (figures 3, 4 and 9): the ratio of means,
  the mean of ratios, and the quartiles of the prompts' ratios.
- `rocs`: how well algorithms find a circuit that is known exactly, since its model is a
  compiled program (figure 5).

Source: Miller et al. 2024, "Transformer Circuit Faithfulness Metrics Are Not Robust" (arXiv
2407.08734).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from auto_circuit.checks import check_count, check_device, check_number, checked
from auto_circuit.circuits import Circuit, circuit_of_scores
from auto_circuit.errors import ConfigError, about
from auto_circuit.metrics.prune_metrics.full_model_outs import FullModelOuts
from auto_circuit.metrics.prune_metrics.prompt_stats import prompt_vals
from auto_circuit.metrics.prune_metrics.prune_metrics import (
    LOGIT_DIFF_PERCENT_METRIC as METRIC,
)
from auto_circuit.metrics.prune_metrics.prune_metrics import (
    with_mean_of_ratios,
)
from auto_circuit.paper_config import PaperConfig
from auto_circuit.prune import run_circuits
from auto_circuit.prune_algos.ground_truth import GROUND_TRUTH_PRUNE_ALGO
from auto_circuit.prune_algos.prune_algos import PruneAlgo, find_prune_algo
from auto_circuit.robustness import (
    VALUE_NAMES,
    Choices,
    RobustnessRow,
    checked_choices,
    chosen_task,
    is_padded,
    robustness_rows,
)
from auto_circuit.sweep import FoundScores, find_scores
from auto_circuit.sweep_config import MAX_SEED, check_out_folder
from auto_circuit.tasks import Task, find_task
from auto_circuit.types import (
    AblationType,
    AlgoKey,
    Measurements,
    PatchType,
    PruneScores,
    TaskKey,
)

ABLATIONS = (
    AblationType.RESAMPLE,
    AblationType.TOKENWISE_MEAN_CORRUPT,
    AblationType.ZERO,
)
"""What the grid patches in."""


@dataclass(frozen=True)
class GridRow:
    """One test of one task's circuit.

    circuit: "published", or what found it. unit, positions, ablation: the choices, in words.
    n_edges, n_graph_edges: of the circuit and of the graph in which it is tested.
    ratio_of_means: the circuit's mean logit difference, in % of the model's mean.
    mean_of_ratios: the mean of each prompt's percentage; std, q1, median, q3: their standard
        deviation and quartiles. n_prompts: how many.
    """

    task: TaskKey
    circuit: str
    unit: str
    positions: str
    ablation: str
    n_edges: int
    n_graph_edges: int
    ratio_of_means: float
    mean_of_ratios: float
    std: float
    q1: float
    median: float
    q3: float
    n_prompts: int


@dataclass(frozen=True)
class RocRow:
    """How well an algorithm finds the true edges of a task.

    auroc: 1 is perfect, 0.5 chance. points: [(false, true positive rate)].
    """

    task: TaskKey
    algo: AlgoKey
    algorithm: str
    auroc: float
    seconds: float
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class PaperResults:
    """All rows; see the module."""

    config: PaperConfig
    verdicts: tuple[RobustnessRow, ...]
    grid: tuple[GridRow, ...]
    rocs: tuple[RocRow, ...]


@dataclass(frozen=True)
class PaperPlan:
    """The tasks and algorithms that a configuration names."""

    tasks: tuple[Task, ...]
    tracr_tasks: tuple[Task, ...]
    algos: tuple[PruneAlgo, ...]


@checked
def check_paper_config(config: PaperConfig) -> PaperPlan:
    """What the configuration names. Raises for all that is wrong without loading a model.

    ConfigError for names, numbers, a device and a folder; DataError for a prompt file that is
    not there, or is not as it must be.
    """
    check_count("seed", config.seed, 0, MAX_SEED)
    check_number("circuit_share", config.circuit_share, above=0, high=1)
    if config.n_prompts is not None:
        check_count("n_prompts", config.n_prompts)
    if config.device is not None:
        check_device("device", config.device)
    tasks = [_task(key, config) for key in config.tasks]
    tracr_tasks = [
        replace(find_task(key), seed=config.seed) for key in config.tracr_tasks
    ]
    algos = [find_prune_algo(name) for name in (config.circuit_algo, *config.algos)]
    for names in (config.tasks, config.tracr_tasks, config.algos):
        if len(set(names)) < len(names):
            raise ConfigError(f"One of {list(names)} is named twice.")
    if not tasks and not tracr_tasks:
        raise ConfigError("`tasks` and `tracr_tasks` are empty; name at least one.")
    for task in tracr_tasks:
        if task._true_edge_func is None:
            raise ConfigError(
                f"The true circuit of {task.key!r} is not known, so it cannot be found: "
                "name it in `tasks`, not in `tracr_tasks`."
            )
    for task in (*tasks, *tracr_tasks):
        task.read_prompts()
    check_out_folder(config.folder)
    return PaperPlan(tuple(tasks), tuple(tracr_tasks), tuple(algos[1:]))


def _task(key: TaskKey, config: PaperConfig) -> Task:
    task = find_task(key)
    changes: dict[str, object] = {"seed": config.seed, "device": config.device}
    if config.model is not None:
        changes["_model_def"] = config.model
    if config.n_prompts is not None:
        changes |= {"batch_size": config.n_prompts, "batch_count": 1}
    return replace(task, **changes)  # type: ignore[arg-type]


@checked
def run_paper(config: PaperConfig) -> PaperResults:
    """All rows of a configuration. Writes and prints nothing.

    Raises, before anything is computed, as `check_paper_config` does, and ModelError for a model
    that cannot be had.
    """
    plan = check_paper_config(config)
    # A model loads now, so that errors come before the work, and for all its task's graphs.
    tasks = [loaded_task(task, config) for task in plan.tasks]
    verdicts: list[RobustnessRow] = []
    grid: list[GridRow] = []
    for task in tasks:
        with about(f"Task {task.key!r}"):
            tested = circuit_of_task(task, config)
            verdicts += circuit_verdicts(task, tested)
            grid += grid_rows(task, tested)
        task.free()
    rocs = [
        roc_row(task, find_scores(task, algo.with_seed(config.seed)))
        for task in plan.tracr_tasks
        for algo in plan.algos
    ]
    return PaperResults(config, tuple(verdicts), tuple(grid), tuple(rocs))


def loaded_task(task: Task, config: PaperConfig) -> Task:
    """The task on a model that is loaded now. Raises for what its circuit cannot be tested on.

    ModelError, and as `checked_choices` does.
    """
    with about(f"Task {task.key!r}"):
        task = task.with_seed(config.seed)
        checked_choices(task, Choices(), (config.circuit_share,))
    return task


@dataclass(frozen=True)
class TaskCircuit:
    """The circuit of a task that is tested: the edges with the largest scores.

    algo, name: what found it; for the published one, "published". n_edges: how many.
    """

    algo: AlgoKey
    name: str
    scores: PruneScores
    n_edges: int


def circuit_of_task(task: Task, config: PaperConfig) -> TaskCircuit:
    """The published circuit if there is one, else what the configuration says."""
    algo, _ = circuit_algo(config, is_published=task.true_edge_count is not None)
    return tested_circuit(task, config, find_scores(task, algo).scores)


def circuit_algo(config: PaperConfig, is_published: bool) -> tuple[PruneAlgo, str]:
    """What finds the circuit of a task, and what it is called."""
    if is_published:
        return GROUND_TRUTH_PRUNE_ALGO, "published"
    algo = find_prune_algo(config.circuit_algo).with_seed(config.seed)
    return algo, algo.short_name


def tested_circuit(task: Task, config: PaperConfig, scores: PruneScores) -> TaskCircuit:
    """The circuit that a task's scores (of its `circuit_algo`) stand for."""
    n_true = task.true_edge_count
    algo, name = circuit_algo(config, is_published=n_true is not None)
    if n_true is None:
        n_true = max(1, int(config.circuit_share * task.model.n_edges))
    return TaskCircuit(algo.key, name, scores, n_true)


def circuit_verdicts(task: Task, tested: TaskCircuit) -> list[RobustnessRow]:
    """The circuit, tested again and again with one of six choices changed."""
    share = tested.n_edges / task.model.n_edges
    # Positions as the task has them, so that the graph is the one it was found in.
    return robustness_rows(
        task, Choices(), (share,), lambda base: {tested.algo: tested.scores}
    )


def grid_rows(task: Task, tested: TaskCircuit) -> list[GridRow]:
    """The circuit, tested in each graph and with each ablation."""
    circuit = circuit_of_scores(task.model, tested.scores, tested.n_edges)
    can_tell = not is_padded(chosen_task(task, Choices(token_positions=False)))
    rows = []
    for nodes, told_apart in product((False, True), (True, False)):
        if told_apart and not can_tell:
            continue
        choices = Choices(nodes=nodes, token_positions=told_apart)
        graph = replace(chosen_task(task, choices), _model_def=task.model.wrapped_model)
        projected = circuit.in_graph(graph.model)
        full = FullModelOuts(graph.model, graph.test_loader)
        rows += [
            _grid_row(
                tested.name, graph, projected, replace(choices, ablation=ablation), full
            )
            for ablation in ABLATIONS
        ]
    return rows


def _grid_row(
    name: str, task: Task, circuit: Circuit, choices: Choices, full: FullModelOuts
) -> GridRow:
    outs = run_circuits(
        task.model,
        task.test_loader,
        [circuit.n_edges],
        circuit.scores,
        PatchType.TREE_PATCH,
        choices.ablation,
    )
    found = []
    for metric in (METRIC, with_mean_of_ratios(METRIC)):
        assert metric.prompt_func is not None
        (vals,) = prompt_vals(
            task.model, task.test_loader, outs, metric.prompt_func, full
        )
        found.append(vals)
    of_means, of_ratios = found
    q1, median, q3 = np.quantile(of_ratios.vals, (0.25, 0.5, 0.75)).tolist()
    return GridRow(
        task=task.key,
        circuit=name,
        unit=VALUE_NAMES["Unit"](choices),
        positions=VALUE_NAMES["Positions"](choices),
        ablation=VALUE_NAMES["Ablation"](choices),
        n_edges=circuit.n_edges,
        n_graph_edges=task.model.n_edges,
        ratio_of_means=of_means.mean,
        mean_of_ratios=of_ratios.mean,
        std=of_ratios.std,
        q1=q1,
        median=median,
        q3=q3,
        n_prompts=len(of_ratios.vals),
    )


def roc_row(task: Task, found: FoundScores) -> RocRow:
    """How well an algorithm has found the true edges of a task."""
    from auto_circuit.metrics.official_circuits.measure_roc import (
        measure_task_roc,
        roc_auc,
    )

    edges = task.true_edges
    assert edges is not None
    with about(f"Task {task.key!r}, algorithm {found.name!r}"):
        points: Measurements = measure_task_roc(
            task.model, edges, found.scores, all_edges=True
        )
    return RocRow(
        task.key,
        found.algo,
        found.name,
        roc_auc(points),
        found.seconds,
        tuple((float(x), float(y)) for x, y in points),
    )


@checked
def grid_values(rows: Sequence[GridRow]) -> list[tuple[str, str, str]]:
    """(unit, positions, ablation) of all rows, in their order."""
    return list(dict.fromkeys((row.unit, row.positions, row.ablation) for row in rows))

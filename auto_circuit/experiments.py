"""Find and test circuits: sweep tasks x algorithms x metrics against circuit size.

An experiment is a frozen ExperimentConfig. For each task, every algorithm scores every
edge; the best edges make circuits of growing size; every metric measures each circuit.
All of it is written to `results/<name>-<hash>/`, and a table is printed.

    python -m auto_circuit.experiments --help
    python -m auto_circuit.experiments --tasks "Pocket IOI" --algos EAP IEG

`robustness` as the first word tests the same circuits in other ways: each of the six
choices of Miller et al. 2024 is changed, and a figure shows how the verdict changes.

    python -m auto_circuit.experiments robustness
    python -m auto_circuit.experiments robustness --algos EAP IEG --circuit-shares 0.01 0.1

`tracr-reverse` and `tracr-xproportion` are sweeps on compiled models, whose circuits are
known exactly: their tables say how well each algorithm finds these (AUROC). The published
circuit of reverse leaves out the two edges of the middle token, which stays where it is but
is carried all the same: a right ranking is at 0.998, not at 1.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from enum import Enum
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro
from rich.console import Console
from rich.table import Table
from safetensors.torch import save

from auto_circuit.checks import (
    check_count,
    check_device,
    check_member,
    check_number,
    checked,
)
from auto_circuit.errors import AutoCircuitError, ConfigError
from auto_circuit.files import checked_file_name, folder_written_whole
from auto_circuit.metrics.area_under_curve import (
    accuracy_area,
    edges_for_share,
    mean_curve,
    task_areas,
)
from auto_circuit.metrics.mean_interval import MAX_VALUES, MeanInterval, mean_interval
from auto_circuit.metrics.official_circuits.measure_roc import measure_task_roc, roc_auc
from auto_circuit.metrics.prune_metrics.prune_metrics import (
    CORRECT_ANSWER_GREATER_THAN_INCORRECT_PERCENT_METRIC,
    LOGIT_DIFF_PERCENT_METRIC,
    PruneMetric,
    find_metric,
    with_mean_of_ratios,
)
from auto_circuit.metrics.prune_metrics.task_measurements import (
    nest_rows,
    task_measurement_rows,
)
from auto_circuit.prune_algos.ACDC import ACDC_PRUNE_ALGO
from auto_circuit.prune_algos.edge_attribution_patching import EDGE_ATTR_PATCH_PRUNE_ALGO
from auto_circuit.prune_algos.prune_algos import (
    PRUNE_ALGOS,
    PruneAlgo,
    find_prune_algo,
    run_prune_algo,
)
from auto_circuit.robustness import (
    Choices,
    RobustnessRow,
    chosen_task,
    robustness_rows,
    values_by_choice,
)
from auto_circuit.tasks import (
    POCKET_DOCSTRING_TASK,
    POCKET_GREATERTHAN_TASK,
    POCKET_IOI_TOKEN_TASK,
    POCKET_TASKS,
    TRACR_REVERSE_TOKEN_CIRCUIT_TASK,
    TRACR_XPROPORTION_TOKEN_CIRCUIT_TASK,
    Task,
    find_task,
)
from auto_circuit.types import (
    AblationMeasurements,
    AblationType,
    AlgoKey,
    AlgoMeasurements,
    AlgoPruneScores,
    EdgeCounts,
    MeasurementRow,
    Measurements,
    PatchType,
    TaskKey,
    TestEdges,
)
from auto_circuit.utils.custom_tqdm import tqdm

if TYPE_CHECKING:
    import pandas  # takes a fifth of the time in which `--help` answers

SHARE = 0.8
Numbers = dict[str, int | float | None]
"""What one run says of one algorithm: a column of the summary -> a number, if it is known."""
MAX_SEED = 2**32 - 1
INTERRUPTED = 130
"""The exit code of a program that was interrupted from the keyboard (128 + SIGINT)."""


@checked
@dataclass(frozen=True)
class ExperimentConfig(Choices):
    """One experiment. Without arguments: the pocket tasks, which need no download."""

    name: str = "pocket"
    """The first part of the result folder's name."""
    tasks: tuple[str, ...] = tuple(task.key for task in POCKET_TASKS)
    """Keys of tasks (see auto_circuit/tasks.py)."""
    algos: tuple[str, ...] = (
        *("GT", "Random", "Act Mag", "EAP", "EAP-IG inputs"),
        *("ACDC quick", "STP quick", "EP quick", "MAttr quick"),
    )
    """Names of prune algorithms (see auto_circuit/prune_algos/prune_algos.py). Those that
    need a known circuit are left out on tasks without one."""
    metrics: tuple[str, ...] = ("Clean KL Div", "Logit Diff", "Logit Diff Percent")
    """Keys of metrics (see auto_circuit/metrics/prune_metrics/prune_metrics.py). Areas are of
    'Logit Diff Percent'; of accuracy, with 'Correct Answer Greater Than Incorrect Percent'."""
    edge_counts: EdgeCounts = EdgeCounts.LOGARITHMIC
    """Which circuit sizes are tested: LOGARITHMIC (1..9, 10, 20, ...), ALL or GROUPS."""
    circuit_sizes: tuple[int, ...] = ()
    """Exactly these numbers of edges, instead of `edge_counts`."""
    circuit_shares: tuple[float, ...] = ()
    """Exactly these shares of all edges (0.05 is 5 %), instead of `edge_counts`."""
    ungroup: bool = False
    """With grouped-query attention, a key and a value for every query head (EAP-IG, MIB)?"""
    keep_positions: bool = False
    """Do zero and mean ablations keep position embeddings, as EAP-IG's tools do?"""
    seed: int = 42
    """Which prompts are picked from each task's file, and in which order, and all that
    algorithms draw at random."""
    n_seeds: int = 3
    """How many seeds (`seed`, `seed` + 1, ...): as many draws of the prompts."""
    once: tuple[str, ...] = ("ACDC quick", "STP quick", "EP quick", "MAttr quick")
    """Algorithms that run for the first seed only, because they are slow: their numbers are
    those of one draw, without an interval."""
    device: str | None = None
    """Where models run, for example "cuda"; None: a GPU if there is one."""
    out: Path = Path("results")
    """The folder that holds the result folders."""

    @property
    def json(self) -> str:
        """All that determines the results, as text (the place of `out` does not)."""
        fields = {key: value for key, value in asdict(self).items() if key != "out"}
        return json.dumps(fields, indent=2, default=_plain) + "\n"

    @property
    def folder(self) -> Path:
        """Where the results are: the same folder for the same configuration."""
        return (
            self.out / f"{self.name}-{hashlib.sha256(self.json.encode()).hexdigest()[:8]}"
        )

    @property
    def seeds(self) -> range:
        """The seeds, ascending."""
        return range(self.seed, self.seed + self.n_seeds)

    @property
    def test_edges(self) -> TestEdges:
        """The circuit sizes, as the metrics take them."""
        return [*self.circuit_sizes, *self.circuit_shares] or self.edge_counts


def _plain(value: object) -> object:
    return value.name if isinstance(value, Enum) else str(value)


@dataclass(frozen=True)
class TaskRun:
    """What one seed found on one task.

    seconds: the time that each algorithm took to score the edges.
    rocs, aurocs: points enough for a figure, and the exact area, of tasks whose circuit is
        known; see `measure_task_roc`.
    """

    task: TaskKey
    seed: int
    scores: AlgoPruneScores
    seconds: dict[AlgoKey, float]
    rows: list[MeasurementRow]
    rocs: AlgoMeasurements
    aurocs: dict[AlgoKey, float]


@dataclass(frozen=True)
class ExperimentResults:
    """What an experiment found: each task's and seed's run, and a summary of them all."""

    config: ExperimentConfig
    runs: list[TaskRun]
    summary: pandas.DataFrame

    @property
    def rows(self) -> list[MeasurementRow]:
        """The measurements of all runs."""
        return [row for run in self.runs for row in run.rows]


def run_experiment(config: ExperimentConfig) -> ExperimentResults:
    """Run a sweep and write its results to `config.folder`.

    Raises ConfigError, before anything is computed, for unknown names, numbers and devices that
    make no sense, circuit sizes that a task's graph does not have, and a folder that cannot
    be written; DataError for a prompt file that is not there. If it is interrupted
    (KeyboardInterrupt), what is finished is written beside that folder; the text says where.
    """
    tasks, algos, metrics = check_config(config)
    _check_graphs(tasks, config)
    if config.mean_of_ratios:
        metrics = [with_mean_of_ratios(metric) for metric in metrics]
    runs: list[TaskRun] = []
    todo = [(replace(t, seed=seed), seed) for t in tasks for seed in config.seeds]
    try:
        for task, seed in tqdm(todo, desc="Tasks and seeds"):
            runs.append(_run_task(task, _algos_of(algos, seed, config), metrics, config))
            task.free()
    except KeyboardInterrupt:
        if not runs:
            raise
        folder = _interrupted_folder(config)
        write_results(_results(config, runs, algos), metrics, algos, folder)
        raise KeyboardInterrupt(
            f"{len(runs)} of {len(todo)} runs were finished: {folder}"
        ) from None
    results = _results(config, runs, algos)
    write_results(results, metrics, algos, config.folder)
    return results


def _results(
    config: ExperimentConfig, runs: list[TaskRun], algos: Sequence[PruneAlgo]
) -> ExperimentResults:
    summary = summarize(runs, algos, config.reverse_clean_corrupt)
    return ExperimentResults(config, runs, summary)


def _interrupted_folder(config: ExperimentConfig) -> Path:
    return config.folder.with_name(f"{config.folder.name}-interrupted")


# ------------------------------------------------------------- checks, before any work


def check_config(
    config: ExperimentConfig,
) -> tuple[list[Task], list[PruneAlgo], list[PruneMetric]]:
    """What the configuration names. Raises for all that is wrong without loading a model.

    ConfigError for names, numbers, devices and folders; DataError for a prompt file that is
    not there, is not as it must be, or has not what an algorithm or a metric compares with.
    """
    checked_file_name("name", config.name)
    _check_numbers(config)
    tasks = [_task(key, config) for key in config.tasks]
    algos = [find_prune_algo(name) for name in config.algos]
    metrics = [find_metric(key) for key in config.metrics]
    for name in config.once:
        find_prune_algo(name)
    _check_not_empty(config)
    _check_circuits_are_known(tasks, algos)
    _check_prompts(tasks, algos, metrics, config)
    if config.device is not None:
        check_device("device", config.device)
    _check_out_folder(config)
    return tasks, algos, metrics


def _check_prompts(
    tasks: Sequence[Task],
    algos: Sequence[PruneAlgo],
    metrics: Sequence[PruneMetric],
    config: ExperimentConfig,
) -> None:
    """Do the prompts have what algorithms and metrics compare? As their files have them."""
    for task, seed in product(tasks, config.seeds):
        train, test = replace(task, seed=seed).read_prompts()
        for algo in algos:
            algo.check_prompts(train)
        for metric in metrics:
            metric.check_prompts(test)


def _task(key: TaskKey, config: ExperimentConfig) -> Task:
    task = find_task(key)
    ungroup = task.ungroup or config.ungroup
    keep_positions = task.keep_positions or config.keep_positions
    task = replace(
        task, device=config.device, ungroup=ungroup, keep_positions=keep_positions
    )
    return chosen_task(task, config)


def _check_numbers(config: ExperimentConfig) -> None:
    check_member("ablation", config.ablation, AblationType)
    check_member("patch_type", config.patch_type, PatchType)
    check_member("edge_counts", config.edge_counts, EdgeCounts)
    check_count("seed", config.seed, 0, MAX_SEED)
    check_count("n_seeds", config.n_seeds, 1, MAX_VALUES)
    for size in config.circuit_sizes:
        check_count("circuit_sizes", size, 0)
    for share in config.circuit_shares:
        check_number("circuit_shares", share, 0, 1)


def _check_not_empty(config: ExperimentConfig) -> None:
    for field in ("tasks", "algos", "metrics"):
        names: tuple[str, ...] = getattr(config, field)
        if not names:
            raise ConfigError(f"`{field}` is empty; name at least one.")
        if len(set(names)) < len(names):
            raise ConfigError(f"`{field}` names one of {list(names)} twice.")
    algos = [find_prune_algo(name) for name in config.algos]
    if len(set(algos)) < len(algos):
        raise ConfigError(
            f"`algos` names an algorithm of {list(config.algos)} in two ways."
        )


def _check_circuits_are_known(tasks: Sequence[Task], algos: Sequence[PruneAlgo]) -> None:
    """Algorithms that need a known circuit are left out of tasks without one."""
    if not all(algo.needs_true_edges for algo in algos):
        return
    for task in tasks:
        if task._true_edge_func is None:
            raise ConfigError(
                f"{algos[0].short_name!r} needs a known circuit, and task {task.key!r} has "
                "none. Add another algorithm, such as 'EAP', or leave the task out."
            )


def _check_out_folder(config: ExperimentConfig) -> None:
    """A folder can be made there, and there is room for something."""
    try:
        config.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=config.out) as file:
            file.write(bytes(1 << 16))
            file.flush()
            os.fsync(file.fileno())
    except (OSError, ValueError) as error:  # ValueError: NUL characters
        raise ConfigError(
            f"Results cannot be written to the folder {str(config.out)!r:.300} ({error}). "
            "Choose another one with `out`."
        ) from error
    for folder in (config.folder, _interrupted_folder(config)):
        if folder.exists() and not folder.is_dir():
            raise ConfigError(
                f"Results cannot be written to the folder {folder}: there is a file of that "
                "name. Move it away, or choose another `out`."
            )


def _check_graphs(tasks: Sequence[Task], config: ExperimentConfig) -> None:
    """What is only known when a task has loaded, looked at before the first one runs."""
    for task in tasks if config.circuit_sizes or config.token_positions else ():
        n_edges = task.model.n_edges
        task.free()
        for size in config.circuit_sizes:
            if size > n_edges:
                raise ConfigError(
                    f"`circuit_sizes` asks for {size} edges, but the graph of task "
                    f"{task.key!r} has {n_edges}. Leave this size out, or give "
                    "`circuit_shares`, which fit every graph."
                )


# -------------------------------------------------------------------------- one run


def _algos_of(
    algos: Sequence[PruneAlgo], seed: int, config: ExperimentConfig
) -> list[PruneAlgo]:
    """The algorithms that run for this seed, drawing from it."""
    once = [find_prune_algo(name) for name in config.once]
    return [
        algo.with_seed(seed) for algo in algos if seed == config.seed or algo not in once
    ]


def _run_task(
    task: Task,
    algos: Sequence[PruneAlgo],
    metrics: Sequence[PruneMetric],
    config: ExperimentConfig,
) -> TaskRun:
    task.test_loader.check_complete()
    for metric in metrics:
        metric.check_prompts(task.test_loader)
    scores, seconds = _timed_scores(task, algos)
    rows = task_measurement_rows(
        task,
        scores,
        [config.ablation],
        metrics,
        config.patch_type,
        config.reverse_clean_corrupt,
        config.test_edges,
    )
    rocs, aurocs = _rocs(task, scores)
    return TaskRun(
        task=task.key,
        seed=task.seed,
        scores=scores,
        seconds=seconds,
        rows=[replace(row, seed=task.seed) for row in rows],
        rocs=rocs,
        aurocs=aurocs,
    )


def _rocs(
    task: Task, scores: AlgoPruneScores
) -> tuple[AlgoMeasurements, dict[AlgoKey, float]]:
    """Points enough for a figure, and the exact areas; none without a known circuit."""
    edges = task.true_edges
    if edges is None:
        return {}, {}
    rocs = {algo: measure_task_roc(task.model, edges, s) for algo, s in scores.items()}
    exact = {
        algo: measure_task_roc(task.model, edges, of_algo, all_edges=True)
        for algo, of_algo in scores.items()
    }
    return rocs, {algo: roc_auc(points) for algo, points in exact.items()}


def _timed_scores(
    task: Task, algos: Sequence[PruneAlgo]
) -> tuple[AlgoPruneScores, dict[AlgoKey, float]]:
    """Scores and seconds; algorithms that need a known circuit are left out without one."""
    scores: AlgoPruneScores = {}
    seconds: dict[AlgoKey, float] = {}
    task.model  # loads now, so that no algorithm's time includes it  # noqa: B018
    for algo in algos:
        algo.check_prompts(task.train_loader)
    for algo in tqdm(algos, desc=f"{task.key}, seed {task.seed}", leave=False):
        if algo.needs_true_edges and task.true_edges is None:
            continue
        start = time.perf_counter()
        scores[algo.key] = run_prune_algo(task, algo)
        seconds[algo.key] = time.perf_counter() - start
    return scores, seconds


# --------------------------------------------------------------------------- the summary


def summarize(
    runs: Sequence[TaskRun], algos: Sequence[PruneAlgo], is_reversed: bool = False
) -> pandas.DataFrame:
    """A row per task and algorithm: how small a circuit does the task, and how well.

    Each number is the mean over seeds; `<number>_plus_minus` is half the width of its 95 %
    interval (`mean_interval`; empty for one seed), n_seeds says of how many.

    edges_for_80_percent: the smallest tested circuit from which on *all* larger ones have 80 %
    of the model's logit difference (empty: for some seed there is none). area: how much of
    it circuits have, from 1 edge to all on a logarithmic axis (`Areas.kept`: higher is
    better, overshoot counts in favour). off: how far they are from the model, both ways
    (`Areas.off`, 0 is best). accuracy_area: the mean share of prompts, in %, whose correct
    answer is above the wrong ones (`accuracy_area`; empty without the metric 'Correct Answer
    Greater Than Incorrect Percent', and with fewer than two sizes above 0 edges). auroc: how
    well the scores tell the known circuit's edges from all others (1 is perfect, 0.5 chance;
    empty: no circuit is known). seconds: the time that the algorithm took to score the edges.

    is_reversed: tests that take the circuit out of the model (`reverse_clean_corrupt`).
        What counts is then what is lost of the model's logit difference, and the share of
        prompts that are not answered correctly.
    """
    import pandas

    values: dict[tuple[TaskKey, AlgoKey], list[Numbers]] = {}
    for run in runs:
        for algo, numbers in _run_numbers(run, is_reversed).items():
            values.setdefault((run.task, algo), []).append(numbers)
    names = {algo.key: algo.short_name for algo in algos}
    return pandas.DataFrame(
        {"task": task, "algorithm": names[algo], "n_seeds": len(of_seeds)}
        | _mean_numbers(of_seeds)
        for (task, algo), of_seeds in values.items()
    )


def _run_numbers(run: TaskRun, is_reversed: bool) -> dict[AlgoKey, Numbers]:
    """The numbers of each algorithm of one run."""
    curves = _curves(run, LOGIT_DIFF_PERCENT_METRIC, is_reversed)
    areas = task_areas(curves, log_x=True)
    metric = CORRECT_ANSWER_GREATER_THAN_INCORRECT_PERCENT_METRIC
    accuracies = _curves(run, metric, is_reversed)
    return {
        algo: {
            "edges_for_80_percent": (
                edges_for_share(curve, SHARE, target=100, stay=True) if curve else None
            ),
            "area": areas[algo].kept,
            "off": areas[algo].off,
            "accuracy_area": _accuracy_area(accuracies[algo]),
            "auroc": run.aurocs.get(algo),
            "seconds": run.seconds[algo],
        }
        for algo, curve in curves.items()
    }


def _curves(
    run: TaskRun, metric: PruneMetric, is_reversed: bool
) -> dict[AlgoKey, Measurements]:
    """Each algorithm's curve of a metric in percent; empty if it was not measured."""
    curves: dict[AlgoKey, Measurements] = {algo: [] for algo in run.seconds}
    for row in run.rows:
        if row.metric == metric.key:
            percent = 100 - row.value if is_reversed else row.value
            curves[row.algo].append((row.n_edges, percent))
    return curves


def _accuracy_area(curve: Measurements) -> float | None:
    has_area = sum(n_edges > 0 for n_edges, _ in curve) > 1
    return accuracy_area(curve) if has_area else None


def _mean_numbers(
    of_seeds: Sequence[Numbers],
) -> dict[str, float]:
    means = {
        name: mean_interval([numbers[name] for numbers in of_seeds])
        for name in of_seeds[0]
    }
    return {name: mean.mean for name, mean in means.items()} | {
        f"{name}_plus_minus": mean.plus_minus for name, mean in means.items()
    }


def print_summary(results: ExperimentResults, console: Console) -> None:
    """The summary as a table, and where the figures are."""
    config = results.config
    one_seed = "Numbers without ± are those of one seed: other prompts give others."
    table = Table(
        title=f"Circuits of {config.name}",
        caption=f"Means over seeds ± half of their 95 % interval. {one_seed}",
    )
    table.add_column("Task")
    table.add_column("Algorithm")
    of_what = "of logit diff lost" if config.reverse_clean_corrupt else "of logit diff"
    answered = "not answered" if config.reverse_clean_corrupt else "answered"
    columns = {
        "edges_for_80_percent": (f"Edges from which\n80 % {of_what}", 0),
        "area": ("Area\n(high is good)", 3),
        "off": ("Off the model\n(0 is best)", 3),
        "accuracy_area": (f"Prompts\n{answered} (%)", 1),
        "auroc": ("AUROC", 3),
        "seconds": ("Seconds", 1),
    }
    for column in list(columns):  # no known circuit, or no logit differences
        if results.summary[column].isna().all():
            del columns[column]
    for title, _ in columns.values():
        table.add_column(title, justify="right")
    last_task = None
    for row in results.summary.to_dict("records"):
        numbers = [
            _shown_mean(
                MeanInterval(row[column], row[f"{column}_plus_minus"]),
                digits,
                column != "seconds",
            )
            for column, (_, digits) in columns.items()
        ]
        if row["task"] != last_task:
            table.add_section()
        shown = row["task"] if row["task"] != last_task else ""
        table.add_row(shown, row["algorithm"], *numbers)
        last_task = row["task"]
    console.print(table)
    _print_folder(config.folder, console)


def _shown_mean(mean: MeanInterval, digits: int, with_interval: bool) -> str:
    if math.isnan(mean.mean):
        return "-"
    shown = f"{round(mean.mean, digits) + 0.0:.{digits}f}"  # no minus before a zero
    if with_interval and not math.isnan(mean.plus_minus):
        shown += f" ± {mean.plus_minus:.{digits}f}"
    return shown


def _print_folder(folder: Path, console: Console) -> None:
    console.print(f"Results: {folder}", soft_wrap=True)
    for path in sorted(folder.glob("*.html")):
        console.print(f"  figure: {path}", soft_wrap=True)


# ------------------------------------------------------------------------------- results


def write_results(
    results: ExperimentResults,
    metrics: Sequence[PruneMetric],
    algos: Sequence[PruneAlgo],
    folder: Path,
) -> None:
    """Write configuration, scores, measurements and figures; all of them or nothing.

    What was in the folder stays until all has been written. Raises FileError.
    """
    with folder_written_whole(folder) as new:
        (new / "config.json").write_text(results.config.json)
        _write_scores(results.runs, new / "scores")
        _as_table(results.rows).to_parquet(new / "measurements.parquet")
        results.summary.to_csv(new / "summary.csv", index=False)
        _write_figures(results, metrics, algos, new)


def _write_scores(runs: Sequence[TaskRun], folder: Path) -> None:
    folder.mkdir()
    for run in runs:
        flat = {
            f"{algo_key}/{module_name}": scores.contiguous().cpu()
            for algo_key, prune_scores in run.scores.items()
            for module_name, scores in prune_scores.items()
        }
        path = folder / f"{_slug(run.task)}-seed-{run.seed}.safetensors"
        path.write_bytes(save(flat))


def _write_figures(
    results: ExperimentResults,
    metrics: Sequence[PruneMetric],
    algos: Sequence[PruneAlgo],
    folder: Path,
) -> None:
    """A mean curve and its areas for each metric, and the ROCs of the first seed."""
    from auto_circuit.metrics.official_circuits.roc_plot import roc_plot
    from auto_circuit.metrics.prune_metrics.prune_metrics_plot import measurement_figs

    names = {algo.key: algo.short_name for algo in algos}
    nested = mean_measurements(results.rows)
    figs = measurement_figs(nested, True, metrics=metrics, algo_names=names)
    stems = [_slug(metric.key) + kind for metric in metrics for kind in ("", "-area")]
    named = dict(zip(stems, figs, strict=True))
    firsts = [run for run in results.runs if run.seed == results.config.seed and run.rocs]
    if firsts:
        areas = {
            (run.task, algo): auroc
            for run in firsts
            for algo, auroc in run.aurocs.items()
        }
        rocs = {run.task: run.rocs for run in firsts}
        named["roc"] = roc_plot(rocs, algo_names=names, areas=areas)
    for name, fig in named.items():
        fig.write_html(folder / f"{name}.html", include_plotlyjs="directory")


def mean_measurements(rows: Sequence[MeasurementRow]) -> AblationMeasurements:
    """Ablation -> metric -> task -> algorithm -> [(edges, mean over seeds of the value)]."""
    by_seed: dict[int | None, list[MeasurementRow]] = {}
    curves: dict[MeasurementRow, list[Measurements]] = {}
    for row in rows:
        by_seed.setdefault(row.seed, []).append(row)
    for of_seed in by_seed.values():
        points: dict[MeasurementRow, Measurements] = {}
        for row in of_seed:
            curve = replace(
                row, n_edges=0, value=0.0, std=None, n_prompts=None, seed=None
            )
            points.setdefault(curve, []).append((row.n_edges, row.value))
        for curve, of_curve in points.items():
            curves.setdefault(curve, []).append(of_curve)
    return nest_rows(
        replace(curve, n_edges=int(n_edges), value=float(value))
        for curve, of_curve in curves.items()
        for n_edges, value in mean_curve(of_curve)
    )


def _as_table(rows: Sequence[Any]) -> pandas.DataFrame:
    import pandas

    return pandas.DataFrame([asdict(row) for row in rows])


def _slug(text: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in text.lower())


# ---------------------------------------------------------------------------- robustness


def run_robustness(config: ExperimentConfig) -> list[RobustnessRow]:
    """Test the same circuits in other ways, and write how the verdicts change.

    Raises, before anything is computed, as `run_experiment` does, and ConfigError for other
    metrics than the logit difference's percentage, in which verdicts are stated, for sizes
    that are no shares, and for several seeds. Interrupted, it writes as `run_experiment`.
    """
    tasks, algos, metrics = check_config(config)
    if metrics != [LOGIT_DIFF_PERCENT_METRIC] or config.circuit_sizes:
        raise ConfigError(
            "Robustness states verdicts in 'Logit Diff Percent', of circuits whose size is "
            "a share of the graph: leave `metrics` and `circuit_sizes` out."
        )
    if config.n_seeds != 1:
        raise ConfigError(f"Robustness has one seed; `n_seeds` is {config.n_seeds}.")

    def find_scores(task: Task) -> AlgoPruneScores:
        return _timed_scores(task, _algos_of(algos, config.seed, config))[0]

    rows: list[RobustnessRow] = []
    try:
        for task in tqdm([replace(t, seed=config.seed) for t in tasks], desc="Tasks"):
            rows += robustness_rows(task, config, config.circuit_shares, find_scores)
            task.free()
    except KeyboardInterrupt:
        if not rows:
            raise
        folder = _interrupted_folder(config)
        _write_robustness(config, rows, algos, folder)
        raise KeyboardInterrupt(f"What was finished: {folder}") from None
    _write_robustness(config, rows, algos, config.folder)
    return rows


def _write_robustness(
    config: ExperimentConfig,
    rows: Sequence[RobustnessRow],
    algos: Sequence[PruneAlgo],
    folder: Path,
) -> None:
    from auto_circuit.robustness_plot import robustness_fig

    with folder_written_whole(folder) as new:
        (new / "config.json").write_text(config.json)
        _as_table(rows).to_parquet(new / "robustness.parquet")
        fig = robustness_fig(rows, {algo.key: algo.short_name for algo in algos})
        fig.write_html(new / "robustness.html", include_plotlyjs="directory")


def print_robustness(
    config: ExperimentConfig, rows: Sequence[RobustnessRow], console: Console
) -> None:
    """The verdicts as a table, and where the figure is."""
    shares = " / ".join(f"{100 * share:g}" for share in sorted(config.circuit_shares))
    table = Table(
        title="Verdicts: % of the task that the same circuit does in other tests",
        caption=f"Circuits of {shares} % of the edges. * The experiment's own choices.",
    )
    table.add_column("Choice")
    table.add_column("Value")
    columns = list(dict.fromkeys((row.task, row.algo) for row in rows))
    for task_key, algo_key in columns:
        algo = find_prune_algo(algo_key).short_name
        table.add_column(f"{task_key}\n{algo}", justify="right")
    last_choice = None
    for choice, value, is_base in values_by_choice(rows):
        if choice != last_choice:
            table.add_section()
        cells = [
            " / ".join(
                f"{row.verdict:.0f}"
                for row in rows
                if (row.task, row.algo, row.choice, row.value) == (*column, choice, value)
            )
            or "no: prompts differ in length"
            for column in columns
        ]
        shown = choice if choice != last_choice else ""
        table.add_row(shown, value + ("*" if is_base else ""), *cells)
        last_choice = choice
    console.print(table)
    _print_folder(config.folder, console)


# -------------------------------------------------------------------- named experiments


NUMBERS = tuple(
    algo.short_name for algo in PRUNE_ALGOS if algo.short_name.endswith("(MSE)")
)
"""The algorithms that compare numbers, for models whose output is no word."""


ROBUSTNESS = ExperimentConfig(
    name="robustness",
    tasks=(
        POCKET_IOI_TOKEN_TASK.key,
        POCKET_GREATERTHAN_TASK.key,
        POCKET_DOCSTRING_TASK.key,
    ),
    algos=("EAP",),
    metrics=(LOGIT_DIFF_PERCENT_METRIC.key,),
    token_positions=True,
    circuit_shares=(0.001, 0.003, 0.01),
    n_seeds=1,
)
"""The pocket tasks whose prompts have one length, so that positions can be told apart."""

TRACR_REVERSE = ExperimentConfig(
    name="tracr-reverse",
    tasks=(TRACR_REVERSE_TOKEN_CIRCUIT_TASK.key,),
    algos=tuple(
        algo.short_name
        for algo in PRUNE_ALGOS
        if algo not in (ACDC_PRUNE_ALGO, EDGE_ATTR_PATCH_PRUNE_ALGO)
        and algo.short_name not in NUMBERS
    ),
    metrics=("Clean KL Div", LOGIT_DIFF_PERCENT_METRIC.key),
    n_seeds=1,
)
"""Every algorithm that compares words, against a circuit that is known exactly (of the ACDCs
the quick one, which here is ACDC with half of the thresholds; EAP by one of its names)."""

TRACR_XPROPORTION = ExperimentConfig(
    name="tracr-xproportion",
    tasks=(TRACR_XPROPORTION_TOKEN_CIRCUIT_TASK.key,),
    algos=("GT", "Act Mag", "Random", *NUMBERS),
    metrics=("Clean MSE",),
    n_seeds=1,
)
"""Every algorithm that compares numbers."""

EXPERIMENTS: dict[str, ExperimentConfig] = {
    "sweep": ExperimentConfig(),
    "robustness": ROBUSTNESS,
    "tracr-reverse": TRACR_REVERSE,
    "tracr-xproportion": TRACR_XPROPORTION,
}
"""The first word of the command line -> what its options change."""


def main(args: Sequence[str] | None = None) -> None:
    """Run the experiment that the command line describes.

    Whatever is wrong is one line, and no traceback: exit code 2 for a command line that
    cannot be read, 1 for values and files that make no sense, 130 if it is interrupted.
    """
    if not sys.stderr.isatty():  # Hugging Face's progress bars; ours look for themselves
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        name, config = parse(sys.argv[1:] if args is None else args)
        if name == "robustness":
            print_robustness(config, run_robustness(config), Console())
        else:
            print_summary(run_experiment(config), Console())
    except AutoCircuitError as error:
        sys.exit(_one_line(f"{type(error).__name__}: {error}"))
    except KeyboardInterrupt as error:
        print(_one_line(f"Interrupted. {error}"), file=sys.stderr)
        sys.exit(INTERRUPTED)


def parse(args: Sequence[str]) -> tuple[str, ExperimentConfig]:
    """The experiment's name, and its configuration with the changes that `args` make.

    Exits with code 2 and one line for options and values that cannot be read, and with 0 for
    `--help`.
    """
    words = list(args)
    name = words.pop(0) if words and words[0] in EXPERIMENTS else "sweep"
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            config = tyro.cli(
                ExperimentConfig,
                args=words,
                default=EXPERIMENTS[name],
                description=__doc__,
            )
    except SystemExit as stop:
        if stop.code:
            # Without the frame that tyro draws around its words.
            text = re.sub("[│╭╮╰╯]|[─-]{4,}", " ", errors.getvalue())
            print(_one_line(text), file=sys.stderr)
        raise
    return name, config


def _one_line(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    main()

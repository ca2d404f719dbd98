"""How much the verdict on a circuit depends on how it is tested.

Miller et al. 2024, "Transformer Circuit Faithfulness Metrics Are Not Robust" (arXiv
2407.08734), name six choices that tests of circuits make without saying so. `Choices` holds
them; `robustness_rows` tests the same circuit again and again, with one of them changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from auto_circuit.checks import checked
from auto_circuit.circuits import Circuit, circuit_of_scores
from auto_circuit.errors import ConfigError, about
from auto_circuit.metrics.prune_metrics.full_model_outs import FullModelOuts
from auto_circuit.metrics.prune_metrics.prune_metrics import (
    LOGIT_DIFF_PERCENT_METRIC,
    with_mean_of_ratios,
)
from auto_circuit.metrics.prune_metrics.task_measurements import measured_values
from auto_circuit.prune import run_circuits
from auto_circuit.tasks import Task
from auto_circuit.types import (
    AblationType,
    AlgoKey,
    AlgoPruneScores,
    PatchType,
    TaskKey,
)
from auto_circuit.utils.edge_counts import listed_edge_counts

# The documentation of the fields is what `experiments.py --help` prints.


@checked
@dataclass(frozen=True)
class Choices:
    """How a circuit is tested: the six choices of Miller et al. 2024."""

    ablation: AblationType = AblationType.RESAMPLE
    """Choice 1: what is patched in when circuits are tested."""
    nodes: bool = False
    """Choice 2: a graph of nodes, whose circuits have whole components; else of edges."""
    token_positions: bool | None = None
    """Choice 3: does each token position have edges of its own? None: as the task says."""
    reverse_clean_corrupt: bool = False
    """Choice 4: swap the roles of clean and corrupt prompts. Without it, TREE_PATCH patches
    corrupt activations into clean prompts, and EDGE_PATCH clean ones into corrupt."""
    patch_type: PatchType = PatchType.TREE_PATCH
    """Choice 5: TREE_PATCH patches all edges but the circuit's, EDGE_PATCH the circuit's."""
    mean_of_ratios: bool = False
    """Choice 6: percentages of the model's logit difference are the mean over prompts of
    each one's percentage; else the circuit's mean in % of the model's mean."""

    @property
    def clean_input(self) -> bool:
        """Does the model run on the clean prompts (else on the corrupt ones)?"""
        return (self.patch_type == PatchType.TREE_PATCH) != self.reverse_clean_corrupt


@checked
def chosen_task(task: Task, choices: Choices) -> Task:
    """The task with the graph that the choices ask for: nodes or edges, positions or not."""
    told_apart = choices.token_positions
    if told_apart is None:
        told_apart = task.tells_positions_apart
    return replace(
        task,
        factorized=task.factorized and not choices.nodes,
        token_circuit=told_apart and not task.span_circuit,
        span_circuit=told_apart and task.span_circuit,
    )


@dataclass(frozen=True)
class Variation:
    """One value of one choice, all others being those of the experiment.

    is_base: is it the experiment's own value?
    """

    choice: str
    value: str
    choices: Choices
    is_base: bool


VALUE_NAMES: Mapping[str, Callable[[Choices], str]] = {
    "Ablation": lambda c: str(c.ablation).replace("Tokenwise ", ""),
    "Unit": lambda c: "nodes" if c.nodes else "edges",
    "Positions": lambda c: "told apart" if c.token_positions else "all alike",
    "Direction": lambda c: (
        "corrupt into clean" if c.clean_input else "clean into corrupt"
    ),
    "Patched": lambda c: (
        "the circuit" if c.patch_type == PatchType.EDGE_PATCH else "the complement"
    ),
    "Average": lambda c: "mean of ratios" if c.mean_of_ratios else "ratio of means",
}
"""Choice -> the name of its value."""


@checked
def variations(base: Choices) -> list[Variation]:
    """Every value of every choice, one changed at a time; the base's own are among them.

    To patch the other set of edges in the same direction, `patch_type` and
    `reverse_clean_corrupt` change together. Raises ConfigError for
    `token_positions=None`, which means another thing in each task.
    """
    if base.token_positions is None:
        raise ConfigError("`token_positions` is None; variations need True or False.")
    changes: list[tuple[str, dict[str, Any]]] = [
        *(("Ablation", {"ablation": ablation}) for ablation in AblationType),
        *(("Unit", {"nodes": nodes}) for nodes in (False, True)),
        *(("Positions", {"token_positions": told}) for told in (True, False)),
        *(("Direction", {"reverse_clean_corrupt": is_r}) for is_r in (False, True)),
        *(("Patched", _patched(base, patch_type)) for patch_type in PatchType),
        *(("Average", {"mean_of_ratios": mean}) for mean in (False, True)),
    ]
    varied = [(choice, replace(base, **change)) for choice, change in changes]
    return [
        Variation(choice, VALUE_NAMES[choice](choices), choices, choices == base)
        for choice, choices in varied
    ]


def _patched(base: Choices, patch_type: PatchType) -> dict[str, Any]:
    is_other = patch_type != base.patch_type
    return {
        "patch_type": patch_type,
        "reverse_clean_corrupt": base.reverse_clean_corrupt != is_other,
    }


@dataclass(frozen=True)
class RobustnessRow:
    """What one test says of one circuit.

    choice, value, is_base: see `Variation`. share: the circuit's edges, as a share of the
    graph in which it was found. n_edges: its edges in the graph in which it is tested.
    percent: the logit difference measured, in % of the full model's.
    verdict: how much of the task the circuit does, in %: `percent`, or with
        reverse_clean_corrupt, where a good circuit leaves nothing, 100 - `percent`.
    """

    task: TaskKey
    algo: AlgoKey
    choice: str
    value: str
    is_base: bool
    share: float
    n_edges: int
    percent: float
    verdict: float


LEFT_OUT = {
    "Positions": "no: prompts differ in length",
    "Unit": "no: autoencoders have edges",
}
"""Choice -> why a task may have no verdict for one of its values."""


@checked
def robustness_rows(
    task: Task,
    choices: Choices,
    shares: Sequence[float],
    find_scores: Callable[[Task], AlgoPruneScores],
) -> list[RobustnessRow]:
    """Test the circuits of one task with every value of every choice.

    find_scores: task -> algorithm -> scores; called once, with the graph of `choices`.
    The circuits have the `shares` of its edges with the largest |score|. In a graph of
    another kind it is the *same* circuit: all edges of its nodes; or its edges, at every
    position at which (if positions are not told apart: if at any) they are in it.

    Positions cannot be told apart in prompts of different lengths, and a graph with
    autoencoders has no nodes of whole components: of such a task, that variation is left
    out (LEFT_OUT says why). Raises ConfigError without shares, and if `choices` ask for
    positions all the same, before any score is computed.
    """
    base, alike = checked_choices(task, choices, shares)
    varied = variations(base)
    if is_padded(alike) and not task.span_circuit:
        varied = [v for v in varied if not v.choices.token_positions]
    if task.has_latents:
        varied = [v for v in varied if not v.choices.nodes]
    # One model under all graphs, seen through its autoencoders if the task asks for them:
    # what it does unpatched is the same.
    shared = {
        "_model_def": alike.model.wrapped_model,
        "autoencoder_input": None,
        "autoencoders": None,
    }
    graphs = {
        _graph_kind(variation.choices): replace(
            chosen_task(task, variation.choices), **shared
        )
        for variation in varied
    } | {(base.nodes, False): alike}
    for graph in graphs.values():
        graph.model  # Loads now, so that errors come before the work.  # noqa: B018
    base_task = graphs[_graph_kind(base)]
    model = base_task.model
    full = FullModelOuts(model, base_task.test_loader)
    rows = []
    for algo, prune_scores in find_scores(base_task).items():
        sizes = listed_edge_counts(model.n_edges, list(shares))
        circuits = [circuit_of_scores(model, prune_scores, size) for size in sizes]
        measured: dict[Choices, list[tuple[int, float]]] = {}
        for variation in varied:
            tested = variation.choices
            if tested not in measured:
                graph = graphs[_graph_kind(tested)]
                with about(f"Task {task.key!r}, algorithm {algo!r}"):
                    measured[tested] = _percents(circuits, graph, tested, full)
            rows += [
                RobustnessRow(
                    task=task.key,
                    algo=algo,
                    choice=variation.choice,
                    value=variation.value,
                    is_base=variation.is_base,
                    share=share,
                    n_edges=n_edges,
                    percent=percent,
                    verdict=100 - percent if tested.reverse_clean_corrupt else percent,
                )
                for share, (n_edges, percent) in zip(
                    sorted(shares), measured[tested], strict=True
                )
            ]
    return rows


@checked
def checked_choices(
    task: Task, choices: Choices, shares: Sequence[float]
) -> tuple[Choices, Task]:
    """The choices of the experiment for this task, and the task with positions all alike.

    Raises what `robustness_rows` raises before it computes anything.
    """
    if not shares:
        raise ConfigError(
            "Robustness is measured for circuits of some shares of the graph: give "
            "`circuit_shares`, for example 0.05."
        )
    if task.crossing:
        raise ConfigError(
            f"The graph of task {task.key!r} has edges through attention (`crossing=True`), "
            "which graphs of nodes, or with positions all alike, do not have, so its circuits "
            "cannot be tested there. Set `crossing` to False."
        )
    told_apart = choices.token_positions
    if told_apart is None:
        told_apart = task.tells_positions_apart
    base = replace(choices, token_positions=told_apart)
    alike = chosen_task(task, replace(base, token_positions=False))
    LOGIT_DIFF_PERCENT_METRIC.check_prompts(alike.test_loader)
    if base.token_positions and is_padded(alike) and not task.span_circuit:
        raise ConfigError(
            f"The prompts of task {task.key!r} have different lengths, so positions "
            "cannot be told apart. Set `token_positions` to False (--token-positions "
            "False), or choose another task, such as 'Pocket IOI Tokens'."
        )
    return base, alike


@checked
def is_padded(task: Task) -> bool:
    """Do a task's prompts differ in length?"""
    return any(
        mask is not None
        for loader in (task.train_loader, task.test_loader)
        for batch in loader
        for mask in (batch.clean_attention_mask, batch.corrupt_attention_mask)
    )


@checked
def values_by_choice(rows: Sequence[RobustnessRow]) -> list[tuple[str, str, bool]]:
    """(choice, value, is_base) of all rows, choice by choice."""
    # A choice's values need not come together: not every task has all of them.
    choices = list(dict.fromkeys(row.choice for row in rows))
    values = dict.fromkeys((row.choice, row.value, row.is_base) for row in rows)
    return sorted(values, key=lambda value: choices.index(value[0]))


def verdict_text(
    rows: Sequence[RobustnessRow], column: tuple[str, str], choice: str, value: str
) -> str:
    """The verdicts on a (task, algorithm)'s circuits; or why there are none."""
    verdicts = [
        f"{round(row.verdict, 0) + 0.0:.0f}"  # no minus before a zero
        for row in rows
        if (row.task, row.algo, row.choice, row.value) == (*column, choice, value)
    ]
    return " / ".join(verdicts) or LEFT_OUT.get(choice, "–")


def _graph_kind(choices: Choices) -> tuple[bool, bool | None]:
    return choices.nodes, choices.token_positions


def _percents(
    circuits: Sequence[Circuit],
    task: Task,
    choices: Choices,
    full: FullModelOuts,
) -> list[tuple[int, float]]:
    """(edges, % of the logit difference) of each circuit, the smallest first."""
    projected = [circuit.in_graph(task.model) for circuit in circuits]
    # Each circuit is part of the next one, so that the sum of them all ranks edges.
    ranks = {
        name: sum((circuit[name] for circuit in projected), start=scores)
        for name, scores in task.model.new_prune_scores().items()
    }
    sizes = [circuit.n_edges for circuit in projected]
    outs = run_circuits(
        task.model,
        task.test_loader,
        sizes,
        ranks,
        choices.patch_type,
        choices.ablation,
        choices.reverse_clean_corrupt,
    )
    metric = LOGIT_DIFF_PERCENT_METRIC
    if choices.mean_of_ratios:
        metric = with_mean_of_ratios(metric)
    measured = measured_values(metric, task.model, task.test_loader, outs, full)
    percents = {n_edges: percent for n_edges, percent, _, _ in measured}
    return [(size, percents[size]) for size in sizes]

"""What a sweep asked and found, in sentences."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any

from auto_circuit.errors import ConfigError
from auto_circuit.metrics.paired_comparisons import Comparison
from auto_circuit.metrics.prune_metrics.prune_metrics import LOGIT_DIFF_PERCENT_METRIC
from auto_circuit.prune_algos.prune_algos import find_prune_algo
from auto_circuit.report_page.tables import shown_number
from auto_circuit.sweep_config import ExperimentConfig
from auto_circuit.types import AblationType, PatchType, TaskKey
from auto_circuit.utils.edge_counts import COARSE_DIGITS

ABLATIONS = {
    AblationType.RESAMPLE: "those of the other prompt of the pair (resample ablation)",
    AblationType.ZERO: "zeros (zero ablation)",
    AblationType.TOKENWISE_MEAN_CLEAN: "means over all clean prompts, position by position",
    AblationType.TOKENWISE_MEAN_CORRUPT: (
        "means over all corrupt prompts, position by position"
    ),
    AblationType.TOKENWISE_MEAN_CLEAN_AND_CORRUPT: (
        "means over all clean and corrupt prompts, position by position"
    ),
    AblationType.BATCH_TOKENWISE_MEAN: "means over the batch, position by position",
    AblationType.BATCH_ALL_TOK_MEAN: "means over the batch and all of its positions",
}
"""What is patched in."""


@dataclass(frozen=True)
class Choice:
    """title: what was chosen. words: how."""

    title: str
    words: str


def choices_in_words(config: ExperimentConfig) -> list[Choice]:
    """All that was chosen for a sweep."""
    found = [
        Choice("What is patched in", f"Activations: {ABLATIONS[config.ablation]}."),
        Choice("What is patched", _patched(config)),
        Choice("What a circuit is made of", _unit(config)),
        Choice("Token positions", _positions(config)),
        Choice("Percentages", _average(config)),
        Choice("Seeds", _seeds(config)),
        Choice("Circuit sizes", _sizes(config)),
        Choice("Metrics", ", ".join(config.metrics) + "."),
    ]
    return found


def _patched(config: ExperimentConfig) -> str:
    of_circuit = config.patch_type is PatchType.EDGE_PATCH
    which = "The circuit's own edges" if of_circuit else "All edges but the circuit's"
    run = "clean" if config.clean_input else "corrupt"
    other = "corrupt" if config.clean_input else "clean"
    kind = "noising" if config.clean_input else "denoising"
    text = (
        f"{which}, while the model runs on the {run} prompts; the activations that are "
        f"patched in are of the {other} side ({kind})."
    )
    if config.reverse_clean_corrupt:
        text += " A good circuit is one without which the task is lost."
    return text


def _unit(config: ExperimentConfig) -> str:
    unit = "Whole components (nodes)" if config.nodes else "Edges between components"
    text = f"{unit}."
    if config.ungroup:
        text += " Keys and values are ungrouped: one of each for every query head."
    if config.keep_positions:
        text += " Zero and mean ablations keep position embeddings."
    if config.crossing:
        text += " Also edges through attention, from one position to another."
    return text


def _positions(config: ExperimentConfig) -> str:
    if config.spans and config.token_positions is not False:
        return "Told apart by spans of tokens: each has edges of its own."
    if config.token_positions is None:
        return "As each task says."
    if config.token_positions:
        return "Told apart: each position has edges of its own."
    return "All alike: an edge is in the circuit at every position, or at none."


def _average(config: ExperimentConfig) -> str:
    if config.mean_of_ratios:
        return (
            "The mean over prompts of each prompt's percentage of the logit difference."
        )
    return "The circuit's mean logit difference, in % of the model's mean."


def _seeds(config: ExperimentConfig) -> str:
    if config.n_seeds == 1:
        return (
            f"One ({config.seed}): one draw of prompts, so numbers have no interval; "
            "other prompts would give others."
        )
    text = (
        f"{config.n_seeds} ({config.seed} to {config.seeds[-1]}), each another draw of "
        "prompts and of all that algorithms draw at random."
    )
    once = [name for name in config.once if name in config.algos]
    if once:
        text += f" Only the first one for {listed(once)}."
    return text


def _sizes(config: ExperimentConfig) -> str:
    sizes = [f"{size:,}" for size in config.circuit_sizes]
    sizes += [f"{100 * share:g} %" for share in config.circuit_shares]
    if sizes:
        what = "edges" if config.circuit_sizes else "of all edges"
        return f"{listed(sizes)} {what}."
    return {
        "COARSE": f"{', '.join(map(str, COARSE_DIGITS))}, 10, 20, ... edges, up to all.",
        "LOGARITHMIC": "1 to 9, 10, 20, ..., 100, 200, ... edges, up to all.",
        "ALL": "Every number of edges.",
        "GROUPS": "One for each group of edges that score alike.",
    }[config.edge_counts.name]


def listed(names: Sequence[str]) -> str:
    """ "a, b and c" """
    *start, last = names
    return f"{', '.join(start)} and {last}" if start else last


# ------------------------------------------------------------------------- how to run it


ALWAYS_SAID = (
    *("name", "tasks", "algos", "metrics", "token_positions", "circuit_shares"),
    "n_seeds",
)
"""What the experiment `robustness` sets in its own way."""


def command_line(config: ExperimentConfig, experiment: str = "sweep") -> str:
    """What is typed to run an experiment: `sweep` or `robustness`."""
    plain = ExperimentConfig()
    said = ALWAYS_SAID if experiment == "robustness" else ()
    words = ["python", "experiments.py"]
    words += [experiment] if experiment != "sweep" else []
    for field in fields(config):
        value = getattr(config, field.name)
        is_changed = value != getattr(plain, field.name)
        if (is_changed and str(value) != str(plain.out)) or field.name in said:
            words += _option(field.name, value)
    return shlex.join(words)


def _option(name: str, value: Any) -> list[str]:
    option = f"--{name.replace('_', '-')}"
    if isinstance(value, bool) and name != "token_positions":
        return [option if value else option.replace("--", "--no-", 1)]
    if isinstance(value, tuple):
        return [option, *map(str, value)]
    return [option, value.name if isinstance(value, Enum) else str(value)]


# -------------------------------------------------------------------------- the verdicts


@dataclass(frozen=True)
class Verdict:
    """A task and what is to be said of it: the sentence, and what stands below it."""

    task: TaskKey
    sentence: str
    more: tuple[str, ...] = ()


@dataclass(frozen=True)
class Facts:
    """What verdicts are made of.

    summary: its rows as dictionaries. n_edges: of each task's graph. comparisons: of all
    tasks and seeds. config: how it was measured.
    """

    summary: Sequence[Mapping[str, Any]]
    n_edges: Mapping[TaskKey, int]
    comparisons: Sequence[Comparison]
    config: ExperimentConfig

    @property
    def is_reversed(self) -> bool:
        """Do tests take the circuit out of the model?"""
        return self.config.reverse_clean_corrupt


def verdict(task: TaskKey, facts: Facts) -> Verdict:
    """Which algorithm does best on a task, how well, and whether that is told apart."""
    rows = [row for row in facts.summary if row["task"] == task]
    known = [row for row in rows if _needs_true_edges(row["algorithm"])]
    ranked = sorted(
        (row for row in rows if row not in known and row["edges_for_80_percent"] > 0),
        key=rank,
    )
    n_edges = facts.n_edges.get(task)
    smaller = [row for row in ranked if row["edges_for_80_percent"] != n_edges]
    more = tuple(_of_known(row) for row in known if row["edges_for_80_percent"] > 0)
    if LOGIT_DIFF_PERCENT_METRIC.key not in facts.config.metrics:
        return Verdict(task, f"{task}: no verdict, which would be stated in "
                       f"{LOGIT_DIFF_PERCENT_METRIC.key!r}: it is not in `metrics`.")  # fmt: skip
    if not smaller:
        return Verdict(
            task,
            f"On {task} no algorithm finds a circuit smaller than the whole graph that "
            f"{_does(facts)}.",
            more,
        )
    best, others = smaller[0], [row for row in ranked if row is not smaller[0]]
    of_all = "" if n_edges is None else f" of {n_edges:,}"
    sentence = (
        f"On {task}, {best['algorithm']} does best: {_edges(best)}{of_all} edges "
        f"{'do' if not facts.is_reversed else 'carry'} 80 % of the task"
    )
    return Verdict(task, f"{sentence}; {_beside(best, others, facts)}.", more)


def rank(row: Mapping[str, Any]) -> tuple[bool, int | float, int | float]:
    """What is lowest for the best algorithm: of a row of the summary of one task."""
    needed = _or_nan(row["edges_for_80_percent"])
    return math.isnan(needed), _or_zero(needed), -_or_zero(row["area"])


def _does(facts: Facts) -> str:
    return "carries 80 % of the task" if facts.is_reversed else "does 80 % of the task"


def _needs_true_edges(name: str) -> bool:
    try:
        return find_prune_algo(name).needs_true_edges
    except ConfigError:
        return False


def _of_known(row: Mapping[str, Any]) -> str:
    return (
        f"With the true edges ranked first ({row['algorithm']}), "
        f"{_edges(row)} are needed."
    )


def _edges(row: Mapping[str, Any]) -> str:
    name = "edges_for_80_percent"
    return shown_number(row[name], 0, _or_nan(row[f"{name}_plus_minus"]))


def _beside(
    best: Mapping[str, Any], others: Sequence[Mapping[str, Any]], facts: Facts
) -> str:
    """How the best one stands to the runner-up."""
    if not others:
        return "no other algorithm's circuits get there"
    second = others[0]
    names = {best["algorithm"], second["algorithm"]}
    pair = next(
        (
            one
            for one in facts.comparisons
            if one.number == "edges_for_80_percent" and {one.first, one.second} == names
        ),
        None,
    )
    runner_up = f"the runner-up, {second['algorithm']} ({_edges(second)})"
    if pair is None or not pair.can_be_significant:
        n_draws = 0 if pair is None else pair.n_draws
        draws = "draw" if n_draws == 1 else "draws"
        return (
            f"whether that is better than {runner_up} cannot be told from the "
            f"{n_draws} {draws} of prompts that both ran on"
        )
    p_value = "p < 0.001" if pair.p_holm < 0.001 else f"p = {pair.p_holm:.2g}"
    where = f"over the {pair.n_draws} draws of prompts of all tasks, {p_value}"
    if not pair.is_significant:
        return f"it is not told apart from {runner_up}: {where}"
    better = pair.first if pair.difference < 0 else pair.second
    if better != best["algorithm"]:
        return f"but {where}, it is {better} ({_edges(second)} here) that needs fewer"
    return f"that is fewer than {runner_up} needs, by more than chance: {where}"


def _or_nan(value: Any) -> float:
    return math.nan if value is None else float(value)


def _or_zero(value: Any) -> float:
    number = _or_nan(value)
    return 0.0 if math.isnan(number) else number

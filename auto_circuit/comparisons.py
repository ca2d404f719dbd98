"""Which differences between a sweep's algorithms mean something: as data and in plain words.

The statistics are in `metrics/paired_comparisons.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from auto_circuit.errors import ConfigError
from auto_circuit.metrics.paired_comparisons import (
    ALPHA,
    MAX_EXACT,
    Comparison,
    Draw,
    compare_all,
    smallest_p_value,
)
from auto_circuit.summary import ExperimentResults, run_numbers
from auto_circuit.sweep import TaskRun
from auto_circuit.tasks import find_task
from auto_circuit.types import TaskKey

if TYPE_CHECKING:
    import pandas

MAX_SHOWN = 12
"""The most pairs that a line names."""


@dataclass(frozen=True)
class ComparedNumber:
    """A number of the summary, in words. is_high_good: is more of it better?"""

    title: str
    digits: int
    is_high_good: bool = True


COMPARED = {
    "edges_for_80_percent": ComparedNumber("Edges for 80 %", 0, is_high_good=False),
    "area": ComparedNumber("Area", 3),
    "off": ComparedNumber("Off the model", 3, is_high_good=False),
    "accuracy_area": ComparedNumber("Prompts (%)", 1),
    "auroc": ComparedNumber("AUROC", 3),
}
"""The columns of the summary by which algorithms are compared (times are the machine's)."""


# ------------------------------------------------------------------------------- as data


def comparisons(results: ExperimentResults) -> list[Comparison]:
    """Every pair of algorithms, compared by every number of the summary that is known.

    Over tasks and seeds: see `metrics.paired_comparisons`. Pairs are in the order of the
    summary, and Holm's correction is over all pairs of one number. An algorithm that ran
    for one seed only (`once`) is compared on that seed. [] for a single algorithm.
    """
    values: dict[str, dict[str, dict[Draw, int | float | None]]] = {
        number: {} for number in COMPARED
    }
    for run in results.runs:
        names = {found.algo: found.name for found in run.found}
        numbers = run_numbers(run, results.config.reverse_clean_corrupt)
        for algo, of_algo in numbers.items():
            for number, by_algo in values.items():
                by_draw = by_algo.setdefault(names[algo], {})
                by_draw[run.task, run.seed] = of_algo[number]
    prompts = prompts_of(results.runs)
    return [
        one
        for number, by_algo in values.items()
        if any(_is_known(v) for by_draw in by_algo.values() for v in by_draw.values())
        for one in compare_all(number, by_algo, prompts)
    ]


def _is_known(value: int | float | None) -> bool:
    return value is not None and math.isfinite(value)


def prompts_of(runs: Sequence[TaskRun]) -> dict[TaskKey, str]:
    """Task -> its model and prompt file; tasks that are not registered are left out."""
    prompts = {}
    for run in runs:
        try:
            task = find_task(run.task)
        except ConfigError:
            continue
        prompts[run.task] = f"{task._model_def}, {task._dataset_name}"
    return prompts


def comparison_table(found: Sequence[Comparison]) -> pandas.DataFrame:
    """A row for each comparison; its columns are the fields of `Comparison`."""
    import pandas

    names = list(Comparison.__dataclass_fields__)
    return pandas.DataFrame([asdict(one) for one in found], columns=names)


# -------------------------------------------------------------------------- in plain words


def comparison_lines(found: Sequence[Comparison]) -> list[str]:
    """What the comparisons say: which differences mean something, and what is not known.

    For each number which algorithms are better than which; which pairs may be as good or not,
    since prompts drawn anew could turn their difference around; and which have too few draws in
    common to say anything, with the number that would do. [] without comparisons.
    """
    if not found:
        return []
    lines = [
        "Which differences mean something, on these tasks and if prompts were drawn anew "
        "(paired by task and seed; ± half of the 95 % interval; p of sign flips):"
    ]
    too_few: dict[str, list[str]] = {}
    for number, group in groupby(found, lambda one: one.number):
        of_number, title = list(group), COMPARED[number].title
        lines += _clear_lines(of_number)
        lines += _open_lines(of_number)
        text = _too_few(of_number)
        if text:
            too_few.setdefault(text, []).append(title)
    return lines + [f"  {', '.join(titles)}: {text}" for text, titles in too_few.items()]


def _clear_lines(of_number: Sequence[Comparison]) -> list[str]:
    """A line for each algorithm that is better than others."""
    better: dict[str, list[Comparison]] = {}
    for one in of_number:
        if one.is_significant:
            better.setdefault(_names(one)[0], []).append(one)
    return [_clear_line(name, pairs) for name, pairs in better.items()]


def _clear_line(name: str, pairs: Sequence[Comparison]) -> str:
    known = COMPARED[pairs[0].number]
    than = "above" if known.is_high_good else "below"
    after = f" after Holm over {pairs[0].n_compared} pairs"
    shown = [
        f"{_names(one)[1]} ({_effect(one)}, {_p(one)}{after * (place == 0)}"
        f"{_where(one, than)}{_left_out(one)})"
        for place, one in enumerate(pairs)
    ]
    return f"  {known.title}: {name} is {than} {_some(shown)}"


def _open_lines(of_number: Sequence[Comparison]) -> list[str]:
    """A line for the pairs that are not told apart, though they could be."""
    pairs = [o for o in of_number if o.can_be_significant and not o.is_significant]
    if not pairs:
        return []
    shown = [
        "{} and {}".format(*_names(one)) + f" ({_effect(one)}, {_p(one)}{_left_out(one)})"
        for one in pairs
    ]
    title = COMPARED[pairs[0].number].title
    return [f"  {title}: not told apart, equal or not: {_some(shown)}"]


def _too_few(of_number: Sequence[Comparison]) -> str | None:
    """What to say of the pairs that could not be told apart, whatever they showed."""
    pairs = [one for one in of_number if not one.can_be_significant]
    if not pairs:
        return None
    names = dict.fromkeys(name for one in of_number for name in (one.first, one.second))
    others = {
        name
        for one in of_number
        if one.can_be_significant
        for name in (one.first, one.second)
    }
    never = [name for name in names if name not in others]
    which = f"{len(pairs)} of {len(of_number)} pairs"
    if never and others:
        which += f" (all of {', '.join(never)})"
    counts = sorted({one.n_draws for one in pairs})
    draws = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return (
        f"{which} have too few draws in common ({draws}) for any difference to mean "
        f"something{_enough(max(1, of_number[0].n_compared))}"
    )


def _enough(n_compared: int) -> str:
    """How many draws every pair would need."""
    for n_draws in range(1, MAX_EXACT + 1):
        if smallest_p_value(n_draws) * n_compared <= ALPHA:
            return f"; {n_draws} would do (tasks x seeds: see `n_seeds` and `once`)"
    return ""


def _names(one: Comparison) -> tuple[str, str]:
    """The better one first."""
    first_is_better = (one.difference >= 0) == COMPARED[one.number].is_high_good
    return (one.first, one.second) if first_is_better else (one.second, one.first)


def _effect(one: Comparison) -> str:
    """The difference of the better one from the other."""
    size = abs(one.difference) * (1 if COMPARED[one.number].is_high_good else -1)
    digits = COMPARED[one.number].digits
    # A difference that is not 0 is not shown as 0.
    form = f"+,.{digits}f" if round(size, digits) or not size else "+.1g"
    shown = f"{size + 0.0:{form}}"
    if math.isnan(one.plus_minus):
        return shown
    form = (
        f",.{digits}f" if round(one.plus_minus, digits) or not one.plus_minus else ".1g"
    )
    return f"{shown} ± {one.plus_minus:{form}}"


def _p(one: Comparison) -> str:
    return "p < 0.001" if one.p_holm < 0.001 else f"p = {one.p_holm:.2g}"


def _where(one: Comparison, than: str) -> str:
    """On how many tasks, if not on all of them."""
    n_above, n_below = one.n_tasks_above, one.n_tasks_below
    n_agree = n_above if one.difference > 0 else n_below
    return f"; {than} on {n_agree} of {one.n_tasks} tasks" * (n_agree < one.n_tasks)


def _left_out(one: Comparison) -> str:
    return f"; {one.n_left_out} unpaired left out" * bool(one.n_left_out)


def _some(shown: Iterable[str]) -> str:
    shown = list(shown)
    more = len(shown) - MAX_SHOWN
    named = ", ".join(shown[:MAX_SHOWN])
    return f"{named} and {more} more, in comparisons.csv" if more > 0 else named

"""Which of two algorithms is better? Paired comparisons over tasks and seeds.

A *draw* is one task with the prompts that one seed picks; two algorithms that ran on it are
a pair. Compared are the differences within draws, so that a draw whose prompts are hard for
both of them tells nothing. Tasks that read the same prompts with the same model (with and without
token positions, say) share their draws: of their differences only the mean counts.

**What a p-value is of.** The null hypothesis: on each of these tasks the two algorithms can be
exchanged, so that swapping their numbers in any one draw makes a result that was as likely. Then
each difference has its sign by chance, and all `2^n` ways to sign n differences are as likely.
The p-value (`sign_flip_p_value`) is the share of them whose mean is at least as far from 0 as
the one that was found, on either side. It is exact, for any distribution.

**What it is not of.** Signs are flipped within tasks, draw by draw: seeds are independent draws
of prompts from the task's file, and so evidence about *these* tasks. About other tasks they are
none: what two algorithms owe to the task, all of its seeds share. `n_tasks_above` and
`n_tasks_below` say whether the tasks agree. Where they do not, the differences are larger than
chance within a task makes them, which makes p-values higher, not lower. What an algorithm draws
at random by itself, it may draw alike for one seed on several tasks; draws of prompts then are
not all that p-values of it hang on.

**Few draws.** No p-value is below `smallest_p_value`, 2 / 2^n for n draws: with 5 draws none is
below 0.06; and Holm's correction (`holm`) multiplies by up to the number of pairs of algorithms.
Where that leaves no way to be significant (`Comparison.can_be_significant`), a p-value is no
evidence that there is no difference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from statistics import fmean

import numpy as np
from jaxtyping import Float

from auto_circuit.checks import check_number, checked
from auto_circuit.errors import ConfigError
from auto_circuit.metrics.mean_interval import mean_interval
from auto_circuit.precision import ROUNDING
from auto_circuit.types import TaskKey

ALPHA = 0.05
"""A difference is significant if its p-value, after Holm's correction, is not above it."""
MAX_EXACT = 30
"""The most differences of which all ways to sign them are looked at."""
N_FLIPS = 19_999
"""How many random ways are, of more differences."""

Pairs = Float[np.ndarray, "pairs"]
Sums = Float[np.ndarray, "ways"]

Draw = tuple[TaskKey, int]
"""A task and a seed."""
Values = Mapping[Draw, int | float | None]
"""One algorithm's number on each draw that it ran on; None or NaN: not known."""


@dataclass(frozen=True)
class Comparison:
    """Two algorithms, compared by one number. See the module.

    number: a column of the summary. first, second: the algorithms.
    difference: the mean over draws of first minus second, in the number's unit. plus_minus:
        half the width of its 95 % interval (`mean_interval`): too wide, if anything, where
        tasks differ. NaN: not known.
    n_draws: how many draws both have the number on. n_left_out: on how many tasks' seeds only
        one of them has it.
    n_tasks: the tasks of these draws; on n_tasks_above the first's mean is above the second's,
        on n_tasks_below below it.
    p_value: of `sign_flip_p_value`; NaN without draws. p_holm: after Holm's correction over
        all pairs of algorithms that have a p-value of this number (n_compared).
    best_p_holm: the lowest that p_holm could have been with so many draws.
    """

    number: str
    first: str
    second: str
    difference: float
    plus_minus: float
    n_draws: int
    n_left_out: int
    n_tasks: int
    n_tasks_above: int
    n_tasks_below: int
    p_value: float
    p_holm: float = math.nan
    best_p_holm: float = math.nan
    n_compared: int = 0

    @property
    def is_significant(self) -> bool:
        """Is p_holm at most 0.05?"""
        return self.p_holm <= ALPHA

    @property
    def can_be_significant(self) -> bool:
        """Are there draws enough, for this many pairs of algorithms?"""
        return self.best_p_holm <= ALPHA


@checked
def compare_all(
    number: str,
    values: Mapping[str, Values],
    prompts: Mapping[TaskKey, str] | None = None,
) -> list[Comparison]:
    """Every pair of algorithms, in their order, compared by a number; see the module.

    values: algorithm -> (task, seed) -> its number there. Draws on which one of a pair has
        none are left out of that pair.
    prompts: task -> which prompts it reads with which model; tasks with the same ones share
        their draws. None: each task has prompts of its own.

    All pairs of the list are one family for Holm's correction: if there is no difference
    at all, the chance that any of them is significant is at most 5 %.
    """
    found = [
        _compare(number, (first, second), (values[first], values[second]), prompts or {})
        for first, second in combinations(values, 2)
    ]
    corrected = holm([one.p_value for one in found])
    best = holm([smallest_p_value(one.n_draws) for one in found])
    n_compared = sum(one.n_draws > 0 for one in found)
    return [
        replace(one, p_holm=p_holm, best_p_holm=best_p_holm, n_compared=n_compared)
        for one, p_holm, best_p_holm in zip(found, corrected, best, strict=True)
    ]


def _compare(
    number: str,
    names: tuple[str, str],
    values: tuple[Values, Values],
    prompts: Mapping[TaskKey, str],
) -> Comparison:
    first, second = map(_known, values)
    by_task: dict[TaskKey, list[float]] = {}
    by_draw: dict[Draw, list[float]] = {}
    for (task, seed), value in first.items():
        if (task, seed) in second:
            difference = _difference(value, second[task, seed])
            by_task.setdefault(task, []).append(difference)
            by_draw.setdefault((prompts.get(task, task), seed), []).append(difference)
    task_means = [fmean(of_task) for of_task in by_task.values()]
    differences = [fmean(of_draw) for of_draw in by_draw.values()]
    mean = mean_interval(differences)
    return Comparison(
        *(number, *names, mean.mean, mean.plus_minus),
        n_draws=len(differences),
        n_left_out=len(first.keys() ^ second.keys()),
        n_tasks=len(by_task),
        n_tasks_above=sum(one > 0 for one in task_means),
        n_tasks_below=sum(one < 0 for one in task_means),
        p_value=sign_flip_p_value(differences) if differences else math.nan,
    )


def _known(values: Values) -> dict[Draw, float]:
    return {
        draw: float(value)
        for draw, value in values.items()
        if value is not None and math.isfinite(value)
    }


def _difference(first: float, second: float) -> float:
    """0 for numbers that differ by rounding, which has a sign, but means nothing."""
    difference = first - second
    return (
        difference if abs(difference) > ROUNDING * max(abs(first), abs(second)) else 0.0
    )


@checked
def sign_flip_p_value(differences: Sequence[int | float]) -> float:
    """The two-sided p-value of paired differences: a permutation test of their mean.

    The share of the ways to give the differences their signs in which |mean| is at least
    what it is: of all `2^n` ways for up to 30 differences, so that the p-value is exact; of more,
    (1 + that number) / (1 + 19,999) of 19,999 random ways, always the same ones, which keeps it
    valid: under the null hypothesis it is at most x with a chance of at most x.

    What it means, and of what it is no evidence: see the module. Raises ConfigError without
    differences, and for one that is no finite number.
    """
    if not differences:
        raise ConfigError("There are no differences; expected at least one.")
    array = np.array([check_number("differences", one) for one in differences], float)
    # Sums that are equal but for rounding are ties, and count.
    least = abs(array.sum()) - 1e-9 * np.abs(array).sum()
    if len(array) > MAX_EXACT:
        n_as_far = int((np.abs(_random_sums(array)) >= least).sum())
        return (1 + n_as_far) / (1 + N_FLIPS)
    # As many sums are that far below 0 as above it.
    return min(1.0, 2 * _n_sums(array, least) / 2 ** len(array))


def _n_sums(differences: Pairs, least: float) -> int:
    """How many of the sums of all ways to sign them are at least this.

    A sum is one of the first half plus one of the second, of which each has 2^(n/2).
    """
    middle = len(differences) // 2
    first, second = _sums(differences[:middle]), _sums(differences[middle:])
    n_below = np.searchsorted(np.sort(second), least - first)
    return int((len(second) - n_below).sum())


def _sums(differences: Pairs) -> Sums:
    """The sums of all ways to sign them."""
    sums = np.zeros(1)
    for one in differences:
        sums = np.concatenate([sums + one, sums - one])
    return sums


def _random_sums(differences: Pairs) -> Sums:
    flips = np.random.default_rng(0).integers(0, 2, (N_FLIPS, len(differences)), np.int8)
    return (1 - 2 * flips) @ differences


@checked
def smallest_p_value(n_pairs: int) -> float:
    """The lowest p-value that `sign_flip_p_value` can have of n differences; NaN of none."""
    if n_pairs == 0:
        return math.nan
    return 2.0 ** (1 - n_pairs) if n_pairs <= MAX_EXACT else 1 / (1 + N_FLIPS)


@checked
def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values after Holm's correction, in their order.

    The i-th lowest of m is multiplied by m - i + 1, and is at least as high as those before it,
    at most 1. With those at or below x called significant, the chance of at least one
    false call is at most x, however the tests depend on each other. NaN: no test; it
    stays, and does not count.

    Raises ConfigError for what is no probability. Source: Holm, "A Simple Sequentially Rejective
    Multiple Test Procedure" (1979).
    """
    tested = [idx for idx, p in enumerate(p_values) if not math.isnan(p)]
    for idx in tested:
        check_number("p_values", p_values[idx], 0, 1)
    corrected = [math.nan] * len(p_values)
    highest = 0.0
    for place, idx in enumerate(sorted(tested, key=lambda idx: p_values[idx])):
        highest = max(highest, min(1.0, (len(tested) - place) * p_values[idx]))
        corrected[idx] = highest
    return corrected

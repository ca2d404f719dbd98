"""Paired comparisons: against enumeration, other libraries' numbers, and simulation."""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from auto_circuit.errors import ConfigError
from auto_circuit.metrics.paired_comparisons import (
    Comparison,
    Values,
    compare_all,
    holm,
    sign_flip_p_value,
    smallest_p_value,
)

Pair = tuple[float, float]


def share_as_far(differences: list[int]) -> Fraction:
    """The exact p-value, by the distribution of the sum of signed whole numbers."""
    sums = Counter({0: 1})
    for one in differences:
        signed: Counter[int] = Counter()
        for total, count in sums.items():
            signed[total + one] += count
            signed[total - one] += count
        sums = signed
    n_as_far = sum(
        count for total, count in sums.items() if abs(total) >= abs(sum(differences))
    )
    return Fraction(n_as_far, 2 ** len(differences))


# scipy 1.17.1: permutation_test((differences,), np.mean, permutation_type="samples",
# n_resamples=np.inf).
SCIPYS = [
    ([0.31, 0.12, -0.05, 0.27, 0.18, 0.09, -0.11, 0.22], 0.0546875),
    ([1, 1, 1, -1, 2, 2, 0], 0.15625),
    ([3.0, 2.5, 4.0, 1.0, 2.0, 0.5, 3.5, 6.0, 1.5, 2.2, 0.1, 0.9], 0.00048828125),
    ([-0.4, -0.2, 0.1, -0.3, -0.25], 0.125),
]


@pytest.mark.parametrize(("differences", "p_value"), SCIPYS)
def test_p_values_are_scipys(differences: list[float], p_value: float) -> None:
    assert sign_flip_p_value(differences) == p_value


@pytest.mark.parametrize("seed", range(5))
def test_p_values_are_shares_of_all_ways_to_sign(seed: int) -> None:
    """With ties, zeros and rounding: tenths are no binary numbers."""
    rng = random.Random(seed)
    tenths = [rng.randint(-4, 6) for _ in range(rng.randint(1, 9))]
    ways = itertools.product((-1, 1), repeat=len(tenths))
    sums = [sum(s * d for s, d in zip(way, tenths, strict=True)) for way in ways]
    share = sum(abs(total) >= abs(sum(tenths)) for total in sums) / len(sums)
    assert sign_flip_p_value([d / 10 for d in tenths]) == share
    assert share_as_far(tenths) == Fraction(share)


@pytest.mark.parametrize("n_pairs", [17, 30, 31, 40])
def test_p_values_of_many_pairs(n_pairs: int) -> None:
    """Of more than 30 the flips are random: near the exact share, and always the same."""
    rng = random.Random(n_pairs)
    differences = [rng.randint(-6, 9) for _ in range(n_pairs)]
    exact = float(share_as_far(differences))
    assert 0.01 < exact < 0.9
    before = str(np.random.get_state())
    found = sign_flip_p_value(differences)
    assert found == sign_flip_p_value(differences)
    assert str(np.random.get_state()) == before
    error = 0.0 if n_pairs <= 30 else 4 * (exact * (1 - exact) / 19_999) ** 0.5
    assert found == pytest.approx(exact, abs=error)
    assert (found == exact) == (n_pairs <= 30)


@pytest.mark.parametrize("n_pairs", [1, 2, 6, 30, 31])
def test_the_smallest_p_value(n_pairs: int) -> None:
    """All on one side: one way and its mirror image; of random ways, one of 20,000."""
    expected = 2 / 2**n_pairs if n_pairs <= 30 else 1 / 20_000
    assert smallest_p_value(n_pairs) == expected
    differences = [1.0 + idx for idx in range(n_pairs)]
    assert sign_flip_p_value(differences) == expected
    assert sign_flip_p_value([-one for one in differences]) == expected
    assert sign_flip_p_value([0.0] * n_pairs) == 1


# statsmodels 0.15.0: multipletests(p_values, method="holm").
STATSMODELS = [
    ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),
    ([0.5, 0.001, 0.2, 0.02, 0.02], [0.5, 0.005, 0.4, 0.08, 0.08]),
]


@pytest.mark.parametrize(("p_values", "expected"), STATSMODELS)
def test_holms_correction_is_that_of_statsmodels(
    p_values: list[float], expected: list[float]
) -> None:
    assert holm(p_values) == pytest.approx(expected)
    # What was not tested takes no part.
    assert holm([math.nan, *p_values])[1:] == holm(p_values)
    assert math.isnan(holm([math.nan, *p_values])[0])


def test_holms_correction_by_hand() -> None:
    """0.01 * 3 = 0.03, 0.011 * 2 = 0.022, but not below 0.03, 0.9 * 1; 0.6 * 2 is above 1."""
    assert holm([0.9, 0.01, 0.011]) == pytest.approx([0.9, 0.03, 0.03])
    assert holm([0.6, 0.7]) == [1, 1]
    assert holm([]) == []


TASKS = ("a", "b", "c", "d")


def by_draw(values: dict[str, list[float | None]]) -> Values:
    """Task -> its values of seeds 0, 1, ... as (task, seed) -> value."""
    return {(task, s): v for task, of in values.items() for s, v in enumerate(of)}


def test_a_comparison_by_hand() -> None:
    eap = by_draw({"a": [0.5, 0.75, 0.5], "b": [1.0, 0.5, 0.25], "c": [2.0]})
    magnitude = by_draw({"a": [0.25, 0.25, None], "b": [0.25, 0.75, 0.0, 9.0]})
    (one,) = compare_all("area", {"EAP": eap, "Act Mag": magnitude})
    differences = [0.25, 0.5, 0.75, -0.25, 0.25]
    assert (one.number, one.first, one.second) == ("area", "EAP", "Act Mag")
    assert one.difference == pytest.approx(0.3)
    half_width = 2.776 * statistics.stdev(differences) / 5**0.5
    assert one.plus_minus == pytest.approx(half_width)
    # Left out: (a, 2), (c, 0) and (b, 3), which only one of them has.
    assert (one.n_draws, one.n_left_out) == (5, 3)
    assert (one.n_tasks, one.n_tasks_above, one.n_tasks_below) == (2, 2, 0)
    # In quarters 1, 2, 3, -1, 1: the sum is 6 at least with all +, or with one 1 as -.
    assert one.p_value == one.p_holm == 2 * 4 / 32
    assert one.best_p_holm == 2 / 32 and one.n_compared == 1
    assert not one.is_significant and not one.can_be_significant


def test_each_pair_has_its_place_and_sign() -> None:
    values = {
        name: by_draw({"a": [level] * 6, "b": [level + 1.0] * 6})
        for name, level in (("low", 1.0), ("high", 3.0), ("middle", 2.0))
    }
    found = compare_all("off", values)
    pairs = [(one.first, one.second, one.difference) for one in found]
    expected = [("low", "high", -2), ("low", "middle", -1), ("high", "middle", 1)]
    assert pairs == expected
    assert {one.p_value for one in found} == {2 / 2**12}
    assert {one.p_holm for one in found} == {3 * 2 / 2**12}
    assert [one.n_tasks_above for one in found] == [0, 0, 2]
    assert [one.n_tasks_below for one in found] == [2, 2, 0]
    assert all(one.is_significant and one.n_compared == 3 for one in found)


def test_what_can_be_significant_depends_on_draws_and_pairs() -> None:
    """12 draws are enough for 28 pairs; the 4 of an algorithm that ran once for none."""
    often = {f"often {i}": by_draw({t: [i, i, i] for t in TASKS}) for i in range(5)}
    once = {f"once {i}": by_draw({t: [i] for t in TASKS}) for i in range(3)}
    found = compare_all("area", {**often, **once})
    assert len(found) == 28 and {one.n_compared for one in found} == {28}
    for one in found:
        both_often = one.first.startswith("often") and one.second.startswith("often")
        assert one.n_draws == (12 if both_often else 4)
        assert one.can_be_significant == one.is_significant == both_often
        one_often = one.first.startswith("often") and not both_often
        assert one.n_left_out == (8 if one_often else 0)


def test_algorithms_without_a_draw_in_common_are_no_test() -> None:
    values = {
        "first": by_draw({"a": [float(i) for i in range(8)]}),
        "second": by_draw({"a": [i + 1.0 for i in range(8)]}),
        "elsewhere": by_draw({"b": [1.0]}),
        "unknown": by_draw({"a": [math.nan, None, math.inf]}),
    }
    found = compare_all("auroc", values)
    tested = [one for one in found if one.n_draws]
    assert [(one.first, one.second) for one in tested] == [("first", "second")]
    assert tested[0].p_holm == tested[0].p_value == 2 / 2**8
    for one in found[1:]:
        assert math.isnan(one.p_value) and math.isnan(one.p_holm)
        assert math.isnan(one.difference) and not one.can_be_significant
        assert one.n_compared == 1
    assert [one.n_left_out for one in found] == [0, 9, 8, 9, 8, 1]
    assert compare_all("auroc", {"alone": by_draw({"a": [1.0]})}) == []
    assert compare_all("auroc", {}) == []


def test_tasks_that_share_prompts_share_their_draws() -> None:
    """Two graphs of one model on the same prompts are no independent evidence."""
    values = {
        "first": by_draw({"a": [1.0, 2.0], "a by token": [3.0, 4.0], "b": [5.0, 5.0]}),
        "second": by_draw({"a": [0.0, 0.0], "a by token": [0.0, 8.0], "b": [0.0, 0.0]}),
    }
    (alone,) = compare_all("area", values)
    assert alone.n_draws == 6 and alone.difference == pytest.approx(2)
    (shared,) = compare_all("area", values, {"a": "of a", "a by token": "of a"})
    # (1 + 3) / 2, (2 - 4) / 2, 5 and 5: of 16 ways, two by two, those without a 5 to be less.
    differences = [2.0, -1.0, 5.0, 5.0]
    assert shared.n_draws == 4 and shared.n_tasks == 3
    assert shared.difference == statistics.mean(differences)
    half_width = 3.182 * statistics.stdev(differences) / 2
    assert shared.plus_minus == pytest.approx(half_width)
    assert shared.p_value == sign_flip_p_value(differences) == 2 * 2 / 16
    assert (shared.n_tasks_above, shared.n_tasks_below) == (2, 1)


def test_rounding_is_no_difference() -> None:
    """The same formula, added up in another order, always on the same side."""
    first = by_draw({t: [0.7, 0.8, 0.9] for t in TASKS})
    second = {draw: 1.000002 * (value or 0.0) for draw, value in first.items()}
    (one,) = compare_all("area", {"EAP": first, "other": second})
    assert one.difference == 0 and one.p_value == 1
    assert (one.n_tasks_above, one.n_tasks_below) == (0, 0)


def draws_of(rng: random.Random, task_effects: list[float]) -> list[Values]:
    """Three algorithms' skewed numbers on 3 seeds of each task.

    They share what is hard about a draw, so that they are far from independent. On a task with
    an effect the last one differs from the others by it.
    """
    values: list[dict[tuple[str, int], float]] = [{}, {}, {}]
    for idx, effect in enumerate(task_effects):
        for seed in range(3):
            shared = 5 * rng.random()
            for algo, of_algo in enumerate(values):
                own = rng.expovariate(1.0) + effect * (algo == 2)
                of_algo[str(idx), seed] = shared + own
    return list(values)


def simulate(task_effects: list[float], n_rounds: int) -> list[list[Comparison]]:
    rng = random.Random(0)
    return [
        compare_all("area", dict(zip("ABC", draws_of(rng, task_effects), strict=True)))
        for _ in range(n_rounds)
    ]


def test_without_a_difference_few_are_claimed() -> None:
    """At most 5 % of the tables claim anything; each test alone is as exact as it can be."""
    n_rounds = 120
    rounds = simulate([0.0] * 4, n_rounds)
    claims = sum(any(one.is_significant for one in found) for found in rounds)
    assert claims / n_rounds < 0.05 + 2 * (0.05 * 0.95 / n_rounds) ** 0.5
    below = sum(one.p_value <= 0.05 for found in rounds for one in found)
    assert 0.02 < below / (3 * n_rounds) < 0.08


def test_tasks_that_disagree_make_no_claim() -> None:
    """C is better on two tasks and as much worse on the others: no mean difference."""
    n_rounds = 60
    rounds = simulate([2.0, -2.0, 2.0, -2.0], n_rounds)
    claims = sum(any(one.is_significant for one in found) for found in rounds)
    assert claims / n_rounds < 0.05
    split = sum(found[1].n_tasks_above == 2 for found in rounds)
    assert split > 0.8 * n_rounds


def test_a_difference_is_found() -> None:
    """As large as twice the noise: nearly always, and of no others."""
    rounds = simulate([2.5] * 4, 40)
    assert (
        sum(found[1].is_significant and found[2].is_significant for found in rounds) > 36
    )
    assert sum(found[0].is_significant for found in rounds) <= 5


def test_errors() -> None:
    with pytest.raises(ConfigError, match="no differences"):
        sign_flip_p_value([])
    with pytest.raises(
        ConfigError, match="`differences` is nan; expected a finite number"
    ):
        sign_flip_p_value([1.0, math.nan])
    with pytest.raises(ConfigError, match="`p_values` is 1.5; expected .* at most 1"):
        holm([0.1, 1.5])

"""Each test of Shi et al.: by hand, and on circuits whose answer is known."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch as t

from auto_circuit.circuits import Circuit, all_edges, circuit_of_edges
from auto_circuit.errors import ConfigError, DataError, GraphError
from auto_circuit.metrics.hypothesis_tests import (
    HypothesisTest,
    binomial_tail,
    edge_minimality,
    equivalence_of_scores,
    equivalence_test,
    independence_of_scores,
    independence_test,
    minimality_test,
    partial_necessity_test,
    sufficiency_test,
)
from auto_circuit.utils.patchable_model import PatchableModel
from tests.micro import micro_loader, micro_model
from tests.models import state_snapshot


def all_but(model: PatchableModel, *names: str) -> Circuit:
    return circuit_of_edges(model, names).complement()


def seeded(seed: int) -> t.Generator:
    return t.Generator().manual_seed(seed)


def randn(n: int, seed: int) -> t.Tensor:
    return t.randn(n, generator=seeded(seed), dtype=t.float64)


# ------------------------------------------------------------------------ the binomial


@pytest.mark.parametrize("p", [Fraction(1, 2), Fraction(9, 10), Fraction(1, 50)])
@pytest.mark.parametrize("n", [1, 7, 100])
def test_binomial_tail(n: int, p: Fraction) -> None:
    for count in {0, 1, n // 2, n - 1, n}:
        exact = sum(
            math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(count, n + 1)
        )
        assert binomial_tail(count, n, float(p)) == pytest.approx(float(exact), rel=1e-9)


def test_binomial_tail_at_the_ends() -> None:
    assert binomial_tail(1, 5, 0.0) == 0.0 and binomial_tail(5, 5, 1.0) == 1.0
    assert binomial_tail(6, 5, 0.5) == 0.0 and binomial_tail(-1, 5, 0.5) == 1.0
    with pytest.raises(ConfigError, match="at least 0 and at most 1"):
        binomial_tail(1, 5, 1.5)


def test_what_a_rejection_says() -> None:
    bad = HypothesisTest("", 0.5, 10, 0.04, 0.05, rejection_is_good=False)
    assert bad.rejected and not bad.speaks_for_circuit
    good = HypothesisTest("", 0.5, 10, 0.04, 0.05, rejection_is_good=True)
    assert good.rejected and good.speaks_for_circuit
    at_alpha = HypothesisTest("", 0.5, 10, 0.05, 0.05, rejection_is_good=True)
    assert not at_alpha.rejected and not at_alpha.speaks_for_circuit


# --------------------------------------------------------------------- equivalence


def test_equivalence_counts_prompts_and_not_differences() -> None:
    model_scores = randn(40, 0)
    # The mean difference is 1/2 (what the published code compares with 1/2), but the
    # circuit is above the model on every prompt.
    above = equivalence_of_scores(model_scores + 0.5, model_scores)
    assert above.statistic == 0.5 and above.rejected and not above.speaks_for_circuit
    # Far from the model on average, but above it on half of the prompts.
    shift = t.tensor([9.0, -1.0] * 20)
    half = equivalence_of_scores(model_scores + shift, model_scores)
    assert half.statistic == 0.0 and half.p_value == 1.0 and half.speaks_for_circuit


def test_equivalence_p_value_by_hand() -> None:
    zeros = t.zeros(10)
    result = equivalence_of_scores(t.ones(10), zeros, epsilon=0.1)
    assert result.p_value == pytest.approx(0.6**10 + 0.4**10)
    below = equivalence_of_scores(-t.ones(10), zeros, epsilon=0.1)
    assert below.p_value == result.p_value and below.n == 10
    scores = t.tensor([1.0] * 2 + [-1.0])
    assert equivalence_of_scores(scores, zeros[:3], epsilon=0.0).p_value == 1.0


def test_ties_count_one_half() -> None:
    scores = randn(20, 1)
    same = equivalence_of_scores(scores, scores)
    assert (same.statistic, same.p_value) == (0.0, 1.0)
    one_above = equivalence_of_scores(scores + t.eye(20)[0], scores)
    assert one_above.statistic == pytest.approx(0.5 / 20)


def test_equivalence_of_micro_circuits() -> None:
    model, loader = micro_model(), micro_loader([1.0 + i for i in range(20)])
    # Removing it lowers the logit difference on every prompt.
    below = equivalence_test(model, loader, all_but(model, "Resid Start->B0.0"))
    assert below.rejected and below.statistic == 0.5
    whole = equivalence_test(model, loader, all_but(model))
    assert not whole.rejected and whole.statistic == 0.0


# -------------------------------------------------------------------- independence


def test_hsic_by_hand() -> None:
    values = t.tensor([0.0, 1.0])
    result = independence_of_scores(values, values, n_permutations=10)
    assert result.statistic == pytest.approx((1 - math.exp(-0.5)) ** 2 / 4)
    assert result.p_value == 1.0  # Both orders of two prompts give the same.


def test_hsic_is_the_trace_of_centred_kernels() -> None:
    values, others = t.tensor([0.0, 1.0, 5.0]), t.tensor([2.0, 0.0, 6.0])
    kernels = [
        t.exp(-((v[:, None] - v[None, :]) ** 2) / (2 * 4.0**2)) for v in (values, others)
    ]  # 4 is the median of the distances 1, 4, 5 and of 2, 4, 6.
    centring = t.eye(3) - 1 / 3
    expected = (kernels[0] @ centring @ kernels[1] @ centring).trace() / 9
    result = independence_of_scores(values, others, n_permutations=5)
    assert result.statistic == pytest.approx(float(expected), rel=1e-5)


def test_independence_sees_what_a_correlation_does_not() -> None:
    scores = randn(60, 2)
    dependent = independence_of_scores(scores**2, scores, n_permutations=200)
    assert dependent.p_value == pytest.approx(1 / 201)
    assert dependent.rejected and not dependent.speaks_for_circuit
    independent = independence_of_scores(randn(60, 3), scores, n_permutations=200)
    assert independent.p_value > 0.05 and independent.speaks_for_circuit
    constant = independence_of_scores(t.ones(60), scores, n_permutations=20)
    assert (constant.statistic, constant.p_value) == (0.0, 1.0)


def test_independence_p_values_are_uniform() -> None:
    p_values = [
        independence_of_scores(randn(12, 2 * i), randn(12, 2 * i + 1), 99).p_value
        for i in range(60)
    ]
    assert 0.35 < sum(p_values) / 60 < 0.65
    assert sum(p < 0.1 for p in p_values) <= 14


def test_independence_of_micro_complements() -> None:
    model, loader = micro_model(), micro_loader([1.0 + i for i in range(20)])
    # The corrupt prompts are the clean ones negated, so they tell all of the score.
    result = independence_test(model, loader, all_but(model), n_permutations=100)
    assert result.rejected and result.p_value == pytest.approx(1 / 101)


# -------------------------------------------------------- against random circuits


def test_sufficiency() -> None:
    model, loader = micro_model(), micro_loader()
    # It changes no logit difference, so only the same circuit is as near to the model.
    best = all_but(model, "Resid Start->Resid End")
    result = sufficiency_test(model, loader, best, share=0.5, n_random=40)
    generator = seeded(0)
    alternatives = [all_edges(model).sample(12, generator) for _ in range(40)]
    n_same = sum(not bool(circuit["output"][0]) for circuit in alternatives)
    assert 0 < n_same < 10
    assert result.statistic == (40 - n_same) / 40
    assert result.rejected and result.speaks_for_circuit
    # The largest effect of all (shared by one other edge).
    worst = all_but(model, "B1.1->Resid End")
    result = sufficiency_test(model, loader, worst, share=0.5, n_random=40)
    assert result.statistic == 0.0 and result.p_value == 1.0 and not result.rejected


def test_partial_necessity() -> None:
    model, loader = micro_model(), micro_loader()
    needed = model.circuit_prune_scores(["B1.1->Resid End"], bool=True)
    before = state_snapshot(model)
    result = partial_necessity_test(model, loader, needed, share=0.5, n_random=40)
    assert state_snapshot(model) == before
    assert result.statistic > 0.7 and result.rejected and result.speaks_for_circuit
    useless = model.circuit_prune_scores(["Resid Start->Resid End"], bool=True)
    result = partial_necessity_test(model, loader, useless, share=0.5, n_random=40)
    assert result.statistic == 0.0 and not result.speaks_for_circuit


def test_same_seed_same_result() -> None:
    model, loader = micro_model(), micro_loader()
    circuit = all_edges(model).sample(5, seeded(0))
    state = t.get_rng_state()
    results = [
        sufficiency_test(model, loader, circuit, n_random=30, seed=seed)
        for seed in (0, 0, 1, 2, 3)
    ]
    assert results[0] == results[1] and len(set(results)) > 1
    assert t.equal(t.get_rng_state(), state)


def test_comparison_errors() -> None:
    model, loader = micro_model(), micro_loader()
    with pytest.raises(ConfigError, match="13 of 13 edges"):
        sufficiency_test(model, loader, all_but(model))
    circuit = all_edges(model).sample(5, seeded(0))
    with pytest.raises(ConfigError, match="`share` is 1.0"):
        partial_necessity_test(model, loader, circuit, share=1.0)
    with pytest.raises(ConfigError, match="`n_random` is 0"):
        sufficiency_test(model, loader, circuit, n_random=0)
    with pytest.raises(GraphError, match="lacks the destination"):
        equivalence_test(model, loader, {})
    with pytest.raises(DataError, match="same prompts"):
        equivalence_of_scores(t.zeros(0), t.zeros(0))
    with pytest.raises(ConfigError, match="`epsilon`"):
        equivalence_of_scores(t.zeros(2), t.ones(2), epsilon=0.5)


# ---------------------------------------------------------------------- minimality


def test_edge_minimality_by_hand() -> None:
    random_effects = t.tensor([0.0, 1.0, 2.0, 3.0])
    result = edge_minimality(2.0, random_effects, share=0.5, alpha=0.05)
    assert result.statistic == 0.5
    assert result.p_value == pytest.approx((1 + 4 + 6) / 16)
    assert edge_minimality(0.0, random_effects, 0.5, 0.05).p_value == 0.5**4
    assert edge_minimality(9.0, random_effects, 0.5, 0.05).p_value == 1.0


def test_minimality_finds_the_superfluous_edge() -> None:
    model, loader = micro_model(), micro_loader()
    names = [
        "Resid Start->B0.1",
        "B0.1->Resid End",
        "B0.1->B1.1",
        "B1.1->Resid End",
        "Resid Start->Resid End",
    ]
    circuit = model.circuit_prune_scores(names, bool=True)
    result = minimality_test(model, loader, circuit, share=0.3, n_random=40)
    assert [edge.name for edge in result.superfluous] == ["Resid Start->Resid End"]
    assert result.rejected and not result.speaks_for_circuit and len(result.edges) == 5
    assert all(edge.test.alpha == 0.05 / 5 for edge in result.edges)
    effects = {edge.edge.name: edge.effect for edge in result.edges}
    assert effects["Resid Start->Resid End"] == pytest.approx(0.0, abs=1e-9)
    # B0.1 writes 2 * [3, 4] more than when it is corrupt.
    assert effects["B0.1->Resid End"] == pytest.approx(2.0)


def test_minimality_errors() -> None:
    model, loader = micro_model(), micro_loader()
    with pytest.raises(ConfigError, match="13 of 13 edges"):
        minimality_test(model, loader, all_but(model))
    circuit = all_edges(model).sample(5, seeded(0))
    with pytest.raises(ConfigError, match="`n_added` is 9; .* at most 8"):
        minimality_test(model, loader, circuit, n_added=9)

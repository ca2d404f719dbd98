"""Numbers, shapes and types of what functions of auto-circuit return."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch as t

from auto_circuit.errors import ConfigError
from auto_circuit.metrics.area_under_curve import mean_height, measurements_auc
from auto_circuit.metrics.area_under_curve_plot import average_auc_plot
from auto_circuit.metrics.completeness_metrics.same_under_knockouts import (
    same_under_knockout,
)
from auto_circuit.metrics.completeness_metrics.train_same_under_knockouts import (
    train_same_under_knockouts,
)
from auto_circuit.metrics.official_circuits.measure_roc import measure_task_roc
from auto_circuit.metrics.prune_metrics.answer_diff_percent import answer_diff_percent
from auto_circuit.prune import run_circuits
from auto_circuit.prune_algos.random_edges import (
    RANDOM_PRUNE_ALGO,
    random_prune_scores,
)
from auto_circuit.types import EdgeCounts, Measurements, PatchType
from auto_circuit.utils.graph_utils import edge_counts_util
from auto_circuit.utils.tensor_ops import flat_prune_scores
from tests.metrics.completeness_metrics.test_same_under_knockouts import SmallTask, kl
from tests.micro import micro_loader, micro_model

# --------------------------------------------------------------------- circuit sizes


def test_scores_that_make_one_circuit_have_its_size() -> None:
    model = micro_model()
    five = model.circuit_prune_scores(edges=list(model.edges)[:5])
    for rule in (None, EdgeCounts.GROUPS):
        assert edge_counts_util(model.edges, rule, five) == [5]
        assert edge_counts_util(model.edges, rule, five, zero_edges=True) == [0, 5]
        assert edge_counts_util(model.edges, rule, five, all_edges=True) == [5, 13]
        assert edge_counts_util(model.edges, rule, five, True, True) == [0, 5, 13]
        assert edge_counts_util(model.edges, rule, five, False, False) == [5]
        assert edge_counts_util(model.edges, rule, five, true_edge_count=4) == [4, 5]
    outs = run_circuits(
        model, micro_loader(), edge_counts_util(model.edges, None, five), five
    )
    assert list(outs) == [5]


def test_scores_that_are_all_equal_make_no_circuit() -> None:
    model = micro_model()
    for value in (0.0, 2.0, math.inf):
        scores = model.new_prune_scores(value)
        assert edge_counts_util(model.edges, None, scores) == []
        assert edge_counts_util(model.edges, None, scores, True, True) == [0, 13]
        assert edge_counts_util(model.edges, None, scores, true_edge_count=3) == [3]


def test_two_circuits_have_both_ends() -> None:
    model = micro_model()
    a, b, c, *_ = model.edges
    scores = model.circuit_prune_scores(edge_dict={a: 2.0, b: -1.0, c: 1.0})
    assert edge_counts_util(model.edges, None, scores) == [0, 1, 3, 13]
    assert edge_counts_util(model.edges, None, scores, False) == [1, 3, 13]
    assert edge_counts_util(model.edges, None, scores, None, False) == [0, 1, 3]


def test_a_roc_of_equal_scores_is_chance() -> None:
    model = micro_model()
    edges = list(model.edges)[:3]
    assert measure_task_roc(model, edges, model.new_prune_scores()) == [(0, 0), (1, 1)]
    circuit = model.circuit_prune_scores(edges=edges)
    assert measure_task_roc(model, edges, circuit) == [(0, 0), (0, 1), (1, 1)]


# ------------------------------------------------------------------------------ areas


RISING: Measurements = [(10, 5.0), (0, 1.0), (2, 3.0)]
KL: Measurements = [(0, 1.0), (1, 1.0), (10, 0.1), (100, 0.01), (1000, 0.01)]


def test_an_area_is_not_divided() -> None:
    # Trapezoids above 1: (0 + 2) / 2 * 2 + (2 + 4) / 2 * 8.
    assert measurements_auc(RISING, False, False, None) == pytest.approx(26.0)
    assert mean_height(RISING) == pytest.approx(2.6)
    # In decades: from 2 edges to 10, no height at 0.
    area = measurements_auc(RISING, log_x=True, log_y=False, y_min=None)
    assert area == pytest.approx((2 + 4) / 2 * math.log10(5))


def test_logarithmic_heights_are_measured_from_a_logarithm() -> None:
    """There: from 1.0 itself, 2 decades of `y_min` - 1, and then up to `eps`."""
    area = measurements_auc(KL, True, True, 1e-2)
    # 0, 1, 2 and 2 decades below the value at 0 edges.
    assert area == pytest.approx(-(0.5 + 1.5 + 2.0))
    assert measurements_auc(KL, True, True, 1e-2, eps=1e-3) == 1e-3
    assert measurements_auc(RISING, eps=1e-3) == pytest.approx(26.0)


def test_inverse_bars_are_said_to_be_nothing() -> None:
    with pytest.warns(UserWarning, match="`inverse` does nothing"):
        average_auc_plot({"Task": {"EAP": KL}}, True, True, 1e-2, True)


# ----------------------------------------------------------------------- random scores


def test_random_scores_are_drawn_anew() -> None:
    def draw(*seed: Any) -> list[float]:
        scores = random_prune_scores(micro_model(), micro_loader(), None, *seed)
        return flat_prune_scores(scores).tolist()

    state = t.get_rng_state()
    try:
        t.manual_seed(3)
        first, second = draw(), draw()
        t.manual_seed(3)
        assert draw() == first != second
        assert all(0 <= score < 1 for score in first)
        state_before = t.get_rng_state()
        assert draw(5) == draw(5) != draw(6)
        generator = t.Generator().manual_seed(5)
        assert draw(generator) == draw(5) != draw(generator)
        assert t.equal(t.get_rng_state(), state_before)
    finally:
        t.set_rng_state(state)
    with pytest.raises(ConfigError, match="`seed` is -1"):
        draw(-1)


def test_the_algorithm_has_a_seed() -> None:
    """A sweep's numbers depend on its seed alone."""

    def draw(algo: Any) -> list[float]:
        return flat_prune_scores(algo.func(micro_model(), micro_loader(), None)).tolist()

    assert draw(RANDOM_PRUNE_ALGO) == draw(RANDOM_PRUNE_ALGO)
    seven = draw(RANDOM_PRUNE_ALGO.with_seed(7))
    assert seven != draw(RANDOM_PRUNE_ALGO)
    by_hand = random_prune_scores(micro_model(), None, None, seed=7)
    assert seven == flat_prune_scores(by_hand).tolist()


# ------------------------------------------------------------------------------ types


@pytest.mark.parametrize("diff_of_means", [True, False])
def test_percents_are_a_tensor_for_each_circuit(diff_of_means: bool) -> None:
    model, loader = micro_model(), micro_loader([0.1, 0.2, 0.3], 2)
    scores = model.circuit_prune_scores(edges=list(model.edges)[:5])
    outs = run_circuits(model, loader, [0, 5, 13], scores, PatchType.TREE_PATCH)
    means, stds, points = answer_diff_percent(
        model, loader, outs, "logits", diff_of_means
    )
    assert [n_edges for n_edges, _ in points] == [n for n, _ in means] == [0, 5, 13]
    for (n_edges, percents), (_, mean), (_, std) in zip(points, means, stds, strict=True):
        assert type(n_edges) is int and type(mean) is float and type(std) is float
        assert isinstance(percents, t.Tensor) and percents.dtype == t.float32
        assert percents.shape == ((0,) if diff_of_means else (3,))
        if not diff_of_means:
            assert float(percents.mean()) == pytest.approx(mean, rel=1e-5)
            assert float(percents.std()) == pytest.approx(std, rel=1e-3, abs=1e-4)


# -------------------------------------------------------------------------- knockouts


def test_no_knockouts_leave_the_divergence_as_it_is() -> None:
    task = SmallTask()
    names = ["Resid Start->B1.1", "B1.1->Resid End"]
    circuit_ps = task.model.circuit_prune_scores(names)
    for knockout_ps, threshold in (
        (task.model.new_prune_scores(), 0.0),
        (circuit_ps, 1.0),
        (task.model.circuit_prune_scores(["B0.0->B1.1"]), 0.5),
    ):
        (score,) = same_under_knockout(task, circuit_ps, knockout_ps, 2, threshold)
        size, n_knockouts, normal, knockout = score
        assert (size, n_knockouts) == (2, 0)
        # B1.1 writes what it makes of -[5, 7] + [2, 2]; all else is corrupt.
        assert normal == pytest.approx(kl([25, 49], [-25 + 6, -49 + 8]), rel=1e-5)
        assert knockout == pytest.approx(normal, rel=1e-6)


def test_no_algorithm_is_no_training() -> None:
    """There, all were trained, whatever the names were."""
    task = SmallTask()
    scores = {"Small": {"A": task.model.new_prune_scores(1.0)}}
    with pytest.raises(ConfigError, match="`algo_keys` is empty"):
        train_same_under_knockouts(scores, [], 0.1, 1, 0.1, tasks=[task])


def test_circuit_sizes_are_those_of_1_0_1() -> None:
    """Made by `circuit_sizes.py`."""
    path = Path(__file__).parent / "circuit_sizes.json"
    rows = json.loads(path.read_text())
    assert len(rows) == 18 * 11
    for groups, sizes, flags, expected in rows:
        prune_scores = None
        if groups is not None:
            values = [
                len(groups) - i for i, size in enumerate(groups) for _ in range(size)
            ]
            prune_scores = {"a": t.tensor(values).float()}
        assert edge_counts_util(range(13), sizes, prune_scores, *flags) == expected

"""Knockouts: by hand, by their laws, and that trained ones do what they are for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch as t

from auto_circuit.data import PromptDataLoader, PromptDataset
from auto_circuit.errors import ConfigError, GraphError, TrainingError
from auto_circuit.metrics.completeness_metrics.same_under_knockouts import (
    measure_same_under_knockouts,
    same_under_knockout,
    same_under_knockouts_fig,
)
from auto_circuit.metrics.completeness_metrics.train_same_under_knockouts import (
    train_same_under_knockout_prune_scores,
    train_same_under_knockouts,
)
from auto_circuit.metrics.prune_metrics.prune_metrics import CLEAN_KL_DIV_METRIC
from auto_circuit.prune import run_circuits
from auto_circuit.prune_algos.mask_gradient import LOGIT_DIFF_GRAD_PRUNE_ALGO
from auto_circuit.ranking import circuit_mask
from auto_circuit.types import PatchType, PruneScores
from auto_circuit.utils.graph_utils import patchable_model
from auto_circuit.utils.patchable_model import PatchableModel
from tests.micro import micro_loader, micro_model
from tests.models import gpt2, state_snapshot, tokens

PATH = ("Resid Start->B1.1", "B1.1->Resid End")
CIRCUIT_SIZE = 40


@dataclass(frozen=True)
class SmallTask:
    """What the metrics need of a task."""

    key: str = "Small"
    model: PatchableModel = field(default_factory=micro_model)
    train_loader: PromptDataLoader = field(default_factory=micro_loader)
    test_loader: PromptDataLoader = field(default_factory=micro_loader)
    true_edge_count: int | None = 2
    true_edges: None = None
    name: str = "Small"


def transformer_task() -> SmallTask:
    n = 5
    dataset = PromptDataset(
        tokens(n, 5, seed=1),
        tokens(n, 5, seed=2),
        [t.tensor([1])] * n,
        [t.tensor([2])] * n,
    )
    loader = PromptDataLoader(dataset, None, 0, batch_size=3)
    model = patchable_model(gpt2(), True, "last_seq", separate_qkv=True)
    return SmallTask("Transformer", model, loader, loader, None)


def kl(target: list[float], out: list[float]) -> float:
    p, q = (t.tensor(x, dtype=t.float64).log_softmax(0) for x in (target, out))
    return float((p.exp() * (p - q)).sum())


def scores(task: SmallTask, **edge_scores: float) -> PruneScores:
    return task.model.circuit_prune_scores(edge_dict=edge_scores)


# ------------------------------------------------------------------------ by hand


def test_micro_knockout() -> None:
    task = SmallTask()
    circuit_ps = scores(task, **{PATH[0]: 2.0, PATH[1]: -3.0})
    knockout_ps = scores(task, **{PATH[1]: 0.5, "B0.0->Resid End": 9.0, PATH[0]: -5.0})
    before = state_snapshot(task.model)
    (score,) = same_under_knockout(task, circuit_ps, knockout_ps, 2)
    assert state_snapshot(task.model) == before
    # The full model: [25, 49]; B1.1 writes [15, 28] of it, and minus that when corrupt.
    # The circuit changes what B1.1 reads, from [-5, -7] by 2, and so writes.
    assert (score.n_edges, score.n_knockouts) == (2, 1)
    assert score.kl_div == pytest.approx(kl([25, 49], [-25 + 6, -49 + 8]), rel=1e-5)
    expected = kl([25 - 30, 49 - 56], [-25, -49])
    assert score.knockout_kl_div == pytest.approx(expected, rel=1e-5)
    assert tuple(score) == (2, 1, score.kl_div, score.knockout_kl_div)


def test_threshold_is_not_reached_by_equal_scores() -> None:
    task = SmallTask()
    circuit_ps = scores(task, **{PATH[0]: 2.0, PATH[1]: 3.0})
    knockout_ps = scores(task, **{PATH[0]: 0.5, PATH[1]: 1.0})
    for threshold, n_knockouts in ((0.5, 1), (0.9, 1)):
        (score,) = same_under_knockout(task, circuit_ps, knockout_ps, 2, threshold)
        assert score.n_knockouts == n_knockouts
    for threshold in (0.0, 0.4):
        with pytest.raises(ConfigError, match="All 2 edges .*without them it is empty"):
            same_under_knockout(task, circuit_ps, knockout_ps, 2, threshold)
    (score,) = same_under_knockout(task, circuit_ps, knockout_ps, 2, 1.0)
    assert score.n_knockouts == 0


def test_no_circuit_and_no_numbers_are_errors() -> None:
    task = SmallTask()
    circuit_ps = scores(task, **{PATH[0]: 2.0, PATH[1]: 3.0})
    with pytest.raises(ConfigError, match="circuit's 0 edges"):
        same_under_knockout(task, circuit_ps, task.model.new_prune_scores(1.0), 0)
    with pytest.raises(GraphError, match="NaN"):
        same_under_knockout(task, circuit_ps, task.model.new_prune_scores(t.nan), 2)


# --------------------------------------------------------------------------- laws


def test_kl_div_is_that_of_the_metric() -> None:
    task = transformer_task()
    algo_ps = LOGIT_DIFF_GRAD_PRUNE_ALGO.func(task.model, task.train_loader, None)
    outs = run_circuits(
        task.model, task.test_loader, [CIRCUIT_SIZE], algo_ps, PatchType.TREE_PATCH
    )
    ((_, expected),) = CLEAN_KL_DIV_METRIC.metric_func(task.model, task.test_loader, outs)
    (score,) = same_under_knockout(task, algo_ps, algo_ps, CIRCUIT_SIZE)
    assert score.kl_div == pytest.approx(expected, rel=1e-3) and expected > 1e-4
    assert 0 < score.n_knockouts < score.n_edges == CIRCUIT_SIZE


def test_the_full_model_is_complete() -> None:
    task = transformer_task()
    n_edges = task.model.n_edges
    algo_ps = LOGIT_DIFF_GRAD_PRUNE_ALGO.func(task.model, task.train_loader, None)
    (score,) = same_under_knockout(task, algo_ps, algo_ps, n_edges)
    assert 0 < score.n_knockouts < n_edges
    assert score.kl_div == pytest.approx(0.0, abs=1e-6)
    assert score.knockout_kl_div == pytest.approx(0.0, abs=1e-6)


# ---------------------------------------------------------------------- many tasks


def test_measure() -> None:
    task = SmallTask()
    circuit_ps = {"Small": {"A": scores(task, **{PATH[0]: 2.0, PATH[1]: 3.0})}}
    knockout_ps = {"Small": {"A": scores(task, **{PATH[1]: 1.0})}}
    measured = measure_same_under_knockouts(circuit_ps, knockout_ps, tasks=[task])
    expected = same_under_knockout(
        task, circuit_ps["Small"]["A"], knockout_ps["Small"]["A"], 2
    )
    assert measured == {"Small": {"A": expected}}
    figure = same_under_knockouts_fig(measured, algo_names={"A": "Algorithm"})
    assert [list(bar.y) for bar in figure.data] == [
        [expected[0].kl_div],
        [expected[0].knockout_kl_div],
    ]
    assert figure.data[0].x[0].startswith("Algorithm<br>2 edges, 1 knocked out")


def test_measure_errors() -> None:
    task = SmallTask(true_edge_count=None)
    circuit_ps = {"Small": {"A": task.model.new_prune_scores()}}
    with pytest.raises(ConfigError, match="Give `circuit_size`"):
        measure_same_under_knockouts(circuit_ps, circuit_ps, tasks=[task])
    with pytest.raises(ConfigError, match="'A' on the task 'Small'.*Did you mean 'AA'"):
        other = {"Small": {"AA": task.model.new_prune_scores()}}
        measure_same_under_knockouts(circuit_ps, other, tasks=[task], circuit_size=2)
    with pytest.raises(ConfigError, match="no such task.* with `tasks=`"):
        measure_same_under_knockouts({"Smaller": {}}, {}, tasks=[task])
    with pytest.raises(
        ConfigError, match="'Pocket IOY', but no such task. Did you mean 'Pocket IOI'"
    ):
        measure_same_under_knockouts({"Pocket IOY": {}}, {})


# ------------------------------------------------------------------------ training


@pytest.mark.parametrize(
    ("target", "penalty", "epochs"), [("kl_div", 3e-5, 12), ("logit_diff", 0.02, 25)]
)
def test_trained_knockouts_are_worse_than_random_ones(
    target: Any, penalty: float, epochs: int
) -> None:
    task = transformer_task()
    algo_ps = LOGIT_DIFF_GRAD_PRUNE_ALGO.func(task.model, task.train_loader, None)
    before = state_snapshot(task.model)
    trained = train_same_under_knockouts(
        {"Transformer": {"EAP": algo_ps, "Other": algo_ps}},
        ["EAP"],
        0.3,
        epochs,
        penalty,
        target,
        circuit_size=CIRCUIT_SIZE,
        tasks=[task],
    )
    assert state_snapshot(task.model) == before
    assert list(trained["Transformer"]) == ["EAP"]
    knockout_ps = trained["Transformer"]["EAP"]
    circuit, _ = circuit_mask(algo_ps, CIRCUIT_SIZE)
    assert all((knockout_ps[name][~edges] == 0).all() for name, edges in circuit.items())
    (worst,) = same_under_knockout(task, algo_ps, knockout_ps, CIRCUIT_SIZE)
    assert 0 < worst.n_knockouts < CIRCUIT_SIZE
    random_kls = []
    for seed in range(5):
        generator = t.Generator().manual_seed(seed)
        random_ps = {
            name: t.rand(edges.shape, generator=generator)
            for name, edges in circuit.items()
        }
        share_kept = 1 - worst.n_knockouts / CIRCUIT_SIZE
        (score,) = same_under_knockout(task, algo_ps, random_ps, CIRCUIT_SIZE, share_kept)
        random_kls.append(score.knockout_kl_div)
    if target == "kl_div":
        assert worst.knockout_kl_div > max(random_kls)
    else:
        assert worst.knockout_kl_div > sum(random_kls) / 5


def test_training_depends_on_its_seed_only() -> None:
    task = transformer_task()
    algo_ps = LOGIT_DIFF_GRAD_PRUNE_ALGO.func(task.model, task.train_loader, None)

    def train(seed: int, penalty: float = 0.1) -> t.Tensor:
        trained = train_same_under_knockout_prune_scores(
            task, algo_ps, CIRCUIT_SIZE, 0.1, 3, penalty, seed=seed
        )
        return t.cat([of_module.flatten() for of_module in trained.values()])

    first = train(0)
    assert t.equal(first, train(0)) and not t.equal(first, train(1))
    assert train(0, penalty=50.0).sum() < first.sum()


def test_training_errors() -> None:
    task = SmallTask()
    circuit_ps = scores(task, **{PATH[0]: 2.0, PATH[1]: 3.0})
    with pytest.raises(ConfigError, match="'B' has no scores on the task 'Small'"):
        train_same_under_knockouts(
            {"Small": {"A": circuit_ps}}, ["B"], 0.1, 1, 0.1, tasks=[task]
        )
    with pytest.raises(ConfigError, match="`epochs` is 0"):
        train_same_under_knockout_prune_scores(task, circuit_ps, 2, 0.1, 0, 0.1)
    with pytest.raises(ConfigError, match="`mask_fn` is None"):
        train_same_under_knockout_prune_scores(task, circuit_ps, 2, 0.1, 1, 0.1, None)
    with pytest.raises(ConfigError, match="circuit has no edges"):
        train_same_under_knockout_prune_scores(task, circuit_ps, 0, 0.1, 1, 0.1)
    with pytest.raises(ConfigError, match="`regularize_lambda` is inf"):
        train_same_under_knockout_prune_scores(task, circuit_ps, 2, 0.1, 1, float("inf"))
    with pytest.raises(TrainingError, match="diverged"):
        train_same_under_knockout_prune_scores(task, circuit_ps, 2, 0.1, 1, 1e308)

"""Every faithfulness metric on a circuit of the micro model, computed by hand."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import permutations
from statistics import fmean
from typing import Any

import pytest
from transformer_lens.model_bridge import TransformerBridge

from auto_circuit.data import PromptDataLoader
from auto_circuit.metrics.prune_metrics.prune_metrics import (
    CLEAN_KL_DIV_METRIC,
    CORRUPT_KL_DIV_METRIC,
    PRUNE_METRICS,
)
from auto_circuit.metrics.prune_metrics.task_measurements import task_measurement_rows
from auto_circuit.prune import run_circuits
from auto_circuit.tasks import POCKET_IOI_TASK
from auto_circuit.types import AblationType, PatchType
from tests.micro import micro_loader, micro_model

SCALES = [0.02, 0.05, 0.01]
"""Logits at the last position, in units of the scale: 25 and 49 on the clean prompt, -25 and
-49 on the corrupt one, -19 and -41 if one edge is patched. 1 is the answer."""
EDGE = "B0.1->Resid End"


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def divergence(target: float, q: float) -> float:
    p, q = sigmoid(target), sigmoid(q)
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def probability_difference(logit_difference: float) -> float:
    return 2 * sigmoid(logit_difference) - 1


def over_scales(value: Callable[[float], float]) -> float:
    return fmean(value(scale) for scale in SCALES)


BY_HAND = {
    "Clean KL Div": over_scales(lambda s: divergence(24 * s, -22 * s)),
    "Corrupt KL Div": over_scales(lambda s: divergence(-24 * s, -22 * s)),
    "Clean MSE": over_scales(lambda s: s**2 * (44**2 + 90**2) / 2),
    "Answer Logit": over_scales(lambda s: -41 * s),
    "Wrong Answer Logit": over_scales(lambda s: -19 * s),
    "Answer Prob": over_scales(lambda s: sigmoid(-22 * s)),
    "Answer Logprob": over_scales(lambda s: math.log(sigmoid(-22 * s))),
    "Logit Diff": over_scales(lambda s: -22 * s),
    "Prob Diff": over_scales(lambda s: probability_difference(-22 * s)),
    "Logprob Diff": over_scales(lambda s: -22 * s),
    "Logit Diff Percent": 100 * -22 / 24,
    "Prob Diff Percent": 100
    * over_scales(lambda s: probability_difference(-22 * s))
    / over_scales(lambda s: probability_difference(24 * s)),
    "LogProb Diff Percent": 100 * -22 / 24,
    "Correct Answer Percent": 0,
    "Correct Answer Greater Than Incorrect Percent": 0,
}
AT_MODEL = {
    "Clean KL Div": 0,
    "Clean MSE": 0,
    "Logit Diff": over_scales(lambda s: 24 * s),
    "Logit Diff Percent": 100,
    "Prob Diff Percent": 100,
    "LogProb Diff Percent": 100,
    "Correct Answer Percent": 100,
    "Correct Answer Greater Than Incorrect Percent": 100,
}


def measure(loader: PromptDataLoader) -> dict[str, dict[int, float]]:
    """Metric -> number of edges -> value."""
    model = micro_model()
    outs = run_circuits(model, loader, [0, 1, 13], model.circuit_prune_scores([EDGE]))
    return {
        metric.key: {int(n): float(v) for n, v in metric.metric_func(model, loader, outs)}
        for metric in PRUNE_METRICS
    }


@pytest.fixture(scope="module")
def measured() -> dict[str, dict[int, float]]:
    return measure(micro_loader(SCALES, batch_size=3))


@pytest.mark.parametrize("key", BY_HAND)
def test_metric_by_hand(key: str, measured: dict[str, dict[int, float]]) -> None:
    values = measured[key]
    assert values[1] == pytest.approx(BY_HAND[key], rel=1e-4, abs=1e-6)
    if key in AT_MODEL:
        assert values[13] == pytest.approx(AT_MODEL[key], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("scales", list(permutations(SCALES))[2::3])
def test_neither_the_order_of_prompts_nor_their_batches_matter(
    scales: tuple[float, ...], measured: dict[str, dict[int, float]]
) -> None:
    for batch_size in (1, 2):
        found = measure(micro_loader(list(scales), batch_size))
        for key, expected in measured.items():
            assert found[key] == pytest.approx(expected, rel=1e-5, abs=1e-6), key


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often a TransformerBridge runs, under "model"."""
    runs: Counter[str] = Counter()
    bare = TransformerBridge.forward

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        runs["model"] += 1
        return bare(self, *args, **kwargs)

    monkeypatch.setattr(TransformerBridge, "forward", counted)
    return runs


def test_the_model_runs_once_for_what_is_known(runs: Counter[str]) -> None:
    """A pass for each circuit and batch, one for what is patched in, two for the model."""
    task = replace(POCKET_IOI_TASK, batch_size=2, batch_count=2)
    model = task.model
    scores = {name: model.new_prune_scores(1.0) for name in ("A", "B")}
    sizes: list[int] = [0, model.n_edges]
    n_circuits, n_batches = len(sizes), len(task.test_loader)
    for metrics in (PRUNE_METRICS, (CLEAN_KL_DIV_METRIC, CORRUPT_KL_DIV_METRIC)):
        runs.clear()
        rows = task_measurement_rows(
            task,
            scores,
            [AblationType.RESAMPLE],
            metrics,
            PatchType.TREE_PATCH,
            test_edge_counts=sizes,
        )
        assert len(rows) == len(scores) * len(metrics) * n_circuits
        expected = n_batches * (len(scores) * (n_circuits + 1) + 2)
        assert runs["model"] == expected


def test_means_over_a_data_set_are_computed_once_for_all_circuits(
    runs: Counter[str],
) -> None:
    """auto-circuit computed them anew in every call, for every batch."""
    task = replace(POCKET_IOI_TASK, batch_size=4, batch_count=2)
    model, loader = task.model, task.test_loader
    scores = model.new_prune_scores(1.0)
    runs.clear()
    run_circuits(
        model,
        loader,
        [0, model.n_edges],
        scores,
        PatchType.TREE_PATCH,
        AblationType.TOKENWISE_MEAN_CORRUPT,
    )
    assert runs["model"] == len(loader) * (1 + 2)

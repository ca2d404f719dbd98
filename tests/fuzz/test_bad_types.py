"""Input of wrong types, which run-time type checks of other tests would see before we do."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch as t

from auto_circuit.errors import ConfigError, DataError, GraphError
from auto_circuit.metrics.prune_metrics.prune_metrics import (
    CLEAN_KL_DIV_METRIC,
    CLEAN_MSE_METRIC,
    CORRUPT_KL_DIV_METRIC,
    LOGIT_DIFF_METRIC,
    PruneMetric,
)
from auto_circuit.prune import run_circuits
from auto_circuit.utils.graph_utils import patch_mode
from auto_circuit.utils.patchable_model import PatchableModel
from tests.micro import micro_loader, micro_model
from tests.test_bad_input import EDGE, numbered, outputs


@pytest.fixture(scope="module")
def model() -> PatchableModel:
    return micro_model()


@pytest.mark.parametrize("edges", [[True], [None], [3], [b"x"], [[EDGE]], [{}]])
def test_edges_are_edges_or_names(model: PatchableModel, edges: Any) -> None:
    patch = t.zeros(model.plan.n_srcs, 1, 3, 2)
    with pytest.raises(ConfigError, match="`edge` is .*; expected a Edge or a text"):
        with patch_mode(model, patch, edges):
            pass
    with pytest.raises(ConfigError, match="`edge` is .*; expected a Edge or a text"):
        model.circuit_prune_scores(edges)


def test_an_edge_has_one_score(model: PatchableModel) -> None:
    (edge,) = model.find_edges(EDGE)
    twice: Any = {edge: 1.0, EDGE: 2.0}
    with pytest.raises(GraphError, match="given twice: 1.0 and 2.0"):
        model.circuit_prune_scores(edge_dict=twice)
    for score in (math.nan, 1e39, -1e308, 1e-46, 10**400):
        with pytest.raises(GraphError, match=f"score of {EDGE}"):
            model.circuit_prune_scores(edge_dict={EDGE: score})


@pytest.mark.parametrize(
    "convert",
    [
        lambda x: x.numpy(),
        lambda x: x.numpy().astype(">f8"),
        lambda x: x.numpy().astype("u1"),
        lambda x: x.numpy()[..., ::-1].copy()[..., ::-1],
        lambda x: x.tolist(),
    ],
)
def test_arrays_and_lists_are_converted_exactly(
    model: PatchableModel, convert: Any
) -> None:
    scores = numbered(model)
    converted = {name: convert(values) for name, values in scores.items()}
    found = model.check_scores(converted)
    assert all(t.equal(found[name].double(), scores[name].double()) for name in scores)
    expected = run_circuits(model, micro_loader(), [3], scores)
    outs = run_circuits(model, micro_loader(), [3], converted)
    assert all(t.equal(outs[3][key], out) for key, out in expected[3].items())


def test_circuit_sizes_of_numpy(model: PatchableModel) -> None:
    many: list[Any] = [np.array([2, 5]), [np.int64(2), np.int32(5)], range(2, 6, 3)]
    for counts in many:
        outs = run_circuits(model, micro_loader(), counts, numbered(model))
        assert list(outs) == [2, 5]


@pytest.mark.parametrize(
    "metric", [CLEAN_KL_DIV_METRIC, CORRUPT_KL_DIV_METRIC, CLEAN_MSE_METRIC]
)
@pytest.mark.parametrize("shape", [(1, 1, 2), (1, 1), (1, 3)])
def test_outputs_do_not_broadcast(
    model: PatchableModel, metric: PruneMetric, shape: tuple[int, ...]
) -> None:
    loader, outs = outputs(model)
    outs[3] = {key: t.zeros(shape) for key in outs[3]}
    with pytest.raises(DataError, match="shape"):
        metric.metric_func(model, loader, outs)


@pytest.mark.parametrize("bad", [None, "x", t.ones(1, 2).tolist()])
def test_outputs_are_tensors(model: PatchableModel, bad: Any) -> None:
    loader, outs = outputs(model)
    whole: Any = {**outs, 3: bad}
    with pytest.raises(DataError, match="of the circuit with 3 edges are"):
        LOGIT_DIFF_METRIC.metric_func(model, loader, whole)
    outs[3] = {key: bad for key in outs[3]}
    with pytest.raises(DataError, match="for the circuit with 3 edges|no such batch"):
        LOGIT_DIFF_METRIC.metric_func(model, loader, outs)

"""Scores, edge names, circuit sizes and circuits' outputs of any kind, on the micro model."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch as t
from hypothesis import given
from hypothesis import strategies as st

from auto_circuit.circuit_files import save_circuit
from auto_circuit.metrics.faithfulness import edge_ranks, faithfulness
from auto_circuit.metrics.prune_metrics.prune_metrics import PRUNE_METRICS
from auto_circuit.metrics.prune_scores_similarity import prune_score_similarities
from auto_circuit.prune import run_circuits
from auto_circuit.prune_algos.score_ensembles import (
    mean_normalised_prune_scores,
    mean_rank_prune_scores,
)
from auto_circuit.ranking import circuit_mask
from auto_circuit.types import EdgeCounts, PatchType
from auto_circuit.utils.edge_counts import edge_counts_util
from auto_circuit.utils.graph_utils import patch_mode
from auto_circuit.utils.patchable_model import PatchableModel
from auto_circuit.visualize import draw_seq_graph
from tests.fuzzing import only_our_errors
from tests.micro import micro_loader, micro_model

MODEL = micro_model()
SEQ_MODEL = micro_model(seq_len=3)
LOADER = micro_loader([1.0, 2.0])
SHAPES = {name: tuple(mask.shape) for name, mask in MODEL.patch_masks.items()}
NAMES = [edge.name for edge in MODEL.edges]
DTYPES = [t.float16, t.bfloat16, t.float32, t.float64, t.complex64, t.int64, t.bool]

NUMBERS = st.one_of(
    st.integers(),
    st.floats(),
    st.sampled_from([0, 1, -1, 1e308, 1e-46, 1e39, 2**53 + 1, 10**400, True]),
)
ANYTHING = st.one_of(
    NUMBERS,
    st.none(),
    st.text(max_size=6),
    st.lists(NUMBERS, max_size=3),
    st.sampled_from(
        [EdgeCounts.ALL, PatchType.EDGE_PATCH, "ALL", np.int64(3), t.ones(2)]
    ),
)
COUNTS = st.one_of(ANYTHING, st.lists(ANYTHING, max_size=4), st.sets(st.integers(0, 14)))


@st.composite
def tensors(draw: st.DrawFn, shape: tuple[int, ...]) -> Any:
    """The values of one module, as a tensor or as what somebody took for one."""
    if draw(st.integers(0, 9)) == 0:
        shape = tuple(draw(st.lists(st.integers(0, 3), max_size=3)))
    size = int(np.prod(shape))
    values = draw(st.lists(NUMBERS, min_size=size, max_size=size))
    kind = draw(st.sampled_from(["tensor", "numpy", "list", "sparse", "meta", "text"]))
    if kind in ("list", "text"):
        return values if kind == "list" else "scores"
    floats = np.array([float(min(max(v, -1e300), 1e300)) for v in values])
    array = floats.reshape(shape)
    if kind == "numpy":
        with np.errstate(all="ignore"):
            return array.astype(
                draw(st.sampled_from(["f4", "f8", ">f8", "i8", "U8", "c8"]))
            )
    tensor = t.tensor(array).to(draw(st.sampled_from(DTYPES)))
    if kind == "sparse" and tensor.ndim:
        return tensor.to_sparse()
    return tensor.to("meta") if kind == "meta" else tensor


@st.composite
def scores(draw: st.DrawFn) -> Any:
    if draw(st.integers(0, 19)) == 0:
        return draw(ANYTHING)
    found: dict[Any, Any] = {name: draw(tensors(shape)) for name, shape in SHAPES.items()}
    if draw(st.integers(0, 9)) == 0:
        found.pop(next(iter(found)))
        found[draw(st.one_of(st.text(max_size=5), st.integers()))] = t.zeros(2)
    return found


@st.composite
def edge_names(draw: st.DrawFn) -> Any:
    name = draw(st.sampled_from(NAMES))
    after = [
        "",
        " @ 0",
        " @ 2",
        " @ -1",
        " @ foo",
        " @ 1 @ 2",
        " @ ²",
        " @ ",
        "@1",
        " @ 9e9",
    ]
    return draw(
        st.one_of(
            st.just(name + draw(st.sampled_from(after))),
            st.just(name + " @ " + draw(st.text(max_size=3))),
            st.text(max_size=12),
            ANYTHING,
        )
    )


@given(prune_scores=scores(), counts=COUNTS)
def test_scores_are_ranked_or_refused(prune_scores: Any, counts: Any) -> None:
    for use in (
        lambda: MODEL.check_scores(prune_scores),
        lambda: circuit_mask(prune_scores, 3),
        lambda: edge_ranks(prune_scores),
        lambda: edge_counts_util(MODEL.edges, counts, prune_scores),
        lambda: mean_rank_prune_scores([prune_scores, MODEL.new_prune_scores()]),
        lambda: mean_normalised_prune_scores([prune_scores, MODEL.new_prune_scores(1)]),
        lambda: prune_score_similarities({"a": prune_scores, "b": prune_scores}, counts),
    ):
        with only_our_errors():
            use()


@given(prune_scores=scores(), counts=COUNTS)
def test_circuits_run_or_are_refused(prune_scores: Any, counts: Any) -> None:
    with only_our_errors():
        outs = run_circuits(MODEL, LOADER, counts, prune_scores)
        for n_edges, of_batches in outs.items():
            assert 0 <= n_edges <= MODEL.n_edges
            assert all(out.isfinite().all() for out in of_batches.values())


@given(prune_scores=scores(), threshold=ANYTHING, labels=COUNTS)
def test_figures_are_drawn_or_refused(
    prune_scores: Any, threshold: Any, labels: Any
) -> None:
    with only_our_errors():
        draw_seq_graph(MODEL, prune_scores, threshold, seq_labels=labels)


@given(
    model=st.sampled_from([MODEL, SEQ_MODEL]),
    names=st.one_of(edge_names(), st.lists(edge_names(), max_size=3)),
)
def test_edges_are_found_or_refused(model: PatchableModel, names: Any) -> None:
    patch = t.zeros(model.plan.n_srcs, 1, 3, 2)
    for use in (
        lambda: model.find_edges(names),
        lambda: model.circuit_prune_scores(names),
        lambda: save_circuit("/dev/null", model, names),
    ):
        with only_our_errors():
            use()
    with only_our_errors(), patch_mode(model, patch, names):
        pass
    assert all(bool((mask == 0).all()) for mask in model.patch_masks.values())


@given(name=edge_names(), value=ANYTHING)
def test_scored_names_are_read_or_refused(name: Any, value: Any) -> None:
    with only_our_errors():
        try:
            values = {name: value}
        except TypeError:  # no key
            return
        found = MODEL.circuit_prune_scores(edge_dict=values)
        # What was asked is there, neither 0 nor infinite for another number.
        total = float(t.cat([s.flatten().double() for s in found.values()]).sum())
        assert total == value or abs(total / float(value) - 1) < 1e-3


@st.composite
def outputs(draw: st.DrawFn) -> Any:
    """Circuits' outputs: right ones, with something wrong now and then."""
    good: dict[Any, Any] = {batch.key: t.randn(1, 2) for batch in LOADER}
    key = draw(st.sampled_from([*good, 7, "x", None]))
    shapes = st.sampled_from(
        [(1, 2), (1, 1, 2), (2, 2), (1, 3), (1, 1), (2,), (), (0, 2)]
    )
    good[key] = draw(
        st.one_of(
            ANYTHING,
            st.builds(
                lambda shape, dtype, value: t.full(shape, value).to(dtype),
                shapes,
                st.sampled_from(DTYPES),
                st.sampled_from([0.0, 1.0, float("nan"), float("inf"), -1e30]),
            ),
        )
    )
    return draw(st.sampled_from([{3: good}, {3: good, 4: good}, good, {}, {3: None}]))


@given(outs=outputs(), metric=st.sampled_from(PRUNE_METRICS))
def test_outputs_are_measured_or_refused(outs: Any, metric: Any) -> None:
    with only_our_errors():
        metric.metric_func(MODEL, LOADER, outs)


@given(values=st.lists(NUMBERS, min_size=3, max_size=3))
def test_faithfulness_is_a_number_or_refused(values: Any) -> None:
    with only_our_errors():
        faithfulness(*values)

"""Faithfulness curves and their areas, by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch as t

from auto_circuit.errors import ConfigError, DataError, GraphError
from auto_circuit.metrics.circuit_outs import iter_circuit_outs
from auto_circuit.metrics.faithfulness import (
    MIB_BUDGETS,
    FaithfulnessPoint,
    circuit_model_distance,
    circuit_performance_ratio,
    edge_ranks,
    faithfulness,
    faithfulness_curve,
    mean_faithfulness,
    measured_faithfulness,
    value_area,
)
from auto_circuit.metrics.prune_metrics.prune_metrics import CORRECT_ANSWER_PERCENT_METRIC
from auto_circuit.model_utils.sparse_autoencoders.autoencoder_transformer import (
    sae_model,
)
from auto_circuit.prune_algos.random_edges import random_prune_scores
from auto_circuit.ranking import circuit_mask
from auto_circuit.types import AblationType, PruneScores
from auto_circuit.utils.graph_utils import patchable_model
from auto_circuit.utils.patchable_model import PatchableModel
from tests.micro import micro_loader, micro_model
from tests.models import gpt2, state_snapshot
from tests.test_prune import token_loader


def constant_curve(f: float) -> list[FaithfulnessPoint]:
    return [FaithfulnessPoint(share, 1, f, f) for share in MIB_BUDGETS]


def micro_scores(model: PatchableModel) -> PruneScores:
    """`Resid Start->Resid End` has the largest |score|, but a negative one."""
    return model.circuit_prune_scores(
        edge_dict={
            "Resid Start->Resid End": -6.0,
            "B1.1->Resid End": 5.0,
            "Resid Start->B1.1": 4.0,
            "B0.0->Resid End": 3.0,
        }
    )


# ------------------------------------------------------------------------------- areas


def test_area_of_the_full_model_and_of_nothing() -> None:
    assert circuit_performance_ratio(constant_curve(1.0)) == pytest.approx(0.999)
    assert circuit_model_distance(constant_curve(1.0)) == 0.0
    assert circuit_performance_ratio(constant_curve(0.0)) == 0.0
    assert circuit_model_distance(constant_curve(0.0)) == pytest.approx(0.999)


def test_areas_by_hand() -> None:
    shares_and_values = [(0.5, 0.7), (0.1, 0.5), (1.0, 1.2)]
    curve = [FaithfulnessPoint(k, 1, 10 * f, f) for k, f in shares_and_values]
    cpr = 0.4 * (0.5 + 0.7) / 2 + 0.5 * (0.7 + 1.2) / 2
    cmd = 0.4 * (0.5 + 0.3) / 2 + 0.5 * (0.3 + 0.2) / 2
    assert circuit_performance_ratio(curve) == pytest.approx(cpr)
    assert circuit_model_distance(curve) == pytest.approx(cmd)
    assert value_area(curve) == pytest.approx(10 * cpr)
    assert mean_faithfulness(curve) == pytest.approx(0.8)
    log_cpr = math.log(5) * 0.6 + math.log(2) * 0.95
    assert circuit_performance_ratio(curve, log_scale=True) == pytest.approx(log_cpr)


def test_an_area_needs_two_budgets() -> None:
    with pytest.raises(ConfigError, match="at least two different budgets"):
        circuit_performance_ratio(constant_curve(1.0)[:1])
    with pytest.raises(ConfigError, match="no points"):
        mean_faithfulness([])


# --------------------------------------------------------------------------- the curve


@pytest.mark.parametrize(
    ("ranking", "expected"),
    [
        # Clean and corrupt logit differences are 24 and -24. The path through B1.1 alone
        # gives -22, and `Resid Start->Resid End` adds the same to both logits.
        ("signed", [(1, 0.0, 0.0), (2, 2.0, 1 / 24), (3, 2.0, 1 / 24), (13, 13.0, 1.0)]),
        ("absolute", [(1, 1.0, 0.0), (2, 1.0, 0.0), (3, 3.0, 1 / 24), (13, 13.0, 1.0)]),
    ],
)
def test_micro_curve(ranking: Any, expected: list[tuple[int, float, float]]) -> None:
    model = micro_model()
    curve = faithfulness_curve(
        model,
        micro_loader(),
        micro_scores(model),
        ranking,
        budgets=[1.0, 0.24, 0.16, 0.1],
    )
    found = [(p.n_edges, p.weighted_edge_count, p.faithfulness) for p in curve]
    for point, (n_edges, connected, f) in zip(found, expected, strict=True):
        assert point == (n_edges, connected, pytest.approx(f, abs=1e-6))
    assert [p.share for p in curve] == [0.1, 0.16, 0.24, 1.0]
    assert curve[0].value == pytest.approx(-24.0)


def test_latents_with_zero_ablation_by_hand() -> None:
    """Dead ends would act: an MLP that reads nothing of the circuit still writes."""
    bridge: Any = gpt2()
    saes = sae_model(bridge, "resid_delta_mlp", load_pretrained=False, n_latents=4)
    for sae in saes.saes.values():
        sae.latent_bias.data += 1.0  # so that all are active
    model = patchable_model(saes, True, "last_seq", separate_qkv=True)
    dead = ["MLP 1 Latent 0->Resid End", "Resid Start->A0.1.V"]
    live = ["Resid Start->MLP 0", "MLP 0 Latent 1->Resid End"]
    ranked = [*dead, *live]
    scores = model.circuit_prune_scores(
        edge_dict={name: 9.0 - rank for rank, name in enumerate(ranked)}
    )
    loader, n_edges = token_loader(5, 5), model.n_edges
    curve = faithfulness_curve(
        model,
        loader,
        scores,
        ablation_type=AblationType.ZERO,
        budgets=[2.5 / n_edges, 4.5 / n_edges, 1.0],
    )
    assert [p.weighted_edge_count for p in curve] == [0.0, 2.0, n_edges]
    # What no node writes stays: the biases of attention's outputs.
    inner = bridge.original_model.transformer
    biases = [block.attn.c_proj.bias for block in inner.h]
    (batch,) = loader
    start = inner.wte(batch.clean) + inner.wpe(t.arange(batch.clean.shape[1]))
    written = inner.h[0].mlp(inner.h[0].ln_2(start + biases[0]))
    sae = saes.saes[0]
    latent = sae.encode(written)[..., 1:2] * sae.decoder_weight[:, 1]
    values = []
    for stream in (0 * latent, latent):
        logits = bridge.unembed(inner.ln_f(stream + biases[0] + biases[1]))[:, -1]
        values.append(float((logits[:, 1] - logits[:, 2]).mean()))
    whole = bridge(batch.clean)[:, -1]
    values.append(float((whole[:, 1] - whole[:, 2]).mean()))
    assert [p.value for p in curve] == pytest.approx(values, abs=1e-5)
    shares = [(value - values[0]) / (values[2] - values[0]) for value in values]
    assert [p.faithfulness for p in curve] == pytest.approx(shares, abs=1e-4)
    assert abs(values[1] - values[0]) > 1e-3


def test_circuits_that_grow_from_the_output() -> None:
    """A path of two edges comes before the better edges that lead nowhere."""
    model = micro_model()
    scores = model.circuit_prune_scores(
        edge_dict={
            "B0.0->B1.0": 9.0,
            "Resid Start->B0.0": 8.0,
            "B1.1->Resid End": 2.0,
            "Resid Start->B1.1": 1.0,
        }
    )
    found = {}
    for selection in ("best", "greedy"):
        two, _ = faithfulness_curve(
            model,
            micro_loader(),
            scores,
            budgets=[0.16, 1.0],
            selection=selection,  # type: ignore[arg-type]
        )
        assert two.n_edges == 2
        found[selection] = (two.weighted_edge_count, two.value)
    # By the path through B1.1 alone, clean gives -22 (see above); by nothing, -24.
    assert found == {"best": (0.0, -24.0), "greedy": (2.0, -22.0)}


def test_budgets_below_one_edge_have_none() -> None:
    model = micro_model()
    curve = faithfulness_curve(model, micro_loader(), micro_scores(model))
    assert [p.n_edges for p in curve] == [int(k * 13) for k in MIB_BUDGETS]
    assert curve[0].n_edges == 0 and curve[0].faithfulness == 0.0
    assert curve[-1].faithfulness == 1.0


def test_equal_scores_do_not_make_large_circuits() -> None:
    model = micro_model()
    curve = faithfulness_curve(model, micro_loader(), model.new_prune_scores(1.0))
    assert [p.n_edges for p in curve] == [int(k * 13) for k in MIB_BUDGETS]
    assert curve[-2].faithfulness < 0.9


@pytest.mark.parametrize("ablation", AblationType)
def test_circuits_of_dead_ends_do_nothing(ablation: AblationType) -> None:
    model = patchable_model(gpt2(), True, "last_seq", separate_qkv=True)
    scores = random_prune_scores(model, None, None, 0)
    curve = faithfulness_curve(
        model,
        token_loader(4, 2),
        scores,
        ablation_type=ablation,
        budgets=[0.05, 0.5, 1.0],
    )
    assert curve[0].n_edges > 3
    assert curve[0].weighted_edge_count == 0.0
    assert curve[0].faithfulness == pytest.approx(0.0, abs=1e-5)
    # The same circuit as it is: with all ablations but one its edges do something.
    kept, n_kept = circuit_mask(edge_ranks(scores), curve[0].n_edges)
    assert n_kept == curve[0].n_edges
    empty = {name: t.zeros_like(edges) for name, edges in kept.items()}
    outs = [
        out
        for _, _, out in iter_circuit_outs(
            model, token_loader(4, 4), [kept, empty], ablation
        )
    ]
    acts = not t.allclose(outs[0], outs[1], atol=1e-5)
    assert acts == (ablation != AblationType.RESAMPLE)
    assert curve[-1].faithfulness == pytest.approx(1.0)


def test_accuracy_area() -> None:
    model = micro_model()
    curve = faithfulness_curve(
        model,
        micro_loader(),
        micro_scores(model),
        metric=CORRECT_ANSWER_PERCENT_METRIC,
        budgets=[0.5, 1.0],
    )
    # Half of the edges do not turn -24 around, all of them do.
    assert [p.value for p in curve] == [0.0, 100.0]
    assert value_area(curve) == pytest.approx(25.0)


def test_the_model_is_left_as_it_was() -> None:
    model = micro_model()
    before = state_snapshot(model)
    faithfulness_curve(model, micro_loader(), micro_scores(model))
    assert state_snapshot(model) == before


def test_measured_curve() -> None:
    curve = measured_faithfulness([(13, 24.0), (0, -24.0), (2, -22.0)])
    assert [(p.n_edges, p.share, p.value) for p in curve] == [
        (2, 2 / 13, -22.0),
        (13, 1.0, 24.0),
    ]
    assert [p.faithfulness for p in curve] == pytest.approx([1 / 24, 1.0])
    with pytest.raises(ConfigError, match="0 and of all edges"):
        measured_faithfulness([(2, 1.0), (13, 2.0)])


def test_undefined_faithfulness() -> None:
    for full_model in (2.0, 2.000001, 1.999999):
        with pytest.raises(DataError, match="equal within rounding"):
            faithfulness(1.0, 2.0, full_model)
    assert faithfulness(2.0005, 2.0, 2.001) == pytest.approx(0.5)
    assert math.isnan(faithfulness(math.nan, 2.0, 3.0))
    assert math.isnan(faithfulness(1.0, 2.0, math.nan))


# ----------------------------------------------------------------------------- ranking


def test_edge_ranks() -> None:
    scores = {"a": t.tensor([[0.5, -3.0]]), "b": t.tensor([0.5, 0.0])}
    signed = edge_ranks(scores, "signed")
    assert signed["a"].tolist() == [[4.0, 1.0]] and signed["b"].tolist() == [3.0, 2.0]
    absolute = edge_ranks(scores, "absolute")
    assert absolute["a"].tolist() == [[3.0, 4.0]] and absolute["b"].tolist() == [2.0, 1.0]
    for k in range(5):
        assert circuit_mask(signed, k)[1] == k


def test_scores_that_have_no_rank() -> None:
    with pytest.raises(GraphError, match="NaN"):
        edge_ranks({"a": t.tensor([math.nan])})


@pytest.mark.parametrize("budgets", [[], [0.0, 1.0], [0.5, 1.5]])
def test_budget_errors(budgets: list[float]) -> None:
    model = micro_model()
    with pytest.raises(ConfigError, match="`budgets`"):
        faithfulness_curve(model, micro_loader(), micro_scores(model), budgets=budgets)

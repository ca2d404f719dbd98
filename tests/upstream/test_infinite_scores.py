"""ACDC's never-removed edges score +inf, and rank before all others wherever scores go.

Each consumer must give for infinite scores what it gives for the same scores with a large
number in their place.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch as t

from auto_circuit.circuit_files import load_circuit, save_circuit, save_mib_circuit
from auto_circuit.errors import DataError, GraphError
from auto_circuit.metrics.circuit_pruning import greedy_ranks
from auto_circuit.metrics.edge_ranks import edge_ranks
from auto_circuit.metrics.official_circuits.measure_roc import measure_task_roc
from auto_circuit.metrics.prune_scores_similarity import prune_score_similarities
from auto_circuit.prune import run_circuits
from auto_circuit.prune_algos.ACDC import acdc_prune_scores, removed_edges
from auto_circuit.prune_algos.acdc_after_eap import acdc_after_eap_prune_scores
from auto_circuit.prune_algos.edge_pruning import train_edge_pruning
from auto_circuit.prune_algos.mask_training import warm_start_logits
from auto_circuit.prune_algos.score_ensembles import (
    mean_normalised_prune_scores,
    mean_rank_prune_scores,
)
from auto_circuit.prune_algos.subnetwork_probing import train_subnetwork
from auto_circuit.types import EdgeCounts, PatchType, PruneScores
from auto_circuit.utils.graph_utils import edge_counts_util, patchable_model
from auto_circuit.utils.tensor_ops import circuit_mask, flat_prune_scores
from auto_circuit.visualize import draw_seq_graph
from tests.micro import micro_loader, micro_model
from tests.models import gpt2

LARGE = 100.0
LOADER = micro_loader([0.1, 0.2], 2)
THRESHOLDS: dict[str, Any] = {"tao_exps": (-3, -2), "tao_bases": (1,)}


def infinite_scores() -> PruneScores:
    """Three edges that never go, one of them against the metric, and two ties."""
    named = {
        "Resid Start->Resid End": math.inf,
        "B0.0->B1.1": math.inf,
        "B1.1->Resid End": -math.inf,
        "B0.1->Resid End": 0.5,
        "B0.0->Resid End": -0.5,
        "B1.0->Resid End": 0.01,
    }
    return micro_model().circuit_prune_scores(edge_dict=named)


def finite(scores: PruneScores) -> PruneScores:
    return {name: of_module.clamp(-LARGE, LARGE) for name, of_module in scores.items()}


# ----------------------------------------------------------------------------- ACDC


def test_acdc_never_removes_its_circuit() -> None:
    model = micro_model()
    scores = acdc_prune_scores(model, LOADER, None, **THRESHOLDS)
    removed = removed_edges(model, LOADER, 1e-2)
    kept = [edge for edge in model.edges if edge not in removed]
    assert 0 < len(kept) < model.n_edges
    assert sum(int(s.isinf().sum()) for s in scores.values()) == len(kept)
    assert all(float(edge.prune_score(scores)) == math.inf for edge in kept)
    finite_scores = {float(s) for s in flat_prune_scores(scores) if s != math.inf}
    assert finite_scores == {t.tensor(1e-3).item(), t.tensor(1e-2).item()}


def test_acdc_after_eap_does_so_too() -> None:
    scores = acdc_after_eap_prune_scores(micro_model(), LOADER, None, 10, (1e-2,))
    flat = flat_prune_scores(scores)
    assert 0 < int(flat.isinf().sum()) < 10 and not flat.isnan().any()
    assert int((flat == 0).sum()) == 13 - 10
    everything = acdc_after_eap_prune_scores(
        micro_model(), LOADER, None, thresholds=(1e-3, 1e-2), all_edges_up_to=13
    )
    expected = acdc_prune_scores(micro_model(), LOADER, None, **THRESHOLDS)
    for name, of_module in everything.items():
        t.testing.assert_close(of_module, expected[name])


# ------------------------------------------------------------------------ consumers


@pytest.mark.parametrize("patch_type", PatchType)
def test_every_circuit_is_run(patch_type: PatchType) -> None:
    model, scores = micro_model(), infinite_scores()
    counts = list(range(14))
    outs = run_circuits(model, LOADER, counts, scores, patch_type)
    expected = run_circuits(model, LOADER, counts, finite(scores), patch_type)
    assert list(outs) == list(expected) == [0, 3, 5, 6, 13]
    for n_edges, of_batches in outs.items():
        for key, out in of_batches.items():
            assert t.equal(out, expected[n_edges][key])


def test_no_edges_are_no_edges() -> None:
    """There, the circuit of 0 edges had all the infinite ones."""
    mask, n_edges = circuit_mask(infinite_scores(), 0)
    assert n_edges == 0 and not any(edges.any() for edges in mask.values())
    outs = run_circuits(micro_model(), LOADER, [0], infinite_scores())
    ((_, of_batches),) = outs.items()
    for batch in LOADER:
        t.testing.assert_close(of_batches[batch.key], micro_model()(batch.corrupt)[:, -1])


def counts(scores: PruneScores) -> Any:
    edges = micro_model().edges
    groups = [edge_counts_util(edges, rule, scores) for rule in (None, EdgeCounts.GROUPS)]
    assert groups[0] == [0, 3, 5, 6, 13]
    return groups


def similarity(scores: PruneScores) -> Any:
    other = {name: t.ones_like(of_module) for name, of_module in scores.items()}
    return prune_score_similarities({"A": scores, "B": other}, [0, 1, 3, 4, 13])


def roc(scores: PruneScores) -> Any:
    model = micro_model()
    edges = [
        e for name in ("B0.0->B1.1", "B1.0->Resid End") for e in model.find_edges(name)
    ]
    return [
        measure_task_roc(model, edges, scores, all_edges) for all_edges in (False, True)
    ]


def mean_ranks(scores: PruneScores) -> Any:
    return mean_rank_prune_scores(
        [scores, {name: 1 + 0 * of_module for name, of_module in finite(scores).items()}]
    )


def warm_start(scores: PruneScores) -> Any:
    return warm_start_logits(micro_model(), LOADER, scores, 2.0)


def training(scores: PruneScores) -> Any:
    options: Any = {"epochs": 2, "warm_start": scores, "faithfulness_target": "answer"}
    return train_subnetwork(micro_model(), LOADER, **options).prune_scores


def edge_pruning(scores: PruneScores) -> Any:
    return train_edge_pruning(
        micro_model(), LOADER, n_steps=2, warm_start=scores
    ).prune_scores


def figure(scores: PruneScores) -> Any:
    """Infinite links are as wide as the widest finite one: here 0.5."""
    if not flat_prune_scores(scores).isinf().any():
        scores = {name: of_module.clamp(-0.5, 0.5) for name, of_module in scores.items()}
    (sankey,) = draw_seq_graph(micro_model(), scores).data
    return [list(sankey.link.value), list(sankey.link.color), list(sankey.link.label)]


CONSUMERS: dict[str, Callable[[PruneScores], Any]] = {
    "edge counts": counts,
    "similarity": similarity,
    "roc": roc,
    "ranks, signed": edge_ranks,
    "ranks, absolute": lambda scores: edge_ranks(scores, "absolute"),
    "greedy ranks": lambda scores: greedy_ranks(micro_model(), scores),
    "mean ranks": mean_ranks,
    "warm start": warm_start,
    "training": training,
    "edge pruning": edge_pruning,
    "figure": figure,
}


@pytest.mark.parametrize("name", CONSUMERS)
def test_infinite_scores_rank_as_large_ones(name: str) -> None:
    scores = infinite_scores()
    found, expected = (CONSUMERS[name](s) for s in (scores, finite(scores)))
    if isinstance(found, dict) and isinstance(next(iter(found.values())), t.Tensor):
        assert found.keys() == expected.keys()
        for module_name, of_module in found.items():
            assert t.equal(of_module, expected[module_name])
            assert not of_module.isnan().any()
    else:
        assert found == expected


def test_only_what_is_never_removed_can_be_drawn() -> None:
    fig = draw_seq_graph(micro_model(), infinite_scores(), math.inf)
    (sankey,) = fig.data
    assert len(sankey.link.value) == 3
    assert "3 of 13 edges" in fig.layout.title.text
    with pytest.raises(ValueError, match="`threshold` is nan"):
        draw_seq_graph(micro_model(), infinite_scores(), math.nan)


def test_a_unit_of_infinite_scores_says_what_to_do() -> None:
    with pytest.raises(
        GraphError, match="`mean_rank_prune_scores`, which takes infinite"
    ):
        mean_normalised_prune_scores([infinite_scores()])


def test_nan_stays_an_error() -> None:
    model = micro_model()
    scores = infinite_scores()
    scores["output"][0] = math.nan
    for consume in (
        lambda: run_circuits(model, LOADER, [1], scores),
        lambda: edge_counts_util(model.edges, None, scores),
        lambda: draw_seq_graph(model, scores),
    ):
        with pytest.raises(GraphError, match="NaN"):
            consume()


# ---------------------------------------------------------------------------- files


def test_our_files_keep_them(tmp_path: Path) -> None:
    path = tmp_path / "circuit.json"
    model, scores = micro_model(), infinite_scores()
    save_circuit(path, model, scores)
    loaded = load_circuit(path, model)
    assert all(t.equal(loaded[name], of_module) for name, of_module in scores.items())
    path.write_text(path.read_text().replace('"-inf"', '"inf"'))
    with pytest.raises(DataError, match="checksum"):
        load_circuit(path, model)


@pytest.mark.parametrize("suffix", [".json", ".pt"])
def test_mib_files_say_what_to_do(tmp_path: Path, suffix: str) -> None:
    model = patchable_model(gpt2(1, 2), True, "last_seq", separate_qkv=True)
    scores = model.new_prune_scores(1.0)
    scores["blocks.0.hook_mlp_in"][0] = math.inf
    path = tmp_path / f"circuit{suffix}"
    with pytest.raises(GraphError, match=r"ACDC's.*clamp\(-1e6, 1e6\)"):
        save_mib_circuit(path, model, scores)
    assert not path.exists()
    clamped = {name: of_module.clamp(-1e6, 1e6) for name, of_module in scores.items()}
    save_mib_circuit(path, model, clamped)

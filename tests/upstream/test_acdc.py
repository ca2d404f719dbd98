"""ACDC's arguments of auto-circuit: slow comparison of every trial, and figures."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go
import pytest
import torch as t

from auto_circuit.errors import ConfigError, GraphError
from auto_circuit.prune import run_circuits
from auto_circuit.prune_algos.ACDC import acdc_prune_scores
from auto_circuit.types import CircuitOutputs, PatchType
from auto_circuit.utils.graph_utils import patchable_model
from auto_circuit.utils.patchable_model import PatchableModel
from auto_circuit.visualize import draw_seq_graph
from tests.micro import micro_loader, micro_model
from tests.models import gpt2, state_snapshot
from tests.test_prune import token_loader

LOADER = micro_loader([0.1, 0.2], 2)
THRESHOLDS: dict[str, Any] = {"tao_exps": [-2], "tao_bases": [1]}


class Recorder:
    """`run_circuits`, which remembers what it was asked, and may say something else."""

    def __init__(self, error: float = 0.0) -> None:
        self.error = error
        self.calls: list[dict[str, Any]] = []

    def __call__(self, **arguments: Any) -> CircuitOutputs:
        self.calls.append(arguments)
        outs = run_circuits(**arguments)
        return {
            n_edges: {key: out + self.error for key, out in of_batches.items()}
            for n_edges, of_batches in outs.items()
        }


@pytest.mark.parametrize("edges_at_once", [1, 3])
def test_test_mode_compares_every_trial(edges_at_once: int) -> None:
    model, run = micro_model(), Recorder()
    before = state_snapshot(model)
    scores = acdc_prune_scores(
        model,
        LOADER,
        None,
        **THRESHOLDS,
        test_mode=True,
        run_circuits_ref=run,
        edges_at_once=edges_at_once,
    )
    assert state_snapshot(model) == before
    assert len(run.calls) == model.n_edges
    assert all(call["patch_type"] == PatchType.TREE_PATCH for call in run.calls)
    assert run.calls[0]["test_edge_counts"] == [12]
    assert all(call["model"] is not model for call in run.calls)
    plain = acdc_prune_scores(model, LOADER, None, **THRESHOLDS)
    assert all(t.equal(scores[name], of_module) for name, of_module in plain.items())


def test_test_mode_of_a_transformer() -> None:
    """Without a function it computes with `run_circuits`; layers are skipped in one only."""
    model = patchable_model(gpt2(1, 2), True, "last_seq", separate_qkv=True)
    scores = acdc_prune_scores(
        model, token_loader(3, 3), None, tao_exps=[-5], tao_bases=[1], test_mode=True
    )
    n_kept = sum(int(of_module.isinf().sum()) for of_module in scores.values())
    assert 0 < n_kept < model.n_edges


def test_test_mode_finds_a_difference() -> None:
    with pytest.raises(
        GraphError, match="up to 0.0?1.* from those of `run_circuits_ref`"
    ):
        acdc_prune_scores(
            micro_model(), LOADER, None, test_mode=True, run_circuits_ref=Recorder(0.01)
        )
    acdc_prune_scores(
        micro_model(),
        LOADER,
        None,
        **THRESHOLDS,
        test_mode=True,
        run_circuits_ref=Recorder(1e-4),
    )


@pytest.mark.parametrize("test_mode", [True, False])
def test_show_graphs_draws_every_trial_of_a_small_graph(
    test_mode: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[go.Figure] = []
    monkeypatch.setattr(go.Figure, "show", lambda fig: shown.append(fig))
    n_trials = 0

    def draw(**arguments: Any) -> None:
        nonlocal n_trials
        n_trials += 1
        if n_trials == 1:
            draw_seq_graph(**arguments)

    acdc_prune_scores(
        micro_model(),
        LOADER,
        None,
        **THRESHOLDS,
        test_mode=test_mode,
        run_circuits_ref=run_circuits,
        show_graphs=True,
        draw_seq_graph_ref=draw,
    )
    assert n_trials == 13
    (fig,) = shown
    assert len(fig.data[0].link.value) == 1  # In the first, one edge is out.


def test_show_graphs_draws_some_trials_of_large_graphs() -> None:
    model = micro_model(seq_len=3)
    drawn: list[int] = []

    def draw(model: PatchableModel, prune_scores: Any, **options: Any) -> None:
        drawn.append(sum(int(of_module.sum()) for of_module in prune_scores.values()))

    options: Any = {"show_graphs": True, "draw_seq_graph_ref": draw}
    acdc_prune_scores(model, LOADER, None, [-3, -2], [1], **options)
    assert model.n_edges == 39
    assert len(drawn) == 2  # Trials 0 and 50 of 78.
    assert drawn[0] == 1
    with pytest.raises(ConfigError, match="give `draw_seq_graph_ref`"):
        acdc_prune_scores(model, LOADER, None, show_graphs=True)

"""Arguments that ask for a figure show one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest

from auto_circuit.prune import run_circuits
from auto_circuit.prune_algos.circuit_probing import circuit_probing_prune_scores
from auto_circuit.prune_algos.subnetwork_probing import (
    subnetwork_probing_prune_scores,
)
from auto_circuit.types import PatchType
from tests.micro import micro_loader, micro_model

LOADER = micro_loader([0.1, 0.2], 2)


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[go.Figure]:
    figs: list[go.Figure] = []
    monkeypatch.setattr(go.Figure, "show", lambda fig: figs.append(fig))
    return figs


def test_show_train_graph(shown: list[go.Figure]) -> None:
    options: Any = {"epochs": 3, "show_train_graph": True}
    subnetwork_probing_prune_scores(
        micro_model(), LOADER, None, **options, validation_dataloader=LOADER
    )
    (fig,) = shown
    curves = {trace.name: trace for trace in fig.data}
    assert {"Loss", "Faithfulness", "Penalty", "Faithfulness (validation)"} <= set(curves)
    assert len(curves["Loss"].y) == 3


def test_show_train_graph_for_each_size(shown: list[go.Figure]) -> None:
    circuit_probing_prune_scores(
        micro_model(), LOADER, None, epochs=2, show_train_graph=True, circuit_sizes=[2, 5]
    )
    titles = [fig.layout.title.text for fig in shown]
    assert titles == ["Subnetwork Probing, 2 Edges", "Subnetwork Probing, 5 Edges"]


@pytest.mark.parametrize("patch_type,n_drawn", [("EDGE_PATCH", 2), ("TREE_PATCH", 11)])
def test_render_graph(
    shown: list[go.Figure], tmp_path: Path, patch_type: str, n_drawn: int
) -> None:
    """What is patched for the last size, as there; once, not for each batch."""
    model = micro_model()
    scores = model.circuit_prune_scores(
        edge_dict={"B0.0->B1.1": 3.0, "B1.1->Resid End": 2.0, "B1.0->Resid End": 1.0}
    )
    path = tmp_path / "graph.html"
    outs = run_circuits(
        model,
        micro_loader([0.1, 0.2], 1),
        [1, 2],
        scores,
        PatchType[patch_type],
        render_graph=True,
        render_score_threshold=False,
        render_file_path=str(path),
    )
    assert list(outs) == [1, 2]
    (fig,) = shown
    assert len(fig.data[0].link.value) == n_drawn
    assert path.exists()
    run_circuits(model, LOADER, [], scores, render_graph=True)
    assert len(shown) == 1

"""Figures of circuits: what is drawn is what the scores say."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import plotly.io as pio
import pytest
import torch as t

from auto_circuit import visualize
from auto_circuit.circuit_files import scored_edges
from auto_circuit.errors import ConfigError, GraphError
from auto_circuit.model_utils.sparse_autoencoders.autoencoder_transformer import (
    sae_model,
)
from auto_circuit.model_utils.transformer_lens_utils import WHOLE_ATTENTION_ADAPTER
from auto_circuit.utils.graph_utils import patchable_model, set_all_masks
from auto_circuit.utils.patchable_model import PatchableModel
from auto_circuit.visualize import (
    JOIN_COLOR,
    NEGATIVE_COLOR,
    POSITIVE_COLOR,
    Drawing,
    draw_seq_graph,
    drawing,
    net_viz,
)
from tests.browser import check_shown
from tests.micro import micro_model
from tests.models import gemma2, gpt2, llama, pythia


@pytest.fixture(scope="module")
def gpt2_model() -> PatchableModel:
    return patchable_model(gpt2(), factorized=True, separate_qkv=True)


def links(sankey: Any) -> dict[str, tuple[float, str]]:
    """Name -> (width, colour)"""
    link = sankey.link
    return {
        name: (value, color)
        for name, value, color in zip(link.label, link.value, link.color, strict=True)
    }


def ends(sankey: Any) -> list[tuple[str, str]]:
    names = node_names(sankey)
    pairs = zip(sankey.link.source, sankey.link.target, strict=True)
    return [(names[source], names[target]) for source, target in pairs]


def node_names(sankey: Any) -> list[str]:
    """What stands beside each node; of a query, key or value the whole name."""
    return [
        name if label in tuple("QKV") else label
        for label, (name, *_) in zip(
            sankey.node.label, sankey.node.customdata, strict=True
        )
    ]


def texts(fig: go.Figure) -> list[str]:
    return [annotation.text for annotation in fig.layout.annotations]


def test_links_are_the_edges_above_the_threshold() -> None:
    model = micro_model()
    scores = model.circuit_prune_scores(
        edge_dict={
            "Resid Start->B0.1": 2.0,
            "B0.1->Resid End": -0.5,
            "B0.0->B1.0": 0.1,
        }
    )
    fig = draw_seq_graph(model, scores, 0.5)
    (sankey,) = fig.data
    assert links(sankey) == {
        "Resid Start->B0.1": (2.0, POSITIVE_COLOR),
        "B0.1->Resid End": (0.5, NEGATIVE_COLOR),
    }
    assert ends(sankey) == [("Embed", "B0.1"), ("B0.1", "Unembed")]
    assert [list(row) for row in sankey.link.customdata] == [
        ["Resid Start->B0.1", "score +2"],
        ["B0.1->Resid End", "score -0.5"],
    ]
    assert sankey.node.customdata[1] == ["B0.1", 1, 1]
    assert fig.layout.title.text == "2 of 13 edges, |score| ≥ 0.5"
    assert len(draw_seq_graph(model, scores).data[0].link.value) == 3


def test_every_link_leads_forward() -> None:
    for factorized in (True, False):
        model = micro_model(factorized)
        (sankey,) = draw_seq_graph(model, model.new_prune_scores(1.0)).data
        assert len(sankey.link.value) == model.n_edges
        x = sankey.node.x
        pairs = zip(sankey.link.source, sankey.link.target, strict=True)
        assert all(x[source] < x[target] for source, target in pairs)
        assert all(0 < place < 1 for place in (*x, *sankey.node.y))


def test_nodes_of_a_layer_do_not_overlap(gpt2_model: PatchableModel) -> None:
    generator = t.Generator().manual_seed(0)
    scores = {
        name: t.randn(zeros.shape, generator=generator)
        for name, zeros in gpt2_model.new_prune_scores().items()
    }
    fig = draw_seq_graph(gpt2_model, scores)
    (sankey,) = fig.data
    value_in, value_out = [0.0] * len(sankey.node.x), [0.0] * len(sankey.node.x)
    link = sankey.link
    for source, target, value in zip(link.source, link.target, link.value, strict=True):
        value_out[source] += value
        value_in[target] += value
    values = [max(pair) for pair in zip(value_in, value_out, strict=True)]
    size = fig.layout.height - fig.layout.margin.t - fig.layout.margin.b
    columns: dict[float, list[int]] = {}
    for idx, x in enumerate(sankey.node.x):
        columns.setdefault(x, []).append(idx)
    pixels = min(
        (size - (len(column) - 1) * sankey.node.pad) / sum(values[idx] for idx in column)
        for column in columns.values()
    )
    assert sorted(len(column) for column in columns.values()) == [1, 1, 1, 1, 4, 4]
    for column in columns.values():
        column.sort(key=lambda idx: sankey.node.y[idx])
        for above, below in zip(column, column[1:], strict=False):
            distance = size * (sankey.node.y[below] - sankey.node.y[above])
            heights = pixels * (values[above] + values[below]) / 2
            assert distance == pytest.approx(heights + sankey.node.pad, abs=1)


def test_empty_circuits_are_drawn() -> None:
    for seq_len in (None, 3):
        model = micro_model(seq_len=seq_len)
        fig = draw_seq_graph(model, model.new_prune_scores())
        assert len(fig.data) == 0  # type: ignore[arg-type]
        assert texts(fig) == ["This circuit has no edges."]
        assert fig.layout.title.text == f"0 of {model.n_edges} edges"
    fig = draw_seq_graph(model, model.new_prune_scores(), show_all_seq_pos=True)
    assert texts(fig) == ["0", "1", "2", "This circuit has no edges."]


def test_a_graph_for_each_position() -> None:
    model = micro_model(seq_len=3)
    scores = model.circuit_prune_scores(
        edge_dict={"B0.1->B1.1 @ 0": 1.0, "B1.0->Resid End @ 2": 3.0}
    )
    labels = ["<b>", "and", "end"]
    fig = draw_seq_graph(model, scores, seq_labels=labels)
    first, last = fig.data
    assert list(links(first)) == ["B0.1->B1.1 @ 0"]
    assert list(links(last)) == ["B1.0->Resid End @ 2"]
    assert texts(fig) == ["&lt;b&gt;", "end"]
    assert first.domain.y[0] > last.domain.y[1]
    sizes = [graph.domain.y[1] - graph.domain.y[0] for graph in fig.data]
    assert sizes[1] > 2 * sizes[0]
    # The same layer is at the same place in all graphs.
    places = [dict(zip(g.node.label, g.node.x, strict=True)) for g in fig.data]
    assert places[0]["B1.1"] == places[1]["B1.0"]

    fig = draw_seq_graph(model, scores, show_all_seq_pos=True, seq_labels=labels)
    assert texts(fig) == ["&lt;b&gt;", "and", "end"]
    assert len(fig.data) == 2  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="has 2 labels; the graph has 3 positions"):
        draw_seq_graph(model, scores, seq_labels=labels[1:])


def test_top_to_bottom() -> None:
    """Plotly places nodes of a vertical diagram in shares of the wrong side."""
    model = micro_model(seq_len=2)
    fig = draw_seq_graph(model, model.new_prune_scores(1.0), orientation="v")
    assert [graph.orientation for graph in fig.data] == ["v", "v"]
    assert fig.data[0].domain.x[1] < fig.data[1].domain.x[0]
    margin = fig.layout.margin
    width = fig.layout.width - margin.l - margin.r
    length = fig.layout.height - margin.t - margin.b
    for graph in fig.data:
        graph_width = width * (graph.domain.x[1] - graph.domain.x[0])
        along = dict(zip(graph.node.label, graph.node.x, strict=True))
        across = dict(zip(graph.node.label, graph.node.y, strict=True))
        assert along["Unembed"] * graph_width == pytest.approx(length, rel=0.01)
        assert across["Unembed"] * length == pytest.approx(graph_width / 2, rel=0.1)


def test_queries_keys_and_values(gpt2_model: PatchableModel) -> None:
    scores = gpt2_model.circuit_prune_scores(
        edge_dict={
            "Resid Start->A0.1.Q": 1.0,
            "Resid Start->A0.1.K": -2.0,
            "MLP 0->A1.0.V": 4.0,
            "Resid Start->A1.0.V": 0.5,
        }
    )
    (merged,) = draw_seq_graph(gpt2_model, scores).data
    assert set(merged.node.label) == {"Embed", "A0.1", "MLP 0", "A1.0"}
    assert links(merged)["Resid Start->A0.1.K"] == (2.0, NEGATIVE_COLOR)
    assert len(merged.link.value) == 4

    fig = draw_seq_graph(gpt2_model, scores, merge_qkv=False)
    (apart,) = fig.data
    assert ("Embed", "A0.1.K") in ends(apart)
    assert ("A0.1.K", "A0.1") in ends(apart)
    joins = {name: join for name, join in links(apart).items() if join[1] == JOIN_COLOR}
    assert joins == {
        "A0.1.Q": (1.0, JOIN_COLOR),
        "A0.1.K": (2.0, JOIN_COLOR),
        "A1.0.V": (4.5, JOIN_COLOR),
    }
    assert fig.layout.title.text == f"4 of {gpt2_model.n_edges:,} edges"
    assert {"Q", "K", "V", "A0.1"} <= set(apart.node.label)
    x = dict(zip(node_names(apart), apart.node.x, strict=True))
    assert x["Embed"] < x["A0.1.K"] < x["A0.1"] < x["MLP 0"] < x["A1.0.V"] < x["A1.0"]


def test_shared_keys_are_no_heads() -> None:
    """Key 1 of two belongs to the heads 2 and 3, not to head 1."""
    model = patchable_model(llama(), factorized=True, separate_qkv=True)
    scores = model.circuit_prune_scores(
        edges=["Resid Start->A0.1.K", "Resid Start->A0.1.Q"]
    )
    (sankey,) = draw_seq_graph(model, scores).data
    assert ends(sankey) == [("Embed", "A0 group 1"), ("Embed", "A0.1")]


def test_attention_that_is_one_source() -> None:
    adapter = WHOLE_ATTENTION_ADAPTER
    model = patchable_model(gemma2(), True, separate_qkv=True, adapter=adapter)
    scores = model.circuit_prune_scores(edges=["Resid Start->A0.1.K", "A0->MLP 0"])
    (sankey,) = draw_seq_graph(model, scores).data
    assert ends(sankey) == [("Embed", "A0"), ("A0", "MLP 0")]


def test_latents_beside_parallel_attention() -> None:
    saes = sae_model(pythia(), "resid_delta_mlp", load_pretrained=False, n_latents=3)
    model = patchable_model(saes, True, None, separate_qkv=True)
    scores = model.circuit_prune_scores(
        edges=["Resid Start->A0.1.K", "Resid Start->MLP 0", "MLP 0 Latent 2->MLP 1"]
    )
    (sankey,) = draw_seq_graph(model, scores).data
    assert ends(sankey) == [
        ("Embed", "A0.1"),
        ("Embed", "MLP 0"),
        ("MLP 0 Latent 2", "MLP 1"),
    ]
    colors = dict(zip(sankey.node.label, sankey.node.color, strict=True))
    assert colors == {
        "Embed": visualize.END_COLOR,
        "A0.1": visualize.HEAD_COLOR,
        "MLP 0": visualize.MLP_COLOR,
        "MLP 0 Latent 2": visualize.MLP_COLOR,
        "MLP 1": visualize.MLP_COLOR,
    }


def test_no_edges_in_one_diagram() -> None:
    assert list(net_viz(micro_model(), []).node.label) == []  # type: ignore[union-attr]


def test_layer_spacing() -> None:
    model = micro_model()
    scores = model.circuit_prune_scores(edges=["Resid Start->B1.0"])
    (close,) = draw_seq_graph(model, scores).data
    (spaced,) = draw_seq_graph(model, scores, layer_spacing=True).data
    assert close.node.x == pytest.approx([0, 1], abs=0.01)
    assert spaced.node.x == pytest.approx([0, 2 / 3], abs=0.01)


def test_infinite_scores_are_as_wide_as_the_widest() -> None:
    model = micro_model()
    scores = model.circuit_prune_scores(
        edge_dict={"B0.0->B1.0": math.inf, "B0.1->B1.0": -3.0, "B0.1->B1.1": 1.0}
    )
    sankey: Any = net_viz(model, scored_edges(model, scores))
    assert [link[0] for link in links(sankey).values()] == [3.0, 3.0, 1.0]
    assert sankey.link.customdata[0][1] == "score +inf"


def test_a_drawing_goes_through_json() -> None:
    """ACDC's scores too, of which some are infinite: JSON has no number for that."""
    model = micro_model()
    names = {"B0.0->B1.0": math.inf, "B0.1->B1.0": -3.5}
    circuit = drawing(model, model.circuit_prune_scores(edge_dict=names))
    assert {repr(edge): score for edge, score in circuit.edges} == names
    text = json.dumps(circuit.as_data(), allow_nan=False)
    assert Drawing.of_data(json.loads(text)) == circuit


def test_masks_are_drawn_without_scores() -> None:
    model = micro_model()
    assert len(draw_seq_graph(model).data) == 0  # type: ignore[arg-type]
    set_all_masks(model, 0.25)
    (sankey,) = draw_seq_graph(model).data
    assert sankey.link.value == (0.25,) * 13


def test_scores_of_another_model() -> None:
    with pytest.raises(GraphError, match="Were they made for another model"):
        draw_seq_graph(micro_model(), micro_model(seq_len=3).new_prune_scores())


def test_html_file(tmp_path: Path) -> None:
    model = micro_model()
    path = tmp_path / "circuit.html"
    draw_seq_graph(model, model.new_prune_scores(1.0), file_path=path)
    assert "B0.1-\\u003eResid End" in path.read_text()


def test_image_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = micro_model()
    scores = model.new_prune_scores(1.0)
    monkeypatch.setattr(visualize, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="kaleido is not installed.*pip install kaleid"):
        draw_seq_graph(model, scores, file_path=tmp_path / "c.png")

    def no_chrome(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("Kaleido requires Google Chrome\nto be installed.")

    monkeypatch.setattr(visualize, "find_spec", lambda name: True)
    monkeypatch.setattr(go.Figure, "write_image", no_chrome)
    with pytest.raises(ConfigError, match="requires Google Chrome.*plotly_get_chrome"):
        draw_seq_graph(model, scores, file_path=str(tmp_path / "c.svg"))

    def write(fig: go.Figure, path: Path, width: int) -> None:
        path.write_text(f"a figure as {path.suffix}")

    monkeypatch.setattr(go.Figure, "write_image", write)
    draw_seq_graph(model, scores, file_path=tmp_path / "c.pdf")
    assert [path.name for path in tmp_path.iterdir()] == ["c.pdf"]
    assert (tmp_path / "c.pdf").read_text() == "a figure as .pdf"


def test_bad_paths(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="its suffix must be"):
        draw_seq_graph(micro_model(), file_path=tmp_path / "c.docx")
    with pytest.raises(ConfigError, match="there is no folder"):
        draw_seq_graph(micro_model(), file_path=tmp_path / "nowhere" / "c.html")


def test_shown_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = []
    monkeypatch.setattr(go.Figure, "show", lambda fig: shown.append(fig))
    template = pio.templates.default
    model = micro_model()
    draw_seq_graph(model, model.new_prune_scores(1.0))
    assert shown == []
    fig = draw_seq_graph(model, model.new_prune_scores(1.0), display_ipython=True)
    assert shown == [fig]
    assert pio.templates.default == template


def test_only_edges_above_the_threshold_cost_anything() -> None:
    model = micro_model(seq_len=4000)
    scores = model.new_prune_scores(0.001)
    scores["output"][7, 0] = 1.0
    fig = draw_seq_graph(model, scores, 0.5)
    assert list(links(fig.data[0])) == ["Resid Start->Resid End @ 7"]
    assert fig.layout.title.text == "1 of 52,000 edges, |score| ≥ 0.5"
    assert "edge_dict" not in vars(model)


@pytest.mark.slow
def test_a_browser_shows_every_position_and_node(tmp_path: Path) -> None:
    model = patchable_model(gpt2(), True, "last_seq", 3, separate_qkv=True)
    scores = model.circuit_prune_scores(
        edge_dict={
            "Resid Start->A0.1.Q @ 0": 2.0,
            "A0.1->MLP 1 @ 0": -1.0,
            "MLP 1->Resid End @ 0": 1.5,
            "Resid Start->A1.2.K @ 2": 1.0,
            "A1.2->Resid End @ 2": 1.0,
        }
    )
    path = tmp_path / "circuit.html"
    draw_seq_graph(model, scores, display_ipython=False, file_path=str(path))
    check_shown(path)


def test_a_share_that_is_rounded_above_the_whole_is_drawn() -> None:
    share = (0.9, math.nextafter(1.0, 2.0))
    for low, high in (
        visualize._domain(share, "h")["y"],
        visualize._domain(share, "v")["x"],
    ):
        assert 0.0 <= low < high <= 1.0

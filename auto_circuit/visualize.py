"""Figures of circuits: Sankey diagrams, one for every token position.

Time runs from left to right: embeddings, the layers, the output. A link is an edge, as wide
as its |score|; blue where the score is positive (patching the edge lowers the task's
metric), red where it is negative.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from html import escape
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, overload

import plotly.graph_objects as go

from auto_circuit.checks import checked
from auto_circuit.circuit_files import ScoredEdge, scored_edges
from auto_circuit.errors import ConfigError, FileError, GraphError
from auto_circuit.files import path_in_folder, write_text, written_whole
from auto_circuit.published_names import published_name as __getattr__  # noqa: F401
from auto_circuit.types import Component, DestNode, Edge, PruneScores, SrcNode
from auto_circuit.utils.component_links import component_srcs
from auto_circuit.utils.patchable_model import PatchableModel

Orientation = Literal["h", "v"]
_Column = tuple[int, int]
"""(graph layer, 0 for a head's query, key or value and 1 for all other nodes)"""

POSITIVE_COLOR = "rgba(31, 100, 190, 0.45)"
NEGATIVE_COLOR = "rgba(205, 45, 45, 0.45)"
POSITIVE_TEXT, NEGATIVE_TEXT = "rgb(31, 100, 190)", "rgb(205, 45, 45)"
JOIN_COLOR = "rgba(150, 150, 150, 0.35)"
"""Links between a head and its own query, key and value."""
END_COLOR, HEAD_COLOR, MLP_COLOR = "rgb(105, 110, 120)", "rgb(115, 140, 170)", "#c9974d"
STREAM_KINDS = ("embed", "unembed", "residual mid", "residual post")
TEXT_COLOR = "rgb(40, 40, 40)"
EMPTY_COLOR, BORDER_COLOR = "rgb(150, 150, 150)", "rgb(230, 230, 230)"

FULL_SIZE = 560
"""Pixels of one graph, and of all positions' links where each has one."""
NODE_PAD: dict[Orientation, int] = {"h": 16, "v": 40}
"""Pixels between nodes of one layer, so that their labels do not overlap."""
LENGTH = 820
"""Pixels along the layers, where they run from top to bottom."""
IMAGE_WIDTH = 1400
MAX_WIDTH, LEAST_OF_LINKS = 1000, 0.2
"""Pixels of a vertical figure; it is wider only if its links would be thinner than that share."""
SIDE_MARGIN = 30
LAST_STEP, FEW_COLUMNS = 0.5, 6
"""By how much the last step between two columns is longer than the others, of so many more."""
MAX_LABEL = 16
"""The most letters of a position's label."""
EMPTY_SIZE, MIN_SIZE = 16, 40
"""Pixels of a position's graph, however little is in it."""
GAP = 24
"""Pixels between the graphs of two positions."""
IMAGE_SUFFIXES = (".png", ".svg", ".pdf", ".jpeg", ".webp")


@checked
def draw_seq_graph(
    model: PatchableModel,
    prune_scores: PruneScores | None = None,
    score_threshold: int | float = 0.0,
    show_all_seq_pos: bool = False,
    seq_labels: Sequence[str] | None = None,
    layer_spacing: bool = False,
    orientation: Orientation = "h",
    display_ipython: bool = False,
    file_path: Path | str | None = None,
    *,
    merge_qkv: bool = True,
) -> go.Figure:
    """A circuit as Sankey diagrams: one, or one for each token position.

    prune_scores: their edges with |score| >= `score_threshold`, and not 0, are drawn.
        None: the current values of the masks, inside `patch_mode` for example.
    show_all_seq_pos: draw positions without edges too.
    seq_labels: a name for each position (`dataloader.seq_labels`).
    layer_spacing: a column for every layer of the model, empty ones too.
    orientation: "h": layers from left to right; "v": from top to bottom.
    display_ipython: also show the figure (in a notebook, or the browser).
    file_path: where to write it: `.html` always works, `.png`, `.svg` and `.pdf` need
        kaleido and Chrome. Relative to the working directory.
    merge_qkv: a head is one node. False: its query, key and value have their own. Keys
        and values that several heads share are a node of their own, "A0 group 1".

    A position's height is proportional to the total of its |score|s, but for a minimum.
    Raises GraphError for scores that do not fit the model, ConfigError for wrong labels
    and for a file that cannot be written, before drawing.

    Nothing is shown or written unless asked for; a circuit without edges is a figure that
    says so.
    """
    path = None if file_path is None else _checked_path(file_path)
    circuit = drawing(model, prune_scores, score_threshold, seq_labels)
    fig = draw(circuit, show_all_seq_pos, layer_spacing, orientation, merge_qkv)
    if path is not None:
        _write(fig, path)
    if display_ipython:
        fig.show()
    return fig


@dataclass(frozen=True)
class Drawing:
    """What a figure shows of a circuit, as data: it needs no model any more.

    edges: those that are drawn, with their scores. readers: destination name -> the node
    that reads there. layers: of all nodes. labels: of the positions, if they are told apart.
    selection: in words, which of the circuit's edges are drawn, if not all.
    """

    edges: tuple[ScoredEdge, ...]
    readers: Mapping[str, str]
    layers: frozenset[int]
    labels: tuple[str, ...] | None
    n_graph_edges: int
    selection: str = ""

    def strongest(self, n_edges: int) -> Drawing:
        """At most so many edges: those with the largest |score|, the first ones of equals."""
        if len(self.edges) <= n_edges:
            return self
        ranked = sorted(self.edges, key=lambda scored: -abs(scored[1]))
        return replace(
            self,
            edges=tuple(sorted(ranked[:n_edges])),
            selection=f", the strongest of a circuit of {len(self.edges):,}",
        )

    def as_data(self) -> dict[str, Any]:
        """Plain data (JSON): `of_data` makes the same drawing of it.

        "edges" are [index of the source in "nodes", of the destination, position, score],
        a score that is infinite as "inf" or "-inf", which JSON has no numbers for.
        """
        nodes = sorted({node for edge, _ in self.edges for node in (edge.src, edge.dest)})
        index = {node: i for i, node in enumerate(nodes)}
        return {
            "nodes": [asdict(node) for node in nodes],
            "edges": [
                [index[edge.src], index[edge.dest], edge.seq_idx, _plain(score)]
                for edge, score in self.edges
            ],
            "readers": dict(self.readers),
            "layers": sorted(self.layers),
            "labels": self.labels,
            "n_graph_edges": self.n_graph_edges,
            "selection": self.selection,
        }

    @classmethod
    def of_data(cls, data: Mapping[str, Any]) -> Drawing:
        """The drawing that `as_data` gave."""
        nodes = [_node_of_data(node) for node in data["nodes"]]
        edges = [
            (Edge(nodes[src], nodes[dest], seq_idx), float(score))
            for src, dest, seq_idx, score in data["edges"]
        ]
        labels = data["labels"]
        return cls(
            edges=tuple(edges),
            readers=data["readers"],
            layers=frozenset(data["layers"]),
            labels=None if labels is None else tuple(labels),
            n_graph_edges=data["n_graph_edges"],
            selection=data["selection"],
        )


def _plain(score: float) -> float | str:
    return score if math.isfinite(score) else str(score)


def _node_of_data(data: Mapping[str, Any]) -> Any:
    component, heads = data["component"], data["heads"]
    read = {
        "component": None if component is None else Component(**component),
        "heads": None if heads is None else tuple(heads),
    }
    return (SrcNode if "src_idx" in data else DestNode)(**{**data, **read})


@checked
def drawing(
    model: PatchableModel,
    prune_scores: PruneScores | None = None,
    score_threshold: int | float = 0.0,
    seq_labels: Sequence[str] | None = None,
) -> Drawing:
    """What `draw` needs to know of a circuit. Parameters and errors: `draw_seq_graph`'s."""
    labels = _position_labels(model, seq_labels)
    if prune_scores is None:
        prune_scores = _current_masks(model)
    has_threshold = score_threshold > 0
    scored = scored_edges(model, prune_scores, score_threshold)
    drawn = [(edge, score) for edge, score in scored if not edge.is_crossing]
    selection = f", |score| \u2265 {score_threshold:.3g}" if has_threshold else ""
    if len(drawn) < len(scored):
        selection += f", without {len(scored) - len(drawn):,} edges through attention"
    return Drawing(
        edges=tuple(drawn),
        readers=_readers(model),
        layers=frozenset(node.layer for node in model.nodes),
        labels=None if model.seq_len is None else tuple(labels),
        n_graph_edges=model.n_edges,
        selection=selection,
    )


@checked
def draw(
    circuit: Drawing,
    show_all_seq_pos: bool = False,
    layer_spacing: bool = False,
    orientation: Orientation = "h",
    merge_qkv: bool = True,
) -> go.Figure:
    """The Sankey diagrams of a circuit: see `draw_seq_graph`."""
    labels = circuit.labels or ()
    all_positions = [None] if circuit.labels is None else range(len(labels))
    graphs: dict[int | None, list[_Link]] = {
        seq_idx: [] for seq_idx in all_positions if show_all_seq_pos
    }
    style = _LinkStyle(circuit.readers, _widest(circuit.edges), merge_qkv)
    for seq_idx, group in groupby(circuit.edges, key=lambda scored: scored[0].seq_idx):
        graphs[seq_idx] = _links(list(group), style)
    layers = circuit.layers if layer_spacing else ()
    fig = _figure(graphs, layers, labels, orientation)
    fig.update_layout(title=_title(circuit))
    if not circuit.edges:
        _say_empty(fig)
    return fig


def _current_masks(model: PatchableModel) -> PruneScores:
    if model.patch_session is None and model.masks_are_put_back():
        assert model.masks_put_back is not None
        raise GraphError(
            model.masks_put_back.explanation(
                "To draw them, call this inside of the context; or draw the edges: "
                "`draw_seq_graph(model, model.circuit_prune_scores(edges))`."
            )
        )
    return model.current_patch_masks_as_prune_scores()


def node_name(n: str, unembed: bool = False) -> str:
    """What auto-circuit's figures call a node: a head is one node, the last has no name.

    unembed: call the last node "Unembed", as in vertical figures.
    """
    if n == "Resid End":
        return "Unembed" if unembed else ""
    if n == "Resid Start":
        return "Embed"
    return n[:-2] if n.endswith((".Q", ".K", ".V")) else n


@overload
def net_viz(
    model: PatchableModel,
    seq_edges: Sequence[ScoredEdge],
    *,
    layers: Collection[int] = (),
    merge_qkv: bool = True,
) -> go.Sankey: ...


@overload
def net_viz(
    model: PatchableModel,
    seq_edges: Collection[Edge],
    prune_scores: PruneScores | None,
    vert_interval: tuple[int | float, int | float],
    seq_idx: int | None = None,
    score_threshold: int | float = 1e-2,
    layer_spacing: bool = False,
    orientation: Orientation = "h",
    *,
    merge_qkv: bool = True,
) -> tuple[go.Sankey, int]: ...


@checked
def net_viz(
    model: PatchableModel,
    seq_edges: Collection[Any],
    prune_scores: PruneScores | None = None,
    vert_interval: tuple[int | float, int | float] | None = None,
    seq_idx: int | None = None,
    score_threshold: int | float = 1e-2,
    layer_spacing: bool = False,
    orientation: Orientation = "h",
    *,
    layers: Collection[int] = (),
    merge_qkv: bool = True,
) -> go.Sankey | tuple[go.Sankey, int]:
    """One Sankey diagram of some edges, as high as `vert_interval` of its figure.

    seq_edges: the edges; or edges with their scores (`circuit_files.scored_edges`), then
        without scores and interval, and only the diagram is returned.
    prune_scores: their scores. None: the masks, as in `draw_seq_graph`.
    vert_interval: where in the figure it stands, from 0 (bottom) to 1.
    seq_idx: not needed: edges know their positions. Raises GraphError if they have others.
    score_threshold: edges with a smaller |score| are left out, and those with the score 0.
    layer_spacing: a column for every layer, empty ones too. layers: for these.
    orientation, merge_qkv: see `draw_seq_graph`.

    Returns the diagram and its number of columns. A link's value is its |score|, its
    `customdata` [edge name, score as text]; auto-circuit showed activations there. A node is
    as high as all that goes in, or all that goes out, whichever is more. Infinite scores are
    as wide as the largest finite one.
    """
    if vert_interval is None:
        edges: list[ScoredEdge] = list(seq_edges)
        return _diagram(model, edges, layers, orientation, merge_qkv)
    wanted = set(seq_edges)
    for edge in wanted:
        if seq_idx is not None and edge.seq_idx != seq_idx:
            raise GraphError(f"{edge!r} is not at the position `seq_idx` = {seq_idx}.")
    scores = _current_masks(model) if prune_scores is None else prune_scores
    edges = [
        (edge, score)
        for edge, score in scored_edges(model, scores, score_threshold)
        if edge in wanted
    ]
    used = {layer for edge, _ in edges for layer in (edge.src.layer, edge.dest.layer)}
    used |= {node.layer for node in model.nodes} if layer_spacing else set()
    sankey = _diagram(model, edges, used if layer_spacing else (), orientation, merge_qkv)
    low, high = vert_interval
    return sankey.update(domain={"x": [0.0, 1.0], "y": [low, high]}), len(used)


def _diagram(
    model: PatchableModel,
    edges: Sequence[ScoredEdge],
    layers: Collection[int],
    orientation: Orientation,
    merge_qkv: bool,
) -> go.Sankey:
    links = _links(edges, _LinkStyle(_readers(model), _widest(edges), merge_qkv))
    size = _size(links, 1.0, orientation)
    return _sankey(links, _columns(links, layers), size, orientation)


def _sankey(
    links: Sequence[_Link],
    columns: Mapping[_Column, float],
    size: int | float,
    orientation: Orientation,
) -> go.Sankey:
    """size: the diagram's pixels across the layers."""
    pad: int | float = NODE_PAD[orientation]
    vertices, scale = _placed(links, columns, pad / size)
    widened = _padding(links, vertices, scale * size, size, pad)
    # Plotly turns a vertical diagram only after it has placed the nodes, so it takes a
    # place along the layers as a share of the diagram's width, and vice versa.
    stretch = 1.0 if orientation == "h" else LENGTH / size
    idxs = {name: idx for idx, name in enumerate(vertices)}
    placed = list(vertices.values())
    return go.Sankey(
        orientation=orientation,
        # To snap, plotly would move the nodes apart by the widened space.
        arrangement="snap" if widened == pad else "freeform",
        textfont={"size": 12, "color": TEXT_COLOR},
        node={
            "label": [_label(name, vertex.kind) for name, vertex in vertices.items()],
            "x": [vertex.x * stretch for vertex in placed],
            "y": [vertex.y / stretch for vertex in placed],
            "color": [_node_color(vertex.kind) for vertex in placed],
            "pad": widened,
            "thickness": 12,
            "line": {"width": 0},
            "customdata": [[name, v.n_in, v.n_out] for name, v in vertices.items()],
            "hovertemplate": "%{customdata[0]}<br>%{customdata[1]} edges in, "
            "%{customdata[2]} out<extra></extra>",
        },
        link={
            "source": [idxs[link.start.name] for link in links],
            "target": [idxs[link.stop.name] for link in links],
            "value": [link.value for link in links],
            "color": [link.color for link in links],
            "label": [link.name for link in links],
            "customdata": [[link.name, link.text] for link in links],
            "hovertemplate": "%{customdata[0]}<br>%{customdata[1]}<extra></extra>",
        },
    )


# ------------------------------------------------------------------- nodes and links


@dataclass(frozen=True)
class _End:
    """Where a link starts or stops: a node, in its column of the figure.

    kind: of the node's component.
    """

    name: str
    column: _Column
    kind: str | None


@dataclass(frozen=True)
class _Link:
    name: str
    start: _End
    stop: _End
    value: float
    color: str
    text: str
    is_edge: bool = True


@dataclass
class _Vertex:
    """A node in the figure. x, y: its centre, in (0, 1); value: its height."""

    column: _Column
    kind: str | None
    n_in: int = 0
    n_out: int = 0
    value_in: float = 0.0
    value_out: float = 0.0
    x: float = 0.0
    y: float = 0.5
    inputs: list[tuple[str, float]] = field(default_factory=list)

    @property
    def value(self) -> float:
        return max(self.value_in, self.value_out)


@dataclass(frozen=True)
class _LinkStyle:
    """readers: destination name -> the node that reads there. widest: of all links."""

    readers: Mapping[str, str]
    widest: float
    merge_qkv: bool


def _readers(model: PatchableModel) -> dict[str, str]:
    """Destination name -> its node: the head "A0.1" for its query "A0.1.Q"."""
    return {dest.name: _reader(dest, fed) for dest, fed in component_srcs(model).items()}


def _reader(dest: DestNode, fed: Sequence[SrcNode]) -> str:
    own = [src for src in fed if src.heads in (None, dest.heads)]
    if len(own) == 1:  # a head, an MLP, or attention that writes as one node
        return own[0].name
    if fed and dest.heads is not None and len(dest.heads) > 1 and dest.component:
        return f"A{dest.component.block} group {dest.head_idx}"
    return dest.name


def _widest(edges: Sequence[ScoredEdge]) -> float:
    sizes = [abs(score) for _, score in edges if math.isfinite(score)]
    return max(sizes, default=1.0)


def _links(edges: Sequence[ScoredEdge], style: _LinkStyle) -> list[_Link]:
    links = []
    # What a node is when it is read decides its column: in unfactorized graphs the
    # residual stream is a destination in one layer and a source in the next.
    read_in = {style.readers[edge.dest.name]: edge.dest.layer for edge, _ in edges}
    joined: dict[_End, _End] = {}
    for edge, score in edges:
        src, dest = edge.src.name, edge.dest
        start = _End(src, (read_in.get(src, edge.src.layer), 1), edge.src.kind)
        stop = _End(style.readers[dest.name], (dest.layer, 1), dest.kind)
        if not style.merge_qkv and dest.head_input is not None:
            head, stop = stop, _End(dest.name, (dest.layer, 0), dest.kind)
            joined[stop] = head
        links.append(
            _Link(
                name=repr(edge),
                start=start,
                stop=stop,
                value=min(abs(score), style.widest),
                color=POSITIVE_COLOR if score > 0 else NEGATIVE_COLOR,
                text=f"score {score:+.4g}",
            )
        )
    return links + _joins(links, joined)


def _joins(links: Sequence[_Link], joined: Mapping[_End, _End]) -> list[_Link]:
    """From every query, key and value to its head, as wide as what it reads."""
    totals: dict[_End, float] = defaultdict(float)
    for link in links:
        totals[link.stop] += link.value
    return [
        _Link(
            name=end.name,
            start=end,
            stop=head,
            value=totals[end],
            color=JOIN_COLOR,
            text=f"reads a total |score| of {totals[end]:.4g}",
            is_edge=False,
        )
        for end, head in joined.items()
    ]


def _columns(links: Sequence[_Link], layers: Collection[int]) -> dict[_Column, float]:
    """The place of each column, in (0, 1), along the layers."""
    used = {end.column for link in links for end in (link.start, link.stop)}
    used |= {(layer, 1) for layer in layers}
    # Plotly takes 0 for "no place given".
    # The last name stands left of its node, and needs room beside the name before it.
    longer = LAST_STEP if len(used) > FEW_COLUMNS else 0.0
    step = 0.998 / max(1, len(used) - 1 + longer)
    places = {column: 0.001 + step * idx for idx, column in enumerate(sorted(used))}
    return {**places, max(places): 0.999} if len(places) > 1 else places


def _placed(
    links: Sequence[_Link], columns: Mapping[_Column, float], pad: float
) -> tuple[dict[str, _Vertex], float]:
    """The nodes of the links and their places, and how high a value of 1 is.

    pad: between them. Heights are shares of the whole.
    """
    vertices = _vertices(links)
    by_column = sorted(vertices.items(), key=lambda item: item[1].column)
    groups = [
        [name for name, _ in group]
        for _, group in groupby(by_column, key=lambda item: item[1].column)
    ]
    scale = min(
        (
            (1 - (len(names) - 1) * pad) / sum(vertices[name].value for name in names)
            for names in groups
        ),
        default=1.0,
    )
    for names in groups:
        for name in names:
            vertices[name].y = _middle_of_inputs(vertices, name)
        names.sort(key=lambda name: vertices[name].y)
        _stack([vertices[name] for name in names], scale, pad)
        for name in names:
            vertices[name].x = columns[vertices[name].column]
    return vertices, scale


def _padding(
    links: Sequence[_Link],
    vertices: Mapping[str, _Vertex],
    scale: float,
    size: int | float,
    pad: int | float,
) -> int | float:
    """The space between nodes with which plotly makes them as high as they were placed.

    Plotly makes a value of 1 as high as the fullest of its own columns lets it, which are not
    ours. Where ours are fuller, wider spaces in its columns leave less for the nodes. For
    example 100 pixels, scale 3 and a column of two nodes with a value of 20: with a space of
    16 they would be 84 / 20 = 4.2 high, with one of 100 - 3 * 20 = 40 they are 3.
    scale: pixels of a value of 1, as placed.
    """
    columns = _plotly_columns(links)
    sums = [(len(c), sum(vertices[name].value for name in c)) for c in columns]
    if not all((size - (n - 1) * pad) / total > scale for n, total in sums):
        return pad
    wider = ((size - scale * total) / (n - 1) for n, total in sums if n > 1)
    return max(pad, min(wider, default=pad))


def _plotly_columns(links: Sequence[_Link]) -> list[list[str]]:
    """Plotly's columns: by the longest way to a node; those that lead nowhere in the last."""
    stops: dict[str, set[str]] = defaultdict(set)
    for link in links:
        stops[link.start.name].add(link.stop.name)
        stops[link.stop.name] |= set()
    depth: dict[str, int] = {}
    reached, step = set(stops), 0
    while reached:
        depth.update(dict.fromkeys(reached, step))
        reached = {stop for name in reached for stop in stops[name]}
        step += 1
    columns: dict[int, list[str]] = defaultdict(list)
    for name, after in stops.items():
        columns[depth[name] if after else step - 1].append(name)
    return list(columns.values())


def _vertices(links: Sequence[_Link]) -> dict[str, _Vertex]:
    vertices: dict[str, _Vertex] = {}
    for link in links:
        start = _vertex(vertices, link.start)
        stop = _vertex(vertices, link.stop)
        start.value_out += link.value
        stop.value_in += link.value
        start.n_out += link.is_edge
        stop.n_in += link.is_edge
        stop.inputs.append((link.start.name, link.value))
    return vertices


def _vertex(vertices: dict[str, _Vertex], end: _End) -> _Vertex:
    return vertices.setdefault(end.name, _Vertex(end.column, end.kind))


def _middle_of_inputs(vertices: Mapping[str, _Vertex], name: str) -> float:
    """Where a node's links come from on average: to be there keeps them short."""
    inputs = vertices[name].inputs
    total = sum(value for _, value in inputs)
    if total == 0:
        return 0.5
    return sum(vertices[start].y * value for start, value in inputs) / total


def _stack(column: Sequence[_Vertex], scale: float, pad: float) -> None:
    """Place nodes near where they want to be, in this order, without overlap."""
    heights = [vertex.value * scale for vertex in column]
    total = sum(heights) + pad * (len(heights) - 1)
    wanted = sum(vertex.y for vertex in column) / len(column) - total / 2
    top = max(0.0, min(wanted, 1 - total))
    for vertex, size in zip(column, heights, strict=True):
        vertex.y = min(max(top + size / 2, 0.001), 0.999)
        top += size + pad


def _label(name: str, kind: str | None) -> str:
    """What stands next to a node."""
    if name.endswith((".Q", ".K", ".V")):  # beside its head, which has the whole name
        return name[-1]
    return {"embed": "Embed", "unembed": "Unembed"}.get(kind or "", name)


def _node_color(kind: str | None) -> str:
    if kind in STREAM_KINDS:
        return END_COLOR
    return MLP_COLOR if kind == "mlp" else HEAD_COLOR


# --------------------------------------------------------------------------- figures


def _figure(
    graphs: Mapping[int | None, Sequence[_Link]],
    layers: Collection[int],
    labels: Sequence[str],
    orientation: Orientation,
) -> go.Figure:
    fig = go.Figure()
    columns = _columns([link for links in graphs.values() for link in links], layers)
    whole = sum(map(_total, graphs.values())) or 1.0
    narrower = 1.0
    if orientation == "v":
        narrower = _narrower(list(graphs.values()))
    sizes = [
        _size(links, _total(links) / whole, orientation, narrower)
        for links in graphs.values()
    ]
    total = max(float(FULL_SIZE) / 2, sum(sizes) + GAP * (len(sizes) - 1))
    offset = 0.0
    for (seq_idx, links), size in zip(graphs.items(), sizes, strict=True):
        share = (offset / total, (offset + size) / total)
        if links:
            sankey = _sankey(links, columns, size, orientation)
            fig.add_trace(sankey.update(domain=_domain(share, orientation)))
        if seq_idx is not None:
            _add_position_label(fig, labels[seq_idx], share, orientation, bool(links))
        offset += size + GAP
        if offset < total:
            _add_border(fig, (offset - GAP / 2) / total, orientation)
    _style(fig, total, labels if None not in graphs else (), orientation)
    return fig


_Share = tuple[float, float]
"""Where a position's graph starts and stops, across the layers, in [0, 1]"""


def _total(links: Sequence[_Link]) -> float:
    return sum((link.value for link in links), start=0.0)


def _size(
    links: Sequence[_Link],
    share: float,
    orientation: Orientation,
    narrower: float = 1.0,
) -> float:
    """A graph's pixels across the layers: for its share of all links, and its nodes.

    narrower: by how much the links are.
    """
    if not links:
        return float(EMPTY_SIZE)
    of_links = MIN_SIZE + FULL_SIZE * share
    return of_links * narrower + _pads(links, orientation)


def _pads(links: Sequence[_Link], orientation: Orientation) -> int:
    """Pixels between the nodes of the fullest layer."""
    ends = {end for link in links for end in (link.start, link.stop)}
    most_nodes = max(Counter(end.column for end in ends).values())
    return NODE_PAD[orientation] * (most_nodes - 1)


def _narrower(graphs: Sequence[Sequence[_Link]]) -> float:
    """By how much links have to be, so that a vertical figure is no wider than it should be.

    What is between nodes stays: their names stand there.
    """
    full = [links for links in graphs if links]
    of_links = FULL_SIZE + MIN_SIZE * len(full)
    others = EMPTY_SIZE * (len(graphs) - len(full)) + GAP * (len(graphs) - 1)
    others += sum(_pads(links, "v") for links in full)
    room = MAX_WIDTH - 2 * SIDE_MARGIN - others
    return min(1.0, max(LEAST_OF_LINKS, room / of_links))


def _domain(share: _Share, orientation: Orientation) -> dict[str, list[float]]:
    start, stop = share[0], min(1.0, share[1])  # sums of sizes are rounded
    if orientation == "h":
        return {"x": [0.0, 1.0], "y": [1 - stop, 1 - start]}
    return {"x": [start, stop], "y": [0.0, 1.0]}


def _add_position_label(
    fig: go.Figure, label: str, share: _Share, orientation: Orientation, has_edges: bool
) -> None:
    middle = sum(share) / 2
    place = (
        {"x": 0, "xanchor": "right", "xshift": -12, "y": 1 - middle}
        if orientation == "h"
        else {"x": middle, "y": 1, "yanchor": "bottom", "yshift": 8}
    )
    color = TEXT_COLOR if has_edges else EMPTY_COLOR
    _add_text(fig, escape(_short(label)), 14, color, **place)


def _short(label: str) -> str:
    """Of a long label the beginning, which leaves room for the graph."""
    if len(label) <= MAX_LABEL:
        return label
    return f"{label[: MAX_LABEL - 1]}\u2026"


def _add_border(fig: go.Figure, middle: float, orientation: Orientation) -> None:
    across = (
        {"x0": 0, "x1": 1, "y0": 1 - middle, "y1": 1 - middle}
        if orientation == "h"
        else {"x0": middle, "x1": middle, "y0": 0, "y1": 1}
    )
    line = {"color": BORDER_COLOR, "width": 1}
    fig.add_shape(type="line", xref="paper", yref="paper", line=line, **across)


def _add_text(fig: go.Figure, text: str, size: int, color: str, **place: Any) -> None:
    fig.add_annotation(
        text=text,
        xref="paper",
        yref="paper",
        showarrow=False,
        font={"size": size, "color": color},
        **place,
    )


def _style(
    fig: go.Figure, size: float, labels: Sequence[str], orientation: Orientation
) -> None:
    longest = max((len(_short(label)) for label in labels), default=0)
    left = SIDE_MARGIN + (9 * longest if orientation == "h" else 0)
    margin = {
        "l": left,
        "r": SIDE_MARGIN,
        "t": 95 if orientation == "h" else 125,
        "b": 30,
    }
    fig.update_layout(margin=margin, template="plotly_white")
    if orientation == "h":
        fig.update_layout(height=size + margin["t"] + margin["b"])
    else:
        fig.update_layout(
            width=size + margin["l"] + margin["r"],
            height=LENGTH + margin["t"] + margin["b"],
        )


def _say_empty(fig: go.Figure) -> None:
    _add_text(fig, "This circuit has no edges.", 18, EMPTY_COLOR, x=0.5, y=0.5)
    fig.update_xaxes(visible=False)
    fig.update_yaxes(visible=False)


def _title(circuit: Drawing) -> dict[str, Any]:
    n_edges = f"{len(circuit.edges):,} of {circuit.n_graph_edges:,} edges"
    legend = (
        f'<span style="color:{POSITIVE_TEXT}">\u25a0</span> positive: patching the edge '
        f'hurts   <span style="color:{NEGATIVE_TEXT}">\u25a0</span> negative: it helps'
        "   width: |score|"
    )
    return {
        "text": n_edges + circuit.selection,
        "subtitle": {"text": legend},
        "x": 0.02,
        "xanchor": "left",
        "font": {"size": 18, "color": TEXT_COLOR},
    }


def _position_labels(
    model: PatchableModel, seq_labels: Sequence[str] | None
) -> Sequence[str]:
    if seq_labels is None and model.spans is not None:
        return model.spans.names
    if seq_labels is None:
        return [str(seq_idx) for seq_idx in range(model.seq_len or 0)]
    if model.seq_len is not None and len(seq_labels) != model.seq_len:
        raise ConfigError(
            f"`seq_labels` has {len(seq_labels)} labels; the graph has {model.seq_len} "
            "positions. Use the `seq_labels` of the dataloader that gave its `seq_len`, or "
            "none for a graph with spans, which have names."
        )
    return seq_labels


# ----------------------------------------------------------------------------- files


def _checked_path(file_path: Path | str) -> Path:
    path = Path(file_path)
    if path.suffix not in (".html", *IMAGE_SUFFIXES):
        raise ConfigError(
            f"Cannot write a figure to {path}: its suffix must be .html or one of "
            f"{', '.join(IMAGE_SUFFIXES)}."
        )
    path_in_folder(path)
    if path.suffix != ".html" and find_spec("kaleido") is None:
        raise _no_images(path, "kaleido is not installed")
    return path


def _write(fig: go.Figure, path: Path) -> None:
    if path.suffix == ".html":
        write_text(path, fig.to_html())
        return
    try:
        width: int | None = fig.layout.width  # type: ignore[attr-defined]
        with written_whole(path) as partial:
            fig.write_image(partial, width=width or IMAGE_WIDTH)
    except FileError:
        raise
    except (RuntimeError, ValueError) as error:
        raise _no_images(path, str(error).strip().partition("\n")[0]) from error


def _no_images(path: Path, reason: str) -> ConfigError:
    return ConfigError(
        f"Cannot write the image {path}: {reason}. Images need kaleido and Chrome: "
        "`pip install kaleido`, then `plotly_get_chrome` if Chrome or Chromium is not "
        f"installed. {path.with_suffix('.html').name} needs neither, and its toolbar "
        "saves PNG files."
    )

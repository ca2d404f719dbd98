"""Circuits as files: our own JSON, and the format of the MIB circuit track.

Our JSON names every edge, so that a person can read it and another program can write it:

    {"format": "auto_circuit circuit", "version": 1, "task": "Pocket IOI",
     "model": {"name": "pocket_model", "factorized": true, ...},
     "edges": {"A0.3->A2.0.Q": 0.71, "MLP 3->Resid End": -0.2}}

Our own files also have a "checksum" over all the rest: a file that was damaged, or edited by
hand, is refused (to edit one, take its checksum out). An edge that is not named has the score
0. Where positions have edges of their own, a name ends with its position: "A0.3->A2.0.Q @ 4".
Nothing is pickled; loading a file runs nothing.

The MIB format (Mueller et al. 2025, https://arxiv.org/abs/2504.13151) is that of the
EAP-IG package of M. Hanna: `input`, `a0.h1`, `m0` and `logits` are nodes, `a0.h1->a2.h3<q>`
is an edge. It knows no positions, always tells query, key and value apart, and is always
factorized.
"""

from __future__ import annotations

import io
import json
import math
import sys
import zipfile
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch as t
from torch import Tensor

from auto_circuit.checks import check_number, checked, is_number, shown
from auto_circuit.errors import ConfigError, DataError, GraphError, near_matches
from auto_circuit.files import (
    checksum,
    read_bytes,
    read_json,
    write_bytes,
    write_text,
)
from auto_circuit.ranking import circuit_mask, score_in_dtype, score_tensors
from auto_circuit.types import DestNode, Edge, HeadInput, PruneScores, SrcNode
from auto_circuit.utils.patchable_model import PatchableModel, split_edge_name

FORMAT = "auto_circuit circuit"
VERSION = 1
FIELDS = ("format", "version", "task", "model", "edges", "checksum")

ScoredEdge = tuple[Edge, float]

# ------------------------------------------------------------------ scores <-> edges


@checked
def scored_edges(
    model: PatchableModel, prune_scores: PruneScores, threshold: int | float = 0.0
) -> list[ScoredEdge]:
    """The edges with |score| >= `threshold` (and not 0) and their scores, in order.

    Makes Edges only of these, so it is fast on large graphs. Raises GraphError for
    scores that do not fit the graph, or are not numbers (NaN).
    """
    if threshold != math.inf:  # the edges that ACDC never takes out
        threshold = check_number("threshold", threshold)
    scores = model.in_edge_order(_ranked(model, prune_scores)).double()
    places = ((scores.abs() >= threshold) & (scores != 0)).nonzero()[:, 0]
    edges = map(model.edge_table.edge, places.tolist())
    return list(zip(edges, scores[places].tolist(), strict=True))


def _ranked(model: PatchableModel, prune_scores: PruneScores) -> PruneScores:
    """The scores as tensors; raises GraphError unless they fit and have a rank."""
    prune_scores = model.check_scores(prune_scores)
    for name, scores in prune_scores.items():
        if scores.isnan().any():
            raise GraphError(f"The scores of {name!r} hold NaN, which has no rank.")
    return prune_scores


def _edge_named(model: PatchableModel, name: str) -> Edge:
    """The one edge of a name. Raises GraphError, also if the name lacks its position."""
    _, position = split_edge_name(name)
    if model.seq_len is not None and position is None:
        raise GraphError(
            f"The edge {name!r} has no position, but in this graph each of "
            f'{model.seq_len} positions has its own: "{name} @ 0".'
        )
    (edge,) = model.find_edges(name)
    return edge


# ------------------------------------------------------------------------- our format


@checked
def save_circuit(
    path: Path | str,
    model: PatchableModel,
    circuit: PruneScores | Collection[Edge | str],
    task: str | None = None,
) -> None:
    """Write a circuit, or the scores of all edges, as JSON with named edges.

    circuit: scores, or the edges of a circuit (which get the score 1).
    task: the key of the task that it was found for.

    Edges with score 0 are left out. Raises GraphError if the circuit does not fit the
    model's graph, before anything is written; FileError if the file cannot be written,
    and then one that was there is still there.
    """
    write_document(path, circuit_document(model, circuit, task))


@checked
def circuit_document(
    model: PatchableModel,
    circuit: PruneScores | Collection[Edge | str],
    task: str | None = None,
) -> dict[str, Any]:
    """What `save_circuit` writes, as JSON holds it: data that needs no model any more."""
    if isinstance(circuit, Mapping):
        scores = cast(PruneScores, circuit)
    else:
        scores = model.circuit_prune_scores(edges=circuit)
    dtype = next(iter(model.patch_masks.values())).dtype
    content = {
        "format": FORMAT,
        "version": VERSION,
        "task": task,
        "model": model_fingerprint(model),
        "edges": {
            repr(edge): score if math.isfinite(score) else str(score)
            for edge, score in scored_edges(model, scores)
            if score_in_dtype(f"The score of {edge!r}", score, dtype)
        },
    }
    return content | {"checksum": checksum(content)}


@checked
def write_document(path: Path | str, document: dict[str, Any]) -> None:
    """Write what `circuit_document` gave. Raises FileError if it cannot be written."""
    write_text(path, json.dumps(document, indent=1, allow_nan=False) + "\n")


@checked
def load_circuit(
    path: Path | str, model: PatchableModel, any_model_name: bool = False
) -> PruneScores:
    """The scores that `save_circuit` wrote; 0 for edges that the file does not name.

    any_model_name: accept a file made for a model of another name. Its graph must still
        be the same.

    Raises DataError for a file that is missing, malformed, damaged or of another version,
    GraphError for one made for another model, for edges that the graph does not have and
    for scores that its numbers cannot hold, FileError for what cannot be read.
    """
    document = checked_document(path, read_json(path))
    return document_scores(path, document, model, any_model_name)


@checked
def checked_document(path: Path | str, content: Any) -> dict[str, Any]:
    """What `circuit_document` gave, read back from `path`.

    Raises DataError for what is malformed, damaged or of another version.
    """
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DataError(
            f'{path} is not a circuit file: its "format" is not {FORMAT!r}. Files of '
            "the MIB circuit track are read by `load_mib_circuit`."
        )
    _check_version(path, content)
    return content


@checked
def document_scores(
    path: Path | str,
    document: dict[str, Any],
    model: PatchableModel,
    any_model_name: bool = False,
) -> PruneScores:
    """The scores in a document that was read from `path`: see `load_circuit`."""
    _check_fingerprint(path, document.get("model"), model, any_model_name)
    return _scores_by_name(path, model, document_edges(path, document))


@checked
def document_edges(path: Path | str, document: dict[str, Any]) -> dict[str, float]:
    """Edge's name -> score, as the document names them. Raises DataError."""
    return _named_scores(path, document.get("edges"))


def _check_version(path: Path | str, content: dict[str, Any]) -> None:
    version = content.get("version")
    if version is True or version != VERSION:
        raise DataError(
            f"{path} has format version {shown(version)}; this version of AutoCircuit "
            f"reads version {VERSION}."
        )
    # A field whose name was damaged, the checksum's too, must not be one that is missing.
    for field in content:
        if field not in FIELDS:
            raise DataError(
                f"{path} has the field {shown(field)}, which no circuit file has."
                + near_matches(str(field), FIELDS)
            )
    if "checksum" not in content:
        return
    rest = {key: value for key, value in content.items() if key != "checksum"}
    if content["checksum"] != checksum(rest):
        raise DataError(
            f"{path} is damaged, or was edited by hand: its checksum is not that of its "
            'content. A file written or edited by hand has no "checksum".'
        )


@checked
def model_fingerprint(model: PatchableModel) -> dict[str, Any]:
    """What a circuit's model must have in common with another to fit it, as JSON.

    `name` is the last part of the model's name or path. The weights are not looked at.
    """
    config = getattr(model.wrapped_model, "cfg", None)
    name = getattr(config, "model_name", None) or type(model.wrapped_model).__name__
    sizes = ("n_layers", "n_heads", "n_key_value_heads", "d_model", "d_vocab")
    return {
        "name": Path(str(name)).name,
        "architecture": getattr(config, "architecture", None),
        **{size: getattr(config, size, None) for size in sizes},
        "factorized": model.is_factorized,
        "separate_qkv": model.separate_qkv,
        "seq_len": model.seq_len,
        "n_edges": model.n_edges,
    }


def _check_fingerprint(
    path: Path | str, found: Any, model: PatchableModel, any_model_name: bool
) -> None:
    if not isinstance(found, Mapping):
        raise DataError(f'{path}: "model" must say which model it was made for.')
    expected = model_fingerprint(model)
    differences = [
        f"{key} is {found.get(key)!r}, here {value!r}"
        for key, value in expected.items()
        if found.get(key) != value and not (key == "name" and any_model_name)
    ]
    if differences:
        hint = ""
        if len(differences) == 1 and differences[0].startswith("name is "):
            hint = " If it is the same model, pass `any_model_name=True`."
        raise GraphError(
            f"{path} was made for another model or graph: {'; '.join(differences)}.{hint}"
        )


def _named_scores(path: Path | str, edges: Any) -> dict[str, float]:
    if not isinstance(edges, dict):
        raise DataError(f'{path}: "edges" must map names of edges to scores.')
    return {name: _score(path, name, value) for name, value in edges.items()}


def _score(path: Path | str, name: str, value: Any) -> float:
    """A finite number, or "inf" or "-inf", which JSON has no numbers for."""
    if value in ("inf", "-inf"):
        return float(value)
    if not is_number(value) or not abs(value) <= sys.float_info.max:
        raise DataError(
            f'{path}: the score of {name!r} is {shown(value)}; expected a number, "inf" or '
            '"-inf".'
        )
    return float(value)


def _scores_by_name(
    path: Path | str, model: PatchableModel, named: Mapping[str, float]
) -> PruneScores:
    scores = model.new_prune_scores()
    for name, value in named.items():
        try:
            edge = _edge_named(model, name)
        except GraphError as error:
            raise GraphError(f"{path}: {error}") from None
        of_module = scores[edge.dest.module_name]
        what = f"{path}: the score of {name!r}"
        of_module[edge.patch_idx] = score_in_dtype(what, value, of_module.dtype)
    return scores


# ----------------------------------------------------------------------------- MIB

_MIB_ENDS = {"embed": "input", "unembed": "logits"}
_MIB_LETTERS: dict[HeadInput, str] = {"query": "q", "key": "k", "value": "v"}


@dataclass(frozen=True)
class _MibGraph:
    """A model's graph in MIB's words.

    src_nodes, dst_nodes: names in the order of the .pt file's tensors. places: our
    edge at each (source, destination) that has one. group: query heads per key-value
    head.
    """

    config: dict[str, Any]
    src_nodes: list[str]
    dst_nodes: list[str]
    places: dict[tuple[str, str], Edge]
    group: int

    @property
    def edge_names(self) -> dict[str, tuple[str, str]]:
        return {f"{src}->{dst}": (src, dst) for src, dst in self.places}

    def shared(self, dst_node: str) -> int:
        """How many MIB edges one of our edges into this destination stands for."""
        return self.group if dst_node.endswith(("<k>", "<v>")) else 1


@checked
def save_mib_circuit(
    path: Path | str,
    model: PatchableModel,
    prune_scores: PruneScores,
    edge_count: int | None = None,
) -> None:
    """Write scores and a circuit in the format of the MIB circuit track.

    path: `.json`, or `.pt` for tensors [source, destination].
    edge_count: the circuit ("in_graph") is the edges with this many largest |score|, and
        ties; None: all edges whose score is not 0.

    Positive scores are helpful edges in both. A node is "in_graph" if an edge of the
    circuit touches it; `logits` always is.

    With grouped-query attention MIB gives every query head a key and a value input of
    its own, as `patchable_model(..., ungroup=True)` does: then every score has its place.
    Without, ours has one per key-value head, whose score is split evenly among its query
    heads, so that they add up to it (attribution is a sum); `load_mib_circuit` adds them
    up again. Such circuits have other sizes than MIB's.

    Raises ConfigError for a graph that the format cannot hold: with positions,
    unfactorized, without separate q/k/v or MLPs, or with whole attention layers as
    sources; GraphError for scores that do not fit or are infinite.
    """
    suffix = _mib_suffix(path)
    graph = _mib_graph(model)
    prune_scores = _ranked(model, prune_scores)
    if any(not scores.isfinite().all() for scores in prune_scores.values()):
        raise GraphError(
            "The MIB format has no place for infinite scores (ACDC's, of the edges that it "
            "never takes out): replace them by a number larger than all others, for "
            "example with `{name: of_module.clamp(-1e6, 1e6) for name, of_module in "
            "scores.items()}`. `save_circuit` keeps them."
        )
    circuit = {name: scores != 0 for name, scores in prune_scores.items()}
    if edge_count is not None:
        circuit, _ = circuit_mask(prune_scores, edge_count)
    score_of, is_in_graph = _listed(prune_scores), _listed(circuit)
    rows = {
        (src, dst): (
            float(_at(score_of, edge)) / graph.shared(dst),
            bool(_at(is_in_graph, edge)),
        )
        for (src, dst), edge in graph.places.items()
    }
    touched = {"logits"} | {
        _mib_node(name)
        for place, (_, in_graph) in rows.items()
        for name in place
        if in_graph
    }
    if suffix == ".json":
        content = _mib_json(graph, rows, touched)
        write_text(path, json.dumps(content, allow_nan=False))
    else:
        buffer = io.BytesIO()
        t.save(_mib_tensors(graph, rows, touched), buffer)
        write_bytes(path, buffer.getvalue())


@checked
def load_mib_circuit(
    path: Path | str, model: PatchableModel, in_graph: bool = False
) -> PruneScores:
    """The scores in a file of the MIB circuit track (`.json` or `.pt`).

    in_graph: instead of the scores, 1 for the edges of the circuit and 0 for others.

    Edges that the file leaves out have the score 0. Scores of nodes and neurons are not
    read. Entries of the tensors where there is no edge must be 0 or not finite.
    Grouped-query attention: see `save_mib_circuit`.

    The .pt file is read with `weights_only=True`: loading it runs no code. Raises
    DataError for a malformed file, GraphError for one made for another model or with
    unknown edges, ConfigError for a graph that the format cannot hold.
    """
    suffix = _mib_suffix(path)
    graph = _mib_graph(model)
    content = read_json(path) if suffix == ".json" else _load_tensors(path)
    if not isinstance(content, dict):
        raise DataError(f"{path} is not a MIB circuit: it holds no dictionary.")
    _check_mib_config(path, content.get("cfg"), graph.config)
    read = _read_mib_json if suffix == ".json" else _read_mib_tensors
    totals: dict[Edge, float] = defaultdict(float)
    for src, dst, score, is_in_graph in read(path, content, graph):
        edge = graph.places[src, dst]
        if in_graph:
            totals[edge] = max(totals[edge], float(is_in_graph))
        else:
            totals[edge] += score
    found = model.new_prune_scores()
    for edge, total in totals.items():
        scores = found[edge.dest.module_name]
        what = f"{path}: the score of {edge!r}"
        scores[edge.patch_idx] = score_in_dtype(what, total, scores.dtype)
    return found


def _mib_suffix(path: Path | str) -> str:
    suffix = Path(path).suffix
    if suffix not in (".json", ".pt"):
        raise ConfigError(f"{path}: a MIB circuit is a .json or a .pt file.")
    return suffix


def _listed(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Nested lists, which are much faster to read one by one."""
    return {name: tensor.tolist() for name, tensor in tensors.items()}


def _at(nested: Mapping[str, Any], edge: Edge) -> Any:
    value = nested[edge.dest.module_name]
    for idx in edge.patch_idx:
        value = value[idx]
    return value


# ------------------------------------------------------------- MIB: names and the graph


def _mib_graph(model: PatchableModel) -> _MibGraph:
    # TransformerLens takes seconds to import: only when there is a model of its.
    from auto_circuit.model_utils.transformer_lens_utils import has_parallel_attention

    check_mib_can_hold(model)
    bridge: Any = model.wrapped_model
    config = bridge.cfg
    dests = {name: dest for dest in model.dests for name in _mib_names(dest)}
    places = {
        (src_name, name): Edge(src, dest)
        for name, dest in dests.items()
        for src in model.srcs[model.wrapper(dest.module_name).in_srcs]  # type: ignore[index]
        for src_name in _mib_names(src)
    }
    return _MibGraph(
        config={
            "n_layers": config.n_layers,
            "n_heads": config.n_heads,
            "parallel_attn_mlp": has_parallel_attention(bridge),
            "d_model": config.d_model,
        },
        src_nodes=[name for src in model.srcs for name in _mib_names(src)],
        dst_nodes=_mib_dst_nodes(config.n_layers, config.n_heads),
        places=places,
        # Heads share a key, unless `ungroup=True` gives every one its own.
        group=max(len(dest.heads or ()) for dest in model.dests),
    )


@checked
def check_mib_can_hold(model: PatchableModel) -> None:
    """Raise ConfigError for a graph that the MIB format cannot hold.

    That is one with positions, unfactorized, without separate q/k/v or MLPs, or with whole
    attention layers as sources.
    """
    problem = None
    mlps = [src.component for src in model.srcs if src.kind == "mlp"]
    if not model.is_transformer:
        problem = "is not a transformer's"
    elif model.seq_len is not None:
        problem = "tells positions apart (use `seq_len=None`)"
    elif not model.is_factorized:
        problem = "is not factorized"
    elif not model.separate_qkv:
        problem = "does not tell query, key and value apart (use `separate_qkv=True`)"
    elif not {node.kind for node in model.nodes} <= {"attention", "mlp", *_MIB_ENDS}:
        problem = "has nodes that are no heads, MLPs, input or output (`Node.component`)"
    elif not any(src.heads for src in model.srcs):
        problem = "has whole attention layers as sources, and not their heads"
    elif not mlps:
        problem = "has no MLPs"
    elif len(set(mlps)) < len(mlps):
        problem = "has parts of MLPs, such as an autoencoder's latents, as sources"
    if problem:
        raise ConfigError(
            f"The MIB format cannot hold this graph: it {problem}. `save_circuit` can."
        )


def _mib_names(node: SrcNode | DestNode) -> list[str]:
    """MIB's names of a node: "a0.h1", or for an input of it "a0.h1<q>".

    A key-value head has one for each of its query heads.
    """
    assert node.component is not None
    kind, block = node.component.kind, node.component.block
    if kind in _MIB_ENDS:
        return [_MIB_ENDS[kind]]
    if kind == "mlp":
        return [f"m{block}"]
    head_input = node.head_input if isinstance(node, DestNode) else None
    letter = f"<{_MIB_LETTERS[head_input]}>" if head_input else ""
    return [f"a{block}.h{head}{letter}" for head in node.heads or ()]


def _mib_dst_nodes(n_layers: int, n_heads: int) -> list[str]:
    names = []
    for layer in range(n_layers):
        names += [f"a{layer}.h{head}<{x}>" for x in "qkv" for head in range(n_heads)]
        names.append(f"m{layer}")
    return [*names, "logits"]


def _mib_node(name: str) -> str:
    """The node of a destination: "a0.h1" for "a0.h1<q>"."""
    return name.partition("<")[0]


# ------------------------------------------------------------------ MIB: writing files

_MibRows = Mapping[tuple[str, str], tuple[float, bool]]


def _mib_json(graph: _MibGraph, rows: _MibRows, touched: set[str]) -> dict[str, Any]:
    return {
        "cfg": graph.config,
        "nodes": {
            name: {"in_graph": name in touched} for name in [*graph.src_nodes, "logits"]
        },
        "edges": {
            f"{src}->{dst}": {"score": score, "in_graph": in_graph}
            for (src, dst), (score, in_graph) in rows.items()
        },
    }


def _mib_tensors(graph: _MibGraph, rows: _MibRows, touched: set[str]) -> dict[str, Any]:
    columns = {name: column for column, name in enumerate(graph.dst_nodes)}
    lines = {name: line for line, name in enumerate(graph.src_nodes)}
    scores = t.zeros(len(lines), len(columns))
    in_graph = t.zeros(len(lines), len(columns), dtype=t.bool)
    for (src, dst), (score, is_in_graph) in rows.items():
        scores[lines[src], columns[dst]] = score
        in_graph[lines[src], columns[dst]] = is_in_graph
    return {
        "cfg": graph.config,
        "src_nodes": graph.src_nodes,
        "dst_nodes": graph.dst_nodes,
        "edges_scores": scores,
        "edges_in_graph": in_graph,
        "nodes_in_graph": t.tensor([name in touched for name in graph.src_nodes]),
    }


# ------------------------------------------------------------------ MIB: reading files

_MibRow = tuple[str, str, float, bool]


def _check_mib_config(path: Path | str, found: Any, expected: dict[str, Any]) -> None:
    if not isinstance(found, Mapping):
        raise DataError(f'{path} is not a MIB circuit: it has no "cfg".')
    differences = [
        f"{key} is {found[key]!r}, here {value!r}"
        for key, value in expected.items()
        if key in found and found[key] != value
    ]
    if differences:
        raise GraphError(f"{path} was made for another model: {'; '.join(differences)}.")


def _read_mib_json(path: Path | str, content: Any, graph: _MibGraph) -> Iterator[_MibRow]:
    edges = content.get("edges")
    if not isinstance(edges, dict):
        raise DataError(f'{path} is not a MIB circuit: "edges" must be a dictionary.')
    nodes = content.get("nodes") or {}
    if not isinstance(nodes, (dict, list)):
        raise DataError(f'{path} is not a MIB circuit: "nodes" must be a dictionary.')
    _check_known_nodes(path, nodes, [*graph.src_nodes, "logits"])
    places = graph.edge_names
    for name, entry in edges.items():
        if name not in places:
            raise GraphError(
                f"{path} names the edge {name!r}, which this model does not have."
                + near_matches(name, places)
            )
        if not isinstance(entry, dict) or not isinstance(entry.get("in_graph"), bool):
            raise DataError(
                f'{path}: the edge {name!r} needs {{"score": number, "in_graph": '
                f"true or false}}; found {entry!r}."
            )
        # Files that only list a circuit have no scores.
        score = _finite(path, name, entry.get("score", float(entry["in_graph"])))
        yield (*places[name], score, entry["in_graph"])


def _finite(path: Path | str, name: str, value: Any) -> float:
    score = _score(path, name, value)
    if math.isinf(score):
        raise DataError(f"{path}: the score of {name!r} is {value!r}; it must be finite.")
    return score


def _check_known_nodes(
    path: Path | str, names: Iterable[Any], known: Collection[str]
) -> None:
    for name in names:
        if name not in known:
            raise GraphError(
                f"{path} names the node {name!r}, which this model does not have."
                + near_matches(str(name), known)
            )


def _read_mib_tensors(
    path: Path | str, content: Any, graph: _MibGraph
) -> Iterator[_MibRow]:
    src_nodes, dst_nodes = content.get("src_nodes"), content.get("dst_nodes")
    if not isinstance(src_nodes, list) or not isinstance(dst_nodes, list):
        raise DataError(f'{path}: "src_nodes" and "dst_nodes" must be lists of names.')
    _check_known_nodes(path, src_nodes, graph.src_nodes)
    _check_known_nodes(path, dst_nodes, graph.dst_nodes)
    for names in (src_nodes, dst_nodes):
        doubles = sorted({name for name in names if names.count(name) > 1})
        if doubles:
            raise DataError(f"{path} has the node {doubles[0]!r} twice.")
    shape = (len(src_nodes), len(dst_nodes))
    scores = _matrix(path, content, "edges_scores", shape).tolist()
    membership = _matrix(path, content, "edges_in_graph", shape)
    if not bool(((membership == 0) | (membership == 1)).all()):
        raise DataError(f'{path}: "edges_in_graph" must be true or false everywhere.')
    in_graph = membership.bool().tolist()
    for row, src in enumerate(src_nodes):
        for column, dst in enumerate(dst_nodes):
            score, is_in_graph = scores[row][column], in_graph[row][column]
            if (src, dst) in graph.places:
                name = f"{src}->{dst}"
                yield src, dst, _finite(path, name, score), is_in_graph
            elif is_in_graph or (score != 0 and math.isfinite(score)):
                raise GraphError(
                    f"{path} has an edge from {src!r} to {dst!r}, which this model does "
                    "not have."
                )


def _matrix(path: Path | str, content: Any, name: str, shape: tuple[int, int]) -> Tensor:
    matrix = content.get(name)
    if not isinstance(matrix, Tensor) or tuple(matrix.shape) != shape:
        found = tuple(matrix.shape) if isinstance(matrix, Tensor) else type(matrix)
        raise DataError(
            f'{path}: "{name}" must be a tensor of shape {shape}, [source, destination]; '
            f"found {found}."
        )
    try:
        return score_tensors({name: matrix})[name].to("cpu", t.float64)
    except GraphError as error:
        raise DataError(f"{path}: {error}") from error


def _load_tensors(path: Path | str) -> Any:
    content = read_bytes(path)
    try:
        # torch itself does not look at the checksums that its files have.
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise DataError(f"the checksum of {damaged!r} is wrong")
        return t.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # Damage shows in any of them: KeyError, OSError, ...
        raise DataError(
            f"{path} is not a file of tensors, is damaged, or holds objects that could "
            f"run code, which are not loaded: {error}"
        ) from error

"""From a table of names and places to the edges of a model's graph.

A circuit of a paper is written down as names of nodes ("A9.6", "MLP 0", "Resid End") and
the places in the prompt where their edges count: a word of the prompts (`word_idxs`), a
span between two words, or a number. All positions count from the start of the prompt.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeVar

from auto_circuit.checks import checked
from auto_circuit.errors import ConfigError, GraphError, near_matches
from auto_circuit.types import DestNode, Edge, Node, SrcNode
from auto_circuit.utils.patchable_model import PatchableModel

NO_WORDS: Mapping[str, int] = MappingProxyType({})
QKV = ("Q", "K", "V")
AnyNode = TypeVar("AnyNode", bound=Node)


@dataclass(frozen=True)
class Span:
    """All positions from one word to another."""

    first: str
    last: str
    last_included: bool = True


Place = str | int | Span
Places = Sequence[Place] | None
"""Where edges count; None: at every position."""


@dataclass(frozen=True)
class ModelShape:
    """What the model in which a circuit was found looks like."""

    name: str
    n_layers: int
    n_heads: int
    has_mlps: bool = True

    @property
    def heads(self) -> set[str]:
        """The names of all heads."""
        layers, heads = range(self.n_layers), range(self.n_heads)
        return {f"A{layer}.{head}" for layer in layers for head in heads}

    @property
    def mlps(self) -> set[str]:
        """The names of all MLPs."""
        return set(mlps(0, self.n_layers)) if self.has_mlps else set()


GPT2_SMALL = ModelShape("GPT-2 small", n_layers=12, n_heads=12)


@dataclass(frozen=True)
class PromptPlaces:
    """How places become the graph's positions: the arguments of every circuit.

    token_positions: False: places do not matter, an edge counts at every position.
    word_idxs: word -> its position in the prompt. seq_start_idx: the position in the
    prompt at which the graph's positions start (the length of a shared prefix).
    """

    token_positions: bool
    word_idxs: Mapping[str, int]
    seq_start_idx: int

    def seq_idxs(self, places: Places, seq_len: int | None) -> list[int | None]:
        """The graph's positions that some places mean; [None] without positions.

        Places in the prefix have no edges and drop out. Raises ConfigError for places
        behind the end.
        """
        if seq_len is None:
            return [None]
        if places is None or not self.token_positions:
            return list(range(seq_len))
        found = {
            token_idx - self.seq_start_idx
            for place in places
            for token_idx in self._token_idxs(place)
        }
        if found and max(found) >= seq_len:
            raise ConfigError(
                f"The circuit has edges at position {max(found) + self.seq_start_idx} of "
                f"the prompt, but the graph has {seq_len} positions from "
                f"{self.seq_start_idx} on. Give `word_idxs` and `seq_start_idx` of the "
                "dataloader for which `seq_len` was set."
            )
        return [seq_idx for seq_idx in sorted(found) if seq_idx >= 0]

    def _token_idxs(self, place: Place) -> Collection[int]:
        if isinstance(place, int):
            return [place]
        if isinstance(place, str):
            return [self.word_idxs[place]]
        last = self.word_idxs[place.last] + place.last_included
        return range(self.word_idxs[place.first], last)


@dataclass(frozen=True)
class CircuitGraph:
    """A model's nodes by name, and where a circuit's edges count in it."""

    model: PatchableModel
    srcs: Mapping[str, SrcNode]
    dests: Mapping[str, DestNode]
    prompt: PromptPlaces

    def edges(self, names: Iterable[str], places: Places) -> set[Edge]:
        """The edges with these names. Raises GraphError for one that does not exist."""
        edges: set[Edge] = set()
        for name in names:
            src_name, _, dest_name = name.partition("->")
            found = self.product([src_name], [dest_name], places)
            if not found and self.prompt.seq_idxs(places, self.model.seq_len):
                raise GraphError(
                    f"The circuit has the edge {name!r}, but in this model {src_name} "
                    f"does not run before {dest_name}, so it is another model."
                )
            edges |= found
        return edges

    def product(
        self, src_names: Iterable[str], dest_names: Iterable[str], places: Places
    ) -> set[Edge]:
        """All edges from some nodes to others; those that do not run earlier drop out.

        Raises GraphError for the name of a node that does not exist.
        """
        srcs = [_named(self.srcs, name) for name in src_names]
        dests = [_named(self.dests, name) for name in dest_names]
        seq_idxs = self.prompt.seq_idxs(places, self.model.seq_len)
        return {
            Edge(src, dest, seq_idx)
            for dest in dests
            for src in srcs
            if self.model.edge_table.reads(dest, src)
            for seq_idx in seq_idxs
        }

    def node_circuit(self, heads: Mapping[str, Places]) -> set[Edge]:
        """All edges but those from heads that are not kept.

        heads: the kept heads and where they are kept. What is no head (embeddings, MLPs)
        is kept everywhere: a circuit of heads is tested by ablating the other heads.
        """
        kept: dict[str, Places] = {
            src.name: None for src in self.srcs.values() if src.kind != "attention"
        }
        kept.update(heads)
        edges: set[Edge] = set()
        for src_name, places in kept.items():
            edges |= self.product([src_name], self.dests, places)
        return edges


@checked
def circuit_graph(
    model: PatchableModel,
    shape: ModelShape,
    token_positions: bool,
    word_idxs: Mapping[str, int],
    seq_start_idx: int,
    *,
    words: Collection[str] = (),
    separate_qkv: bool | None = None,
    factorized: bool | None = True,
    prompt_len: int | None = None,
) -> CircuitGraph:
    """The graph of a model in which a circuit can be found.

    words: those that the circuit's places name. separate_qkv, factorized: what the graph
    must be (None: either). prompt_len: the length that prompts must have.

    Raises ConfigError, before anything is built, if the model is another one, if the
    graph is of another kind, or if `word_idxs` lacks a word.
    """
    _check_shape(model, shape)
    _check_kind(model, shape, factorized, separate_qkv)
    if token_positions:
        _check_positions(model, words, word_idxs)
        _check_prompt_len(model, prompt_len, seq_start_idx)
    return CircuitGraph(
        model=model,
        srcs=model.edge_table.srcs_by_name,
        dests=model.edge_table.dests_by_name,
        prompt=PromptPlaces(token_positions, word_idxs, seq_start_idx),
    )


def mlps(first: int, stop: int) -> list[str]:
    """The MLPs of the layers `first` to `stop` - 1."""
    return [f"MLP {layer}" for layer in range(first, stop)]


def head_inputs(heads: Iterable[str], letters: Iterable[str] = QKV) -> list[str]:
    """The query, key or value inputs of some heads."""
    letters = tuple(letters)
    return [f"{head}.{letter}" for head in heads for letter in letters]


def pairs(names: Sequence[str]) -> Iterator[str]:
    """The edges from each node to every later one of a list."""
    for i, src in enumerate(names):
        yield from (f"{src}->{dest}" for dest in names[i + 1 :])


def _named(nodes: Mapping[str, AnyNode], name: str) -> AnyNode:
    if name not in nodes:
        raise GraphError(
            f"The circuit has the node {name!r}, which the graph has not."
            f"{near_matches(name, nodes)}"
        )
    return nodes[name]


def _check_shape(model: PatchableModel, shape: ModelShape) -> None:
    heads = {src.name for src in model.srcs if src.kind == "attention"}
    found_mlps = {src.name for src in model.srcs if src.kind == "mlp"}
    if heads != shape.heads or found_mlps != shape.mlps:
        raise ConfigError(
            f"This circuit was found in {shape.name}, with {shape.n_layers} layers of "
            f"{shape.n_heads} heads and {len(shape.mlps)} MLPs. The graph given has "
            f"{len(heads)} heads and {len(found_mlps)} MLPs, so it is another model, in "
            "which the circuit means nothing. Leave `_true_edge_func` out for it."
        )


def _check_kind(
    model: PatchableModel,
    shape: ModelShape,
    factorized: bool | None,
    separate_qkv: bool | None,
) -> None:
    for name, found, needed in (
        ("factorized", model.is_factorized, factorized),
        ("separate_qkv", model.separate_qkv, separate_qkv),
    ):
        if needed is not None and found != needed:
            raise ConfigError(
                f"This circuit of {shape.name} is one of a graph with `{name}={needed}`; "
                f"this one has `{name}={found}`. Make the model patchable (or the Task) "
                f"with `{name}={needed}`."
            )


def _check_positions(
    model: PatchableModel, words: Collection[str], word_idxs: Mapping[str, int]
) -> None:
    if model.seq_len is None:
        raise ConfigError(
            "`token_positions` is True, but the graph does not tell positions apart. "
            "Make the model patchable with a `seq_len`, or the Task with "
            "`token_circuit=True`."
        )
    missing = [word for word in words if word not in word_idxs]
    if missing:
        raise ConfigError(
            f"The circuit has edges at the words {', '.join(map(repr, missing))}, which "
            f"`word_idxs` lacks; it has {sorted(word_idxs)}. Put them into the "
            '"word_idxs" of the prompt file, or use `token_positions=False`.'
        )


def _check_prompt_len(
    model: PatchableModel, prompt_len: int | None, seq_start_idx: int
) -> None:
    found = (model.seq_len or 0) + seq_start_idx
    if prompt_len is not None and found != prompt_len:
        raise ConfigError(
            f"The circuit is known by position for prompts of {prompt_len} tokens, not "
            f"{found}. Use such prompts, or `token_positions=False`."
        )

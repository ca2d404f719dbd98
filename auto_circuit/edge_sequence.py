"""The edges of a graph, without a list of them.

A graph of a large model has millions of edges, and as many again at every position. All of
them follow from which sources each destination reads, so that an edge's place in their fixed
order, and the edge at a place, are a matter of arithmetic.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from operator import index
from typing import Any, overload

import numpy as np
from ordered_set import OrderedSet
from torch import Tensor

from auto_circuit.errors import GoneError, GraphError, near_matches, nearest_names
from auto_circuit.types import DestNode, Edge, SrcNode

N_SHOWN = 3
"""How many edges a `repr` names."""
N_NEAR_NODES = 8
"""How many sources and destinations are looked at for a name that is nearly an edge's."""
CHANGES = frozenset(
    ("add", "append", "clear", "difference_update", "discard", "extend", "insert")
    + ("intersection_update", "pop", "remove", "reverse", "sort")
    + ("symmetric_difference_update", "update")
)
"""What would change a set or list."""


@dataclass(frozen=True, eq=False)
class EdgeTable:
    """Which sources each destination of a graph reads.

    srcs: source `i` has `src_idx` i. dests: in the graph's order. read: for each of them, the
        indices of its sources. seq_len: how many positions have edges of their own, if any.
    crossings: the ends of crossing edges, which come after all others: by the position that
        they lead to, the end, and the position that they come from.
    """

    srcs: Sequence[SrcNode]
    dests: Sequence[DestNode]
    read: Sequence[range]
    seq_len: int | None
    crossings: Sequence[DestNode] = ()

    @cached_property
    def starts(self) -> list[int]:
        """The place of each destination's first edge, and behind them how many there are."""
        return [0, *accumulate(map(len, self.read))]

    @property
    def n_at_position(self) -> int:
        """How many edges there are at each position, but for crossing ones."""
        return self.starts[-1]

    @property
    def _n_from_srcs(self) -> int:
        """How many edges there are but for crossing ones."""
        return self.n_at_position * len(self.positions)

    @cached_property
    def _crossing_starts(self) -> list[int]:
        """For each position, the place of the first crossing edge that leads to it."""
        if not self.crossings:
            return [self._n_from_srcs]
        n_read = [
            len(self.crossings[0].crossing.srcs_of(i))  # type: ignore[union-attr]
            for i in range(len(self.positions))
        ]
        n_edges = (len(self.crossings) * n for n in n_read)
        return list(accumulate(n_edges, initial=self._n_from_srcs))

    def places_at(self, seq_idx: int | None) -> Sequence[int]:
        """The places of all edges at a position."""
        position, n_each = seq_idx or 0, self.n_at_position
        from_srcs = range(position * n_each, (position + 1) * n_each)
        if not self.crossings:
            return from_srcs
        return [
            *from_srcs,
            *range(*self._crossing_starts[position : position + 2]),
        ]

    @property
    def positions(self) -> Sequence[int | None]:
        """All positions; None if they are not told apart."""
        return [None] if self.seq_len is None else range(self.seq_len)

    @property
    def n_edges(self) -> int:
        """How many edges there are, counted at each position if these are told apart."""
        return self._crossing_starts[-1]

    @cached_property
    def srcs_by_name(self) -> dict[str, SrcNode]:
        """Name -> source."""
        return {src.name: src for src in self.srcs}

    @cached_property
    def dests_by_name(self) -> dict[str, DestNode]:
        """Name -> destination."""
        return {dest.name: dest for dest in self.dests}

    @cached_property
    def _crossings_by_name(self) -> dict[str, DestNode]:
        return {dest.name: dest for dest in self.crossings}

    @cached_property
    def _crossing_idxs(self) -> dict[DestNode, int]:
        return {dest: idx for idx, dest in enumerate(self.crossings)}

    @cached_property
    def _dest_idxs(self) -> dict[DestNode, int]:
        return {dest: idx for idx, dest in enumerate(self.dests)}

    def edge(self, place: int) -> Edge:
        """The edge at a place in the graph's order, from 0 on."""
        if place >= self._n_from_srcs and self.crossings:
            return self._crossing_edge(place)
        position, rest = divmod(place, self.n_at_position)
        # Destinations with 3, 1 and 4 edges start at 0, 3 and 4: place 5 is one of the last,
        # the second of its sources.
        dest_idx = bisect_right(self.starts, rest) - 1
        src_idx = self.read[dest_idx][rest - self.starts[dest_idx]]
        return Edge(self.srcs[src_idx], self.dests[dest_idx], self.positions[position])

    def _crossing_edge(self, place: int) -> Edge:
        position = bisect_right(self._crossing_starts, place) - 1
        rest = place - self._crossing_starts[position]
        dest_idx, src_idx = divmod(rest, len(self._read_across(position)))
        dest = self.crossings[dest_idx]
        assert dest.crossing is not None
        return Edge(dest.crossing.srcs[src_idx], dest, position)

    def _read_across(self, position: int, dest_idx: int = 0) -> Sequence[SrcNode]:
        """What the end of crossing edges reads at a position: of all positions, in order."""
        crossing = self.crossings[dest_idx].crossing
        assert crossing is not None
        return crossing.srcs_of(position)

    def _crossing_place(self, edge: Edge) -> int | None:
        dest_idx, position = self._crossing_idxs.get(edge.dest), edge.seq_idx
        if dest_idx is None or position is None:
            return None
        read = self._read_across(position, dest_idx)
        if edge.src.src_idx >= len(read) or read[edge.src.src_idx] != edge.src:
            return None
        start = self._crossing_starts[position] + dest_idx * len(read)
        return start + edge.src.src_idx

    def place(self, edge: object) -> int | None:
        """Where an edge is in that order; None if it is no edge of the graph."""
        if not isinstance(edge, Edge) or not self.has_position(edge.seq_idx):
            return None
        if edge.is_crossing:
            return self._crossing_place(edge)
        dest_idx = self._dest_idxs.get(edge.dest)
        if dest_idx is None or not self.reads(edge.dest, edge.src):
            return None
        at_position = (edge.seq_idx or 0) * self.n_at_position
        column = edge.src.src_idx - self.read[dest_idx].start
        return int(at_position) + self.starts[dest_idx] + column

    def reads(self, dest: DestNode, src: SrcNode) -> bool:
        """Is there an edge from a source to a destination?"""
        dest_idx = self._dest_idxs.get(dest)
        return (
            dest_idx is not None
            and src.src_idx in self.read[dest_idx]
            and self.srcs[src.src_idx] == src
        )

    def has_position(self, seq_idx: int | None) -> bool:
        """Do edges have this position (None: none)?"""
        return seq_idx in self.positions

    def named(self, name: str, seq_idx: int | None) -> Edge | None:
        """The edge of a name without position, at a position; None if there is none."""
        src_name, _, dest_name = name.partition("->")
        if not self.has_position(seq_idx):
            return None
        across = self._crossings_by_name.get(dest_name)
        if across is not None:
            return self._named_across(src_name, across, seq_idx or 0)
        src, dest = self.srcs_by_name.get(src_name), self.dests_by_name.get(dest_name)
        if src is None or dest is None:
            return None
        return Edge(src, dest, seq_idx) if self.reads(dest, src) else None

    def _named_across(self, src_name: str, dest: DestNode, position: int) -> Edge | None:
        read = self._read_across(position, self._crossing_idxs[dest])
        found = [src for src in read if src.name == src_name]
        return Edge(found[0], dest, position) if found else None

    def hint(self, name: str) -> str:
        """For the end of an error's text: what may be meant by a name that no edge has."""
        src_name, arrow, dest_name = name.partition("->")
        example = self.edge(0).name
        if not arrow:
            return f' The name of an edge is "source->destination", such as "{example}".'
        if not src_name or not dest_name:
            missing = "destination" if src_name else "source"
            return f' It names no {missing}; an edge is, for example, "{example}".'
        if dest_name in self._crossings_by_name:
            return self._crossing_hint(src_name, self._crossings_by_name[dest_name])
        at = self.positions[0]
        if src_name in self.srcs_by_name and dest_name in self.dests_by_name:
            if self.named(name, at) is not None:
                return ""
            return f" There are both nodes, but {dest_name} does not read {src_name}."
        srcs = nearest_names(src_name, self.srcs_by_name, N_NEAR_NODES)
        dests = nearest_names(dest_name, self.dests_by_name, N_NEAR_NODES)
        near = [f"{src}->{dest}" for src in srcs for dest in dests]
        return near_matches(name, [found for found in near if self.named(found, at)])

    def _crossing_hint(self, src_name: str, dest: DestNode) -> str:
        assert dest.crossing is not None
        names = [src.name for src in dest.crossing.srcs]
        if src_name not in names:
            return near_matches(src_name, names)
        return f" In causal attention {dest.name} reads no later position than its own."


class EdgeSequence(Sequence[Edge], AbstractSet[Edge]):
    """Edges of a graph, in its order: a sequence and a set of which no list is kept.

    An edge is made when it is asked for. A slice is a sequence like this one; what is no run
    of edges (the difference of two sets, say) is an OrderedSet. It cannot be changed:
    `OrderedSet(edges)` can, and has all the edges in memory.
    """

    def __init__(self, table: EdgeTable, places: Sequence[int] | None = None) -> None:
        self._table = table
        self._places = range(table.n_edges) if places is None else places

    # ----------------------------------------------------------------- as a sequence

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, item: int) -> Edge: ...
    @overload
    def __getitem__(self, item: slice) -> EdgeSequence: ...
    @overload
    def __getitem__(self, item: Sequence[int]) -> list[Edge]: ...
    def __getitem__(self, item: Any) -> Any:
        """The edge at an index; of a slice, a sequence; of several indices, a list."""
        if isinstance(item, slice):
            return EdgeSequence(self._table, self._places[item])
        if isinstance(item, (Tensor, np.ndarray)):
            item = item.tolist()
        if hasattr(item, "__index__"):
            return self._table.edge(self._places[index(item)])
        if isinstance(item, str) or not isinstance(item, Iterable):
            raise GraphError(
                f"Edges are counted from 0 to {len(self) - 1}, and {item!r:.80} is no whole "
                "number. `model.find_edges(name)` finds an edge by its name."
            )
        return [self[i] for i in item]

    def __iter__(self) -> Iterator[Edge]:
        return map(self._table.edge, self._places)

    def __reversed__(self) -> Iterator[Edge]:
        return map(self._table.edge, reversed(self._places))

    def __contains__(self, edge: object) -> bool:
        place = self._table.place(edge)
        return place is not None and place in self._places

    def index(self, edge: Edge, *limits: int) -> int:  # type: ignore[override]
        """An edge's index. Raises GraphError for one that is not here."""
        place = self._table.place(edge)
        if place is None or place not in self._places:
            raise GraphError(f"The edge {edge!r} is none of these {len(self):,} edges.")
        found = self._places.index(place)
        if found not in range(len(self))[slice(*limits or (None,))]:
            raise GraphError(f"The edge {edge!r} is at {found}, outside of {limits}.")
        return found

    def count(self, edge: object) -> int:
        """1 for an edge that is here, else 0."""
        return int(edge in self)

    def __add__(self, other: Iterable[Edge]) -> list[Edge]:
        return [*self, *other]

    def __radd__(self, other: Iterable[Edge]) -> list[Edge]:
        return [*other, *self]

    # ---------------------------------------------------------------------- as a set

    def __eq__(self, other: object) -> bool:
        """In the same order, if the other one has an order; else, the same set."""
        if not isinstance(other, (Sequence, AbstractSet)) or len(self) != len(other):
            return False
        if isinstance(other, Sequence):
            return all(ours == theirs for ours, theirs in zip(self, other, strict=True))
        return all(edge in self for edge in other)

    @classmethod
    def _from_iterable(cls, it: Iterable[Any]) -> OrderedSet[Any]:  # type: ignore[override]
        return OrderedSet(it)

    def __and__(self, other: Any) -> Any:
        return self.intersection(other)

    def intersection(self, *others: Iterable[Edge]) -> OrderedSet[Edge]:
        """The edges that are in all of them, in this order."""
        return OrderedSet(self).intersection(*map(OrderedSet, others))

    def union(self, *others: Iterable[Edge]) -> OrderedSet[Edge]:
        """The edges that are in any of them."""
        return OrderedSet(self).union(*map(OrderedSet, others))

    def difference(self, *others: Iterable[Edge]) -> OrderedSet[Edge]:
        """The edges that are in none of the others."""
        return OrderedSet(self).difference(*map(OrderedSet, others))

    def symmetric_difference(self, other: Iterable[Edge]) -> OrderedSet[Edge]:
        """The edges that are in one of the two alone."""
        return OrderedSet(self).symmetric_difference(OrderedSet(other))

    def issubset(self, other: Iterable[Edge]) -> bool:
        """Are all of them in the other?"""
        return self <= OrderedSet(other)

    def issuperset(self, other: Iterable[Edge]) -> bool:
        """Are all of the other's here?"""
        return all(edge in self for edge in other)

    def copy(self) -> OrderedSet[Edge]:
        """A set of the same edges, which can be changed."""
        return OrderedSet(self)

    def __getattr__(self, name: str) -> Any:
        if name in CHANGES:
            raise GoneError(
                f"The edges of a graph cannot be changed, so they have no `{name}`. "
                "`model.edges.copy()` is a set of your own, `list(model.edges)` a list."
            )
        raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}")

    def __repr__(self) -> str:
        names = [repr(edge) for edge in self[:N_SHOWN]]
        more = ["..."] if len(self) > N_SHOWN else []
        return f"EdgeSequence({len(self):,}: {', '.join(names + more)})"


class NamedEdges(Mapping[str, Edge]):
    """Name -> edge, at one position."""

    def __init__(self, table: EdgeTable, seq_idx: int | None) -> None:
        self._table = table
        self._seq_idx = seq_idx

    def __getitem__(self, name: str) -> Edge:
        edge = self._table.named(name, self._seq_idx) if isinstance(name, str) else None
        if edge is None:
            raise KeyError(name)
        return edge

    def __iter__(self) -> Iterator[str]:
        places = self._table.places_at(self._seq_idx)
        return (self._table.edge(place).name for place in places)

    def __len__(self) -> int:
        return len(self._table.places_at(self._seq_idx))

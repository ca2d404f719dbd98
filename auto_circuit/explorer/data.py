"""What the explorer shows of a task, as data: its graph, prompts, algorithms and circuits.

All of it is frozen, and plain JSON by `as_data`; `TaskView.of_data` reads it back. Everything
that the explorer ranks is ranked here, by `ranking.py`, and never in the browser.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch as t
from jaxtyping import Float
from torch import Tensor

from auto_circuit.checks import checked
from auto_circuit.errors import DataError, GraphError
from auto_circuit.explorer import plain_data
from auto_circuit.metrics.area_under_curve import (
    curve_interval,
    edges_for_share,
    mean_curve,
)
from auto_circuit.metrics.edge_ranks import best_first
from auto_circuit.metrics.mean_interval import student_975
from auto_circuit.metrics.prune_metrics.prune_metrics import LOGIT_DIFF_PERCENT_METRIC
from auto_circuit.ranking import circuit_mask, desc_prune_scores, score_tensors
from auto_circuit.types import MeasurementRow, Measurements, PruneScores
from auto_circuit.utils.edge_counts import coarse_edge_counts

VERSION = 2

# ------------------------------------------------------------------------------ prompts


@dataclass(frozen=True)
class PromptSide:
    """A prompt, token by token. differs: where its pair's other side has another token."""

    tokens: tuple[str, ...]
    differs: tuple[int, ...]


@dataclass(frozen=True)
class PromptView:
    """A prompt pair as text, without padding, with what is to be answered to the clean one."""

    clean: PromptSide
    corrupt: PromptSide
    answers: tuple[str, ...]
    wrong_answers: tuple[str, ...]


# -------------------------------------------------------------------------------- graph


@dataclass(frozen=True)
class NodeView:
    """A node as it is drawn: a head is one, also if its Q, K and V are told apart.

    layer: the graph's. head: its place sideways, None if it is its block's only node.
    block: the transformer's, None for the first and the last node.
    """

    name: str
    kind: str
    layer: int
    head: int | None
    block: int | None


@dataclass(frozen=True)
class SourceView:
    """A source of the graph. node: which of the drawn ones it is."""

    name: str
    node: int


@dataclass(frozen=True)
class DestinationView:
    """A destination of the graph. node: which of the drawn ones it is.

    module, head, first_source: where its scores are: `scores[module][seq?, head?, source]`,
    the first of which is of the source `first_source`.
    """

    name: str
    node: int
    module: str
    head: int | None
    first_source: int


@dataclass(frozen=True)
class CrossingView:
    """A head that reads keys (or values) of other positions: the ends of its edges there.

    source, name: as in "A0.3.V[4]->A0.3 by value @ 5", without the positions.
    source_node, node: the drawn nodes that are read, and that read.
    module, head: where its scores are: `scores[module][head, pair]`.
    """

    source: str
    name: str
    source_node: int
    node: int
    module: str
    head: int


@dataclass(frozen=True, eq=False)
class GraphView:
    """A graph: its nodes, and its edges in the order of `PatchableModel.edges`.

    src, dest: the edges at one position, as indices of `sources` and `destinations`. With
        positions, each has these edges: edge `e` is `e % len(src)` at the position
        `e // len(src)`.
    n_positions: how many positions have edges of their own; None: they are not told apart.
    position_labels: a name for each. first_token: the prompts' token at the first of them.
    true_edges: the indices of the true edges; None if none are known.
    crossings, pairs: the edges that lead through attention, which come after all others:
        those of each head, in its order, at each pair (to, from) of positions: [pair 2].
    span_texts: where positions are spans, what is in them in the first prompt.
    separate_qkv: are the queries, keys and values of a head destinations of their own?
    """

    nodes: tuple[NodeView, ...]
    sources: tuple[SourceView, ...]
    destinations: tuple[DestinationView, ...]
    src: np.ndarray
    dest: np.ndarray
    n_positions: int | None
    position_labels: tuple[str, ...] | None
    first_token: int
    true_edges: np.ndarray | None
    separate_qkv: bool
    crossings: tuple[CrossingView, ...] = ()
    pairs: np.ndarray | None = None
    span_texts: tuple[str, ...] | None = None

    @property
    def n_edges(self) -> int:
        """How many edges there are, counted at each position."""
        return self.n_from_sources + len(self.crossings) * self.n_pairs

    @property
    def n_from_sources(self) -> int:
        """How many edges come from sources: all but those through attention."""
        return len(self.src) * (self.n_positions or 1)

    @property
    def n_pairs(self) -> int:
        """How many pairs of positions a head's edges through attention join."""
        return 0 if self.pairs is None else len(self.pairs)

    def crossing(self, edge: int | np.integer) -> tuple[CrossingView, int, int] | None:
        """(The head, to, from) of an edge through attention; None for others."""
        place = int(edge) - self.n_from_sources
        if place < 0 or self.pairs is None:
            return None
        head, pair = divmod(place, self.n_pairs)
        to, come_from = self.pairs[pair].tolist()
        return self.crossings[head], to, come_from

    def drawn_ends(self, edge: int | np.integer) -> tuple[int, int]:
        """The drawn nodes that an edge joins, at whichever positions."""
        crossing = self.crossing(edge)
        if crossing is not None:
            return crossing[0].source_node, crossing[0].node
        place = int(edge) % len(self.src)
        src, dest = self.sources[self.src[place]], self.destinations[self.dest[place]]
        return src.node, dest.node

    def edge_name(self, edge: int | np.integer) -> str:
        """The library's name of an edge, such as "A0.1->MLP 2 @ 3"."""
        crossing = self.crossing(edge)
        if crossing is not None:
            head, to, come_from = crossing
            return f"{head.source}[{come_from}]->{head.name} @ {to}"
        position, place = divmod(int(edge), len(self.src))
        src, dest = self.sources[self.src[place]], self.destinations[self.dest[place]]
        at = "" if self.n_positions is None else f" @ {position}"
        return f"{src.name}->{dest.name}{at}"

    def flat_scores(self, prune_scores: PruneScores) -> Float[Tensor, "edges"]:
        """Scores in the order of the edges, in float64.

        Raises GraphError for scores that are not of this graph.
        """
        scores = score_tensors(prune_scores)
        n_sources = np.bincount(self.dest, minlength=len(self.destinations))
        rows = []
        for dest, n_of_dest in zip(self.destinations, n_sources.tolist(), strict=True):
            row = scores.get(dest.module)
            if row is not None and dest.head is not None:
                fits = row.ndim > 1 and row.shape[-2] > dest.head
                row = row[..., dest.head, :] if fits else None
            expected = (n_of_dest,)
            if self.n_positions is not None:
                expected = (self.n_positions, n_of_dest)
            if row is None or tuple(row.shape) != expected:
                raise GraphError(
                    f"The scores do not fit the graph: of the destination {dest.name!r} "
                    f"(module {dest.module!r}) expected {list(expected)} of them."
                )
            rows.append(row.cpu().double())
        from_sources = t.cat(rows, dim=-1).flatten()
        return t.cat([from_sources, *(self._of_head(scores, h) for h in self.crossings)])

    def _of_head(self, scores: PruneScores, head: CrossingView) -> Float[Tensor, "pair"]:
        of_module = scores.get(head.module)
        if of_module is None or of_module.shape[1:] != (self.n_pairs,):
            raise GraphError(
                f"The scores do not fit the graph: of the heads of {head.module!r} expected "
                f"{self.n_pairs} each."
            )
        return of_module[head.head].cpu().double()


# --------------------------------------------------------- what the model does on a prompt


@dataclass(frozen=True, eq=False)
class AttentionView:
    """How much each head attends where, on the first prompt: [head query key], 255 is all.

    nodes: the drawn node of each head.
    """

    nodes: tuple[int, ...]
    clean: np.ndarray
    corrupt: np.ndarray


@dataclass(frozen=True, eq=False)
class SideEffects:
    """What each source adds to logits: [source], [source word].

    answer, wrong_answer: to those of the first answer, and of the first wrong one; None if
        there is no such word.
    words, values: the words whose logits it raises most, falling, and then those that it
        lowers most; indices of `EffectsView.words`, and how much.
    """

    answer: np.ndarray | None
    wrong_answer: np.ndarray | None
    words: np.ndarray
    values: np.ndarray


@dataclass(frozen=True, eq=False)
class EffectsView:
    """Direct effects on the logits at the first prompt's last position.

    What a source writes there, through the final norm (with the scale that it has on the
    whole residual stream) and the unembedding. n_raised: how many words each raises.
    """

    words: tuple[str, ...]
    n_raised: int
    clean: SideEffects
    corrupt: SideEffects


# --------------------------------------------------------------------------- algorithms


@dataclass(frozen=True)
class MeasuredValue:
    """A metric's mean over seeds, and half its 95 % interval; None: not known."""

    mean: float | None
    plus_minus: float | None


@dataclass(frozen=True)
class MeasuredSize:
    """A circuit size that was measured.

    n_edges: of the circuits that were measured. n_drawn: of the mean scores' circuit of that
    size, with all edges that tie with the last one: the first so many of the order.
    values: by metric.
    """

    n_edges: int
    n_drawn: int
    values: dict[str, MeasuredValue]


@dataclass(frozen=True, eq=False)
class AlgorithmView:
    """An algorithm's scores of a graph's edges, and what was measured of its circuits.

    scores: the mean over seeds. plus_minus: half the width of its 95 % interval, the upper 16
        bits of a float32; None for one seed.
    order: the edges by |score|, the largest first; of equal ones the first.
    ties: where in that order edges of equal |score| begin, and how many they are: [tie 2].
    sizes: ascending; without measurements some from 0 edges to all, with no values.
    first_size: which of them is shown first.
    """

    name: str
    n_seeds: int
    scores: np.ndarray
    plus_minus: np.ndarray | None
    order: np.ndarray
    ties: np.ndarray
    sizes: tuple[MeasuredSize, ...]
    first_size: int


@dataclass(frozen=True, eq=False)
class TaskView:
    """What the explorer shows of one task.

    attention, effects: None if the model does not show them; `notes` say why.
    """

    version: int
    key: str
    name: str
    prompts: tuple[PromptView, ...]
    graph: GraphView
    attention: AttentionView | None
    effects: EffectsView | None
    notes: tuple[str, ...] = ()
    algorithms: tuple[AlgorithmView, ...] = ()

    def as_data(self) -> dict[str, Any]:
        """All of it as plain data, as JSON holds it."""
        return plain_data.as_data(self)

    @staticmethod
    def of_data(data: Any) -> TaskView:
        """The view that `as_data` gave this for.

        Raises DataError for anything else, also for a view of another version.
        """
        if isinstance(data, Mapping) and data.get("version") != VERSION:
            raise DataError(
                f"This is a view of version {data.get('version')!r:.40}, and version "
                f"{VERSION} is read here. Make it again."
            )
        return plain_data.of_data(TaskView, data)

    def with_algorithms(self, algorithms: Sequence[AlgorithmView]) -> TaskView:
        """The same task with these algorithms. Raises GraphError for another graph's."""
        for algorithm in algorithms:
            if len(algorithm.scores) != self.graph.n_edges:
                raise GraphError(
                    f"The algorithm {algorithm.name!r} scores {len(algorithm.scores)} "
                    f"edges, and the graph of {self.key!r} has {self.graph.n_edges}."
                )
        return replace(self, algorithms=tuple(algorithms))


@checked
def algorithm_view(
    graph: GraphView,
    name: str,
    seed_scores: Sequence[PruneScores],
    rows: Sequence[MeasurementRow] = (),
) -> AlgorithmView:
    """An algorithm's scores and measured circuits. No model is needed.

    seed_scores: one for each seed. rows: what was measured of its circuits, with one way of
    testing, by any metrics and seeds.
    Raises GraphError for scores that are not of this graph, or are NaN, and for none.
    """
    if not seed_scores:
        raise GraphError(f"There are no scores of the algorithm {name!r}.")
    of_seeds = t.stack([graph.flat_scores(scores) for scores in seed_scores])
    scores = of_seeds.mean(0)
    # Edges that are infinitely good in one seed and bad in another.
    opposed = scores.isnan() & ~of_seeds.isnan().any(0)
    scores = t.where(opposed, t.inf, scores)
    sizes = _sizes(scores, rows)
    order = best_first({"edges": scores}, "absolute")
    return AlgorithmView(
        name=name,
        n_seeds=len(seed_scores),
        scores=scores.float().numpy(),
        plus_minus=_score_intervals(of_seeds),
        order=small_indices(order.numpy(), len(scores)),
        ties=_ties(scores.abs()[order].numpy()),
        sizes=sizes,
        first_size=_first_size(sizes),
    )


def _score_intervals(of_seeds: Float[Tensor, "seed edges"]) -> np.ndarray | None:
    n_seeds = len(of_seeds)
    if n_seeds == 1:
        return None
    half = of_seeds.std(0) / n_seeds**0.5 * student_975(n_seeds - 1)
    bits = half.to(t.bfloat16).view(t.int16).numpy()
    return bits.view(np.uint16)


def small_indices(indices: np.ndarray, count: int) -> np.ndarray:
    """Indices below `count` in the smallest type that the browser reads."""
    return indices.astype(np.uint16 if count <= 2**16 else np.uint32)


def _ties(falling: np.ndarray) -> np.ndarray:
    """[start, length] of each run of two or more equal numbers."""
    starts = np.flatnonzero(np.r_[True, falling[1:] != falling[:-1]])
    lengths = np.diff(np.r_[starts, len(falling)])
    return np.stack([starts, lengths], axis=1)[lengths > 1].astype(np.uint32)


def _sizes(
    scores: Float[Tensor, "edges"], rows: Sequence[MeasurementRow]
) -> tuple[MeasuredSize, ...]:
    values = _measured_values(rows) or {
        size: {} for size in coarse_edge_counts(len(scores))
    }
    edges = {"edges": scores}
    falling = desc_prune_scores(edges)
    return tuple(
        MeasuredSize(size, circuit_mask(edges, size, falling)[1], of_size)
        for size, of_size in sorted(values.items())
    )


def _measured_values(
    rows: Sequence[MeasurementRow],
) -> dict[int, dict[str, MeasuredValue]]:
    """Size -> metric -> value."""
    curves: dict[str, dict[int | None, Measurements]] = {}
    for row in rows:
        of_metric = curves.setdefault(row.metric, {})
        of_metric.setdefault(row.seed, []).append((row.n_edges, row.value))
    values: dict[int, dict[str, MeasuredValue]] = {}
    for metric, of_seeds in curves.items():
        every = list(of_seeds.values())
        points = zip(mean_curve(every), curve_interval(every), strict=True)
        for (size, mean), (_, plus_minus) in points:
            value = MeasuredValue(_known(mean), _known(plus_minus))
            values.setdefault(int(size), {})[metric] = value
    return values


def _first_size(sizes: Sequence[MeasuredSize]) -> int:
    """The smallest from which on all do 80 % of the task; else the one nearest to 100 edges."""
    values = [size.values.get(LOGIT_DIFF_PERCENT_METRIC.key) for size in sizes]
    curve: Measurements = [
        (size.n_edges, value.mean)
        for size, value in zip(sizes, values, strict=True)
        if value is not None and value.mean is not None
    ]
    wanted = edges_for_share(curve, 0.8, target=100, stay=True) if curve else None
    if wanted is None or wanted == sizes[-1].n_edges:
        wanted = 100
    distances = [abs(size.n_edges - wanted) for size in sizes]
    return distances.index(min(distances))


def _known(value: int | float) -> float | None:
    return float(value) if np.isfinite(value) else None

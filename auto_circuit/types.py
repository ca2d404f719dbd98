"""The vocabulary of AutoCircuit: nodes, edges, scores, measurements.

Imports only the standard library, torch and jaxtyping, so that every other module can
import it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import total_ordering
from typing import Any, Literal

from jaxtyping import Shaped
from torch import Tensor
from torch.nn import Module, Parameter

MaskFn = Literal["hard_concrete", "sigmoid"] | None
"""How a mask's raw value becomes the share of an edge that is patched.

`None`: the value itself (0 = the edge carries its current activation, 1 = it is patched).
"""

OutputSlice = Literal["last_seq", "not_first_seq"] | None
AutoencoderInput = Literal["mlp_post_act", "resid_delta_mlp", "resid"]
HeadInput = Literal["query", "key", "value"]
PositionsRead = Literal["own", "earlier", "all"]
"""Which positions an output depends on: its own, the earlier ones too, or all of them."""

COLOR_PALETTE: list[str] = [
    "rgb(31, 100, 190)",
    "rgb(235, 125, 20)",
    "rgb(40, 150, 70)",
    "rgb(225, 95, 165)",
    "rgb(205, 45, 45)",
    "rgb(125, 80, 180)",
    "rgb(125, 85, 65)",
    "rgb(120, 120, 120)",
    "rgb(185, 175, 35)",
]
"""Line colours of the figures, one per algorithm."""


class _TitledEnum(Enum):
    """An Enum whose `str()` is its name in title case, for legends and tables."""

    def __str__(self) -> str:
        return self.name.replace("_", " ").title()


class EdgeCounts(_TitledEnum):
    """How the circuit sizes of a sweep are chosen."""

    ALL = 1
    LOGARITHMIC = 2
    GROUPS = 3
    COARSE = 4


TestEdges = EdgeCounts | list[int | float] | list[int] | list[float]
"""Circuit sizes to test: a rule, numbers of edges (int) or shares of all edges (float)."""


class PatchType(_TitledEnum):
    """Which edges are patched: the circuit's (EDGE) or all the others (TREE).

    With corrupt activations patched into clean prompts, TREE_PATCH is noising; with clean ones
    patched into corrupt prompts, EDGE_PATCH is denoising.
    """

    EDGE_PATCH = 1
    TREE_PATCH = 2


class AblationType(_TitledEnum):
    """Which activations are patched in.

    RESAMPLE (resample ablation, interchange): those of another prompt, the counterfactual.
    ZERO (zero ablation): zeros. The others are mean ablations. TOKENWISE_MEAN_*: the mean at each
    token position over a data set's clean prompts, corrupt prompts, or both.
    BATCH_TOKENWISE_MEAN: the mean at each position over the batch that is patched in.
    BATCH_ALL_TOK_MEAN: the mean over that batch and all of its positions.

    What ZERO takes away depends on where the weights have their biases. A value bias (and
    what the values make of a layer norm's bias) that is folded into the output bias belongs
    to no head and stays; one that is not goes with its head. `load_tl_model` folds them, and
    a Task in another dtype than float32 does not: compare zero ablations of one kind of
    weights only. The other ablations do not depend on it.

    Learned position embeddings (GPT-2) are part of the first source, so that ZERO and the
    mean over positions take them away too. EAP-IG's tools keep them, and so does
    `patchable_model(..., keep_positions=True)`.
    """

    RESAMPLE = 1
    ZERO = 2
    TOKENWISE_MEAN_CLEAN = 3
    TOKENWISE_MEAN_CORRUPT = 4
    TOKENWISE_MEAN_CLEAN_AND_CORRUPT = 5
    BATCH_TOKENWISE_MEAN = 6
    BATCH_ALL_TOK_MEAN = 7

    @property
    def mean_over_dataset(self) -> bool:
        """Is this a mean over a whole data set, the same for every batch?"""
        return self.clean_dataset or self.corrupt_dataset

    @property
    def clean_dataset(self) -> bool:
        """Do the data set's clean prompts enter the mean?"""
        return self in (
            AblationType.TOKENWISE_MEAN_CLEAN,
            AblationType.TOKENWISE_MEAN_CLEAN_AND_CORRUPT,
        )

    @property
    def corrupt_dataset(self) -> bool:
        """Do the data set's corrupt prompts enter the mean?"""
        return self in (
            AblationType.TOKENWISE_MEAN_CORRUPT,
            AblationType.TOKENWISE_MEAN_CLEAN_AND_CORRUPT,
        )


class PatchWrapper(Module, ABC):
    """The stateful module that patches at one node site (see `engine.patch_wrapper`)."""

    module_name: str
    patch_mask: Parameter | None

    @abstractmethod
    def set_mask_batch_size(self, batch_size: int | None) -> None:
        """Give the mask a leading batch dimension, or take it away (None)."""


@dataclass(frozen=True)
class Component:
    """A part of a model that turns what its destinations read into what its sources write.

    kind: "attention" or "mlp" of a block; "embed", which reads nothing of the graph, and
        "unembed", which writes nothing; or any other word.
    block: the block that it is in, from 0 on; None if it is in none.
    positions: which positions of its inputs its output at a position depends on: the "own"
        one, the "earlier" ones too (causal attention), or "all" (bidirectional attention).
        None: not said; what needs to know it then raises GraphError.
    """

    kind: str
    block: int | None = None
    positions: PositionsRead | None = None


@total_ordering
@dataclass(frozen=True, eq=True)
class Node:
    """A place in the computation graph that writes to or reads from the residual stream.

    `layer` orders the graph: an edge always goes to a higher layer. `head_idx` is the
    index along `head_dim` of the module's activation, or None when the module is one
    node. For the keys and values of grouped-query attention it is the index of the
    key-value head, or, ungrouped, of the query head. `weight` and `weight_head_dim` name
    the node's weight matrix.

    `component` is what the node is an input or an output of, and `heads` are those of its
    heads that the node belongs to (None: to all): a destination feeds the sources of the
    same component that share a head with it. Neither counts when nodes are compared. Without
    a `component` (None), a destination and a source belong together if they have the same
    name; where that leaves a node alone in the middle of the graph, what needs to know
    raises GraphError.
    """

    name: str
    module_name: str
    layer: int
    head_idx: int | None = None
    head_dim: int | None = None
    weight: str | None = None
    weight_head_dim: int | None = None
    component: Component | None = field(default=None, kw_only=True, compare=False)
    heads: tuple[int, ...] | None = field(default=None, kw_only=True, compare=False)

    @property
    def kind(self) -> str | None:
        """The kind of the node's component, if it is said."""
        return None if self.component is None else self.component.kind

    @property
    def sort_key(self) -> tuple[int, str, int, int]:
        """(layer, module, head, source index): the fixed order of nodes."""
        head_idx = -1 if self.head_idx is None else self.head_idx
        return (self.layer, self.module_name, head_idx, getattr(self, "src_idx", -1))

    def __lt__(self, other: Node) -> bool:
        return self.sort_key < other.sort_key

    def module(self, model: Any) -> PatchWrapper:
        """The wrapper of `model` (a PatchableModel) that patches at this node."""
        return model.wrapper(self.module_name)

    def __repr__(self) -> str:
        return self.name

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, eq=True, repr=False)
class SrcNode(Node):
    """A node that writes. `src_idx` is its index in the tensors of source activations."""

    src_idx: int = 0


@dataclass(frozen=True, eq=True, repr=False)
class DestNode(Node):
    """A node that reads the sources `min_src_idx`, `min_src_idx` + 1, ...

    `head_input` says which of a head's inputs it is, if each is a destination of its own.
    `reaches_all_heads`: does it change what all heads of its component write, as where a
    norm runs over the queries of all of them?

    `crossing`: if given, the node reads no residual stream but what a head's attention takes
    from all positions (see `Crossing`).
    """

    min_src_idx: int = 0
    head_input: HeadInput | None = field(default=None, kw_only=True, compare=False)
    reaches_all_heads: bool = field(default=False, kw_only=True, compare=False)
    crossing: Crossing | None = field(
        default=None, kw_only=True, compare=False, repr=False
    )


@dataclass(frozen=True)
class Crossing:
    """What a head reads across positions: its own values (or keys) at each of them.

    srcs: the head's value (or key) input at every position; `src_idx` is the position.
    is_causal: does a position read none after itself?

    The edges into one head are numbered by the position that they lead to and then by that
    which they come from. Of 3 positions, causal, that is 0->0, 0->1, 1->1, 0->2, 1->2, 2->2.
    """

    srcs: tuple[SrcNode, ...] = field(repr=False)
    is_causal: bool

    @property
    def n_positions(self) -> int:
        """The number of positions."""
        return len(self.srcs)

    @property
    def n_pairs(self) -> int:
        """The number of edges into one head."""
        return self.pair(self.n_positions, 0)

    def pair(self, reader: int, read: int) -> int:
        """The number of the edge that leads to one position from another."""
        return (
            reader * (reader + 1) // 2 if self.is_causal else reader * self.n_positions
        ) + read

    def srcs_of(self, reader: int) -> tuple[SrcNode, ...]:
        """What a position reads."""
        return self.srcs[: reader + 1] if self.is_causal else self.srcs

    def pairs(self) -> list[tuple[int, int]]:
        """(the position that reads, that which is read) for each edge, in order."""
        return [
            (reader, src.src_idx)
            for reader in range(self.n_positions)
            for src in self.srcs_of(reader)
        ]


@total_ordering
@dataclass(frozen=True, eq=True, repr=False)
class Edge:
    """What one source writes and one destination reads, at one position or at all.

    A crossing edge (`is_crossing`) is what attention carries from one position to another:
    `seq_idx` is where it leads to, and the `src_idx` of its source where it comes from.
    """

    src: SrcNode
    dest: DestNode
    seq_idx: int | None = None

    @property
    def name(self) -> str:
        """The text `source->destination`, without the position."""
        return f"{self.src.name}->{self.dest.name}"

    @property
    def is_crossing(self) -> bool:
        """Does it lead through attention, from one position to another or the same?"""
        return self.dest.crossing is not None

    @property
    def patch_idx(self) -> tuple[int, ...]:
        """The index of the edge in its destination module's mask and scores."""
        crossing = self.dest.crossing
        if crossing is not None:
            assert self.seq_idx is not None and self.dest.head_idx is not None
            return (
                self.dest.head_idx,
                crossing.pair(self.seq_idx, self.src.src_idx),
            )
        seq_idx = () if self.seq_idx is None else (self.seq_idx,)
        head_idx = () if self.dest.head_idx is None else (self.dest.head_idx,)
        return seq_idx + head_idx + (self.src.src_idx - self.dest.min_src_idx,)

    @property
    def sort_key(self) -> tuple[bool, int, int, str, int, int]:
        """(crossing?, position, layer, module, head, source): the fixed order of edges."""
        seq_idx = -1 if self.seq_idx is None else self.seq_idx
        layer, module_name, head_idx, _ = self.dest.sort_key
        return (
            self.is_crossing,
            seq_idx,
            layer,
            module_name,
            head_idx,
            self.src.src_idx,
        )

    def __lt__(self, other: Edge) -> bool:
        return self.sort_key < other.sort_key

    def patch_mask(self, model: Any) -> Parameter:
        """The mask of `model` (a PatchableModel) that holds this edge's entry.

        After `patch_mode(..., edges)` it is again what it was before; in auto-circuit it
        stayed set.
        """
        return model.patch_masks[self.dest.module_name]

    def prune_score(self, prune_scores: Mapping[str, PerEdge]) -> Shaped[Tensor, ""]:
        """This edge's score, or its entry in masks like them."""
        return prune_scores[self.dest.module_name][self.patch_idx]

    def set_prune_score(
        self, prune_scores: Mapping[str, PerEdge], value: int | float
    ) -> None:
        """Write this edge's score into scores, or its entry into masks like them."""
        prune_scores[self.dest.module_name][self.patch_idx] = value

    def __repr__(self) -> str:
        return self.name if self.seq_idx is None else f"{self.name} @ {self.seq_idx}"

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class MeasurementRow:
    """One measured number, with all that is needed to read it on its own.

    `n_edges` is the number of edges really in the circuit; `std` the standard deviation
    over prompts where the metric has one; `n_prompts` the number of prompts measured.
    """

    task: str
    algo: str
    metric: str
    ablation: str
    patch_type: str
    n_edges: int
    value: float
    std: float | None = None
    n_prompts: int | None = None
    seed: int | None = None


BatchKey = int
PerEdge = Shaped[Tensor, "*_seq_head _src"]
"""A value for each edge into the destinations of one module: [seq?, head?, src].

Of crossing edges it is [head, pair]: see `Crossing`.
"""

PruneScores = dict[str, PerEdge]
"""Destination module name -> [seq?, head?, src]: one number per edge.

Positive: patching the edge lowers the task's metric. Algorithms rank edges by |score|.
"""

TaskKey = str
AlgoKey = str
PruneMetricKey = str
Measurements = list[tuple[int | float, int | float]]
"""[(number of edges, value)]"""

BatchOutputs = dict[BatchKey, Tensor]
CircuitOutputs = dict[int, BatchOutputs]
"""{number of edges really in the circuit: {batch key: output}}"""

AlgoPruneScores = dict[AlgoKey, PruneScores]
TaskPruneScores = dict[TaskKey, AlgoPruneScores]
AlgoMeasurements = dict[AlgoKey, Measurements]
TaskMeasurements = dict[TaskKey, AlgoMeasurements]
PruneMetricMeasurements = dict[PruneMetricKey, TaskMeasurements]
AblationMeasurements = dict[AblationType, PruneMetricMeasurements]

"""What the engine must know about a model family, as data.

An adapter says which modules of a model are its source and destination nodes. To support
a new architecture, write one of these in a file of its own and either add it to
`adapters.ADAPTERS` or pass it to `patchable_model(..., adapter=...)`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch as t
from jaxtyping import Float
from torch import Tensor
from torch.nn import Module

from auto_circuit.types import DestNode, HeadInput, SrcNode
from auto_circuit.utils.user_hooks import Bypassed

GraphNodes = tuple[list[SrcNode], list[DestNode]]
HeadVectors = Float[Tensor, "batch head seq d_head"]
"""Keys or values of heads, at the positions of the input (or of a prefix too)."""
Scores = Float[Tensor, "batch head seq _"]
"""For each head and position, a number for what it may attend to."""


@dataclass(frozen=True, eq=False)
class SrcSite:
    """Where the outputs of one module's sources can be seen.

    module: its forward output is what the sources write, [batch seq head? d_model].
    projection: if given, the output of `module` is still to be projected: it holds one
        part of the last dimension for each head, and head `h` writes
        `part[h] @ projection(n_heads)[h]`. The model itself then never computes what a
        single head writes; the engine does, where it needs it. The weights are
        [head, d_head, d_model], as they are at the moment of the call.
    transform: if given (instead of `projection`), what the sources write is this function
        of the output of `module`: any that autograd can differentiate, with
        [batch seq head d_model] as its value, or [batch seq d_model] where the module is
        one source. It is asked anew in each pass, so it may depend on weights.
    """

    module: Module
    projection: Callable[[int], Float[Tensor, "head d_head d_model"]] | None = None
    transform: Callable[[Tensor], Float[Tensor, "batch seq *head d_model"]] | None = None

    @property
    def is_computed(self) -> bool:
        """Does the engine compute what the sources write, where the model does not?"""
        return self.projection is not None or self.transform is not None


@dataclass(frozen=True, eq=False)
class Norm:
    """A norm y = gain * centre(x) / scale(centre(x)) + bias.

    centred: is the mean subtracted (layer norm), or not (RMS norm)?
    epsilon: is added to the mean square.
    gain, bias: the weights that it multiplies by, and those that it adds, now.
    """

    centred: bool
    epsilon: float
    gain: Callable[[], Tensor | float]
    bias: Callable[[], Tensor | None]

    def centre(self, x: Float[Tensor, "*token d"]) -> Float[Tensor, "*token d"]:
        """x without its mean, if the norm subtracts it."""
        return x - x.mean(-1, keepdim=True) if self.centred else x

    def scale(self, centred: Float[Tensor, "*token d"]) -> Float[Tensor, "*token 1"]:
        """What the norm divides `centre(x)` by, in float32 at least."""
        exact = t.promote_types(centred.dtype, t.float32)
        length = t.linalg.vector_norm(centred, dim=-1, keepdim=True, dtype=exact)
        return (length.square() / centred.shape[-1] + self.epsilon).sqrt()


@dataclass(frozen=True, eq=False)
class HeadInputs:
    """Inputs of heads that the model never keeps apart.

    The model computes `linear(norm(x))` with one `linear` for all heads. If head `h`
    reads x_h instead of x, that is `linear.weight[part h] @ norm(x_h)`. An MLP that reads
    the same `norm(x)` as the heads is one more of them (GPT-J, Phi, Falcon).

    norm: None if `linear` reads x as it is. Its closed form is None if the engine must
        not rely on one.
    linears: torch's `Linear`s with the number of heads that each serves, in the order in
        which the model calls them. If `share_rows`, all of them read the same inputs (a
        head's query, key and value are one destination); else each has its own.
    n_mlp_linears: so many of the `linears`, the last ones, are those of an MLP, which all
        read one input, after the heads'.
    called: the modules that the model calls for these, if they are others; what the
        `linears` give then takes the place of what those would.
    opened: a context in which the model can use what the `linears` give, if that is not
        what it uses as it is.
    """

    norm: Module | None
    closed_form: Norm | None
    linears: tuple[tuple[Module, int], ...]
    share_rows: bool = False
    n_mlp_linears: int = 0
    called: tuple[Module, ...] | None = None
    opened: Callable[[], AbstractContextManager[None]] = nullcontext

    @property
    def called_modules(self) -> tuple[Module, ...]:
        """The module that the model calls for each linear."""
        return self.called or tuple(linear for linear, _ in self.linears)

    @property
    def n_rows(self) -> int:
        """The number of inputs."""
        return self.rows()[-1].stop

    def rows(self) -> list[slice]:
        """For each linear, the inputs that it reads."""
        counts = [n for _, n in self.linears[: len(self.linears) - self.n_mlp_linears]]
        # Queries of 4 heads, keys and values of 2: rows 0..3, 4..5 and 6..7. The gate and
        # the up projection of an MLP with the same norm: both row 8.
        starts = [0 if self.share_rows else sum(counts[:i]) for i in range(len(counts))]
        rows = [slice(start, start + n) for start, n in zip(starts, counts, strict=True)]
        stop = rows[-1].stop if rows else 0
        return rows + [slice(stop, stop + 1)] * self.n_mlp_linears


@dataclass(frozen=True, eq=False)
class Port:
    """One place through which patches enter the model.

    dest_modules: the destination modules that are read here; their masks' rows, one after
        the other, are the port's rows.
    module: its forward output is what they read: [batch seq d_model], or with a head
        dimension that counts rows.
    mask_rows: head `h` of the module reads this row of the masks (None: row `h`).
    additive: the module's output is not the residual stream itself but something that is
        added to it, so the patch is added there and reaches the residual stream.
    heads: `module` shows the residual stream, and these are the heads that read it.
    component: the module that turns what is read here into what one source writes, if that
        depends on nothing else.
    block: which of the adapter's `blocks` it is in.
    bypassed: the modules that the model runs between the residual stream and its heads.
    by_token: does the module give each token alone, [token d_model] (OPT's MLPs)?
    """

    dest_modules: tuple[str, ...]
    module: Module
    mask_rows: tuple[int, ...] | None = None
    additive: bool = False
    heads: HeadInputs | None = None
    component: Module | None = None
    block: int = 0
    bypassed: tuple[Bypassed, ...] = ()
    by_token: bool = False


class AttentionReader(ABC):
    """What looks into attention, and changes what heads read there (see `CrossingSite`)."""

    @abstractmethod
    def further_keys(self, keys: HeadVectors) -> HeadVectors | None:
        """Keys that queries are to be compared with as well, if any."""

    @abstractmethod
    def further_values(self, values: HeadVectors) -> HeadVectors | None:
        """Values that are to be read as well, if any."""

    @abstractmethod
    def scores(self, own: Scores, further: Scores) -> Scores:
        """What the scores become, from them and from those of the further keys."""

    @abstractmethod
    def further_pattern(self, pattern: Scores) -> Scores | None:
        """How much each position reads of the further values."""


@dataclass(frozen=True, eq=False)
class CrossingSite:
    """The attention of one block, where heads read keys and values of other positions.

    attention: the module, called with the (normed) input of heads.
    head_input: which of the two is read: "key" or "value".
    inputs: for each head, the destination that its keys (values) are made from.
    dests: for each head, the node that reads them at all positions.
    is_causal: does a position read none after itself?
    """

    attention: Module
    head_input: HeadInput
    inputs: tuple[DestNode, ...]
    dests: tuple[DestNode, ...]
    is_causal: bool


@dataclass(frozen=True)
class ModelAdapter:
    """One model family.

    handles: is this a model of the family?
    graph_nodes: (model, factorized, separate_qkv) -> its sources and destinations, each
        in the order in which they run; source `i` has `src_idx` i. Every node says its
        `component`, and the `heads` that it belongs to: which sources a destination feeds
        follows from that (see `types.Node` for nodes that do not say it).
    src_site: (model, module name of sources) -> where they are seen.
    ports: (model, module names of all destinations, separate_qkv) -> where their patches
        enter, in the order in which they run.
    open_sites: (model, separate_qkv) -> a context in which every such module fires; it
        restores the model's switches on exit.
    probe_input: model -> a small input to check the graph with.
    find_unembed: model -> the module that turns the final residual stream into outputs,
        position by position, if there is one: outputs that nobody asks for are not
        computed.
    blocks: model -> the modules that the residual stream passes one after the other, each
        called with it as the first argument; empty if there are none. Blocks before the
        first changed edge need not run again.
    is_transformer: do its nodes need `separate_qkv`, and may it have a KV cache?
    ungrouped: model -> the adapter for the graph in which every query head has a key and a
        value of its own (`patchable_model(..., ungroup=True)`), which is this one if it
        always has; raises ModelError if that cannot be. None: no model of the family can.
    example: () -> a small model of the family, for the conformance tests; members of
        `adapters.ADAPTERS` have one.
    open_hooks: model -> a context in which all hook points fire that a user may ask for
        (`run_with_cache`), also those that cost time.
    embed_tokens: (model, tokens) -> what the first source would write without position
        embeddings, [batch seq d_model]; None if there are none in what it writes.
    crossings: model -> where heads read across positions: for each block its keys and its
        values; raises ModelError if that cannot be. None: no model of the family can.
    read_attention: (attention, what looks into it) -> a context in which it does: it sees
        keys and values as they are compared and read (with positions, normed).
    about, tried, refused: for readers: which models these are, those that were tried and
        run, and those of the family that are refused.
    """

    name: str
    handles: Callable[[Module], bool]
    graph_nodes: Callable[[Module, bool, bool | None], GraphNodes]
    src_site: Callable[[Module, str], SrcSite]
    ports: Callable[[Module, Sequence[str], bool | None], tuple[Port, ...]]
    open_sites: Callable[[Module, bool | None], AbstractContextManager[None]]
    probe_input: Callable[[Module], Tensor]
    find_unembed: Callable[[Module], Module | None]
    blocks: Callable[[Module], Sequence[Module]]
    is_transformer: bool
    ungrouped: Callable[[Module], ModelAdapter] | None = None
    embed_tokens: Callable[[Module, Tensor], Tensor | None] = lambda model, tokens: None
    open_hooks: Callable[[Module], AbstractContextManager[None]] = lambda model: (
        nullcontext()
    )
    crossings: Callable[[Module], tuple[CrossingSite, ...]] | None = None
    read_attention: (
        Callable[[Module, AttentionReader], AbstractContextManager[None]] | None
    ) = None
    example: Callable[[], Module] | None = None
    about: str = ""
    tried: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()

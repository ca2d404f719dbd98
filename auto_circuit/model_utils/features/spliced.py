"""A transformer, some of whose components are seen through latents or neurons.

`spliced(model, autoencoders)` gives a model for `patchable_model`. What a component writes
(or all that the residual stream has, where it is cut) is the sum of what latents write and of
an error, the rest; both are sources, and destinations where what is encoded is read from the
residual stream. Since the error is kept, the model's outputs are the bare model's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch as t
from jaxtyping import Float
from torch import Tensor
from torch.nn import Identity, Module, ModuleList
from transformer_lens.model_bridge import TransformerBridge

from auto_circuit.checks import checked, is_whole_number
from auto_circuit.errors import ConfigError, ModelError
from auto_circuit.model_utils.features.places import Neurons, make_splice, placed
from auto_circuit.model_utils.features.splices import Parts, Splice
from auto_circuit.model_utils.model_adapter import (
    GraphNodes,
    HeadInputs,
    ModelAdapter,
    Port,
    SrcSite,
)
from auto_circuit.model_utils.transformer_lens_sites import hook_point
from auto_circuit.model_utils.transformer_lens_utils import (
    RESID_START,
    TRANSFORMER_BRIDGE_ADAPTER,
    embed_tokens,
    small_bridge,
)
from auto_circuit.types import Component, DestNode, SrcNode
from auto_circuit.utils.torch_state import in_own_state

BRIDGE = TRANSFORMER_BRIDGE_ADAPTER
LATENTS, SKIP, ERROR = ".latents", ".skip", ".error"
LATENTS_IN, SKIP_IN, ERROR_IN = ".latents_in", ".skip_in", ".error_in"
ROUNDING = 1e4
"""How much latents computed in two ways may differ, in units of `eps`."""
Residual = Float[Tensor, "batch seq d_model"]


class SplicedTransformer(Module):
    """A TransformerBridge, and what takes the place of some of its parts (see `spliced`).

    Called, it is the wrapped model. Attributes that it does not have are that one's.
    """

    def __init__(self, wrapped_model: TransformerBridge, splices: list[Splice]) -> None:
        super().__init__()
        self.wrapped_model = wrapped_model
        self._splices = ModuleList(splices)
        # Shows what the first source writes where a cut follows right after it.
        self.start = Identity()
        self.eval()

    @property
    def splices(self) -> list[Splice]:
        """In the order in which they run."""
        return list(self._splices)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("wrapped_model", "_splices", "start"):
                raise
            return getattr(self.wrapped_model, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped model's output."""
        return self.wrapped_model(*args, **kwargs)


@checked
def spliced(
    model: TransformerBridge,
    autoencoders: Sequence[Any],
    latents: Sequence[Sequence[int] | None] | None = None,
) -> SplicedTransformer:
    """A model whose graph has latents, or neurons, as nodes. The model is not changed.

    autoencoders: each an `Autoencoder` (`load_autoencoder_folder`), a `Placed(object with
        encode and decode, hook_name)`, or `Neurons(block)`.
    latents: for each of them the latents that are nodes (None: all); what the others write
        becomes part of the error. `active_latents` finds those that are active.

    Where a hook point is encoded, and the nodes that there are then, for block 2:

    - `hook_resid_pre`, `hook_resid_mid`, `hook_resid_post`: "Resid Pre 2 Latent 7" and "Resid
      Pre 2 Error", both sources and destinations. The residual stream is cut: later
      destinations read them alone, and no earlier source.
    - `hook_attn_out`, `attn.hook_z`: the sources "A2 Latent 7" and "A2 Error" in place of the
      block's heads. `hook_mlp_out`, `mlp.hook_post`: "MLP 2 Latent 7", "MLP 2 Error" in place
      of the MLP. Destinations are those of the model.
    - a transcoder, from `mlp.hook_in` or `ln2.hook_normalized` to `hook_mlp_out`: "MLP 2
      Latent 7" and "MLP 2 Error" as sources and destinations. The error is what the MLP
      writes, less what the latents would write if they read what the error reads. A skip
      transcoder's linear path is a source and a destination too, "MLP 2 Skip".
    - `Neurons(2)`: the sources "MLP 2 Neuron 7" and "MLP 2 Rest", which is what the other
      neurons and the bias write; with `as_destinations=True` also destinations.

    Raises ConfigError and ModelError for an autoencoder of another model or hook point, for two
    in one place, and for latents that it does not have.
    """
    _check_bridge(model)
    items = [placed(item) for item in autoencoders]
    kept: Sequence[Sequence[int] | None] = (
        [None] * len(items) if latents is None else latents
    )
    if not items or len(kept) != len(items):
        raise ConfigError(
            f"There are {len(items)} autoencoders and `latents` for {len(kept)}; expected "
            "one or more, and as many. Without any use the model itself."
        )
    splices = [
        make_splice(model, item, None if idxs is None else _whole_numbers(idxs))
        for item, idxs in zip(items, kept, strict=True)
    ]
    _check_places(splices)
    splices.sort(key=_order)
    result = SplicedTransformer(model, splices)
    _check_by_numbers(result)
    return result


def _whole_numbers(idxs: Any) -> list[int]:
    """The latents of one autoencoder. Raises ConfigError for what is no list of numbers."""
    found = idxs.tolist() if isinstance(idxs, (Tensor, np.ndarray)) else idxs
    if not isinstance(found, Iterable) or not all(
        map(is_whole_number, found := [*found])
    ):
        raise ConfigError(
            f"`latents` has {idxs!r:.80} for one of the autoencoders; expected a list of "
            "whole numbers for each."
        )
    return [int(idx) for idx in found]


def _check_bridge(model: Any) -> None:
    if not isinstance(model, TransformerBridge):
        raise ConfigError(
            f"A {type(model).__name__} cannot be spliced; expected a TransformerBridge, "
            "which `load_tl_model` gives."
        )


def _check_places(splices: Sequence[Splice]) -> None:
    """Raise ConfigError for two that replace the same."""
    places = [
        (s.site.key if s.is_cut else s.site.component, s.site.block) for s in splices
    ]
    for i, place in enumerate(places):
        if place in places[:i]:
            first = splices[places.index(place)]
            raise ConfigError(
                f"Two autoencoders replace {splices[i].name!r}: of {first.site.reads.hook!r} "
                f"and of {splices[i].site.reads.hook!r}. Keep one."
            )


def _order(splice: Splice) -> tuple[int, int]:
    """Before its block, in it, after it."""
    site = splice.site
    order = ("before", "attention", "inside", "mlp", "after")
    place = site.component
    if splice.is_cut:
        is_before = site.writes.hook.endswith("hook_in")
        place = "before" if is_before else "after" if site.before is None else "inside"
    return site.block, order.index(place)


@in_own_state(grad=False)
def _check_by_numbers(model: SplicedTransformer) -> None:
    """Raise ModelError unless the model computes what the graph takes for granted."""
    runs: list[_Run] = []
    with _open_sites(model, True, runs=runs):
        model.wrapped_model(BRIDGE.probe_input(model.wrapped_model))
    tolerance = ROUNDING * t.finfo(next(model.parameters()).dtype).eps
    for run in runs:
        for claim, (error, scale) in run.differences.items():
            if not error <= tolerance * scale:
                raise ModelError(
                    f"{claim} does not hold at {run.splice.name!r} (it is off by "
                    f"{error:.1e}): this architecture computes something else, which is not "
                    "supported. Use autoencoders of `hook_mlp_out` or `hook_attn_out`."
                )


# -------------------------------------------------------------------- running the model

Hook = tuple[str, Callable[..., Any]]
"""A hook point, and what is called with its output."""


@dataclass(eq=False)
class _Run:
    """What one pass leaves for the rest of it.

    differences: what is claimed about the model -> (error, size).
    """

    splice: Splice
    before: list[Tensor] = field(default_factory=list)
    encoded: list[Tensor] = field(default_factory=list)
    parts: list[Parts] = field(default_factory=list)
    shares: list[tuple[Parts, Parts]] = field(default_factory=list)
    inner: list[Tensor] = field(default_factory=list)
    differences: dict[str, tuple[float, float]] = field(default_factory=dict)

    def keep(self, module: Module, args: Any, out: Tensor) -> None:
        """The residual stream, for later."""
        self.before[:] = [out]

    def read(self, module: Module, args: Any, out: Tensor) -> None:
        """Keep what is encoded."""
        self.encoded[:] = [self.splice.encoded(out)]

    def compare_encoded(self, module: Module, args: Any, out: Tensor) -> None:
        """Is what is encoded what the model shows?"""
        claim = "That what is encoded is the normed residual stream"
        self.differences[claim] = _difference(
            out.reshape_as(self.encoded[0]), self.encoded[0]
        )

    def look(self, module: Module, args: Any, out: Tensor) -> None:
        """Keep what is written as a matrix times it."""
        self.inner[:] = [out]

    def show(self, module: Module, args: Any, out: Tensor) -> None:
        """Compute latents, each from an input of its own."""
        by_position = self.splice.site.reads.by_position
        if by_position is not None and out.ndim == 2:
            out = by_position(out)
        self.parts[:] = [self.splice.read_as_dests(out)]

    def enter(self, norm: Module, module: Module, args: Any, out: Tensor) -> Tensor:
        """An MLP that shares its norm with the heads reads the residual stream by itself."""
        residual = self.before.pop()
        self.parts[:] = [self.splice.read_as_dests(residual)]
        of_error = self.splice.error_in(residual)
        self.encoded[:] = [self.splice.normed(of_error)]
        return norm(of_error)  # type: ignore[no-any-return]

    def _two_parts(self) -> tuple[Parts, Parts]:
        """(What latents write, what they would write if they read what the error reads)"""
        of_error = self.splice.read(self.encoded.pop())
        return (self.parts.pop() if self.parts else of_error), of_error

    def sum_up(self, compares: bool, module: Module, args: Any, out: Tensor) -> Tensor:
        """Change the sum that is normed next, by what latents write; know its scale."""
        post_norm = self.splice.site.post_norm
        assert post_norm is not None
        parts, of_error = self._two_parts()
        total = post_norm.sums.of(out)
        if compares:
            self.compare(parts, of_error, total)
        if parts is not of_error:
            change = self.splice.decoded(parts) - self.splice.decoded(of_error)
            total = total + (
                change if post_norm.to_sum is None else post_norm.to_sum(change)
            )
        scale = post_norm.norm.scale(post_norm.norm.centre(total)).to(total.dtype)
        shares = parts.over(scale)
        self.shares[:] = [(shares, shares)]
        return post_norm.sums.back(total, out)

    def write(self, compares: bool, module: Module, args: Any, out: Tensor) -> Tensor:
        """Split what is written."""
        if self.shares:
            parts, of_error = self.shares.pop()
        else:
            parts, of_error = self._two_parts()
            if compares:
                self.compare(parts, of_error, out)
        writes = self.splice.site.writes
        return writes.back(self.splice.split(writes.of(out), parts, of_error), out)

    def compare(self, parts: Parts, of_error: Parts, out: Tensor) -> None:
        """Where nothing is patched: is all as the graph says?"""
        site = self.splice.site
        if parts is not of_error:
            claim = "That latents follow from the residual stream"
            self.differences[claim] = _difference(parts.amounts, of_error.amounts)
        if site.linear is not None:
            shown = self.inner.pop()
            if self.splice.part == "Neuron":
                claim = "That neurons are what the MLP's inputs say"
                real = site.reads.of(shown[..., list(self.splice.idxs)])
                self.differences[claim] = _difference(parts.amounts, real)
            rest = (out - shown @ site.linear[1]()).flatten(0, -2)
            claim = "That what is written is a matrix times what is seen before it"
            constant = rest.mean(0, keepdim=True).expand_as(rest)
            error, _ = _difference(rest, constant)
            self.differences[claim] = error, float(out.abs().max())

    def cut(self, start: Module | None, module: Module, args: Any, out: Tensor) -> Tensor:
        """Split the residual stream."""
        return self._split_stream(out if start is None else start(out))

    def _split_stream(self, stream: Residual) -> Residual:
        parts = self.splice.read_as_dests(stream)
        of_error = self.splice.error_in(stream)
        return self.splice.split(of_error, parts, self.splice.read(of_error))

    def cut_inside(self, module: Module, args: Any, out: Tensor) -> Tensor:
        """Split the residual stream where something has just been added to it."""
        writes = self.splice.site.writes
        stream = self.before.pop() + writes.of(out)
        self.encoded[:] = [stream]
        # That sum is the model's own: what changes it is added to what is added.
        return out + writes.back(self._split_stream(stream) - stream, out)

    def compare_stream(self, module: Module, args: Any, out: Tensor) -> None:
        """Is the residual stream inside of a block what was cut?"""
        claim = (
            "That the residual stream is what was there before, and what attention adds"
        )
        shown = self.splice.site.reads.of(out)
        self.differences[claim] = _difference(shown, self.encoded.pop())

    def hooks(self, start: Module | None, compares: bool) -> list[Hook]:
        """In the order in which they are called."""
        site = self.splice.site
        if site.before is not None:
            inside: list[Hook] = [
                (site.before, self.keep),
                (site.writes.hook, self.cut_inside),
            ]
            return [*inside, *([(site.reads.hook, self.compare_stream)] * compares)]
        if self.splice.is_cut:
            return [(site.writes.hook, partial(self.cut, start))]
        found: list[Hook] = []
        if site.enters is not None:
            assert site.shows is not None
            hook, norm = site.enters
            found += [(site.shows, self.keep), (hook, partial(self.enter, norm))]
        else:
            found.append((site.reads.hook, self.read))
            found += [(site.shows, self.show)] if site.shows is not None else []
            if compares and site.normalized is not None:
                found.append((site.normalized, self.compare_encoded))
        if compares and site.linear is not None:
            found.append((site.linear[0], self.look))
        if site.post_norm is not None:
            found.append((site.post_norm.sums.hook, partial(self.sum_up, compares)))
        return [*found, (site.writes.hook, partial(self.write, compares))]


def _difference(
    x: Float[Tensor, "*any"], y: Float[Tensor, "*any"]
) -> tuple[float, float]:
    """(How much two tensors differ, how large they are)"""
    return float((x - y).abs().max()), float(y.abs().max()) + 1e-9


@contextmanager
def _open_sites(
    model: Module, separate_qkv: bool | None, runs: list[_Run] | None = None
) -> Iterator[None]:
    """Inside, what is replaced passes through latents and errors. runs: they compare."""
    assert isinstance(model, SplicedTransformer)
    with ExitStack() as stack:
        stack.enter_context(BRIDGE.open_sites(model.wrapped_model, separate_qkv))
        for splice in model.splices:
            run = _Run(splice)
            for kept in (run.before, run.encoded, run.parts, run.shares):
                stack.callback(kept.clear)
            start = model.start if _is_at_start(splice) else None
            for name, hook in run.hooks(start, runs is not None):
                site = hook_point(model.wrapped_model, name)
                stack.callback(site.register_forward_hook(hook).remove)
            if runs is not None:
                runs.append(run)
        yield


def _is_at_start(splice: Splice) -> bool:
    return splice.is_cut and splice.site.writes.hook == "blocks.0.hook_in"


# ---------------------------------------------------------------------------- the graph


def _graph_nodes(
    model: Module,
    factorized: bool,
    separate_qkv: bool | None,
    bridge_adapter: ModelAdapter = BRIDGE,
) -> GraphNodes:
    assert isinstance(model, SplicedTransformer)
    if not factorized or separate_qkv is None:
        raise ConfigError(
            "A spliced model has a factorized graph only, and needs `separate_qkv`: make it "
            "patchable with `factorized=True, separate_qkv=True` (or False)."
        )
    srcs, dests = bridge_adapter.graph_nodes(model.wrapped_model, True, separate_qkv)
    layers = _layers(dests)
    # Three new layers before each: after the block before, before this block, and itself.
    srcs = [replace(src, layer=4 * src.layer) for src in srcs]
    dests = [replace(dest, layer=4 * dest.layer) for dest in dests]
    for splice in model.splices:
        if splice.is_cut:
            layer = _cut_layer(splice, layers)
            srcs = _inserted(srcs, _cut_nodes(SrcNode, splice, layer))
            dests = _inserted(dests, _cut_nodes(DestNode, splice, layer))
        else:
            srcs = _replaced_srcs(splice, srcs, dests)
            dests = _split_dests(splice, dests)
    srcs = [replace(src, src_idx=i) for i, src in enumerate(srcs)]
    return _with_dense_layers(srcs, _reading_the_last_cut(model, srcs, dests))


def _layers(dests: Sequence[DestNode]) -> dict[tuple[int | None, str], int]:
    """(block, kind of component) -> its layer; block None: the end's."""
    components = [(dest.component, dest.layer) for dest in dests]
    return {(c.block, c.kind): layer for c, layer in components if c is not None}


def _cut_layer(splice: Splice, layers: Mapping[tuple[int | None, str], int]) -> int:
    block = splice.site.block
    if splice.site.before is not None:
        return 4 * layers[block, "mlp"] - 1
    blocks = {of for of, _ in layers}
    first = {b: min(layers[key] for key in layers if key[0] == b) for b in blocks}
    if splice.site.writes.hook.endswith("hook_in"):
        return 4 * first[block] - 1
    return 4 * first[block + 1 if block + 1 in first else None] - 2


def _inserted(nodes: list[Any], new: list[Any]) -> list[Any]:
    """New nodes of one layer before those of later ones."""
    earlier = [node for node in nodes if node.layer < new[0].layer]
    return [*earlier, *new, *nodes[len(earlier) :]]


def _new_nodes(
    kind: type[Any],
    splice: Splice,
    modules: tuple[str, str, str],
    heads: tuple[int, ...] | None = None,
    **common: Any,
) -> list[Any]:
    """A node for each latent, one for a skip if there is one, and one for the error.

    modules: theirs. heads: those that all belong to, where latents have no inputs of their
        own. Else each has a "head" to itself: a latent feeds that latent.
    """
    own = splice.site.shows is not None
    if own and kind is DestNode and splice.site.post_norm is not None:
        common["reaches_all_heads"] = True  # by the scale of the sum
    n_latents = len(splice.idxs)
    nodes = [
        kind(
            name=f"{splice.name} {splice.part} {idx}",
            module_name=modules[0],
            head_idx=row,
            head_dim=2,
            heads=(row,) if own else heads,
            **common,
        )
        for row, idx in enumerate(splice.idxs)
    ]
    if splice.skip is not None:
        of_skip = (n_latents + 1,) if own else heads
        nodes.append(kind(f"{splice.name} Skip", modules[1], heads=of_skip, **common))
    of_error = (n_latents,) if own else heads
    return [*nodes, kind(splice.rest, modules[2], heads=of_error, **common)]


def _cut_component(splice: Splice) -> Component:
    return Component(splice.name.rpartition(" ")[0].lower(), splice.site.block, "own")


def _src_modules(splice: Splice) -> tuple[str, str, str]:
    key = splice.site.key
    return key + LATENTS, key + SKIP, key + ERROR


def _cut_nodes(kind: type[Any], splice: Splice, layer: int) -> list[Any]:
    key = splice.site.key
    dest_modules = (key + LATENTS_IN, key + SKIP_IN, key + ERROR_IN)
    modules = _src_modules(splice) if kind is SrcNode else dest_modules
    component = _cut_component(splice)
    return _new_nodes(kind, splice, modules, layer=layer, component=component)


def _is_replaced(splice: Splice, node: SrcNode | DestNode) -> bool:
    component = node.component
    return component is not None and (component.kind, component.block) == (
        splice.site.component,
        splice.site.block,
    )


def _replaced_srcs(
    splice: Splice, srcs: list[SrcNode], dests: Sequence[DestNode]
) -> list[SrcNode]:
    """The sources, with a component's replaced by latents and an error."""
    old = [src for src in srcs if _is_replaced(splice, src)]
    heads = {
        head for dest in dests if _is_replaced(splice, dest) for head in dest.heads or ()
    }
    new = _new_nodes(
        SrcNode,
        splice,
        _src_modules(splice),
        heads=tuple(sorted(heads)) or None,
        layer=old[0].layer,
        component=old[0].component,
    )
    first = srcs.index(old[0])
    return [*srcs[:first], *new, *srcs[first + len(old) :]]


def _split_dests(splice: Splice, dests: list[DestNode]) -> list[DestNode]:
    """The destinations, with an MLP's split into its latents and its error."""
    shows = splice.site.shows
    if shows is None:
        return dests
    (old,) = [dest for dest in dests if _is_replaced(splice, dest)]
    new = _new_nodes(
        DestNode,
        splice,
        (shows + LATENTS_IN, shows + SKIP_IN, old.module_name),
        layer=old.layer,
        component=old.component,
    )
    where = dests.index(old)
    return [*dests[:where], *new, *dests[where + 1 :]]


def _reading_the_last_cut(
    model: SplicedTransformer, srcs: list[SrcNode], dests: list[DestNode]
) -> list[DestNode]:
    """The destinations, each of which reads no source before the last cut."""
    first_of_cut: dict[int, int] = {}
    for splice in model.splices:
        if splice.is_cut:
            module_name = splice.site.key + LATENTS
            src = next(src for src in srcs if src.module_name == module_name)
            first_of_cut[src.layer] = src.src_idx
    return [
        replace(
            dest,
            min_src_idx=max(
                (idx for layer, idx in first_of_cut.items() if layer < dest.layer),
                default=dest.min_src_idx,
            ),
        )
        for dest in dests
    ]


def _with_dense_layers(srcs: list[SrcNode], dests: list[DestNode]) -> GraphNodes:
    layers = sorted({node.layer for node in (*srcs, *dests)})
    dense = {layer: i for i, layer in enumerate(layers)}
    return (
        [replace(src, layer=dense[src.layer]) for src in srcs],
        [replace(dest, layer=dense[dest.layer]) for dest in dests],
    )


# ----------------------------------------------------------------------- sources, ports


def _src_site(model: Module, module_name: str) -> SrcSite:
    assert isinstance(model, SplicedTransformer)
    for splice in model.splices:
        if module_name == splice.site.key + LATENTS:
            return SrcSite(splice.latents_out, partial(_projection, splice))
        if module_name == splice.site.key + SKIP:
            return SrcSite(splice.skip_out)
        if module_name == splice.site.key + ERROR:
            return SrcSite(splice.error_out)
    if module_name == RESID_START and any(map(_is_at_start, model.splices)):
        return SrcSite(model.start)
    return BRIDGE.src_site(model.wrapped_model, module_name)


def _projection(splice: Splice, n_latents: int) -> Float[Tensor, "latent 1 d_model"]:
    """What latents write, as if each was a head with one value."""
    return splice.written_directions().unsqueeze(1)


def _ports(
    model: Module,
    module_names: Sequence[str],
    separate_qkv: bool | None,
    bridge_adapter: ModelAdapter = BRIDGE,
) -> tuple[Port, ...]:
    assert isinstance(model, SplicedTransformer)
    ours = {port.dest_modules[0]: port for s in model.splices for port in _own_ports(s)}
    names = [name for name in module_names if name not in ours]
    of_bridge = bridge_adapter.ports(model.wrapped_model, names, separate_qkv)
    # Of an MLP whose inside is read, what it gave before does not say what that was.
    read = {splice.site.block for splice in model.splices if not splice.is_cut}
    ports = [
        replace(port, component=None) if port.block in read else port
        for port in of_bridge
    ]
    order = list(module_names)
    both = [*ports, *ours.values()]
    return tuple(sorted(both, key=lambda port: order.index(port.dest_modules[0])))


def _own_ports(splice: Splice) -> list[Port]:
    """Where patches of latents enter, and those of the skip, and of the error.

    Not the error of an MLP with a norm of its own: it reads what the MLP reads.
    """
    if splice.site.shows is None:
        return []
    heads = None
    if len(splice.latents.linears):
        n_latents = len(splice.idxs)
        heads = HeadInputs(
            norm=splice.site.norm,
            closed_form=splice.site.closed_form,
            linears=tuple((linear, n_latents) for linear in splice.latents.linears),
            share_rows=len(splice.latents.linears) > 1,
        )
    shows, block = splice.site.shows, splice.site.block
    ports = [Port((shows + LATENTS_IN,), splice.latents_in, heads=heads, block=block)]
    if splice.skip is not None:
        ports.append(Port((shows + SKIP_IN,), splice.skip_in, block=block))
    if splice.is_cut:
        ports.append(Port((shows + ERROR_IN,), splice.error_in, block=block))
    if splice.site.enters is not None:
        mlp_in = f"blocks.{block}.hook_mlp_in"
        ports.append(Port((mlp_in,), splice.error_in, block=block))
    return ports


def _of_wrapped(
    function: Callable[..., Any],
) -> Callable[..., Any]:
    return lambda model, *args: function(model.wrapped_model, *args)


def _ungrouped(model: Module) -> ModelAdapter:
    assert isinstance(model, SplicedTransformer) and BRIDGE.ungrouped is not None
    bridge_adapter = BRIDGE.ungrouped(model.wrapped_model)
    return replace(
        SPLICED_TRANSFORMER_ADAPTER,
        graph_nodes=partial(_graph_nodes, bridge_adapter=bridge_adapter),
        ports=partial(_ports, bridge_adapter=bridge_adapter),
    )


def _open_hooks(model: Module) -> AbstractContextManager[None]:
    assert isinstance(model, SplicedTransformer)
    return BRIDGE.open_hooks(model.wrapped_model)


SPLICED_TRANSFORMER_ADAPTER = ModelAdapter(
    name="SplicedTransformer",
    about="TransformerLens models with latents or neurons as nodes (`spliced`).",
    tried=(
        *("GPT-2", "Pythia", "GPT-J", "Phi", "Falcon", "Cohere", "Llama", "Granite"),
        *("Gemma 2", "OLMo 2"),
    ),
    handles=lambda model: isinstance(model, SplicedTransformer),
    graph_nodes=_graph_nodes,
    src_site=_src_site,
    ports=_ports,
    open_sites=_open_sites,
    probe_input=_of_wrapped(BRIDGE.probe_input),
    find_unembed=_of_wrapped(BRIDGE.find_unembed),
    blocks=_of_wrapped(BRIDGE.blocks),
    is_transformer=True,
    ungrouped=_ungrouped,
    embed_tokens=_of_wrapped(embed_tokens),
    open_hooks=_open_hooks,
    example=lambda: spliced(small_bridge(), [Neurons(0)], [(0, 2)]),
)

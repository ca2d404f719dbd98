"""Turn a model into a PatchableModel, and patch its edges inside context managers."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain, groupby
from typing import Any

import torch as t
from jaxtyping import Float
from ordered_set import OrderedSet
from torch import Tensor
from torch.nn import Module, Parameter

from auto_circuit import devices
from auto_circuit.checks import check_count, check_device, check_number, checked
from auto_circuit.edge_sequence import EdgeSequence
from auto_circuit.engine.edge_matrices import (
    CrossingPort,
    DestPort,
    PatchPlan,
    SrcPort,
    edge_matrix_groups,
)
from auto_circuit.engine.masks_put_back import masks_put_back
from auto_circuit.engine.patch_session import PatchSession
from auto_circuit.engine.patch_wrapper import PatchWrapperImpl
from auto_circuit.errors import (
    AutoCircuitError,
    ConfigError,
    GraphError,
    ModelError,
    one_line,
)
from auto_circuit.model_utils.model_adapter import ModelAdapter
from auto_circuit.precision import mask_dtype
from auto_circuit.prefix_cache import PrefixCache
from auto_circuit.published_names import published_name as __getattr__  # noqa: F401
from auto_circuit.spans import Spans
from auto_circuit.types import (
    DestNode,
    Edge,
    MaskFn,
    Node,
    OutputSlice,
    SrcNode,
)
from auto_circuit.utils.component_links import check_words
from auto_circuit.utils.crossing_nodes import crossing_dests, crossing_sites
from auto_circuit.utils.edge_counts import edge_counts_util
from auto_circuit.utils.module_use import in_use
from auto_circuit.utils.patchable_model import (
    LAST_POSITION,
    EdgeDict,
    PatchableModel,
    check_has_values,
    unpatched,
)
from auto_circuit.utils.torch_state import (
    eval_mode,
    in_own_state,
    ordinary,
    own_computation,
    own_defaults,
)
from auto_circuit.weights import (
    MORE_THAN_WEIGHTS,
    WeightFingerprint,
    check_not_offloaded,
    has_values,
    input_rounding,
)

__all__ = [
    "edge_counts_util",
    "graph_edges",
    "mask_fn_mode",
    "patch_mode",
    "patchable_model",
    "preserved_masks",
    "set_all_masks",
    "set_mask_batch_size",
    "starting_at",
    "train_mask_mode",
    "unpatch",
]

SEQ_DIM = 1
SUM_ROUNDING = 16
"""How much a sum of sources may be off, in units of `eps` times what they write."""


@checked
def patchable_model(
    model: Module,
    factorized: bool,
    slice_output: OutputSlice = None,
    seq_len: int | None = None,
    separate_qkv: bool | None = None,
    kv_caches: Sequence[PrefixCache | None] = (None,),
    device: t.device | str | None = None,
    adapter: ModelAdapter | None = None,
    ungroup: bool = False,
    keep_positions: bool = False,
    crossing: bool = False,
    spans: Spans | None = None,
) -> PatchableModel:
    """Compute a model's graph, and make its edges patchable.

    model: a MicroModel, a TransformerBridge, or what `adapter` handles. It is not
        changed: hooks and switches are on only inside `patch_mode` and the like.
    factorized: True: an edge from every source to every later destination. False: edges
        from components to the residual stream right after them (node patching).
    slice_output: what part of the output counts: "last_seq" (the last position),
        "not_first_seq", or None (all).
    seq_len: the number of positions, to give each position edges of its own.
    separate_qkv: do queries, keys and values have inputs of their own? Transformers only.
    kv_caches: prefix caches of the dataloaders that will be used (`loader.kv_cache`).
    device: where the masks are; the model's device if None.
    ungroup: with grouped-query attention, do keys and values have an input for every query
        head (True), as in EAP-IG and the MIB benchmark, or one for each group, as in the
        model (False)? A score of a group is the sum of its heads'. Without grouped
        queries both are the same graph.
    keep_positions: where the first source is the sum of token and position embeddings
        (GPT-2), do zero and mean ablations leave the position embeddings in it (True), as
        in EAP-IG's tools, or take them away with it (False)? No other model differs.
    crossing: does the graph also have the edges that lead through attention, from a head's
        keys and values at one position to the head at another (PEAP)? Only with
        `factorized`, `separate_qkv`, and `seq_len` or `spans`.
    spans: gives each span of the prompts edges of its own, in the place of `seq_len`, which
        is then the number of spans (see `auto_circuit.spans`).

    Runs the model once on a small input to check that every node is seen, and that what
    a destination reads is the sum of its sources and a constant. Raises ModelError if
    not, or for an unknown architecture, and ConfigError for arguments that do not fit.

    A model on the meta device (shapes without weights) has a graph too, in no time and
    memory: to name and count edges. It is not checked and cannot be run.
    """
    _check_can_be_patchable(model)
    n_positions = _n_positions(seq_len, spans)
    if crossing:
        _check_can_cross(factorized, separate_qkv, n_positions)
    if device is not None and str(device) != "meta":
        device = check_device("device", device)
    # TransformerLens takes seconds to import: only when there is a model.
    from auto_circuit.model_utils.adapters import find_adapter

    given_adapter, adapter = adapter, adapter or find_adapter(model)
    if ungroup:
        adapter = _ungrouped(adapter, model)
    srcs, dests = adapter.graph_nodes(model, factorized, separate_qkv)
    check_words([*srcs, *dests])
    with own_computation(), own_defaults():
        wrappers = _make_wrappers(model, srcs, dests, factorized, n_positions, device)
        sites = crossing_sites(adapter, model) if crossing else ()
        crossings = [d for site in sites for d in crossing_dests(site, n_positions or 0)]
        wrappers |= _crossing_wrappers(model, crossings, device)
    src_wrappers = OrderedSet(w for w in wrappers if w.is_src)
    dest_wrappers = OrderedSet(w for w in wrappers if w.is_dest)
    patchable = PatchableModel(
        nodes=OrderedSet(sorted({*srcs, *dests}, key=_sort_key)),
        srcs=OrderedSet(srcs),
        dests=OrderedSet(sorted(dests, key=_sort_key)),
        crossings=crossings,
        spans=spans,
        seq_dim=SEQ_DIM,
        seq_len=n_positions,
        wrappers=wrappers,
        src_wrappers=src_wrappers,
        dest_wrappers=dest_wrappers,
        out_slice=_out_slice(slice_output),
        is_factorized=factorized,
        is_transformer=adapter.is_transformer,
        separate_qkv=separate_qkv,
        kv_caches=kv_caches,
        keep_positions=keep_positions,
        wrapped_model=model,
        adapter=adapter,
        plan=_make_plan(
            model, adapter, separate_qkv, src_wrappers, dest_wrappers, crossings
        ),
    )
    _check_graph(patchable)
    patchable.make_again = partial(
        patchable_model,
        factorized=factorized,
        slice_output=slice_output,
        seq_len=seq_len,
        separate_qkv=separate_qkv,
        kv_caches=kv_caches,
        device=device,
        adapter=given_adapter,
        ungroup=ungroup,
        keep_positions=keep_positions,
        crossing=crossing,
        spans=spans,
    )
    return patchable


def _check_can_be_patchable(model: Module) -> None:
    if isinstance(model, PatchableModel):
        raise ConfigError(
            "This model is a PatchableModel already. Give its `wrapped_model` to make "
            "another one; several can share a model."
        )
    if isinstance(model, Module):  # what is none has an error of its own
        check_not_offloaded(model)


def _sort_key(node: Node) -> tuple[int, str, int, int]:
    # To compare nodes makes the key anew each time, of which a large graph has many.
    return node.sort_key


def _n_positions(seq_len: int | None, spans: Spans | None) -> int | None:
    """How many positions have edges of their own."""
    if spans is None:
        return None if seq_len is None else check_count("seq_len", seq_len)
    if seq_len is not None:
        raise ConfigError(
            "Give `seq_len` (each position has edges of its own) or `spans` (each span "
            "has), not both."
        )
    return len(spans)


def _check_can_cross(
    factorized: bool, separate_qkv: bool | None, n_positions: int | None
) -> None:
    needed = {
        "`factorized=True`": factorized,
        "`separate_qkv=True`": bool(separate_qkv),
        "`seq_len` or `spans`": n_positions is not None,
    }
    missing = [what for what, is_there in needed.items() if not is_there]
    if missing:
        raise ConfigError(
            "Crossing edges (`crossing=True`) lead from a head's keys and values at one "
            f"position to the head at another, so they need {' and '.join(missing)} too."
        )


def _ungrouped(adapter: ModelAdapter, model: Module) -> ModelAdapter:
    if adapter.ungrouped is None:
        raise ConfigError(
            "`ungroup=True` gives every query head of grouped-query attention keys and "
            f"values of its own, which the adapter {adapter.name!r} cannot. Use "
            "`ungroup=False`, or give the adapter an `ungrouped`."
        )
    return adapter.ungrouped(model)


@checked
def unpatch(model: PatchableModel) -> Module:
    """The model that was wrapped, as it was. Raises GraphError inside `patch_mode`."""
    if model.patch_session is not None:
        raise GraphError("`unpatch` inside of `patch_mode`: leave the context first.")
    model.free_buffers()
    return model.wrapped_model


def _out_slice(slice_output: OutputSlice) -> slice | tuple[slice | int, ...]:
    slices: dict[OutputSlice, slice | tuple[slice | int, ...]] = {
        None: slice(None),
        "last_seq": LAST_POSITION,
        "not_first_seq": (slice(None), slice(1, None)),
    }
    return slices[slice_output]


# ---------------------------------------------------------------------------- the graph


@checked
def graph_edges(
    model: Module,
    factorized: bool,
    separate_qkv: bool | None = None,
    seq_len: int | None = None,
    adapter: ModelAdapter | None = None,
    ungroup: bool = False,
) -> tuple[
    OrderedSet[Node],
    OrderedSet[SrcNode],
    OrderedSet[DestNode],
    EdgeDict,
    EdgeSequence,
    int,
    int | None,
]:
    """(nodes, srcs, dests, edge_dict, edges, seq_dim, seq_len) of a model's graph."""
    graph = patchable_model(
        model,
        factorized,
        None,
        seq_len,
        separate_qkv,
        adapter=adapter,
        ungroup=ungroup,
    )
    return (
        graph.nodes,
        graph.srcs,
        graph.dests,
        graph.edge_dict,
        graph.edges,
        graph.seq_dim,
        graph.seq_len,
    )


def _incoming(dest: DestNode, srcs: list[SrcNode], factorized: bool) -> slice:
    """The sources that a destination reads: all earlier ones, or those right before.

    From `min_src_idx` on: where the residual stream is cut, and sources take the place of
    all that came before, later destinations read none of those.
    """
    if factorized:
        earlier = [src for src in srcs if src.layer < dest.layer]
        idxs = [src.src_idx for src in earlier if src.src_idx >= dest.min_src_idx]
    else:
        idxs = [src.src_idx for src in srcs if src.layer + 1 == dest.layer]
    if not idxs or idxs != list(range(dest.min_src_idx, dest.min_src_idx + len(idxs))):
        raise ModelError(
            f"The destination {dest.name!r} reads the sources {idxs[:8]} by its layer "
            f"{dest.layer}; expected some, and in a row from its `min_src_idx` "
            f"{dest.min_src_idx} on. The adapter's sources must be in the order in which "
            "they run, the i-th with `src_idx` i."
        )
    return slice(idxs[0], idxs[-1] + 1)


def _make_wrappers(
    model: Module,
    srcs: list[SrcNode],
    dests: list[DestNode],
    factorized: bool,
    seq_len: int | None,
    device: t.device | str | None,
) -> OrderedSet[PatchWrapperImpl]:
    """One wrapper for each module that is a node site, in the order of the graph."""
    param = next(model.parameters())
    by_name: dict[str, dict[str, object]] = {}
    for module_name, group in groupby(srcs, key=lambda node: node.module_name):
        nodes = list(group)
        by_name[module_name] = {
            "head_dim": nodes[0].head_dim,
            "is_src": True,
            "src_idxs": slice(nodes[0].src_idx, nodes[-1].src_idx + 1),
        }
    for module_name, group in groupby(dests, key=lambda node: node.module_name):
        heads = list(group)
        in_srcs = _incoming(heads[0], srcs, factorized)
        shape = [] if seq_len is None else [seq_len]
        shape += [] if heads[0].head_idx is None else [len(heads)]
        shape += [in_srcs.stop - in_srcs.start]
        dtype = mask_dtype(param.dtype)
        mask = t.zeros(shape, dtype=dtype, device=device or param.device)
        by_name.setdefault(module_name, {}).update(
            head_dim=heads[0].head_dim,
            seq_dim=None if seq_len is None else SEQ_DIM,
            is_dest=True,
            patch_mask=mask,
            in_srcs=in_srcs,
        )
    return OrderedSet(
        PatchWrapperImpl(module_name, **kwargs)  # type: ignore[arg-type]
        for module_name, kwargs in by_name.items()
    )


def _crossing_wrappers(
    model: Module, crossings: Sequence[DestNode], device: t.device | str | None
) -> OrderedSet[PatchWrapperImpl]:
    """A wrapper for the keys, and one for the values, of each block: masks [head, pair]."""
    param = next(model.parameters())
    wrappers = OrderedSet[PatchWrapperImpl]([])
    for module_name, group in groupby(crossings, key=lambda node: node.module_name):
        heads = list(group)
        assert heads[0].crossing is not None
        mask = t.zeros(
            (len(heads), heads[0].crossing.n_pairs),
            dtype=mask_dtype(param.dtype),
            device=device or param.device,
        )
        wrappers.add(
            PatchWrapperImpl(
                module_name, heads[0].head_dim, is_dest=True, patch_mask=mask
            )
        )
    return wrappers


def _make_plan(
    model: Module,
    adapter: ModelAdapter,
    separate_qkv: bool | None,
    src_wrappers: OrderedSet[PatchWrapperImpl],
    dest_wrappers: OrderedSet[PatchWrapperImpl],
    crossings: Sequence[DestNode] = (),
) -> PatchPlan:
    dests = {w.module_name: w for w in dest_wrappers if w.in_srcs is not None}
    ports = []
    for port in adapter.ports(model, list(dests), separate_qkv):
        wrappers = tuple(dests[name] for name in port.dest_modules)
        n_rows = sum(w.mask.shape[-2] if w.head_dim is not None else 1 for w in wrappers)
        ports.append(
            DestPort(
                wrappers=wrappers,
                module=port.module,
                n_rows=len(port.mask_rows) if port.mask_rows else n_rows,
                mask_rows=port.mask_rows,
                additive=port.additive,
                heads=port.heads,
                component=port.component,
                block=port.block,
                bypassed=port.bypassed,
                by_token=port.by_token,
            )
        )
    src_ports = tuple(
        SrcPort(wrapper, adapter.src_site(model, wrapper.module_name))
        for wrapper in src_wrappers
    )
    blocks = tuple(adapter.blocks(model))
    return PatchPlan(
        edge_matrix_groups(ports),
        tuple(ports),
        src_ports,
        blocks,
        crossings=tuple(_crossing_ports(model, adapter, ports, dest_wrappers, crossings)),
    )


def _crossing_ports(
    model: Module,
    adapter: ModelAdapter,
    ports: Sequence[DestPort],
    wrappers: OrderedSet[PatchWrapperImpl],
    crossings: Sequence[DestNode],
) -> Iterator[CrossingPort]:
    """One port for each attention: its keys and its values."""
    if not crossings:
        return
    assert adapter.read_attention is not None
    by_name = {wrapper.module_name: wrapper for wrapper in wrappers}
    dests = {dest.module_name: dest for dest in crossings}
    sites = crossing_sites(adapter, model)
    for attention, group in groupby(sites, key=lambda site: site.attention):
        of_attention = tuple(group)
        first = of_attention[0]
        crossing = dests[first.dests[0].module_name].crossing
        assert crossing is not None
        of_input = {
            site.head_input: by_name[site.dests[0].module_name] for site in of_attention
        }
        yield CrossingPort(
            attention=attention,
            heads=next(
                port for port in ports if first.inputs[0].module_name in port.dest_modules
            ),
            crossing=crossing,
            wrappers=of_input,
            read_attention=adapter.read_attention,
        )


# ----------------------------------------------------------------- checking the graph


def _current_weights(model: PatchableModel) -> WeightFingerprint:
    """The weights, after what belongs to them was computed again if they have changed."""
    if model.weights is None or not model.weights.holds():
        return _check_graph(model)
    return model.weights


def _check_weights_allow_gradients(model: Module) -> None:
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise ModelError(
            "The model's weights were made in `torch.inference_mode()`, and PyTorch allows "
            "no gradients through those. Load the model outside of it (what is computed "
            "with it may be inside)."
        )


@in_own_state(grad=False)
def _check_graph(model: PatchableModel) -> WeightFingerprint:
    """Run the model once: does every node fire, and do sources add up to destinations?

    Stores what reaches each destination besides its sources: biases that belong to no
    node, such as attention's output bias. On the meta device there is nothing to run.
    """
    adapter, plan = model.adapter, model.plan
    _check_weights_allow_gradients(model.wrapped_model)
    if not has_values(model.wrapped_model):
        return WeightFingerprint(model.wrapped_model)
    _check_whole_blocks(plan.blocks)
    outs: dict[SrcPort, list[Tensor]] = {port: [] for port in plan.src_ports}
    reads: dict[DestPort, list[Tensor]] = {port: [] for port in plan.dest_ports}
    with ExitStack() as stack:
        stack.enter_context(unpatched(model))
        stack.enter_context(adapter.open_sites(model.wrapped_model, model.separate_qkv))
        for src_port in plan.src_ports:
            stack.enter_context(_recording(src_port.site.module, outs[src_port]))
        for port in plan.dest_ports:
            stack.enter_context(_recording(port.module, reads[port]))
        inputs = {
            port: stack.enter_context(_recorded_inputs(port.heads.called_modules))
            for port in plan.dest_ports
            if port.heads is not None
        }
        out = _probe(model)
        are_hooked = bool(model.user_hooks.ids())
        for port, of_port in inputs.items():
            _check_fired_once(port.name, reads[port], model)
            if not are_hooked:
                _check_heads_read(port, reads[port][0], of_port)
    if not inputs and isinstance(out, Tensor) and not are_hooked:
        _check_same_output(model, out)
    for src_port, fired in outs.items():
        _check_fired_once(src_port.wrapper.module_name, fired, model)
    written = [port.outputs(out).movedim(2, 0) for port, (out,) in outs.items()]
    home = devices.device_of(written[0])
    sources = t.cat([devices.moved(of_port, home) for of_port in written])
    is_computed = any(port.site.transform is not None for port in plan.src_ports)
    eps = _norms_rounding(sources.dtype) if is_computed else t.finfo(sources.dtype).eps
    eps = max(eps, input_rounding(model.wrapped_model))
    for port, fired in reads.items():
        _check_fired_once(port.name, fired, model)
        if not port.additive:
            (read,) = fired
            if port.by_token:
                read = read.unflatten(0, sources.shape[1:3])
            here = devices.moved(sources, devices.device_of(read))
            model.constants[port.name] = _constant_at(port, read, here, eps)
    places = {port.name: devices.device_of(fired[0]) for port, fired in reads.items()}
    is_on_one = set(places.values()) == {home}
    if plan.crossings and not is_on_one:
        raise ModelError(
            "Edges that lead through attention (`crossing=True`) need a model on one device; "
            f"this one is on {' and '.join(sorted(map(str, {home, *places.values()})))}."
        )
    model.plan = replace(model.plan, devices={} if is_on_one else places)
    model.written = sources[0, 0, 0].clone()
    weights = WeightFingerprint(model.wrapped_model)
    # What hooks add to the residual stream looks like biases, but they may be removed.
    model.weights = None if are_hooked else weights
    return weights


def _probe(model: PatchableModel) -> Any:
    """Run the model once. Raises ModelError if it cannot be run like that."""
    tokens = model.adapter.probe_input(model.wrapped_model)
    try:
        return model.wrapped_model(tokens)
    except AutoCircuitError:
        raise
    except Exception as error:  # each architecture has errors of its own
        if model.user_hooks.ids():
            raise
        raise ModelError(
            f"This {type(model.wrapped_model).__name__} cannot be run with its nodes in "
            f"view: {type(error).__name__}: {one_line(error):.300}. Its architecture is not "
            "supported as it is: it needs a ModelAdapter of its own."
        ) from error


def _check_same_output(model: PatchableModel, in_view: Any) -> None:
    """Raise ModelError if the model is another one where its nodes can be seen.

    Where TransformerLens computes what single heads read and write, it does so from the
    weights of linear maps, which may compute more than that (adapters).
    """
    with unpatched(model):
        out = _probe(model)
    wide = t.promote_types(out.dtype, t.float32)
    distance = (out.to(wide) - in_view.to(wide)).square().mean().sqrt()
    share = max(_norms_rounding(out.dtype) ** 0.5, input_rounding(model.wrapped_model))
    limit = share * out.to(wide).square().mean().sqrt()
    if not distance <= limit:
        raise ModelError(
            f"This {type(model.wrapped_model).__name__} computes something else where what "
            f"its heads read and write can be seen: its outputs are off by {distance:.2g} "
            f"(root mean square). {MORE_THAN_WEIGHTS}"
        )


def _check_whole_blocks(blocks: Sequence[Module]) -> None:
    """Raise ModelError for a block whose weights are on several devices."""
    for idx, block in enumerate(blocks):
        weights = [weight for weight in block.parameters() if not weight.is_meta]
        found = sorted({str(devices.device_of(weight)) for weight in weights})
        if len(found) > 1:
            raise ModelError(
                f"The block {idx} of this model is split over {' and '.join(found)}. What "
                "its heads and MLP read and write must be on one device: load the model "
                "with a device map of whole blocks."
            )


@contextmanager
def _recording(module: Module, outputs: list[Tensor]) -> Iterator[None]:
    handle = module.register_forward_hook(partial(_record, outputs))
    try:
        yield
    finally:
        handle.remove()


def _record(outputs: list[Tensor], module: Module, args: Any, out: Tensor) -> None:
    outputs.append(out)


@contextmanager
def _recorded_inputs(modules: Sequence[Module]) -> Iterator[list[list[Tensor]]]:
    """What each module is given, inside, in each of its calls."""
    inputs: list[list[Tensor]] = [[] for _ in modules]
    with ExitStack() as stack:
        for module, of_module in zip(modules, inputs, strict=True):
            handle = module.register_forward_pre_hook(partial(_record_input, of_module))
            stack.callback(handle.remove)
        yield inputs


def _record_input(inputs: list[Tensor], module: Module, args: Any) -> None:
    inputs.extend(args[:1])


def _check_heads_read(
    port: DestPort, residual: Tensor, inputs: Sequence[Sequence[Tensor]]
) -> None:
    """Raise ModelError unless heads' linear maps read the norm of the residual stream."""
    assert port.heads is not None
    norm = port.heads.norm
    expected = residual if norm is None else norm(residual)
    size = expected.abs()
    tolerance = SUM_ROUNDING * _norms_rounding(expected.dtype) * (size + size.mean())
    for of_linear in inputs:
        is_once = len(of_linear) == 1 and of_linear[0].shape == expected.shape
        if not is_once or not ((of_linear[0] - expected).abs() <= tolerance).all():
            raise ModelError(
                f"The heads at {port.name!r} do not read what was expected: each of their "
                f"{len(inputs)} linear maps must be called once, with the normed residual "
                "stream. This architecture computes attention in another way, so it is not "
                "supported as it is: it needs a ModelAdapter of its own."
            )


def _norms_rounding(dtype: t.dtype) -> float:
    """Hugging Face computes most norms in float32, also in float64 models."""
    return max(t.finfo(dtype).eps, t.finfo(t.float32).eps)


def _check_fired_once(name: str, fired: list[Tensor], model: PatchableModel) -> None:
    if len(fired) != 1:
        raise ModelError(
            f"The module {name!r} ran {len(fired)} times in one forward pass of this "
            f"{type(model.wrapped_model).__name__}, so its node cannot be patched; "
            "expected once. The architecture is not supported as it is: it needs a "
            "ModelAdapter of its own."
        )


def _constant_at(
    port: DestPort,
    read: Float[Tensor, "batch seq *head d_model"],
    sources: Float[Tensor, "src batch seq d_model"],
    eps: float,
) -> Float[Tensor, "d_model"]:
    """What a destination reads besides its sources. Raises ModelError if it varies.

    eps: what the model rounds to.
    """
    heads = read if read.ndim == 4 else read.unsqueeze(2)
    if port.heads is None and heads.shape[2] != port.n_rows:
        raise ModelError(
            f"The activation at {port.name!r} has {heads.shape[2]} heads; "
            f"the graph expects {port.n_rows}."
        )
    wide = t.promote_types(read.dtype, t.float32)
    parts = sources[port.srcs]
    rest = heads.to(wide) - parts.sum(0, dtype=wide).unsqueeze(2)
    constant = rest.mean(dim=(0, 1, 2))
    # What is written is what is rounded, even if a later source takes it away again.
    written = parts.abs().sum(0, dtype=wide).unsqueeze(2) + constant.abs()
    scale = written + written.mean(-1, keepdim=True)
    # A mean over positions is as far off as these are, also where little is written.
    scale = scale + scale.mean(dim=(0, 1, 2))
    error = (rest - constant).abs()
    tolerance = (SUM_ROUNDING * eps * scale).expand_as(error)
    if not (error <= tolerance).all():
        worst = (error / tolerance).nan_to_num(t.inf).argmax()
        raise ModelError(
            f"What {port.name!r} reads is not the sum of its sources: it differs by "
            f"{error.flatten()[worst]:.1e}, and rounding explains "
            f"{tolerance.flatten()[worst]:.1e}. The adapter misses a source, the model "
            "changes the residual stream in between, or its numbers are not finite."
        )
    return constant


# ---------------------------------------------------------------------- patching edges


@checked
@contextmanager
def patch_mode(
    model: PatchableModel,
    patch_src_outs: Float[Tensor, "src batch seq d_model"],
    edges: Collection[Edge | str] | None = None,
    curr_src_outs: Float[Tensor, "src batch seq d_model"] | None = None,
    overwrite_patch: bool = False,
    differences: bool = False,
    keeps_layers: bool = False,
) -> Iterator[None]:
    """Inside, a call of `model` patches `patch_src_outs` along the edges of its masks.

    With single edges this is path patching: it shows a source's direct effect on what one
    destination reads. With all edges of a source it is activation patching.

    patch_src_outs: the activations to patch in, from `src_ablations`.
    edges: Edges or names ("A0.1->MLP 2") to patch, and no others. None: whatever the
        masks say (see `set_all_masks`, `PatchableModel.patch_masks`).
    curr_src_outs: a tensor that receives each source's output, if given.
    overwrite_patch: `patch_src_outs` may be overwritten, which saves memory of its size;
        `model` can then be called once.
    differences: `patch_src_outs` already holds what a patched edge adds to what its
        destination reads: nothing is subtracted, whatever the sources write.
    keeps_layers: `starting_at` will be used inside.

    Hooks of yours take effect as in the model itself, and see what they would see there; what
    they change is recorded as what the source writes. Raises GraphError for hooks that change
    what single heads read (`ln1.hook_normalized`, `attn.hook_in` and the like), which only the
    heads without patched edges would see, and for backward hooks there.

    The wrapped model cannot be called by itself inside. On exit, hooks, switches, train flags
    and masks are what they were. Raises GraphError for an unknown edge, for activations of
    the wrong shape, and for nested use.

    Differs from auto-circuit: the masks do not stay set after the context. What would see
    them there (`draw_seq_graph(model)`, `current_patch_masks_as_prune_scores`, a
    `patch_mode` without `edges`) says so.
    """
    if model.patch_session is not None:
        raise GraphError("`patch_mode` inside of `patch_mode` on the same model.")
    found = (
        None if edges is None else [e for edge in edges for e in model.find_edges(edge)]
    )
    weights = _current_weights(model)
    check_has_values(model)
    model.refresh_prefix()
    with own_computation():
        _heal_masks(model)
        patch_src_outs = _as_written(model, patch_src_outs)
    _check_receives(model, curr_src_outs)
    session = PatchSession(
        model.plan,
        patch_src_outs,
        curr_src_outs,
        model.constants,
        lambda: _any_requires_grad(model),
        weights,
        model.user_hooks,
        overwrite_patch,
        differences,
        keeps_layers,
    )
    session.buffers = model.pass_buffers
    with ExitStack() as stack:
        stack.enter_context(in_use(model.wrapped_model, model, patches=True))
        stack.enter_context(eval_mode(model.wrapped_model))
        for module in (model, *model.wrappers):
            stack.callback(setattr, module, "training", module.training)
        stack.enter_context(
            model.adapter.open_sites(model.wrapped_model, model.separate_qkv)
        )
        if found is not None:
            stack.enter_context(preserved_masks(model, notes="patch_mode"))
            set_all_masks(model, val=0.0)
            for edge in found:
                edge.patch_mask(model).data[(..., *edge.patch_idx)] = 1.0
        stack.callback(setattr, model, "patch_session", None)
        stack.callback(session.close)
        session.open()
        model.patch_session = session
        yield


def _as_written(model: PatchableModel, patch_src_outs: Tensor) -> Tensor:
    """The activations to patch in, as the model's sources would write them.

    Raises GraphError for those that cannot be converted exactly.
    """
    written = model.written
    assert written is not None
    given = f"The activations to patch in (`patch_src_outs`) are {_kind(patch_src_outs)}"
    if patch_src_outs.layout != t.strided or patch_src_outs.is_meta:
        raise GraphError(f"{given}, which hold no numbers that can be patched in.")
    shape = tuple(patch_src_outs.shape)
    if (len(shape), shape[:1], shape[-1:]) != (4, (model.plan.n_slots,), written.shape):
        raise GraphError(
            f"The activations to patch in have shape {shape}; expected [sources, batch, "
            f"positions, d_model] = [{model.plan.n_slots}, batch, positions, "
            f"{len(written)}]. Compute them with `src_ablations`."
        )
    if not _is_exact(patch_src_outs.dtype, written.dtype):
        raise GraphError(
            f"{given}; the model's sources write {_kind(written)}, to which they cannot be "
            f"converted exactly. Convert them yourself (`.to({written.dtype})`), or "
            "compute them with `src_ablations` on this model."
        )
    if patch_src_outs.requires_grad and t.is_grad_enabled():
        raise GraphError(
            "The activations to patch in require gradients, which patching does not give "
            "them: it gives the masks' gradients alone. Pass `patch_src_outs.detach()`."
        )
    return ordinary(patch_src_outs.detach().to(written.device, written.dtype))


def _check_receives(model: PatchableModel, curr_src_outs: Tensor | None) -> None:
    """Raise GraphError unless what the sources write can be stored exactly."""
    written = model.written
    if curr_src_outs is None or written is None:
        return
    is_plain = curr_src_outs.layout == t.strided and not curr_src_outs.is_meta
    if (
        not is_plain
        or curr_src_outs.requires_grad
        or not _is_exact(written.dtype, curr_src_outs.dtype)
    ):
        raise GraphError(
            "`curr_src_outs` receives what the sources write, which is "
            f"{_kind(written)}; it is {_kind(curr_src_outs)}. Give a tensor without "
            "gradients that can hold it: `torch.empty_like(patch_src_outs)`."
        )


def _is_exact(source: t.dtype, target: t.dtype) -> bool:
    """Can all numbers of one type be converted to the other without rounding?"""
    return source.is_floating_point and t.promote_types(source, target) == target


def _kind(tensor: Tensor) -> str:
    grad = ", requires_grad" if tensor.requires_grad else ""
    return f"{tensor.dtype} on {tensor.device} ({tensor.layout}{grad})"


@checked
@contextmanager
def starting_at(model: PatchableModel, dest: DestNode) -> Iterator[None]:
    """Inside, one call of `model` skips the blocks before a destination's.

    Inside of `patch_mode(..., keeps_layers=True)`, without gradients, after one whole
    call. The skipped blocks hand on what they gave in that call, so the masks of their
    destinations must be what they were; and calls must go from late destinations to early
    ones. Raises GraphError if something of this is missing (not for masks).
    """
    if model.patch_session is None:
        raise GraphError("`starting_at` outside of `patch_mode`.")
    ports = (*model.plan.dest_ports, *model.plan.crossings)
    port, *_ = [p for p in ports if dest.module_name in p.dest_modules]
    with model.patch_session.starting_at(port.block):
        yield


def _any_requires_grad(model: PatchableModel) -> bool:
    masks = model.patch_masks.values()
    return any(p.requires_grad for p in chain(masks, model.wrapped_model.parameters()))


@checked
def set_all_masks(model: PatchableModel, val: float) -> None:
    """Set every entry of every mask: 0 patches no edge, 1 patches all of them.

    The masks stay so; but what is set inside of a context that restores masks (`patch_mode`
    with `edges`, `train_mask_mode`, `preserved_masks`) is undone on its exit.
    """
    val = check_number("val", val)
    model.masks_put_back = None
    for mask in model.patch_masks.values():
        mask.data.fill_(val)


@checked
@contextmanager
def preserved_masks(model: PatchableModel, notes: str | None = None) -> Iterator[None]:
    """On exit, the masks have the values that they had on entry.

    notes: the name of a context that users enter: whoever looks at the masks after it, and
    would have seen them changed in auto-circuit, is told (see `masks_put_back`).
    """
    with in_use(model.wrapped_model, model):
        with own_computation():
            _heal_masks(model)
            masks = model.patch_masks
            kept = {name: mask.data for name, mask in masks.items()}
            before = {name: data.clone() for name, data in kept.items()}
        noted, model.masks_put_back = model.masks_put_back, None
        try:
            yield
        finally:
            with own_computation():
                if notes is not None:
                    inside = {name: mask.data for name, mask in masks.items()}
                    noted = masks_put_back(notes, before, inside) or noted
                for name, data in kept.items():
                    # The same memory again: what `current_patch_masks_as_prune_scores`
                    # gave stays true.
                    masks[name].data = data.copy_(before[name])
            model.masks_put_back = noted


def _heal_masks(model: PatchableModel) -> None:
    """Masks whose data somebody made in inference mode, or by `expand`, can be changed."""
    for mask in model.patch_masks.values():
        if mask.is_inference() or not mask.is_contiguous():
            mask.data = mask.data.clone(memory_format=t.contiguous_format)


@checked
@contextmanager
def train_mask_mode(
    model: PatchableModel, requires_grad: bool = True, *, notes: bool = True
) -> Iterator[dict[str, Parameter]]:
    """Inside, the masks can be trained. Yields {destination module name: mask}.

    The model itself is in eval mode and its weights need no gradients; the wrappers are
    in train mode, so that `mask_fn_mode`'s dropout is live. On exit all of that is as it
    was, the masks' values and gradients too: copy what you need inside.

    notes: tell whoever reads the masks after it that they were put back (algorithms of the
        library, whose scores are what they return, do not).
    """
    masks = model.patch_masks
    weights = list(model.wrapped_model.parameters())
    grads_before = [(p, p.requires_grad) for p in [*weights, *masks.values()]]
    wrappers_before = [(wrapper, wrapper.training) for wrapper in model.wrappers]
    with ExitStack() as stack:
        stack.enter_context(own_computation(grad=requires_grad or None))
        stack.enter_context(preserved_masks(model, "train_mask_mode" if notes else None))
        stack.enter_context(eval_mode(model.wrapped_model))
        try:
            for wrapper, _ in wrappers_before:
                wrapper.training = wrapper.is_dest
            for weight, required_grad in grads_before:
                if required_grad:
                    weight.requires_grad_(False)
            for mask in masks.values():
                mask.requires_grad_(requires_grad)
                mask.grad = None
            yield masks
        finally:
            for wrapper, was_training in wrappers_before:
                wrapper.training = was_training
            for param, required_grad in grads_before:
                param.requires_grad_(required_grad)
            for mask in masks.values():
                mask.grad = None


@checked
@contextmanager
def mask_fn_mode(
    model: PatchableModel,
    mask_fn: MaskFn,
    dropout_p: float = 0.0,
    generator: t.Generator | None = None,
) -> Iterator[None]:
    """Inside, masks are read through a function and, when trained, with dropout.

    mask_fn: "hard_concrete" (a random sample per example), "sigmoid", or None.
    generator: where the randomness comes from; the global generator if None.
    """
    check_number("dropout_p", dropout_p, 0, 1)
    wrappers = list(model.dest_wrappers)
    before: list[tuple[PatchWrapperImpl, MaskFn, float, t.Generator | None]] = [
        (w, w.mask_fn, w.dropout_p, w.generator) for w in wrappers
    ]
    with in_use(model.wrapped_model, model):
        try:
            for wrapper in wrappers:
                wrapper.mask_fn, wrapper.dropout_p = mask_fn, dropout_p
                wrapper.generator = generator
            yield
        finally:
            for wrapper, old_fn, old_p, old_generator in before:
                wrapper.mask_fn, wrapper.dropout_p = old_fn, old_p
                wrapper.generator = old_generator


@checked
@contextmanager
def set_mask_batch_size(model: PatchableModel, batch_size: int | None) -> Iterator[None]:
    """Inside, every example of a batch of `batch_size` has masks of its own.

    Masks then have a leading batch dimension. On exit they are what they were.
    `model.patch_masks` stays true all the time. Raises ConfigError for nested use.
    """
    if batch_size is None:
        yield
        return
    batch_size = check_count("batch_size", batch_size)
    wrappers = list(model.dest_wrappers)
    with ExitStack() as stack:
        stack.enter_context(preserved_masks(model))
        for wrapper in wrappers:
            wrapper.set_mask_batch_size(batch_size)
            stack.callback(wrapper.set_mask_batch_size, None)
        yield

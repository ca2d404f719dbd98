"""How edges are patched: the hooks and tensors of one `patch_mode`.

A destination reads `x + sum_src mask[src] * (patch[src] - current[src])`. While a forward
pass runs, each source writes its difference `patch - current` into one buffer, and each
destination multiplies its masks with that buffer. The work is arranged so that it costs
little more than the model itself:

- *Edge blocks.* The edges from a range of sources into all the modules that read it at
  the same place (query, key and value of a block, and the MLP after them) are one matrix
  product, `mask [row, src] @ difference [src, d_model]` at each token.
- *Backward* needs no copy of the differences per destination: a block's gradient is one
  product with the shared buffer, and what it sends back to the sources is added to one
  shared gradient buffer, which each source subtracts from its own gradient. Each source
  is upstream of all the destinations that read it, so the order is right by itself.
- *Sparse circuits.* Without gradients only the columns of a block that do something are
  computed, and only their sources are recorded. If most edges are patched, the base is
  the residual stream of the patched-in run and the columns are those that are *not*
  patched: a small circuit then costs about what the model costs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch as t
from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function, Variable
from torch.nn import Module
from torch.utils.hooks import RemovableHandle

from auto_circuit.errors import GraphError
from auto_circuit.utils.patch_wrapper import PatchWrapperImpl

BlockDelta = Float[Tensor, "token row d_model"]


@dataclass(frozen=True, eq=False)
class DestPort:
    """A module through which the patches of a destination wrapper enter the model.

    Its activation has `n_rows` heads (or is one row); head `h` reads row `mask_rows[h]`
    of the wrapper's mask, or row `h`. `additive`: what the module gives is not the
    residual stream but something that is added to it.
    """

    wrapper: PatchWrapperImpl
    module: Module
    n_rows: int
    mask_rows: tuple[int, ...] | None = None
    additive: bool = False

    @property
    def srcs(self) -> slice:
        """The sources that the module reads."""
        assert self.wrapper.in_srcs is not None
        return self.wrapper.in_srcs


@dataclass(frozen=True, eq=False)
class EdgeBlock:
    """The edges from the sources lo..hi-1 into all the rows of some ports."""

    ports: tuple[DestPort, ...]
    lo: int
    hi: int

    def rows(self, port: DestPort) -> slice:
        """Where the port's rows are in the block."""
        start = sum(p.n_rows for p in self.ports[: self.ports.index(port)])
        return slice(start, start + port.n_rows)


@dataclass(frozen=True, eq=False)
class PatchPlan:
    """What does not change between forward passes.

    block_groups: the blocks, in the order in which the model needs them; blocks that
        share a port are in one group.
    """

    block_groups: tuple[tuple[EdgeBlock, ...], ...]
    dest_ports: tuple[DestPort, ...]
    src_sites: tuple[tuple[PatchWrapperImpl, Module], ...]
    n_srcs: int

    @property
    def blocks(self) -> Iterator[EdgeBlock]:
        """All the blocks, in order."""
        return (block for group in self.block_groups for block in group)


def edge_block_groups(
    ports: Sequence[DestPort],
) -> tuple[tuple[EdgeBlock, ...], ...]:
    """Cut the edges into blocks.

    Ports in a row that read the same sources make one block. A single port that follows
    and reads these and a few more (the MLP after its block's heads) joins the block for
    the sources that they share, and has a second, small block for the rest.
    """
    runs: list[list[DestPort]] = []
    for port in ports:
        if runs and runs[-1][0].srcs == port.srcs:
            runs[-1].append(port)
        else:
            runs.append([port])
    groups: list[tuple[EdgeBlock, ...]] = []
    while runs:
        run = runs.pop(0)
        srcs = run[0].srcs
        if runs and _can_join(runs[0], run):
            (port,) = runs.pop(0)
            shared = EdgeBlock((*run, port), srcs.start, srcs.stop)
            groups.append((shared, EdgeBlock((port,), srcs.stop, port.srcs.stop)))
        else:
            groups.append((EdgeBlock(tuple(run), srcs.start, srcs.stop),))
    return tuple(groups)


def _can_join(following: list[DestPort], run: list[DestPort]) -> bool:
    port, srcs = following[0], run[0].srcs
    return (
        len(following) == 1
        and port.n_rows == 1
        and port.srcs.start == srcs.start
        and port.srcs.stop > srcs.stop
        and not port.additive
    )


@dataclass(eq=False)
class BlockWork:
    """What one forward pass does with a block.

    weights: [batch or 1, position or 1, row, column]; on the patched base, mask - 1.
    columns: the slots of `ForwardPass.diff` that they are multiplied with.
    does_nothing: the weights are all zero.
    delta: the product, from when the block's first port has been reached.
    handles: per further port, the tensor that carries its gradient back to the block.
    """

    weights: Tensor
    columns: slice | Tensor
    does_nothing: bool
    delta: BlockDelta | None = None
    handles: dict[DestPort, Tensor] = field(default_factory=dict)


@dataclass(eq=False)
class ForwardPass:
    """The differences of one forward pass, and the gradients that flow back to them.

    diff: [batch, seq, slot, d_model]; grad_buffer: the same, [token, slot, d_model];
    slots: the slot of each recorded source. With gradients all sources are recorded, so
    that source `i` has slot `i`.
    """

    diff: Tensor | None
    slots: dict[int, int]
    works: dict[EdgeBlock, BlockWork]
    patched_base: frozenset[DestPort]
    grad_buffer: Tensor | None = None
    has_grad: bool = False
    awaits_backward: bool = False
    is_in_backward: bool = False

    def tokens(self) -> Float[Tensor, "token slot d_model"]:
        """The differences, one row of slots per token."""
        if self.diff is None:
            raise GraphError(
                "`backward` came after another forward pass that overwrote what it "
                "needs. Call `backward` for each forward pass before you call it a "
                "second time with retain_graph=True."
            )
        return self.diff.flatten(0, 1)

    def compute(self, block: EdgeBlock) -> BlockDelta | None:
        """What the block's edges change at each row; None if nothing."""
        work = self.works[block]
        if work.does_nothing:
            return None
        if isinstance(work.columns, slice):
            differences = self.tokens()[:, work.columns]
        else:
            differences = self.tokens().index_select(1, work.columns)
        return t.bmm(self._per_token(work.weights), differences)

    def _per_token(self, weights: Tensor) -> Tensor:
        """[batch or 1, seq or 1, row, src] -> [token, row, src]; a view if it can be."""
        assert self.diff is not None
        batch, seq = self.diff.shape[:2]
        if weights.shape[:2] == (1, 1):
            return weights[0].expand(batch * seq, -1, -1)
        return weights.expand(batch, seq, -1, -1).flatten(0, 1)

    def weights_grad(self, block: EdgeBlock, grads: BlockDelta) -> Tensor:
        """The gradient of the block's weights, from those of its rows."""
        work = self.works[block]
        tokens = self.tokens()
        assert self.diff is not None
        products = t.bmm(grads, tokens[:, work.columns].mT)
        products = products.unflatten(0, self.diff.shape[:2])
        expanded = [dim for dim in (0, 1) if work.weights.shape[dim] == 1]
        return products.sum(expanded, keepdim=True) if expanded else products

    def send_back(self, block: EdgeBlock, grads: BlockDelta) -> None:
        """Add to the gradient of the differences what comes from the block's rows."""
        weights = self._per_token(self.works[block].weights).mT
        tokens = self.tokens()
        if self.grad_buffer is None:
            self.grad_buffer = t.empty_like(tokens)
        grad = self.grad_buffer
        if not self.has_grad and (block.lo, block.hi) == (0, tokens.shape[1]):
            t.bmm(weights, grads, out=grad)
        else:
            if not self.has_grad:
                grad.zero_()
            grad[:, block.lo : block.hi].baddbmm_(weights, grads)
        self.has_grad = True

    def enter_backward(self) -> None:
        """When the backward pass that is running ends, forget its gradients."""
        if not self.is_in_backward:
            self.is_in_backward = True
            Variable._execution_engine.queue_callback(self._leave_backward)

    def _leave_backward(self) -> None:
        self.has_grad = False
        self.is_in_backward = False
        self.awaits_backward = False


class _ReadBlock(Function):
    """Identity plus patch on the input of a block's first port; a handle per further one.

    A handle is a constant zero whose gradient is that of the further port's input. The
    first port's input goes through here so that autograd knows that the block is
    downstream of its sources.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, block: EdgeBlock, run: ForwardPass
    ) -> tuple[Tensor, ...]:
        ctx.run, ctx.block = run, block
        ctx.set_materialize_grads(False)
        run.awaits_backward = True
        work = run.works[block]
        work.delta = run.compute(block)
        tokens = run.tokens()
        zero = tokens.new_zeros(())
        handles = [
            zero.expand(tokens.shape[0], port.n_rows, tokens.shape[2])
            for port in block.ports[1:]
        ]
        return (_add_delta(x, work, block, block.ports[0]), *handles)

    @staticmethod
    def backward(ctx: Any, *grad_outs: Tensor | None) -> tuple[Tensor | None, ...]:
        run, block = ctx.run, ctx.block
        run.enter_backward()
        tokens = run.tokens()
        n_rows = sum(port.n_rows for port in block.ports)
        grads = tokens.new_empty((tokens.shape[0], n_rows, tokens.shape[2]))
        for port, grad in zip(block.ports, grad_outs, strict=True):
            rows = grads[:, block.rows(port)]
            rows.zero_() if grad is None else rows.copy_(grad.reshape(rows.shape))
        grad_weights = None
        if ctx.needs_input_grad[1]:
            grad_weights = run.weights_grad(block, grads)
        if not run.works[block].does_nothing:
            run.send_back(block, grads)
        return grad_outs[0], grad_weights, None, None


class _EnterPort(Function):
    """Add to a further port's input what its block holds for it."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        handle: Tensor,
        work: BlockWork,
        block: EdgeBlock,
        port: DestPort,
    ) -> Tensor:
        ctx.handle_shape = handle.shape
        return _add_delta(x, work, block, port)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return grad_out, grad_out.reshape(ctx.handle_shape), None, None, None


class _WriteSource(Function):
    """Identity on a source's output, minus the gradient that destinations send back."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, run: ForwardPass, srcs: slice) -> Tensor:
        ctx.run, ctx.srcs = run, srcs
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if not ctx.run.has_grad:
            return grad_out, None, None
        sent_back = ctx.run.grad_buffer[:, ctx.srcs].reshape(grad_out.shape)
        return grad_out - sent_back, None, None


def _add_delta(x: Tensor, work: BlockWork, block: EdgeBlock, port: DestPort) -> Tensor:
    if work.delta is None:
        return x.view_as(x)
    return x + work.delta[:, block.rows(port)].reshape(x.shape)


class PatchSession:
    """The hooks of one `patch_mode`, and the forward pass that runs under them.

    patch_src_outs: [src batch seq d_model], the activations that are patched in.
    curr_src_outs: if given, a tensor of that shape that receives each source's output.
    constants: per destination module, what reaches it besides its sources (biases).
    needs_grad: may gradients be asked for?
    overwrite_patch: may `patch_src_outs` be overwritten with the differences? Saves a
        tensor of that size; one forward pass only.
    differences: are `patch_src_outs` the differences themselves? They then do not depend
        on what the sources write.
    """

    def __init__(
        self,
        plan: PatchPlan,
        patch_src_outs: Tensor,
        curr_src_outs: Tensor | None,
        constants: dict[str, Tensor],
        needs_grad: Callable[[], bool],
        overwrite_patch: bool = False,
        differences: bool = False,
    ) -> None:
        self.plan = plan
        self.patch = patch_src_outs
        self.curr_src_outs = curr_src_outs
        self.constants = constants
        self.needs_grad = needs_grad
        self.overwrite_patch = overwrite_patch
        self.differences = differences
        self.run: ForwardPass | None = None
        self._patch_sums: dict[tuple[int, int], Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def open(self) -> None:
        """Register the hooks.

        Of a module that is both, first the destination is patched and then the source
        recorded; but an additive port comes after the source that it adds to.
        """
        for port in self.plan.dest_ports:
            if not port.additive:
                self._hook(port.module, self._reader(port))
        for wrapper, module in self.plan.src_sites:
            self._hook(module, self._writer(wrapper))
        for port in self.plan.dest_ports:
            if port.additive:
                self._hook(port.module, self._reader(port))

    def close(self) -> None:
        """Remove the hooks and let go of all activations."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self.run is not None and not self.run.awaits_backward:
            # Even if someone keeps an output, and by it the pass, alive.
            self.run.diff = self.run.grad_buffer = None
        self.run = None
        self._patch_sums.clear()

    def _hook(self, module: Module, hook: Callable[[Tensor], Tensor | None]) -> None:
        def forward_hook(module: Module, args: Any, output: Tensor) -> Tensor | None:
            return hook(output)

        self._handles.append(module.register_forward_hook(forward_hook))

    # ------------------------------------------------------------------ sources

    def _writer(self, wrapper: PatchWrapperImpl) -> Callable[[Tensor], Tensor | None]:
        srcs = wrapper.src_idxs
        assert srcs is not None

        def write(out: Tensor) -> Tensor | None:
            if srcs.start == 0:
                self.run = self._new_run(out)
            run = self._running()
            heads = out if wrapper.head_dim is not None else out.unsqueeze(2)
            self._record(run, srcs, heads.detach())
            if t.is_grad_enabled() and out.requires_grad and not self.differences:
                return _WriteSource.apply(out, run, srcs)  # type: ignore[no-any-return]
            return None

        return write

    def _record(self, run: ForwardPass, srcs: slice, heads: Tensor) -> None:
        if self.curr_src_outs is not None:
            self.curr_src_outs[srcs] = heads.movedim(2, 0)
        assert run.diff is not None
        all_srcs = range(srcs.start, srcs.stop)
        recorded = [i for i, src in enumerate(all_srcs) if src in run.slots]
        if len(recorded) == len(all_srcs):
            first = run.slots[srcs.start]
            out = run.diff[:, :, first : first + len(recorded)]
            self._subtract(self.patch[srcs].movedim(0, 2), heads, out)
            return
        for i in recorded:
            out = run.diff[:, :, run.slots[srcs.start + i]]
            self._subtract(self.patch[srcs.start + i], heads[:, :, i], out)

    def _subtract(self, patch: Tensor, current: Tensor, out: Tensor) -> None:
        if self.differences:
            out.copy_(patch)
        else:
            t.sub(patch, current, out=out)

    def _running(self) -> ForwardPass:
        if self.run is None:
            raise GraphError(
                "A destination ran before the first source. In `patch_mode` a model "
                "must run from its start."
            )
        return self.run

    # ------------------------------------------------------------- forward passes

    def _new_run(self, start: Tensor) -> ForwardPass:
        batch, seq, d_model = start.shape
        if self.patch.shape != (self.plan.n_srcs, batch, seq, d_model):
            raise GraphError(
                f"The activations to patch in have shape {tuple(self.patch.shape)}, but "
                "this forward pass needs [sources, batch, positions, d_model] = "
                f"{(self.plan.n_srcs, batch, seq, d_model)}. Compute them with "
                "`src_ablations` on inputs of the same size (and the same KV cache)."
            )
        weights = self._block_weights(batch, seq)
        if t.is_grad_enabled() and (start.requires_grad or self.needs_grad()):
            works = self._dense_works(weights)
            slots = {src: src for src in range(self.plan.n_srcs)}
            patched_base: frozenset[DestPort] = frozenset()
        else:
            works, slots, patched_base = self._sparse_works(weights)
        run = ForwardPass(None, slots, works, patched_base)
        self._give_buffers(run, (batch, seq, len(slots), d_model))
        return run

    def _give_buffers(self, run: ForwardPass, shape: tuple[int, ...]) -> None:
        """Memory for the differences: the last pass's, if nothing can need it."""
        last = self.run
        if last is not None and last.diff is not None and last.diff.shape == shape:
            same_mode = last.diff.is_inference() == t.is_inference_mode_enabled()
            if same_mode and not last.awaits_backward:
                run.diff, last.diff = last.diff, None
                run.grad_buffer, last.grad_buffer = last.grad_buffer, None
        if run.diff is None and self.overwrite_patch:
            run.diff = self._patch_as_diff(shape)
        if run.diff is None:
            run.diff = self.patch.new_empty(shape)

    def _patch_as_diff(self, shape: tuple[int, ...]) -> Tensor | None:
        if self.run is not None:
            raise GraphError(
                "A second forward pass in a `patch_mode` with `overwrite_patch=True`: "
                "the first one has overwritten the activations to patch in."
            )
        by_token = self.patch.movedim(0, 2)
        return by_token if by_token.shape == shape and by_token.is_contiguous() else None

    def _block_weights(self, batch: int, seq: int) -> dict[EdgeBlock, Tensor]:
        """Each block's share of the masks: [batch or 1, position or 1, row, src]."""
        wrappers = {port.wrapper: None for port in self.plan.dest_ports}
        masks = {wrapper: wrapper.mask_weights(batch) for wrapper in wrappers}
        for wrapper, mask in masks.items():
            if mask.shape[0] not in (1, batch) or mask.shape[1] not in (1, seq):
                raise GraphError(
                    f"The mask of {wrapper.module_name} is for {mask.shape[0]} examples "
                    f"of {mask.shape[1]} positions, but the input has {batch} of {seq}. "
                    "See `set_mask_batch_size` and `patchable_model(..., seq_len=)`."
                )
        return {block: _stack_rows(block, masks) for block in self.plan.blocks}

    def _dense_works(
        self, weights: dict[EdgeBlock, Tensor]
    ) -> dict[EdgeBlock, BlockWork]:
        # One transfer for all the blocks: a GPU would stop at each.
        is_used = t.stack([w.detach().any() for w in weights.values()]).tolist()
        return {
            block: BlockWork(w, slice(block.lo, block.hi), not used)
            for (block, w), used in zip(weights.items(), is_used, strict=True)
        }

    def _sparse_works(
        self, weights: dict[EdgeBlock, Tensor]
    ) -> tuple[dict[EdgeBlock, BlockWork], dict[int, int], frozenset[DestPort]]:
        """Choose base and columns of every block, and the sources to record."""
        patched, unpatched = _used_columns(weights)
        columns: dict[EdgeBlock, list[int]] = {}
        on_patched_base: list[DestPort] = []
        for group in self.plan.block_groups:
            base = patched
            ports = {port for block in group for port in block.ports}
            # Fixed differences do not lead to the patched-in run.
            if not self.differences and not any(port.additive for port in ports):
                if _n_columns(unpatched, group) < _n_columns(patched, group):
                    base = unpatched
                    on_patched_base += ports
            columns.update((block, _worth_picking(block, base[block])) for block in group)
        patched_base = frozenset(on_patched_base)
        recorded = sorted({src for srcs in columns.values() for src in srcs})
        slots = {src: slot for slot, src in enumerate(recorded)}
        works = {
            block: _sparse_work(block, w, columns[block], slots, patched_base)
            for block, w in weights.items()
        }
        return works, slots, patched_base

    # --------------------------------------------------------------- destinations

    def _reader(self, port: DestPort) -> Callable[[Tensor], Tensor | None]:
        blocks = [block for block in self.plan.blocks if port in block.ports]

        def read(x: Tensor) -> Tensor | None:
            run = self._running()
            if port in run.patched_base:
                out = self._patched_base(port).to(x.dtype)
                out = out.unsqueeze(2) if x.ndim == 4 else out
                out = out.expand_as(x)
            else:
                out = x
            for block in blocks:
                out = _read(run, block, port, out)
            return None if out is x else out

        return read

    def _patched_base(self, port: DestPort) -> Float[Tensor, "batch seq d_model"]:
        """What the port reads when all of its edges are patched."""
        total = self._patch_sum(port.srcs.start, port.srcs.stop)
        return total + self.constants[port.wrapper.module_name]

    def _patch_sum(self, lo: int, hi: int) -> Float[Tensor, "batch seq d_model"]:
        if (lo, hi) not in self._patch_sums:
            shorter = [end for start, end in self._patch_sums if start == lo]
            known = max((end for end in shorter if end < hi), default=lo)
            # Half precision loses too much over a hundred sources.
            dtype = t.promote_types(self.patch.dtype, t.float32)
            total = self.patch[known:hi].sum(0, dtype=dtype)
            if known > lo:
                total = total + self._patch_sums[lo, known]
            self._patch_sums[lo, hi] = total
        return self._patch_sums[lo, hi]


def _read(run: ForwardPass, block: EdgeBlock, port: DestPort, x: Tensor) -> Tensor:
    out = _read_first(run, block, x) if port is block.ports[0] else None
    work = run.works[block]
    if out is None:
        # Taken out: a handle that stayed would keep the whole pass alive in a circle.
        handle = work.handles.pop(port, None)
        if handle is not None:
            out = _EnterPort.apply(x, handle, work, block, port)
        else:
            out = x if work.delta is None else _add_delta(x, work, block, port)
    if port is block.ports[-1]:
        work.delta = None
    return out  # type: ignore[return-value]


def _read_first(run: ForwardPass, block: EdgeBlock, x: Tensor) -> Tensor | None:
    """The patched input of a block's first port, or None if no gradient flows there."""
    work = run.works[block]
    if t.is_grad_enabled() and (x.requires_grad or work.weights.requires_grad):
        if work.does_nothing and not work.weights.requires_grad:
            return x
        out, *handles = _ReadBlock.apply(x, work.weights, block, run)  # type: ignore[misc]
        work.handles = dict(zip(block.ports[1:], handles, strict=True))
        return out
    work.delta = run.compute(block)
    return None


def _stack_rows(block: EdgeBlock, masks: dict[PatchWrapperImpl, Tensor]) -> Tensor:
    """The rows of all the block's ports, for the block's sources."""
    parts = []
    for port in block.ports:
        mask = masks[port.wrapper]
        if port.mask_rows is not None:
            mask = mask[:, :, list(port.mask_rows)]
        parts.append(mask[..., block.lo - port.srcs.start : block.hi - port.srcs.start])
    if len(parts) == 1:
        return parts[0]
    leading = t.broadcast_shapes(*(part.shape[:2] for part in parts))
    return t.cat([part.expand(*leading, -1, -1) for part in parts], dim=2)


def _used_columns(
    weights: dict[EdgeBlock, Tensor],
) -> tuple[dict[EdgeBlock, list[int]], dict[EdgeBlock, list[int]]]:
    """Per block: the sources with any patched edge, and with any not fully patched."""
    flags = [
        t.stack([w != 0, w != 1]).flatten(1, -2).any(dim=1) for w in weights.values()
    ]
    # One transfer for all the blocks: a GPU would stop at each.
    all_flags = t.cat(flags, dim=1).cpu()
    per_block = all_flags.split([flag.shape[1] for flag in flags], dim=1)
    patched, unpatched = (
        {
            block: (used[i].nonzero().flatten() + block.lo).tolist()
            for block, used in zip(weights, per_block, strict=True)
        }
        for i in (0, 1)
    )
    return patched, unpatched


def _worth_picking(block: EdgeBlock, srcs: list[int]) -> list[int]:
    """These columns, or all if there are so many that picking them costs more."""
    n_srcs = block.hi - block.lo
    return list(range(block.lo, block.hi)) if 2 * len(srcs) > n_srcs else srcs


def _n_columns(columns: dict[EdgeBlock, list[int]], blocks: Iterable[EdgeBlock]) -> int:
    return sum(len(columns[block]) for block in blocks)


def _sparse_work(
    block: EdgeBlock,
    weights: Tensor,
    srcs: list[int],
    slots: dict[int, int],
    patched_base: frozenset[DestPort],
) -> BlockWork:
    if block.ports[0] in patched_base:
        weights = weights - 1
    if not srcs:
        return BlockWork(weights, slice(0, 0), does_nothing=True)
    if len(srcs) == block.hi - block.lo:
        first = slots[block.lo]
        return BlockWork(weights, slice(first, first + len(srcs)), does_nothing=False)
    columns = t.tensor([src - block.lo for src in srcs], device=weights.device)
    slot_idxs = t.tensor([slots[src] for src in srcs], device=weights.device)
    weights = weights.index_select(-1, columns)
    return BlockWork(weights, slot_idxs, does_nothing=False)

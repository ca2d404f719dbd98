"""How edges are patched: the hooks of one `patch_mode`.

A destination reads `x + sum_src mask[src] * (patch[src] - current[src])`. While a forward
pass runs, each source writes its difference `patch - current` into one buffer, and each
destination multiplies its masks with that buffer. The work is arranged so that it costs
little more than the model itself:

- *Edge matrices* (`edge_matrices`): one matrix product for all that is read at one place.
- *Backward* (`forward_pass`) needs no copy of the differences per destination.
- *Heads* (`head_inputs`): inputs of single heads are computed only where they differ.
- *Sparse circuits.* Without gradients only the rows and columns of a matrix that do
  something are computed, and only their sources are recorded. If most edges are patched,
  the base is the residual stream of the patched-in run and the columns are those that are
  *not* patched: a small circuit then costs about what the model costs.
- *Starting late.* If no edge changes before some block, the blocks before it hand on what
  they gave in the last whole pass (`PatchSession.starting_at`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch as t
from jaxtyping import Float
from torch import Tensor
from torch.nn import Module

from auto_circuit.engine.edge_matrices import DestPort, EdgeMatrix, PatchPlan, SrcPort
from auto_circuit.engine.forward_pass import (
    ForwardPass,
    MatrixWork,
    read_port,
    write_source,
)
from auto_circuit.engine.head_inputs import head_outputs, linear_forward, outputs_of
from auto_circuit.engine.patch_wrapper import PatchWrapperImpl
from auto_circuit.errors import GraphError
from auto_circuit.modules import replaced_forward
from auto_circuit.utils.user_hooks import (
    Bypassed,
    UserHooks,
    changes_refused,
    check_no_backward_hooks,
)
from auto_circuit.weights import WeightFingerprint

PICKING_COST = 3
"""To copy a difference to another place, in terms of multiplying with it where it is."""


class PatchSession:
    """The hooks of one `patch_mode`, and the forward pass that runs under them.

    patch_src_outs: [src batch seq d_model], the activations that are patched in.
    curr_src_outs: if given, a tensor of that shape that receives each source's output.
    constants: per destination module, what reaches it besides its sources (biases).
    needs_grad: may gradients be asked for?
    weights: those that the constants, and whatever is remembered, belong to.
    user_hooks: those on the model, which must take effect or be refused.
    overwrite_patch: may `patch_src_outs` be overwritten with the differences? Saves a
        tensor of that size; one forward pass only.
    differences: are `patch_src_outs` the differences themselves? They then do not depend
        on what the sources write.
    keeps_layers: will `starting_at` be used?
    """

    def __init__(
        self,
        plan: PatchPlan,
        patch_src_outs: Tensor,
        curr_src_outs: Tensor | None,
        constants: dict[str, Tensor],
        needs_grad: Callable[[], bool],
        weights: WeightFingerprint,
        user_hooks: UserHooks,
        overwrite_patch: bool = False,
        differences: bool = False,
        keeps_layers: bool = False,
    ) -> None:
        if overwrite_patch and keeps_layers:
            raise GraphError(
                "`keeps_layers` and `overwrite_patch` do not go together: a pass from the "
                "middle needs the activations that the whole pass would overwrite."
            )
        self.plan = plan
        self.patch = patch_src_outs
        self.curr_src_outs = curr_src_outs
        self.constants = constants
        self.needs_grad = needs_grad
        self.weights = weights
        self.user_hooks = user_hooks
        self.overwrite_patch = overwrite_patch
        self.differences = differences
        self.keeps_layers = keeps_layers
        self.forward_pass: ForwardPass | None = None
        self.is_called = False
        self._first_block = 0
        self._overwritten_from = len(plan.blocks)
        self._block_outs: dict[int, Any] = {}
        self._hook_ids: list[int] = []
        self._last_hooks: list[tuple[Any, int]] = []  # a module's OrderedDict, a key
        self._patch_version: int | None = None
        self._patch_sums: dict[tuple[int, int], Tensor] = {}
        self._base_outs: dict[DestPort, tuple[list[Tensor], list[int | None]]] = {}
        self._exit = ExitStack()

    def open(self) -> None:
        """Register the hooks.

        Of a module that is both, first the destination is patched and then the source
        recorded; but an additive port comes after the source that it adds to.
        """
        for port in self.plan.dest_ports:
            if port.heads is not None:
                self._stand_in(port)
            elif not port.additive:
                self._hook(
                    port.module, partial(self._read, port, self._matrices_of(port))
                )
            if port.component is not None:
                self._remember(port, port.component)
        for src_port in self.plan.src_ports:
            site = src_port.site
            is_last = site.projection is not None
            self._hook(site.module, partial(self._write, src_port), is_last)
        for port in self.plan.dest_ports:
            if port.additive:
                self._hook(
                    port.module, partial(self._read, port, self._matrices_of(port))
                )
        if self.keeps_layers:
            for idx, block in enumerate(self.plan.blocks):
                self._hook(block, partial(self._keep, idx))

    def close(self) -> None:
        """Remove the hooks and let go of all activations."""
        self._exit.close()
        if self.forward_pass is not None and not self.forward_pass.awaits_backward:
            # Even if someone keeps an output, and by it the pass, alive.
            self.forward_pass.diff = self.forward_pass.grad_buffer = (
                self.forward_pass.scratch
            ) = None
        self.forward_pass = None
        self._patch_sums.clear()
        self._base_outs.clear()
        self._block_outs.clear()

    def _hook(
        self, module: Module, hook: Callable[[Any], Tensor | None], is_last: bool = False
    ) -> None:
        """is_last: must it see what all other hooks have made of the output?"""
        handle = module.register_forward_hook(partial(_call_with_output, hook))
        self._exit.callback(handle.remove)
        if is_last:
            self._last_hooks.append((module._forward_hooks, handle.id))

    # ------------------------------------------------------------------ users' hooks

    def _meet_users_hooks(self) -> None:
        """Before a pass: what users' hooks change takes effect, or will be refused."""
        self._hook_ids = self.user_hooks.ids()
        if not self._hook_ids:
            return
        for hooks, id in self._last_hooks:
            hooks.move_to_end(id)
        for port in self.plan.dest_ports:
            self._exit.enter_context(changes_refused(port.bypassed))
        # Without those that cannot change anything now.
        self._hook_ids = self.user_hooks.ids()

    def _check_no_backward_hooks(self) -> None:
        """Where the engine sends gradients past a module, its hooks would not see them."""
        if not self._hook_ids:
            return
        for port in self.plan.dest_ports:
            check_no_backward_hooks(port.bypassed)
            if port.heads is not None:
                residual = f"the residual stream that {port.name} reads"
                check_no_backward_hooks([Bypassed(residual, port.module)])
        for src_port in self.plan.src_ports:
            if src_port.site.projection is not None:
                name = f"the input of {src_port.wrapper.module_name}"
                check_no_backward_hooks([Bypassed(name, src_port.site.module)])

    # ------------------------------------------------------------------ starting late

    def _keep(self, idx: int, output: Any) -> None:
        if self._first_block == 0:
            self._block_outs[idx] = _copied(output)

    @contextmanager
    def called(self) -> Iterator[None]:
        """Inside, the PatchableModel is called, and not the model that it wraps."""
        before, self.is_called = self.is_called, True
        try:
            yield
        finally:
            self.is_called = before

    @contextmanager
    def starting_at(self, block: int) -> Iterator[None]:
        """Inside, one forward pass, in which the blocks before this one do not run.

        They hand on what they gave in the last whole pass, whose masks the caller must
        not have changed before it. Only with `keeps_layers`, without gradients, and
        from late blocks to early ones: what later blocks wrote is overwritten.
        """
        if block == 0:
            yield
            return
        is_ready = self.forward_pass is not None and len(self._block_outs) == len(
            self.plan.blocks
        )
        if t.is_grad_enabled() or not is_ready:
            raise GraphError(
                "A pass from the middle needs `patch_mode(..., keeps_layers=True)` and, "
                "in it, a whole pass before; both without gradients (`torch.no_grad()`)."
            )
        if block > self._overwritten_from:
            raise GraphError(
                f"A pass from block {block} after one from {self._overwritten_from}: they "
                "must go from late blocks to early ones, or with a whole pass in between."
            )
        if self.user_hooks.ids() != self._hook_ids:
            raise GraphError(
                "Hooks were added or removed since the whole pass, so blocks cannot hand on "
                "what they gave in it. Begin with a whole pass again."
            )
        if not self.weights.holds():
            raise GraphError(
                "The model's weights have changed inside of `patch_mode`: blocks cannot "
                "hand on what they gave before. Leave the context, and compute the "
                "activations to patch in again."
            )
        with ExitStack() as stack:
            for idx, module in enumerate(self.plan.blocks[:block]):
                stack.enter_context(replaced_forward(module, self._hand_on(idx)))
            stack.callback(setattr, self, "_first_layer", 0)
            self._first_block = self._overwritten_from = block
            self.forward_pass = self._continued(self._current_pass())
            yield

    def _hand_on(self, idx: int) -> Callable[..., Any]:
        # A copy: somebody's hook in the next block may change it in place.
        return lambda *args, **kwargs: _copied(self._block_outs[idx])

    def _continued(self, forward_pass: ForwardPass) -> ForwardPass:
        """A pass with the differences that the last one left."""
        assert forward_pass.diff is not None
        matrices = [
            matrix
            for matrix in self.plan.matrices
            if matrix.ports[0].block >= self._first_block
        ]
        batch, seq = forward_pass.diff.shape[:2]
        weights = self._matrix_weights(batch, seq, matrices)
        works, _, recorded, patched_base = self._sparse_works(weights)
        return ForwardPass(
            forward_pass.diff,
            forward_pass.slots,
            recorded,
            works,
            patched_base,
            scratch=forward_pass.scratch,
        )

    # ------------------------------------------------------------------ sources

    def _write(self, port: SrcPort, out: Tensor) -> Tensor | None:
        if port.srcs.start == 0:
            self.forward_pass = self._new_pass(out)
        forward_pass = self._current_pass()
        self._record(forward_pass, port, out.detach())
        if _needs_grad(forward_pass, out) and not self.differences:
            return write_source(forward_pass, port, out)
        return None

    def _record(self, forward_pass: ForwardPass, port: SrcPort, out: Tensor) -> None:
        assert forward_pass.diff is not None
        srcs = port.srcs
        all_srcs = range(srcs.start, srcs.stop)
        recorded = [i for i, src in enumerate(all_srcs) if src in forward_pass.recorded]
        if not recorded and self.curr_src_outs is None:
            return
        with t.no_grad():
            heads = port.outputs(out)
        if self.curr_src_outs is not None:
            # What was made in inference mode can be changed in it alone.
            with t.inference_mode(self.curr_src_outs.is_inference()), t.no_grad():
                self.curr_src_outs[srcs] = heads.movedim(2, 0)
        if len(recorded) == len(all_srcs):
            first = forward_pass.slots[srcs.start]
            out = forward_pass.diff[:, :, first : first + len(recorded)]
            self._subtract(self.patch[srcs].movedim(0, 2), heads, out)
            return
        for i in recorded:
            out = forward_pass.diff[:, :, forward_pass.slots[srcs.start + i]]
            self._subtract(self.patch[srcs.start + i], heads[:, :, i], out)

    def _subtract(self, patch: Tensor, current: Tensor, out: Tensor) -> None:
        if self.differences:
            out.copy_(patch)
        else:
            t.sub(patch, current, out=out)

    def _current_pass(self) -> ForwardPass:
        if self.forward_pass is None:
            raise GraphError(
                "A destination ran before the first source. In `patch_mode` a model "
                "must run from its start."
            )
        return self.forward_pass

    # ------------------------------------------------------------- forward passes

    def _new_pass(self, start: Tensor) -> ForwardPass:
        batch, seq, d_model = start.shape
        self._repeat_for(batch)
        if self.patch.shape != (self.plan.n_srcs, batch, seq, d_model):
            raise GraphError(
                f"The activations to patch in have shape {tuple(self.patch.shape)}, but "
                "this forward pass needs [sources, batch, positions, d_model] = "
                f"{(self.plan.n_srcs, batch, seq, d_model)}. Compute them with "
                "`src_ablations` on inputs of the same size (and the same KV cache)."
            )
        if not self.is_called:
            raise GraphError(
                "The wrapped model was called by itself while its PatchableModel is in "
                "`patch_mode`, whose patches act in every pass of the model. Call the "
                "PatchableModel, or leave `patch_mode` for a pass without patches."
            )
        self._check_curr_src_outs()
        if self.overwrite_patch and self.forward_pass is not None:
            raise GraphError(
                "A second forward pass in a `patch_mode` with `overwrite_patch=True`: "
                "the first one has overwritten the activations to patch in."
            )
        self._forget_what_is_stale()
        self._meet_users_hooks()
        weights = self._matrix_weights(batch, seq, list(self.plan.matrices))
        if t.is_grad_enabled() and (start.requires_grad or self.needs_grad()):
            self._check_no_backward_hooks()
            works = self._dense_works(weights)
            slots = {src: src for src in range(self.plan.n_srcs)}
            forward_pass = ForwardPass(
                None, slots, frozenset(slots), works, frozenset(), is_dense=True
            )
        else:
            works, slots, recorded, patched_base = self._sparse_works(weights)
            forward_pass = ForwardPass(None, slots, recorded, works, patched_base)
        self._overwritten_from = len(self.plan.blocks)
        # A slot more: see `ForwardPass.compute_inputs`.
        n_slots = min(len(slots) + 1, self.plan.n_srcs)
        self._give_buffers(forward_pass, (batch, seq, n_slots, d_model))
        return forward_pass

    def _repeat_for(self, batch: int) -> None:
        """Repeat one set of activations (a mean) for a batch of another size.

        The last batch of a dataloader may be smaller.
        """
        of_another_size = self.patch.ndim == 4 and self.patch.shape[1] != batch
        if of_another_size and self.patch.shape[1] > 1 and self.patch.stride(1) == 0:
            self.patch = self.patch[:, :1].expand(-1, batch, -1, -1)
            self._patch_version = None  # what is remembered is of the other size

    def _give_buffers(self, forward_pass: ForwardPass, shape: tuple[int, ...]) -> None:
        """Memory for the differences: the last pass's, if nothing can need it."""
        last = self.forward_pass
        if last is not None and last.diff is not None and last.diff.shape == shape:
            same_mode = last.diff.is_inference() == t.is_inference_mode_enabled()
            if same_mode and not last.awaits_backward:
                forward_pass.diff, last.diff = last.diff, None
                forward_pass.grad_buffer, last.grad_buffer = last.grad_buffer, None
                forward_pass.scratch, last.scratch = last.scratch, None
        if self.overwrite_patch and forward_pass.is_dense:
            forward_pass.diff = self._patch_as_diff(shape)
            forward_pass.holds_patches = forward_pass.diff is not None
        if forward_pass.diff is None:
            forward_pass.diff = self.patch.new_empty(shape)

    def _patch_as_diff(self, shape: tuple[int, ...]) -> Tensor | None:
        by_token = self.patch.movedim(0, 2)
        return by_token if by_token.shape == shape and by_token.is_contiguous() else None

    def _check_curr_src_outs(self) -> None:
        given = self.curr_src_outs
        if given is None:
            return
        if given.shape != self.patch.shape:
            raise GraphError(
                f"`curr_src_outs` has shape {tuple(given.shape)}; it must have that of the "
                f"activations to patch in, {tuple(self.patch.shape)}."
            )
        if given.untyped_storage().data_ptr() == self.patch.untyped_storage().data_ptr():
            raise GraphError(
                "`curr_src_outs` shares memory with the activations to patch in, which "
                "it would overwrite before they are used. Give a tensor of its own: "
                "`torch.empty_like(patch_src_outs)`."
            )

    def _forget_what_is_stale(self) -> None:
        """Sums of patches, and what they lead to, are those of the patches as they were."""
        version = _version(self.patch)
        if version is None or version != self._patch_version:
            self._patch_sums.clear()
            self._base_outs.clear()
        self._patch_version = version

    def _matrix_weights(
        self, batch: int, seq: int, matrices: list[EdgeMatrix]
    ) -> dict[EdgeMatrix, Tensor]:
        """Each matrix's share of the masks: [batch or 1, position or 1, row, src]."""
        ports = {port: None for matrix in matrices for port in matrix.ports}
        wrappers = {wrapper: None for port in ports for wrapper in port.wrappers}
        masks = {wrapper: wrapper.mask_weights(batch) for wrapper in wrappers}
        for wrapper, mask in masks.items():
            if mask.shape[0] not in (1, batch) or mask.shape[1] not in (1, seq):
                raise GraphError(
                    f"The mask of {wrapper.module_name} is for {mask.shape[0]} examples "
                    f"of {mask.shape[1]} positions, but the input has {batch} of {seq}. "
                    "See `set_mask_batch_size` and `patchable_model(..., seq_len=)`."
                )
        return {matrix: _stack_rows(matrix, masks) for matrix in matrices}

    def _dense_works(
        self, weights: dict[EdgeMatrix, Tensor]
    ) -> dict[EdgeMatrix, MatrixWork]:
        # One transfer for all the matrices: a GPU would stop at each.
        is_used = t.stack([w.detach().any() for w in weights.values()]).tolist()
        return {
            matrix: MatrixWork(
                w,
                slice(matrix.lo, matrix.hi),
                list(range(matrix.n_rows)),
                does_nothing=not used,
                inputs_slot=matrix.hi,
            )
            for (matrix, w), used in zip(weights.items(), is_used, strict=True)
        }

    def _sparse_works(
        self, weights: dict[EdgeMatrix, Tensor]
    ) -> tuple[
        dict[EdgeMatrix, MatrixWork], dict[int, int], frozenset[int], frozenset[DestPort]
    ]:
        """Choose base and edges of every matrix, and the sources with slots and to record."""
        patched, unpatched = _used_edges(weights)
        used: dict[EdgeMatrix, UsedEdges] = {}
        on_patched_base: list[DestPort] = []
        # Else what is known of the patched-in run belongs to other weights, or lacks what
        # hooks add to the residual stream.
        may_use_base = (
            not self.differences and not self._hook_ids and self.weights.holds()
        )
        for whole_group in self.plan.matrix_groups:
            group = [matrix for matrix in whole_group if matrix in weights]
            base = patched
            ports = {port for matrix in group for port in matrix.ports}
            # Fixed differences do not lead to the patched-in run.
            if may_use_base and not any(port.additive for port in ports):
                if _n_columns(unpatched, group) < _n_columns(patched, group):
                    base = unpatched
                    on_patched_base += ports
            used.update((matrix, base[matrix]) for matrix in group)
        patched_base = frozenset(on_patched_base)
        all_srcs = range(self.plan.n_srcs)
        recorded = {src for edges in used.values() for src in edges.srcs}
        if self.keeps_layers and self._first_block == 0:
            recorded = set(all_srcs)
        with_slot = all_srcs if self.keeps_layers else sorted(recorded)
        slots = {src: slot for slot, src in enumerate(with_slot)}
        works = {
            matrix: _sparse_work(matrix, w, used[matrix], slots, patched_base)
            for matrix, w in weights.items()
        }
        return works, slots, frozenset(recorded), patched_base

    # --------------------------------------------------------------- destinations

    def _read(
        self, port: DestPort, matrices: list[EdgeMatrix], x: Tensor
    ) -> Tensor | None:
        forward_pass = self._current_pass()
        _needs_grad(forward_pass, x)
        out = x
        if port in forward_pass.patched_base:
            out = self._patched_base(port).to(x.dtype)
            out = (out.unsqueeze(2) if x.ndim == 4 else out).expand_as(x)
        for matrix in matrices:
            out = read_port(forward_pass, matrix, port, out)
        return None if out is x else out

    def _matrices_of(self, port: DestPort) -> list[EdgeMatrix]:
        return [matrix for matrix in self.plan.matrices if port in matrix.ports]

    def _stand_in(self, port: DestPort) -> None:
        """Compute the port's heads in place of the linear maps that read it."""
        assert port.heads is not None
        (matrix,) = self._matrices_of(port)
        # Nothing of a pass may hold a tensor of its graph for longer than needed: the
        # graph holds the pass, and the circle would keep both.
        self._hook(
            port.module,
            lambda x: self._current_pass().residuals.update({port: x}),
            is_last=True,
        )
        self._exit.enter_context(port.heads.opened())
        for idx, called in enumerate(port.heads.called_modules):
            linear, _ = port.heads.linears[idx]
            forward = partial(self._head_forward, port, matrix, idx, linear)
            self._exit.enter_context(replaced_forward(called, forward))

    def _head_forward(
        self, port: DestPort, matrix: EdgeMatrix, idx: int, linear: Module, normed: Tensor
    ) -> Tensor:
        heads, forward_pass = port.heads, self._current_pass()
        assert heads is not None
        if idx == 0:
            x, base_outs = forward_pass.residuals.pop(port), None
            _needs_grad(forward_pass, x)
            if port in forward_pass.patched_base:
                x = self._patched_base(port).to(x.dtype)
                base_outs = self._remembered(port, lambda: outputs_of(heads, x))
            outs = head_outputs(forward_pass, matrix, port, x, normed, base_outs)
            forward_pass.head_outs[port] = outs or []
        outs = forward_pass.head_outs[port]
        return outs.pop(0) if outs else linear_forward(linear, normed)

    def _remember(self, port: DestPort, component: Module) -> None:
        """Compute a component once for all passes in which all its edges are patched."""
        matrices = self._matrices_of(port)
        forward = partial(self._component_forward, port, matrices, component.forward)
        self._exit.enter_context(replaced_forward(component, forward))

    def _component_forward(
        self,
        port: DestPort,
        matrices: list[EdgeMatrix],
        forward: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        forward_pass = self._current_pass()
        if port not in forward_pass.patched_base or any(
            forward_pass.works[b].changes(b.rows(port))[1] for b in matrices
        ):
            return forward(*args, **kwargs)
        (out,) = self._remembered(port, lambda: [forward(*args, **kwargs)])
        return out

    def _remembered(
        self, port: DestPort, compute: Callable[[], list[Tensor]]
    ) -> list[Tensor]:
        """What it gave in an earlier pass, unless a hook has changed that in place."""
        outs, versions = self._base_outs.get(port, ([], []))
        if not outs or [_version(out) for out in outs] != versions:
            outs = compute()
            self._base_outs[port] = outs, [_version(out) for out in outs]
        return [out.clone() if out.is_inference() else out for out in outs]

    def _patched_base(self, port: DestPort) -> Float[Tensor, "batch seq d_model"]:
        """What the port reads when all of its edges are patched."""
        total = self._patch_sum(port.srcs.start, port.srcs.stop)
        return total + self.constants[port.name]

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


def _call_with_output(
    hook: Callable[[Any], Tensor | None], module: Module, args: Any, output: Any
) -> Tensor | None:
    return hook(output)


def _version(tensor: Tensor) -> int | None:
    """How often it was changed in place; inference tensors do not count that (None)."""
    return None if tensor.is_inference() else tensor._version


def _copied(output: Any) -> Any:
    """A block's output, which may be a tuple, as tensors that nobody else has."""
    if isinstance(output, tuple):
        return tuple(_copied(part) for part in output)
    return output.clone() if isinstance(output, Tensor) else output


def _needs_grad(forward_pass: ForwardPass, x: Tensor) -> bool:
    """Do gradients flow through x? Raises GraphError if the pass is not made for them."""
    if not (t.is_grad_enabled() and x.requires_grad):
        return False
    if not forward_pass.is_dense:
        raise GraphError(
            "Gradients are asked for from the middle of a forward pass that began "
            "without any, so that not all is recorded that they need. Let the masks need "
            "gradients (`train_mask_mode`), or the model's weights, or what the first "
            "source writes; or run it under `torch.no_grad()`."
        )
    return True


def _stack_rows(matrix: EdgeMatrix, masks: dict[PatchWrapperImpl, Tensor]) -> Tensor:
    """The rows of all the matrix's ports, for the matrix's sources."""
    parts = []
    for port in matrix.ports:
        of_srcs = slice(matrix.lo - port.srcs.start, matrix.hi - port.srcs.start)
        for wrapper in port.wrappers:
            mask = masks[wrapper]
            if port.mask_rows is not None:
                mask = mask[:, :, list(port.mask_rows)]
            parts.append(mask[..., of_srcs])
    if len(parts) == 1:
        # The backward pass reads the weights again; the mask may have changed by then.
        return parts[0].clone()
    leading = t.broadcast_shapes(*(part.shape[:2] for part in parts))
    return t.cat([part.expand(*leading, -1, -1) for part in parts], dim=2)


@dataclass(frozen=True)
class UsedEdges:
    """The sources of a matrix, and its rows, that have an edge which does something."""

    srcs: list[int]
    rows: list[int]


def _used_edges(
    weights: dict[EdgeMatrix, Tensor],
) -> tuple[dict[EdgeMatrix, UsedEdges], dict[EdgeMatrix, UsedEdges]]:
    """Per matrix: what has any patched edge, and what has any not fully patched one."""
    flags = []
    for w in weights.values():
        used = t.stack([w != 0, w != 1]).flatten(1, 2).any(1)  # [2 row src]
        flags += [used.any(1), used.any(2)]
    # One transfer for all the matrices: a GPU would stop at each.
    parts = t.cat(flags, 1).cpu().split([flag.shape[1] for flag in flags], 1)
    patched, unpatched = (
        {
            matrix: UsedEdges(
                (srcs[i].nonzero().flatten() + matrix.lo).tolist(),
                rows[i].nonzero().flatten().tolist(),
            )
            for matrix, srcs, rows in zip(weights, parts[::2], parts[1::2], strict=True)
        }
        for i in (0, 1)
    )
    return patched, unpatched


def _n_columns(used: dict[EdgeMatrix, UsedEdges], matrices: Iterable[EdgeMatrix]) -> int:
    return sum(len(used[matrix].srcs) for matrix in matrices)


def _sparse_work(
    matrix: EdgeMatrix,
    weights: Tensor,
    used: UsedEdges,
    slots: dict[int, int],
    patched_base: frozenset[DestPort],
) -> MatrixWork:
    if matrix.ports[0] in patched_base:
        weights = weights - 1
    if not used.rows:
        return MatrixWork(weights, slice(0, 0), [], does_nothing=True)
    if len(used.rows) < matrix.n_rows:
        rows = t.tensor(used.rows, device=weights.device)
        weights = weights.index_select(2, rows)
    recorded = [src for src in slots if matrix.lo <= src < matrix.hi]
    # To pick the used ones costs more than to multiply with zeros, unless they are few.
    is_worth_picking = PICKING_COST * len(used.srcs) < len(recorded)
    srcs = used.srcs if is_worth_picking else recorded
    if len(srcs) < matrix.hi - matrix.lo:
        columns = t.tensor([src - matrix.lo for src in srcs], device=weights.device)
        weights = weights.index_select(-1, columns)
    inputs_slot = slots[recorded[-1]] + 1
    slots_of_srcs: slice | Tensor = slice(slots[recorded[0]], inputs_slot)
    if is_worth_picking:
        slots_of_srcs = t.tensor([slots[src] for src in srcs], device=weights.device)
    return MatrixWork(weights, slots_of_srcs, used.rows, False, inputs_slot)

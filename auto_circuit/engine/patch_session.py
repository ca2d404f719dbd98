"""How edges are patched: the hooks of one `patch_mode`.

A destination reads `x + sum_src mask[src] * (patch[src] - current[src])`. While a forward
pass runs, each source writes its difference `patch - current` into one buffer, and each
destination multiplies its masks with that buffer. The work is arranged so that it costs
little more than the model itself:

- *Edge matrices* (`edge_matrices`): one matrix product for all that is read at one place.
- *Backward* (`forward_pass`, `matrix_work`) needs no copy of the differences per destination.
- *Heads* (`head_inputs`): inputs of single heads are computed only where they differ.
- *Sparse circuits* (`pass_works`). Without gradients only the rows and columns of a matrix that do
  something are computed, and only their sources are recorded. If most edges are patched,
  the base is the residual stream of the patched-in run and the columns are those that are
  *not* patched: a small circuit then costs about what the model costs.
- *Starting late.* If no edge changes before some block, the blocks before it hand on what
  they gave in the last whole pass (`PatchSession.starting_at`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch as t
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.nn import Module

from auto_circuit import devices
from auto_circuit.engine.buffers import PassBuffers
from auto_circuit.engine.crossings import AttentionPatches
from auto_circuit.engine.edge_matrices import (
    CrossingPort,
    DestPort,
    EdgeMatrix,
    PatchPlan,
    SrcPort,
    Written,
)
from auto_circuit.engine.forward_pass import ForwardPass, Residual, write_source
from auto_circuit.engine.head_inputs import (
    Outputs,
    has_closed_form,
    head_outputs,
    linear_forward,
    outputs_of,
)
from auto_circuit.engine.matrix_work import Input, Weights
from auto_circuit.engine.pass_works import (
    PassWorks,
    any_nonzero,
    dense_works,
    edges_to_use,
    slots_of,
    sparse_works,
    stack_rows,
    used_srcs,
)
from auto_circuit.engine.patch_wrapper import MaskWeights, PatchWrapperImpl
from auto_circuit.engine.recomputation import flagged, kept_as_they_are, run_twice
from auto_circuit.engine.token_masks import TokenMasks
from auto_circuit.errors import GraphError
from auto_circuit.modules import replaced_forward
from auto_circuit.utils.user_hooks import (
    Bypassed,
    UserHooks,
    changes_refused,
    check_no_backward_hooks,
)
from auto_circuit.weights import WeightFingerprint

SrcOuts = Float[Tensor, "src batch seq d_model"]
Hook = Callable[[Any], Any]
"""A module's output -> what it shall give instead, or None."""
Constant = Float[Tensor, "*position d_model"]
"""What reaches a destination besides its sources, alike for every prompt."""


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

    What a pass may be told besides: positions, the position (or span) of each of its tokens,
    if that is not the token's own; token_masks, to which it gives its masks at each token.
    """

    positions: Int[Tensor, "example token"] | None = None
    token_masks: TokenMasks | None = None

    def __init__(
        self,
        plan: PatchPlan,
        patch_src_outs: SrcOuts,
        curr_src_outs: SrcOuts | None,
        constants: dict[str, Constant],
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
        if differences and plan.crossings:
            raise GraphError(
                "This graph has crossing edges, which need what the run that is patched in "
                "wrote, and not only how far it is from this one (`differences`). Use a "
                "graph without them (`crossing=False`), or another algorithm."
            )
        if plan.kept is not None and plan.crossings:
            raise GraphError(
                "This graph has crossing edges, which need what all sources write, so a pass "
                "cannot keep a few of them at a time. Give more memory, or smaller batches."
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
        self._works: PassWorks | None = None
        self.is_called = False
        self._first_block = 0
        self._overwritten_from = len(plan.blocks)
        self._block_outs: dict[int, Any] = {}
        self._attention = {port: AttentionPatches() for port in plan.crossings}
        self._recording: DestPort | None = None
        self._hook_ids: list[int] = []
        self._last_hooks: list[tuple[Any, int]] = []  # a module's OrderedDict, a key
        self._patch_version: int | None = None
        self._patch_sums: dict[tuple[int, int], Residual] = {}
        self._base_outs: dict[DestPort, tuple[list[Outputs], list[int | None]]] = {}
        self._first_hook_ids = user_hooks.ids() if plan.crossings else []
        self._exit = ExitStack()
        # The model has its own, to keep them between contexts.
        self.buffers = PassBuffers()

    def open(self) -> None:
        """Register the hooks.

        Of a module that is both, first the destination is patched and then the source
        recorded; but an additive port comes after the source that it adds to.
        """
        for port in self.plan.dest_ports:
            if port.heads is not None:
                self._stand_in(port)
            elif not port.additive:
                read = self._read_by_token if port.by_token else self._read
                self._hook(port.module, partial(read, port))
            if port.component is not None:
                self._remember(port, port.component)
        for crossing_port in self.plan.crossings:
            self._look_into(crossing_port)
        for src_port in self.plan.src_ports:
            site = src_port.site
            self._hook(site.module, partial(self._write, src_port), site.is_computed)
        for port in self.plan.dest_ports:
            if port.additive:
                self._hook(port.module, partial(self._read, port))
        if self.plan.recomputes:
            for block in self.plan.blocks:
                forward = partial(self._recomputed, block.forward)
                self._exit.enter_context(replaced_forward(block, forward))
        if self.keeps_layers:
            for idx, block in enumerate(self.plan.blocks):
                self._hook(block, partial(self._keep, idx))

    def close(self) -> None:
        """Remove the hooks and let go of all activations."""
        self._exit.close()
        if self.forward_pass is not None:
            # Even if someone keeps an output, and by it the pass, alive.
            self.buffers.take_back(self.forward_pass)
        self._break_circles()
        self.forward_pass = self._works = None
        self._patch_sums.clear()
        self._base_outs.clear()
        self._block_outs.clear()
        self._attention.clear()
        self.token_masks = None

    def _break_circles(self) -> None:
        """A pass that was not finished holds tensors of its graph, which holds the pass."""
        if self.forward_pass is not None:
            self.forward_pass.residuals.clear()
            self.forward_pass.head_outs.clear()
        for works in [] if self._works is None else self._works.of_port.values():
            for work in works:
                work.carriers.clear()
                work.delta = None

    def _hook(self, module: Module, hook: Hook, is_last: bool = False) -> None:
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
            if src_port.site.is_computed:
                name = f"what {src_port.wrapper.module_name} follows from"
                check_no_backward_hooks([Bypassed(name, src_port.site.module)])

    # ------------------------------------------------------------------ running again

    def _recomputed(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A block that keeps nothing but its inputs."""
        of_block: ForwardPass | None = None

        def first(*args: Any, **kwargs: Any) -> Any:
            nonlocal of_block
            output = forward(*args, **kwargs)
            of_block = self.forward_pass  # the first block is where it begins
            return output

        def again(*args: Any, **kwargs: Any) -> Any:
            if of_block is None or of_block is not self.forward_pass:
                raise GraphError(
                    "`backward` came after another forward pass, or after `patch_mode` was "
                    "left, but the blocks run again in it (`checkpoint=True`). Call it "
                    "inside of the context, before the next pass."
                )
            with flagged(of_block, "is_repeated"):
                return forward(*args, **kwargs)

        return run_twice(first, again, args, kwargs)

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
            stack.callback(setattr, self, "_first_block", 0)
            self._first_block = self._overwritten_from = block
            self._continue(self._current_pass())
            yield

    def _hand_on(self, idx: int) -> Callable[..., Any]:
        # A copy: somebody's hook in the next block may change it in place.
        return lambda *args, **kwargs: _copied(self._block_outs[idx])

    def _continue(self, last: ForwardPass) -> None:
        """A pass with the differences that the last one left."""
        assert last.diff is not None
        matrices = [
            matrix
            for matrix in self.plan.matrices
            if matrix.ports[0].block >= self._first_block
        ]
        batch, seq = last.diff.shape[:2]
        self.forward_pass = ForwardPass(last.diff, scratch=last.scratch)
        for device, part in last.elsewhere.items():
            again = ForwardPass(part.diff, scratch=part.scratch)
            self.forward_pass.elsewhere[device] = again
        weights = self._matrix_weights(batch, seq, matrices)
        self._works = self._sparse_works(weights, self.forward_pass)
        self._set_attention(batch, seq)

    # ------------------------------------------------------------------ sources

    def _write(self, port: SrcPort, out: Written) -> Written | None:
        is_repeated = self.forward_pass is not None and self.forward_pass.is_repeated
        if port is self.plan.src_ports[0] and not is_repeated:
            self._begin(out)
        forward_pass = self._current_pass()
        if not is_repeated:
            self._record(port, out.detach())
        if _needs_grad(forward_pass, out) and not self.differences:
            if not self._slots_of(port):
                return None
            return write_source(forward_pass, port, out)
        return None

    def _record(self, port: SrcPort, out: Written) -> None:
        diff, works = self._current_pass().diff, self._current_works()
        assert diff is not None
        srcs, all_srcs = self.plan.slots_of(port.srcs), self._slots_of(port)
        recorded = [i for i, src in enumerate(all_srcs) if src in works.recorded]
        if not recorded and self.curr_src_outs is None:
            return
        with t.no_grad():
            heads = devices.moved(
                self.plan.written(port, out), devices.device_of(self.patch)
            )
        if self.curr_src_outs is not None:
            # What was made in inference mode can be changed in it alone.
            with t.inference_mode(self.curr_src_outs.is_inference()), t.no_grad():
                # [batch seq head d_model] of a module's heads -> [head batch seq d_model].
                self.curr_src_outs[srcs] = heads.movedim(2, 0)
        # Of the sources 9..12 that a module writes, 10 and 12 are recorded: numbers 1 and 3
        # of its output, which go to the slots of 10 and 12. Slots are in the order of the
        # sources, so if all four are recorded, their slots follow each other.
        if len(recorded) == len(all_srcs):
            first = works.slots[srcs.start]
            slots = slice(first, first + len(recorded))
            self._subtract(self.patch[srcs].movedim(0, 2), heads, diff[:, :, slots])
            self._written(slots)
            return
        for i in recorded:
            slot = works.slots[srcs.start + i]
            of_src = diff[:, :, slot]
            self._subtract(self.patch[srcs.start + i], heads[:, :, i], of_src)
            self._written(slice(slot, slot + 1))

    def _written(self, slots: slice) -> None:
        """Some differences are there: give them to the other devices of the model too."""
        here = self._current_pass()
        for part in (here, *here.elsewhere.values()):
            part.n_written = max(part.n_written, slots.stop)
        # At once, not when a port needs them: what follows may overwrite a slot here (see
        # `overwrite_patch`, and `compute_inputs`).
        for part in here.elsewhere.values():
            assert part.diff is not None and here.diff is not None
            part.diff[:, :, slots].copy_(here.diff[:, :, slots])

    def _slots_of(self, port: SrcPort) -> range:
        slots = self.plan.slots_of(port.srcs)
        return range(slots.start, slots.stop)

    def _subtract(
        self,
        patch: Float[Tensor, "batch seq *head d_model"],
        current: Float[Tensor, "batch seq *head d_model"],
        out: Float[Tensor, "batch seq *head d_model"],
    ) -> None:
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

    def _current_works(self) -> PassWorks:
        self._current_pass()
        assert self._works is not None
        return self._works

    # ------------------------------------------------------------- forward passes

    def _begin(self, start: Written) -> None:
        """A new pass, whose first source writes `start`."""
        batch, seq, d_model = start.shape
        self._repeat_for(batch)
        self._check_may_begin((self.plan.n_slots, batch, seq, d_model))
        self._forget_what_is_stale()
        self._meet_users_hooks()
        # A pass that begins inside a block is not all the block's.
        with kept_as_they_are():
            weights = self._matrix_weights(batch, seq, list(self.plan.matrices))
        is_dense = t.is_grad_enabled() and (start.requires_grad or self.needs_grad())
        forward_pass = ForwardPass(is_dense=is_dense, kept=self.plan.kept)
        home = devices.device_of(self.patch)
        for device in dict.fromkeys(self.plan.devices.values()):
            # Blocks 0..3 on one device, 4..7 on another: the matrices of the latter need the
            # differences of all earlier sources there, and have a buffer of their own.
            if device != home:
                part = ForwardPass(is_dense=is_dense, kept=self.plan.kept)
                forward_pass.elsewhere[device] = part
        if is_dense:
            self._check_no_backward_hooks()
            works = dense_works(weights, self.plan, forward_pass)
        else:
            works = self._sparse_works(weights, forward_pass)
        self._overwritten_from = len(self.plan.blocks)
        shape = (batch, seq, self._n_slots(works), d_model)
        self._give_buffers(forward_pass, shape)
        self.forward_pass, self._works = forward_pass, works
        self._set_attention(batch, seq)

    def _n_slots(self, works: PassWorks) -> int:
        """A slot more, after the last source, for the input of heads that read it."""
        if self.plan.kept is None:
            return min(len(works.slots) + 1, self.plan.n_srcs)
        # One that is not needed would keep `overwrite_patch` from saving a buffer.
        inputs = [
            work.inputs_slot + 1
            for port, of_port in works.of_port.items()
            for work in of_port
            if port.heads is not None
            and not (work.does_nothing and has_closed_form(port.heads))
        ]
        return max([self.plan.n_slots, *inputs])

    def _check_may_begin(self, shape: tuple[int, ...]) -> None:
        if self.patch.shape != shape:
            raise GraphError(
                f"The activations to patch in have shape {tuple(self.patch.shape)}, but "
                "this forward pass needs [sources, batch, positions, d_model] = "
                f"{shape}. Compute them with "
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

    def _repeat_for(self, batch: int) -> None:
        """Repeat one set of activations (a mean) for a batch of another size.

        The last batch of a dataloader may be smaller.
        """
        of_another_size = self.patch.ndim == 4 and self.patch.shape[1] != batch
        if of_another_size and self.patch.shape[1] > 1 and self.patch.stride(1) == 0:
            self.patch = self.patch[:, :1].expand(-1, batch, -1, -1)
            self._patch_version = None  # what is remembered is of the other size

    def _give_buffers(self, forward_pass: ForwardPass, shape: tuple[int, ...]) -> None:
        """Memory for the differences: an earlier pass's, if nothing can need it."""
        if self.forward_pass is not None:
            self.buffers.take_back(self.forward_pass)
        # Crossing edges need the patches until the last block.
        may_overwrite = self.overwrite_patch and not self.plan.crossings
        if may_overwrite and forward_pass.is_dense:
            forward_pass.diff = self._patch_as_diff(shape)
            forward_pass.holds_patches = forward_pass.diff is not None
        self.buffers.give(forward_pass, self.patch, shape)
        for device, part in forward_pass.elsewhere.items():
            part.diff = self.patch.new_empty(shape, device=device)

    def _patch_as_diff(
        self, shape: tuple[int, ...]
    ) -> Float[Tensor, "batch seq src d_model"] | None:
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
    ) -> dict[EdgeMatrix, Weights]:
        """Each matrix's share of the masks."""
        ports = {port: None for matrix in matrices for port in matrix.ports}
        wrappers = {wrapper: None for port in ports for wrapper in port.wrappers}
        masks = {
            wrapper: self._mask_at_tokens(wrapper, batch, seq) for wrapper in wrappers
        }
        weights = {matrix: stack_rows(matrix, masks) for matrix in matrices}
        kept, places = self.plan.kept, self.plan.devices
        if places:
            weights = {
                m: devices.moved(w, places[m.ports[0].name]) for m, w in weights.items()
            }
        if kept is None:
            return weights
        return {m: kept.columns(m.lo, m.hi, w) for m, w in weights.items()}

    def _mask_at_tokens(
        self, wrapper: PatchWrapperImpl, batch: int, seq: int
    ) -> MaskWeights:
        """A mask as the tokens of the pass read it."""
        mask = wrapper.mask_weights(batch)
        if self.positions is not None and wrapper.seq_dim is not None:
            mask = _at_positions(mask, self.positions)
        if mask.shape[0] not in (1, batch) or mask.shape[1] not in (1, seq):
            raise _wrong_mask_size(wrapper, tuple(mask.shape[:2]), batch, seq)
        if self.token_masks is None:
            return mask
        return self.token_masks.leaf(wrapper.module_name, mask, batch, seq)

    def _sparse_works(
        self, weights: dict[EdgeMatrix, Weights], forward_pass: ForwardPass
    ) -> PassWorks:
        """Those on the cheaper base; with `keeps_layers`, all sources have slots."""
        # Fixed differences do not lead to the patched-in run. And what is known of that
        # run may belong to other weights, or lack what hooks add to the residual stream.
        may_use_base = (
            not self.differences and not self._hook_ids and self.weights.holds()
        )
        edges = edges_to_use(weights, self.plan.matrix_groups, may_use_base)
        assert self.plan.kept is None, "only passes with gradients keep some sources"
        all_srcs = range(self.plan.n_srcs)
        with_slot = all_srcs if self.keeps_layers else used_srcs(edges)
        works = sparse_works(weights, edges, slots_of(with_slot), forward_pass)
        if self.keeps_layers and self._first_block == 0:
            return replace(works, recorded=frozenset(all_srcs))
        return works

    # --------------------------------------------------------------- destinations

    def _read_by_token(
        self, port: DestPort, x: Float[Tensor, "token d_model"]
    ) -> Float[Tensor, "token d_model"] | None:
        diff = self._current_pass().diff
        assert diff is not None
        out = self._read(port, x.unflatten(0, diff.shape[:2]))
        return None if out is None else out.flatten(0, 1)

    def _read(self, port: DestPort, x: Input) -> Input | None:
        works = self._current_works()
        _needs_grad(self._current_pass(), x)
        out = x
        if port in works.patched_base:
            out = self._patched_base(port).to(x.dtype)
            # All rows of a port have the same base: [batch seq 1 d_model] for its heads.
            out = (out.unsqueeze(2) if x.ndim == 4 else out).expand_as(x)
        for work in works.of_port[port]:
            out = work.read(port, out)
        return None if out is x else out

    def _stand_in(self, port: DestPort) -> None:
        """Compute the port's heads in place of the linear maps that read it."""
        assert port.heads is not None
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
            forward = partial(self._head_forward, port, idx, linear)
            self._exit.enter_context(replaced_forward(called, forward))

    def _head_forward(
        self,
        port: DestPort,
        idx: int,
        linear: Module,
        normed: Float[Tensor, "batch seq d_in"],
    ) -> Outputs:
        if self._recording is port:
            return linear_forward(linear, normed)
        head_outs = self._current_pass().head_outs
        if idx == 0:
            head_outs[port] = self._patched_heads(port, normed)
        outs = head_outs[port]
        return outs.pop(0) if outs else linear_forward(linear, normed)

    def _patched_heads(self, port: DestPort, normed: Residual) -> list[Outputs]:
        """What all linear maps of a port's heads give; [] for what the model computes."""
        heads, forward_pass = port.heads, self._current_pass()
        works = self._current_works()
        assert heads is not None
        x, base_outs = forward_pass.residuals.pop(port), None
        _needs_grad(forward_pass, x)
        if port in works.patched_base:
            x = self._patched_base(port).to(x.dtype)
            base_outs = self._remembered(port, lambda: outputs_of(heads, x))
        (work,) = works.of_port[port]
        return head_outputs(work, x, normed, base_outs) or []

    # ------------------------------------------------------------------ attention

    def _look_into(self, port: CrossingPort) -> None:
        patches = self._attention[port]
        patches.names = {kind: w.module_name for kind, w in port.wrappers.items()}
        self._exit.enter_context(port.read(patches))
        forward = partial(self._attend, port, port.attention.forward)
        self._exit.enter_context(replaced_forward(port.attention, forward))

    def _set_attention(self, batch: int, seq: int) -> None:
        """What the masks of crossing edges do in a pass that begins."""
        places, masks = [], []
        for port, patches in self._attention.items():
            patches.pairs, patches.patched = {}, {}
            patches.token_masks = self.token_masks
            if port.block >= self._first_block:
                places += [(port, kind) for kind in port.wrappers]
                masks += [w.mask_weights(batch) for w in port.wrappers.values()]
        # With gradients, edges that do nothing have some too.
        is_dense = self._current_pass().is_dense
        is_used = [True] * len(masks) if is_dense else any_nonzero(masks)
        for (port, kind), mask, used in zip(places, masks, is_used, strict=True):
            if used:
                pairs = self._pairs_at_tokens(port, port.wrappers[kind], mask, batch, seq)
                self._attention[port].pairs[kind] = pairs
        if any(patches.pairs for patches in self._attention.values()):
            self._check_patched_run_is_known()

    def _pairs_at_tokens(
        self,
        port: CrossingPort,
        wrapper: PatchWrapperImpl,
        mask: MaskWeights,
        batch: int,
        seq: int,
    ) -> Float[Tensor, "batch_or_1 head token token"]:
        positions = self.positions
        if positions is None:
            positions = t.arange(port.crossing.n_positions, device=mask.device)[None]
        if mask.shape[0] not in (1, batch) or positions.shape[1] != seq:
            size = (mask.shape[0], positions.shape[1])
            raise _wrong_mask_size(wrapper, size, batch, seq)
        pairs = port.at_tokens(mask, positions)
        if self.token_masks is None:
            return pairs
        return self.token_masks.leaf(wrapper.module_name, pairs, batch)

    def _check_patched_run_is_known(self) -> None:
        """What attention read in it follows from its sources, unless something has changed."""
        if not self.weights.holds() or self.user_hooks.ids() != self._first_hook_ids:
            raise GraphError(
                "Weights, or hooks, have changed inside of `patch_mode`, so that it is not "
                "known what heads read in the run that is patched in, which crossing edges "
                "need. Leave the context, and compute the activations to patch in again."
            )

    def _attend(
        self, port: CrossingPort, forward: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Attention, after a look at its keys and values in the run that is patched in."""
        patches = self._attention[port]
        if patches.pairs:
            heads = port.heads.heads
            assert heads is not None
            # The patched-in run's residual stream, by the model's own norm and linear maps;
            # keys also know their positions, which only a pass of the attention does.
            with t.no_grad(), patches.recording(), self._without_patches(port.heads):
                x = self._patched_base(port.heads).to(self.patch.dtype)
                x = x if heads.norm is None else heads.norm(x)
                _call_with_input(forward, x, args, kwargs)
        return forward(*args, **kwargs)

    @contextmanager
    def _without_patches(self, port: DestPort) -> Iterator[None]:
        """Inside, the linear maps of the port's heads give what they give to all alike."""
        self._recording = port
        try:
            yield
        finally:
            self._recording = None

    # ------------------------------------------------------------------ components

    def _remember(self, port: DestPort, component: Module) -> None:
        """Compute a component once for all passes in which all its edges are patched.

        A circuit of 1 % of the edges costs 0.76 times the plain model by that, not 1.00.
        """
        forward = partial(self._component_forward, port, component.forward)
        self._exit.enter_context(replaced_forward(component, forward))

    def _component_forward(
        self, port: DestPort, forward: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        works = self._current_works()
        is_changed = any(work.changes(port)[1] for work in works.of_port[port])
        if port not in works.patched_base or is_changed:
            return forward(*args, **kwargs)
        (out,) = self._remembered(port, lambda: [forward(*args, **kwargs)])
        return out

    def _remembered(
        self, port: DestPort, compute: Callable[[], list[Outputs]]
    ) -> list[Outputs]:
        """What it gave in an earlier pass, unless a hook has changed that in place."""
        outs, versions = self._base_outs.get(port, ([], []))
        if not outs or [_version(out) for out in outs] != versions:
            outs = compute()
            self._base_outs[port] = outs, [_version(out) for out in outs]
        return [out.clone() if out.is_inference() else out for out in outs]

    def _patched_base(self, port: DestPort) -> Residual:
        """What the port reads when all of its edges are patched."""
        total = self._patch_sum(port.srcs.start, port.srcs.stop)
        constant = self.constants[port.name]
        return devices.moved(total, devices.device_of(constant)) + constant

    def _patch_sum(self, lo: int, hi: int) -> Residual:
        if (lo, hi) not in self._patch_sums:
            # The sum of the sources 0..9 is that of 0..5, if it is known, plus 6..9.
            shorter = [end for start, end in self._patch_sums if start == lo]
            known = max((end for end in shorter if end < hi), default=lo)
            # Half precision loses too much over a hundred sources.
            dtype = t.promote_types(self.patch.dtype, t.float32)
            total = self.patch[known:hi].sum(0, dtype=dtype)
            if known > lo:
                total = total + self._patch_sums[lo, known]
            self._patch_sums[lo, hi] = total
        return self._patch_sums[lo, hi]


def _call_with_output(hook: Hook, module: Module, args: Any, output: Any) -> Any:
    return hook(output)


def _version(tensor: Shaped[Tensor, "..."]) -> int | None:
    """How often it was changed in place; inference tensors do not count that (None)."""
    return None if tensor.is_inference() else tensor._version


def _call_with_input(
    forward: Callable[..., Any],
    x: Residual,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Call an attention's forward with another input, given as its own was."""
    if "hidden_states" in kwargs:
        forward(*args, **{**kwargs, "hidden_states": x})
    else:
        forward(x, *args[1:], **kwargs)


def _at_positions(
    mask: MaskWeights, positions: Int[Tensor, "row token"]
) -> Float[Tensor, "_batch token _head _src"]:
    """The mask of each token's position; positions: of each example, or a row for all."""
    # Positions 0, 0, 1 of three tokens: the mask [1 2 row src] becomes [1 3 row src].
    if len(positions) == 1:
        return mask[:, positions[0]]
    mask = mask.expand(len(positions), -1, -1, -1)
    return mask[t.arange(len(positions), device=mask.device)[:, None], positions]


def _wrong_mask_size(
    wrapper: PatchWrapperImpl, size: tuple[int, ...], batch: int, seq: int
) -> GraphError:
    return GraphError(
        f"The mask of {wrapper.module_name} is for {size[0]} examples "
        f"of {size[1]} positions, but the input has {batch} of {seq}. "
        "See `set_mask_batch_size` and `patchable_model(..., seq_len=)`."
    )


def _copied(output: Any) -> Any:
    """A block's output, which may be a tuple, as tensors that nobody else has."""
    if isinstance(output, tuple):
        return tuple(_copied(part) for part in output)
    return output.clone() if isinstance(output, Tensor) else output


def _needs_grad(forward_pass: ForwardPass, x: Float[Tensor, "batch seq ..."]) -> bool:
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

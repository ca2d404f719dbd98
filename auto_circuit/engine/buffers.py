"""The memory of a pass, kept for the next one over the same model.

To allocate the buffers anew takes time in every first pass of a context: the system has to
find the memory and to clear it. So a PatchableModel keeps one set of them.
"""

from __future__ import annotations

import math
from typing import Any

import torch as t
from jaxtyping import Float
from torch import Tensor

from auto_circuit.engine.forward_pass import ForwardPass

NAMES = ("diff", "grad_buffer", "scratch")
"""The buffers of a ForwardPass."""

Buffer = Float[Tensor, "..."]
Flat = Float[Tensor, "value"]


class PassBuffers:
    """At most one set of buffers that no pass uses, for the next pass of one model.

    A buffer belongs either to one pass or to the set, never to both. A pass gives its
    buffers back when the next one of its context begins, or when the context is left, unless
    a backward pass may still read them: those live and die with their pass. So does memory of
    the caller (`overwrite_patch`). Only values of the pass itself are ever read from a buffer.

    A kept buffer serves any pass that needs no more of it, of the same dtype and on the same
    device (and the same stream of a GPU). One that does not fit is let go of before a new one
    is allocated. So the set is as large as the last pass needed, or a larger one before it:
    the differences of all sources that are recorded, [batch seq source d_model], after a
    backward pass as much again, and the inputs of one block's heads.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Flat] = {}  # name -> all of its memory, in one dimension
        self._stream: Any = None

    @property
    def n_bytes(self) -> int:
        """The size of what is kept."""
        return sum(flat.untyped_storage().nbytes() for flat in self._kept.values())

    def free(self) -> None:
        """Let go of everything that no pass uses."""
        self._kept.clear()

    def give(
        self, forward_pass: ForwardPass, like: Buffer, shape: tuple[int, ...]
    ) -> None:
        """A pass's memory for its differences, [batch seq slot d_model], and what is kept.

        like: a tensor of their dtype, on their device. A pass that has the patches as its
        differences is to save memory: none is kept beside them.
        """
        if self._stream != _stream(like):
            self.free()
        self._kept = {
            name: flat for name, flat in self._kept.items() if _is_of(flat, like)
        }
        diff, grad = self._take("diff", shape), None
        if forward_pass.is_dense:
            batch, seq, *rest = shape
            grad = self._take("grad_buffer", (batch * seq, *rest))
        if forward_pass.holds_patches:
            diff = forward_pass.diff
        forward_pass.grad_buffer = grad
        forward_pass.diff = self.new(like, shape) if diff is None else diff
        forward_pass.scratch = self._kept.pop("scratch", None)

    def take_back(self, forward_pass: ForwardPass) -> None:
        """Keep what a pass leaves, if nothing can need it."""
        if forward_pass.awaits_backward:
            return
        buffers = {name: getattr(forward_pass, name) for name in NAMES}
        for name in NAMES:
            setattr(forward_pass, name, None)
        if forward_pass.awaits_backward:
            # Another thread has begun a backward pass: it says so before it reads them.
            for name, buffer in buffers.items():
                setattr(forward_pass, name, buffer)
            return
        if forward_pass.holds_patches:
            buffers["diff"] = None
        for name, buffer in buffers.items():
            if type(buffer) is Tensor:
                self._kept[name] = _all_of(buffer)
                self._stream = _stream(buffer)

    def new(self, like: Buffer, shape: tuple[int, ...]) -> Buffer:
        """New memory; if there is none, what is kept is let go of, and asked again."""
        try:
            return like.new_empty(shape)
        except (RuntimeError, MemoryError):
            if not self._kept:
                raise
            self.free()
        return like.new_empty(shape)

    def _take(self, name: str, shape: tuple[int, ...]) -> Buffer | None:
        flat, n_values = self._kept.pop(name, None), math.prod(shape)
        if flat is None or len(flat) < n_values:
            return None
        return flat[:n_values].view(shape)


def _all_of(buffer: Buffer) -> Flat:
    """The memory that a buffer is the beginning of."""
    n_values = buffer.untyped_storage().nbytes() // buffer.element_size()
    return buffer.detach().as_strided((n_values,), (1,), 0)


def _is_of(flat: Flat, like: Buffer) -> bool:
    is_inference = t.is_inference_mode_enabled()
    kinds = (flat.dtype, flat.device, flat.is_inference())
    return kinds == (like.dtype, like.device, is_inference)


def _stream(tensor: Buffer) -> Any:
    """Work on one stream is done in order; that on another may still be reading."""
    return t.cuda.current_stream(tensor.device) if tensor.is_cuda else None

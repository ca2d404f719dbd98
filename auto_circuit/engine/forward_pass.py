"""The state of one forward pass: its differences, and the gradients that flow back to them.

Backward needs no copy of the differences per destination: a matrix's gradient is one
product with the shared buffer, and what it sends back to the sources is added to one
shared gradient buffer, which each source subtracts from its own gradient. Each source is
upstream of all the destinations that read it, so the order is right by itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch as t
from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function, Variable

from auto_circuit import devices
from auto_circuit.engine.edge_matrices import DestPort, SrcPort, Written
from auto_circuit.engine.kept_sources import KeptSources
from auto_circuit.errors import GraphError

Residual = Float[Tensor, "batch seq d_model"]
Rows = Float[Tensor, "token row d_model"]
"""What some destinations read, or its gradient: a row for each, at each token."""


@dataclass(eq=False)
class ForwardPass:
    """The state of one forward pass.

    diff: the differences; grad_buffer: their gradients.
    is_dense: gradients may flow. All sources are recorded then, source `i` in slot `i`.
    kept: the sources that have slots, if not all.
    is_repeated: does a block run again now, for the backward pass?
    holds_patches: in the slots of `diff` that are not written yet are the patches that
        the differences will be made from.
    n_written: the slots before this one are written.
    scratch: memory for the rows of one matrix of heads at a time.
    has_grad: is there anything in `grad_buffer` for the backward pass that is running?
    elsewhere: on each other device of the model, a pass with buffers of its own. They hold
        the same differences; the gradients of each are those that came to its device.
    residuals, head_outs: per port of heads, the residual stream that they read, and what
        their linear maps give until the model asks for it.
    """

    diff: Float[Tensor, "batch seq slot d_model"] | None = None
    is_dense: bool = False
    holds_patches: bool = False
    n_written: int = 0
    grad_buffer: Float[Tensor, "token slot d_model"] | None = None
    scratch: Float[Tensor, "value"] | None = None
    has_grad: bool = False
    awaits_backward: bool = False
    kept: KeptSources | None = None
    is_repeated: bool = False
    backward_id: int | None = None
    residuals: dict[DestPort, Residual] = field(default_factory=dict)
    head_outs: dict[DestPort, list[Float[Tensor, "batch seq _"]]] = field(
        default_factory=dict
    )
    elsewhere: dict[t.device, ForwardPass] = field(default_factory=dict)

    def on(self, device: t.device) -> ForwardPass:
        """What is on a device; if the model is on one, all of it."""
        return self.elsewhere.get(device, self)

    def tokens(self) -> Float[Tensor, "token slot d_model"]:
        """The differences, one row of slots per token."""
        if self.diff is None:
            raise GraphError(
                "`backward` came after another forward pass that overwrote what it "
                "needs. Call `backward` for each forward pass before you call it a "
                "second time with retain_graph=True."
            )
        # Token `b * seq + s` is position s of example b: [2 3 slot d] -> [6 slot d] has
        # tokens 0..2 of example 0, then 3..5 of example 1. A view: the slots of a token
        # lie together, so one product per token reads them in a row.
        return self.diff.flatten(0, 1)

    def row_memory(self, n_rows: int) -> Rows:
        """Memory for so many rows, until the next matrix of heads asks for it."""
        tokens = self.tokens()
        shape = (tokens.shape[0], n_rows, tokens.shape[2])
        n_values = math.prod(shape)
        if self.scratch is None or len(self.scratch) < n_values:
            self.scratch = tokens.new_empty(n_values)
        # The front of a longer one: 6 tokens of 2 rows are the first 12 d_model values of
        # memory that was made for 5 rows.
        return self.scratch[:n_values].view(shape)

    def add_gradient(
        self,
        first: int,
        weights: Float[Tensor, "token slot row"],
        grads: Rows,
    ) -> None:
        """Add `weights @ grads` to the gradients of the slots from the first on."""
        tokens = self.tokens()
        if self.grad_buffer is None:
            self.grad_buffer = t.empty_like(tokens)
        grad = self.grad_buffer
        stop = first + weights.shape[1]
        if not self.has_grad and (first, stop) == (0, tokens.shape[1]):
            # The first matrix that is reached backwards reads all the sources: nothing to
            # be zeroed, and to be read again.
            t.bmm(weights, grads, out=grad)
        else:
            if not self.has_grad:
                grad.zero_()
            grad[:, first:stop].baddbmm_(weights, grads)
        self.has_grad = True

    def grad_of(self, port: SrcPort) -> Float[Tensor, "token src d_model"]:
        """The gradients of a port's sources."""
        # A module of 4 heads that are the sources 9..12: slots 9..12 of each token,
        # [token 4 d_model].
        assert self.grad_buffer is not None
        if self.kept is None:
            return self.grad_buffer[:, port.srcs]
        return self.kept.spread(port.srcs, self.grad_buffer)

    def enter_backward(self) -> None:
        """When the backward pass that is running ends, forget its gradients.

        If it fails it has no end; what it left is forgotten when the next one begins.
        """
        self.awaits_backward = True  # also if it is the second of this pass
        backward_id = t._C._current_graph_task_id()
        if self.backward_id != backward_id:
            self.backward_id, self.has_grad = backward_id, False
            Variable._execution_engine.queue_callback(self._leave_backward)

    def _leave_backward(self) -> None:
        self.has_grad = False
        self.backward_id = None
        self.awaits_backward = False


def write_source(forward_pass: ForwardPass, port: SrcPort, out: Written) -> Written:
    """A source's output, whose gradient is that minus what destinations send back."""
    return _WriteSource.apply(out, forward_pass, port)  # type: ignore[no-any-return]


class _WriteSource(Function):
    """Identity on a source's output, minus the gradient that destinations send back."""

    @staticmethod
    def forward(
        ctx: Any, out: Written, forward_pass: ForwardPass, port: SrcPort
    ) -> Written:
        ctx.forward_pass, ctx.port = forward_pass, port
        if port.site.transform is not None:
            ctx.save_for_backward(out)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad_out: Written) -> tuple[Written | None, ...]:  # type: ignore[override]
        forward_pass, port = ctx.forward_pass, ctx.port
        (out,) = ctx.saved_tensors or (None,)
        here, grad = devices.device_of(grad_out), grad_out
        for part in (forward_pass, *forward_pass.elsewhere.values()):
            part.enter_backward()
            if part.has_grad:
                of_srcs = devices.moved(part.grad_of(port), here)
                sent_back = port.grad_of_out(out, of_srcs)
                grad = grad - sent_back.reshape(grad_out.shape)
        return grad, None, None

"""The differences of one forward pass, and the gradients that flow back to them.

Backward needs no copy of the differences per destination: a matrix's gradient is one
product with the shared buffer, and what it sends back to the sources is added to one
shared gradient buffer, which each source subtracts from its own gradient. Each source is
upstream of all the destinations that read it, so the order is right by itself.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch as t
from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function, Variable

from auto_circuit.engine.edge_matrices import DestPort, EdgeMatrix, SrcPort
from auto_circuit.errors import GraphError

MatrixDelta = Float[Tensor, "token row d_model"]


@dataclass(eq=False)
class MatrixWork:
    """What one forward pass does with a matrix.

    weights: [batch or 1, position or 1, row, column], in float32 at least; on the patched
        base, mask - 1.
    columns: the slots of `ForwardPass.diff` that they are multiplied with.
    row_idxs: the rows of the matrix that the weights are for; the others do not change.
    does_nothing: the weights are all zero.
    inputs_slot: the slot that heads' common input goes to while it is multiplied.
    delta: the product, from when the matrix's first port has been reached.
    handles: per further port, the tensor that carries its gradient back to the matrix.
    """

    weights: Tensor
    columns: slice | Tensor
    row_idxs: list[int]
    does_nothing: bool
    inputs_slot: int = -1
    delta: MatrixDelta | None = None
    handles: dict[DestPort, Tensor] = field(default_factory=dict)

    def changes(self, rows: slice) -> tuple[slice, list[int]]:
        """(Which rows of delta change some of the matrix's rows; which of these change)"""
        if self.does_nothing:
            return slice(0, 0), []
        lo = bisect_left(self.row_idxs, rows.start)
        hi = bisect_left(self.row_idxs, rows.stop)
        return slice(lo, hi), [idx - rows.start for idx in self.row_idxs[lo:hi]]


@dataclass(eq=False)
class ForwardPass:
    """The state of one forward pass.

    diff: [batch, seq, slot, d_model]; grad_buffer: the same, [token, slot, d_model];
    holds_patches: in the slots of `diff` that are not written yet are the patches that
        the differences will be made from.
    slots: the slot of each source that has one.
    is_dense: gradients may flow. All sources are recorded then, source `i` in slot `i`.
    recorded: the sources that this pass must record.
    patched_base: the ports at which the base is the patched-in run's residual stream.
    scratch: memory for the rows of one matrix of heads at a time.
    residuals, head_outs: per port of heads, the residual stream that they read, and what
        their linear maps give until the model asks for it.
    """

    diff: Tensor | None
    slots: dict[int, int]
    recorded: frozenset[int]
    works: dict[EdgeMatrix, MatrixWork]
    patched_base: frozenset[DestPort]
    is_dense: bool = False
    holds_patches: bool = False
    grad_buffer: Tensor | None = None
    scratch: Tensor | None = None
    has_grad: bool = False
    awaits_backward: bool = False
    backward_id: int | None = None
    residuals: dict[DestPort, Tensor] = field(default_factory=dict)
    head_outs: dict[DestPort, list[Tensor]] = field(default_factory=dict)

    def tokens(self) -> Float[Tensor, "token slot d_model"]:
        """The differences, one row of slots per token."""
        if self.diff is None:
            raise GraphError(
                "`backward` came after another forward pass that overwrote what it "
                "needs. Call `backward` for each forward pass before you call it a "
                "second time with retain_graph=True."
            )
        return self.diff.flatten(0, 1)

    def rows(self, n_rows: int) -> MatrixDelta:
        """Memory for so many rows, until the next matrix of heads asks for it."""
        tokens = self.tokens()
        shape = (tokens.shape[0], n_rows, tokens.shape[2])
        n_values = math.prod(shape)
        if self.scratch is None or len(self.scratch) < n_values:
            self.scratch = tokens.new_empty(n_values)
        return self.scratch[:n_values].view(shape)

    def compute(self, matrix: EdgeMatrix) -> MatrixDelta | None:
        """What the matrix's edges change at each row; None if nothing."""
        work = self.works[matrix]
        if work.does_nothing:
            return None
        return self._multiply(work.weights.detach(), work.columns)

    def compute_inputs(
        self,
        matrix: EdgeMatrix,
        x: Float[Tensor, "batch seq d_model"],
        to: MatrixDelta | None = None,
    ) -> MatrixDelta:
        """The same, plus x at each row of heads: their inputs, in one product.

        to: memory for them.
        x takes part as one more source, whose weight is 1 for heads.
        """
        with self._x_in_its_slot(matrix, x, keeps=self.holds_patches):
            return self._multiply(*self._with_x(matrix), to)

    def add_inputs(
        self,
        matrix: EdgeMatrix,
        x: Float[Tensor, "batch seq d_model"],
        factor: Float[Tensor, "token row 1"],
        to: MatrixDelta,
    ) -> None:
        """Add to a tensor what `compute_inputs` gave, each row times a factor.

        For the backward pass, so that inputs of heads need not be kept until then.
        """
        # The slot holds a difference, which another backward pass may need.
        with self._x_in_its_slot(matrix, x, keeps=True):
            weights, columns = self._with_x(matrix)
            to.baddbmm_(self._per_token(weights) * factor, self._columns(columns))

    @contextmanager
    def _x_in_its_slot(
        self, matrix: EdgeMatrix, x: Float[Tensor, "batch seq d_model"], keeps: bool
    ) -> Iterator[None]:
        """Inside, x is in the slot of the source after the matrix's.

        In a forward pass that source has not written yet, so nothing of it is lost,
        unless its patch is there. keeps: put back what was there.
        """
        assert self.diff is not None
        slot = self.diff[:, :, self.works[matrix].inputs_slot]
        before = slot.clone() if keeps else None
        slot.copy_(x.detach())
        try:
            yield
        finally:
            if before is not None:
                slot.copy_(before)

    def _with_x(self, matrix: EdgeMatrix) -> tuple[Tensor, slice | Tensor]:
        """The matrix's weights and columns, with those of its heads' common input."""
        work = self.works[matrix]
        n_head_rows = bisect_left(work.row_idxs, matrix.n_head_rows)
        of_x = work.weights.new_zeros((*work.weights.shape[:3], 1))
        of_x[:, :, :n_head_rows] = 1.0
        columns = work.columns
        if isinstance(columns, slice):
            assert columns.stop == work.inputs_slot
            columns = slice(columns.start, columns.stop + 1)
        else:
            columns = t.cat([columns, columns.new_tensor([work.inputs_slot])])
        return t.cat([work.weights.detach(), of_x], -1), columns

    def _multiply(
        self, weights: Tensor, columns: slice | Tensor, to: MatrixDelta | None = None
    ) -> MatrixDelta:
        return t.bmm(self._per_token(weights), self._columns(columns), out=to)

    def _columns(self, columns: slice | Tensor) -> Float[Tensor, "token col d_model"]:
        if isinstance(columns, slice):
            return self.tokens()[:, columns]
        return self.tokens().index_select(1, columns)

    def _per_token(self, weights: Tensor) -> Tensor:
        """[batch or 1, seq or 1, row, src] -> [token, row, src]; a view if it can be."""
        assert self.diff is not None
        batch, seq = self.diff.shape[:2]
        weights = weights.to(self.diff.dtype)
        if weights.shape[:2] == (1, 1):
            return weights[0].expand(batch * seq, -1, -1)
        return weights.expand(batch, seq, -1, -1).flatten(0, 1)

    def products(
        self, matrix: EdgeMatrix, grads: Float[Tensor, "token row d_model"]
    ) -> Float[Tensor, "token row col"]:
        """The scalar products of gradients with the differences, at each token."""
        return t.bmm(grads, self.tokens()[:, self.works[matrix].columns].mT)

    def weights_grad(
        self, matrix: EdgeMatrix, products: Float[Tensor, "token row col"]
    ) -> Tensor:
        """The gradient of the matrix's weights, from its products at each token."""
        weights = self.works[matrix].weights
        assert self.diff is not None
        by_token = products.unflatten(0, self.diff.shape[:2])
        expanded = [dim for dim in (0, 1) if weights.shape[dim] == 1]
        if not expanded:
            return by_token.to(weights.dtype)
        return by_token.sum(expanded, keepdim=True, dtype=weights.dtype)

    def send_back(self, matrix: EdgeMatrix, grads: MatrixDelta) -> None:
        """Add to the gradient of the differences what comes from the matrix's rows."""
        weights = self._per_token(self.works[matrix].weights).mT
        tokens = self.tokens()
        if self.grad_buffer is None:
            self.grad_buffer = t.empty_like(tokens)
        grad = self.grad_buffer
        if not self.has_grad and (matrix.lo, matrix.hi) == (0, tokens.shape[1]):
            t.bmm(weights, grads, out=grad)
        else:
            if not self.has_grad:
                grad.zero_()
            grad[:, matrix.lo : matrix.hi].baddbmm_(weights, grads)
        self.has_grad = True

    def enter_backward(self) -> None:
        """When the backward pass that is running ends, forget its gradients.

        If it fails it has no end; what it left is forgotten when the next one begins.
        """
        backward_id = t._C._current_graph_task_id()
        if self.backward_id != backward_id:
            self.backward_id, self.has_grad = backward_id, False
            Variable._execution_engine.queue_callback(self._leave_backward)

    def _leave_backward(self) -> None:
        self.has_grad = False
        self.backward_id = None
        self.awaits_backward = False


# ------------------------------------------------------------------------ destinations


def read_port(
    forward_pass: ForwardPass, matrix: EdgeMatrix, port: DestPort, x: Tensor
) -> Tensor:
    """What a port reads instead of x because of a matrix's edges."""
    out = _read_first(forward_pass, matrix, x) if port is matrix.ports[0] else None
    work = forward_pass.works[matrix]
    if out is None:
        # Taken out: a handle that stayed would keep the whole pass alive in a circle.
        handle = work.handles.pop(port, None)
        if handle is not None:
            out = _EnterPort.apply(x, handle, work, matrix, port)
        else:
            out = x if work.delta is None else add_delta(x, work, matrix, port)
    forget_delta(work, matrix, port)
    return out  # type: ignore[return-value]


def forget_delta(work: MatrixWork, matrix: EdgeMatrix, port: DestPort) -> None:
    """After the matrix's last port, its product is not needed any more."""
    if port is matrix.ports[-1]:
        work.delta = None


def _read_first(
    forward_pass: ForwardPass, matrix: EdgeMatrix, x: Tensor
) -> Tensor | None:
    """The patched input of a matrix's first port, or None if no gradient flows there."""
    work = forward_pass.works[matrix]
    if t.is_grad_enabled() and (x.requires_grad or work.weights.requires_grad):
        if work.does_nothing and not work.weights.requires_grad:
            return x
        return read_matrix(forward_pass, matrix, x)
    work.delta = forward_pass.compute(matrix)
    return None


def read_matrix(forward_pass: ForwardPass, matrix: EdgeMatrix, x: Tensor) -> Tensor:
    """The patched input of a matrix's first port, when gradients flow."""
    work = forward_pass.works[matrix]
    out, *handles = _ReadMatrix.apply(x, work.weights, matrix, forward_pass)  # type: ignore[misc]
    work.handles = dict(zip(matrix.ports[1:], handles, strict=True))
    return out


def new_handles(forward_pass: ForwardPass, matrix: EdgeMatrix) -> list[Tensor]:
    """A constant zero for each further port, whose gradient is that of its input."""
    tokens = forward_pass.tokens()
    zero = tokens.new_zeros(())
    return [
        zero.expand(tokens.shape[0], port.n_rows, tokens.shape[2])
        for port in matrix.ports[1:]
    ]


def fill_rows(
    rows: MatrixDelta,
    matrix: EdgeMatrix,
    grads: tuple[tuple[DestPort, Tensor | None], ...],
) -> None:
    """Collect the gradients of some ports' inputs in the rows of their matrix."""
    for port, grad in grads:
        of_port = rows[:, matrix.rows(port)]
        of_port.zero_() if grad is None else of_port.copy_(grad.reshape(of_port.shape))


class _ReadMatrix(Function):
    """Input plus patch at a matrix's first port; a handle for each further port.

    The first port's input goes through here so that autograd knows that the matrix is
    downstream of its sources. A port of heads gets all rows, [token, row, d_model]; those
    after its own mean nothing to it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        matrix: EdgeMatrix,
        forward_pass: ForwardPass,
    ) -> tuple[Tensor, ...]:
        ctx.forward_pass, ctx.matrix, ctx.shape = forward_pass, matrix, x.shape
        ctx.set_materialize_grads(False)
        forward_pass.awaits_backward = True
        work = forward_pass.works[matrix]
        if matrix.n_head_rows:
            out = forward_pass.compute_inputs(matrix, x)
            work.delta = out.detach()
        else:
            work.delta = forward_pass.compute(matrix)
            out = add_delta(x, work, matrix, matrix.ports[0])
        return (out, *new_handles(forward_pass, matrix))

    @staticmethod
    def backward(ctx: Any, *grad_outs: Tensor | None) -> tuple[Tensor | None, ...]:
        forward_pass, matrix = ctx.forward_pass, ctx.matrix
        forward_pass.enter_backward()
        tokens = forward_pass.tokens()
        shape = (tokens.shape[0], matrix.n_rows, tokens.shape[2])
        by_port = tuple(zip(matrix.ports, grad_outs, strict=True))
        grad_x = grad_outs[0]
        if matrix.n_head_rows and grad_x is not None:
            # All rows, of which those of further ports are zero.
            grads = grad_x.clone(memory_format=t.contiguous_format)
            fill_rows(grads, matrix, by_port[1:])
            grad_x = grads[:, : matrix.n_head_rows].sum(1).reshape(ctx.shape)
        else:
            grads = tokens.new_empty(shape)
            fill_rows(grads, matrix, by_port)
        grad_weights = None
        if ctx.needs_input_grad[1]:
            grad_weights = forward_pass.weights_grad(
                matrix, forward_pass.products(matrix, grads)
            )
        if not forward_pass.works[matrix].does_nothing:
            forward_pass.send_back(matrix, grads)
        return grad_x, grad_weights, None, None


class _EnterPort(Function):
    """Add to a further port's input what its matrix holds for it."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        handle: Tensor,
        work: MatrixWork,
        matrix: EdgeMatrix,
        port: DestPort,
    ) -> Tensor:
        ctx.handle_shape = handle.shape
        return add_delta(x, work, matrix, port)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return grad_out, grad_out.reshape(ctx.handle_shape), None, None, None


def add_delta(x: Tensor, work: MatrixWork, matrix: EdgeMatrix, port: DestPort) -> Tensor:
    """x plus what the matrix's edges change at the port's rows."""
    in_delta, changed = work.changes(matrix.rows(port))
    if work.delta is None or not changed:
        return x.view_as(x)
    delta = work.delta[:, in_delta]
    if len(changed) == port.n_rows:
        return x + delta.reshape(x.shape)
    out = x.clone()
    out[:, :, changed] += delta.unflatten(0, x.shape[:2])
    return out


# ----------------------------------------------------------------------------- sources


def write_source(forward_pass: ForwardPass, port: SrcPort, out: Tensor) -> Tensor:
    """A source's output, whose gradient is that minus what destinations send back."""
    return _WriteSource.apply(out, forward_pass, port)  # type: ignore[no-any-return]


class _WriteSource(Function):
    """Identity on a source's output, minus the gradient that destinations send back."""

    @staticmethod
    def forward(
        ctx: Any, out: Tensor, forward_pass: ForwardPass, port: SrcPort
    ) -> Tensor:
        ctx.forward_pass, ctx.port = forward_pass, port
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        forward_pass, port = ctx.forward_pass, ctx.port
        forward_pass.enter_backward()
        if not forward_pass.has_grad:
            return grad_out, None, None
        sent_back = forward_pass.grad_buffer[:, port.srcs]
        weights = port.weights()
        if weights is not None:
            sent_back = t.bmm(sent_back.transpose(0, 1), weights.mT).transpose(0, 1)
        return grad_out - sent_back.reshape(grad_out.shape), None, None

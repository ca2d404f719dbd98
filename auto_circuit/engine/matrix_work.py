"""What one forward pass does with one edge matrix, forwards and backwards.

`docs/engine.md` derives the formulas. Forwards, the matrix's product is computed when its
first port is reached, and each of its ports adds its own rows. Backwards, the rows'
gradients are collected at the first port, where two products give the gradients of the
masks and those of the differences.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch as t
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd import Function

from auto_circuit import devices
from auto_circuit.engine.edge_matrices import DestPort, EdgeMatrix
from auto_circuit.engine.forward_pass import ForwardPass, Residual, Rows

Weights = Float[Tensor, "batch_or_1 seq_or_1 row column"]
Input = Float[Tensor, "batch seq *head d_model"]
"""What a port's module gives: the residual stream, or that of each row."""
Carrier = Float[Tensor, "_ _ d_model"]
"""A zero for each of a port's rows, [token row d_model], with its input's gradient."""
InputOrCarrier = Float[Tensor, "... d_model"]
Columns = slice | Int[Tensor, "column"]


@dataclass(eq=False)
class MatrixWork:
    """What one forward pass does with an edge matrix.

    weights: in float32 at least; on the patched base, mask - 1.
    columns: the slots of `ForwardPass.diff` that they are multiplied with.
    row_idxs: the rows of the matrix that the weights are for; the others do not change.
    inputs_slot: the slot that heads' common input goes to while it is multiplied.
    delta: the product, from when the matrix's first port has been reached.
    carriers: per further port, what carries its gradient back to the matrix.
    """

    matrix: EdgeMatrix
    forward_pass: ForwardPass
    weights: Weights
    columns: Columns
    row_idxs: list[int]
    does_nothing: bool
    inputs_slot: int = -1
    delta: Rows | None = None
    carriers: dict[DestPort, Carrier] = field(default_factory=dict)

    def changes(self, port: DestPort) -> tuple[slice, list[int]]:
        """(The rows of delta that change the port's; which of the port's they change)"""
        if self.does_nothing:
            return slice(0, 0), []
        # Rows 1, 4 and 6 of the matrix change. A port that has the rows 4..6 of it finds
        # them at 1 and 2 of delta, slice(1, 3), and they are its own rows 0 and 2.
        rows = self.matrix.rows(port)
        lo = bisect_left(self.row_idxs, rows.start)
        hi = bisect_left(self.row_idxs, rows.stop)
        return slice(lo, hi), [idx - rows.start for idx in self.row_idxs[lo:hi]]

    # ------------------------------------------------------------------------ forwards

    def read(self, port: DestPort, x: Input) -> Input:
        """What a port reads instead of x because of the matrix's edges."""
        out = self._read_first(x) if port is self.matrix.ports[0] else None
        if out is None:
            # Taken out: one that stayed would keep the whole pass alive in a circle.
            carrier = self.carriers.pop(port, None)
            if carrier is not None:
                out = _EnterPort.apply(x, carrier, self, port)
            else:
                out = x if self.delta is None else self.add_delta(port, x)
        self.forget_delta(port)
        return out  # type: ignore[return-value]

    def _read_first(self, x: Input) -> Input | None:
        """The patched input of the first port, or None if no gradient flows there."""
        if t.is_grad_enabled() and (x.requires_grad or self.weights.requires_grad):
            if self.does_nothing and not self.weights.requires_grad:
                return x
            return self.read_with_gradients(x)
        self.delta = self.compute()
        return None

    def read_with_gradients(self, x: Input) -> Input | Rows:
        """The patched input of the first port, when gradients flow."""
        out, *carriers = _ReadMatrix.apply(x, self.weights, self)  # type: ignore[misc]
        self.keep(carriers)
        return out

    def compute(self) -> Rows | None:
        """What the edges change at each row; None if nothing."""
        if self.does_nothing:
            return None
        return self._multiply(self.weights.detach(), self.columns)

    def compute_inputs(self, x: Residual, to: Rows | None = None) -> Rows:
        """The same, plus x at each row of heads: their inputs, in one product.

        to: memory for them.
        x takes part as one more source, whose weight is 1 for heads.
        """
        here = self.forward_pass
        # Where attention and MLP are parallel, latents read after the heads have written.
        is_written = self.inputs_slot < here.n_written
        keeps = here.holds_patches or here.is_repeated or is_written
        with self._x_in_its_slot(x, keeps=keeps):
            return self._multiply(*self._with_x(), to)

    def add_inputs(
        self, x: Residual, factor: Float[Tensor, "token row 1"], to: Rows
    ) -> None:
        """Add to a tensor what `compute_inputs` gave, each row times a factor.

        For the backward pass, so that inputs of heads need not be kept until then.
        """
        # The slot holds a difference, which another backward pass may need.
        with self._x_in_its_slot(x, keeps=True):
            weights, columns = self._with_x()
            to.baddbmm_(self._per_token(weights) * factor, self._columns(columns))

    def add_delta(self, port: DestPort, x: Input) -> Input:
        """x plus what the edges change at the port's rows."""
        in_delta, changed = self.changes(port)
        if self.delta is None or not changed:
            return x.view_as(x)
        # A port with 3 heads, of which 0 and 2 change: 2 rows of delta are added to x at the
        # heads 0 and 2. If all change, or the port has one row, delta has the shape of x but
        # for its tokens, [6 3 d_model] for [2 3 3 d_model].
        delta = self.delta[:, in_delta]
        if len(changed) == port.n_rows:
            return x + delta.reshape(x.shape)
        rows = devices.index_tensor(changed, x.device)
        return x.index_add(2, rows, delta.unflatten(0, x.shape[:2]))

    def forget_delta(self, port: DestPort) -> None:
        """After the last port, the product is not needed any more."""
        if port is self.matrix.ports[-1]:
            self.delta = None

    @contextmanager
    def _x_in_its_slot(self, x: Residual, keeps: bool) -> Iterator[None]:
        """Inside, x is in the slot of the source after the matrix's.

        In a forward pass that source has mostly not written yet, so nothing of it is lost,
        unless its patch is there. keeps: put back what was there.
        """
        # Sources 0..4 in slots 0..4, of which the heads read 0..2: x goes to slot 3, which
        # source 3 (one of these heads, or what follows them) will write later.
        diff = self.forward_pass.diff
        assert diff is not None
        slot = diff[:, :, self.inputs_slot]
        before = slot.clone() if keeps else None
        slot.copy_(x.detach())
        try:
            yield
        finally:
            if before is not None:
                slot.copy_(before)

    def _with_x(self) -> tuple[Weights, Columns]:
        """The weights and columns, with those of the heads' common input."""
        # Two heads and an MLP that read the sources 0..2: weights [3 rows, 3 columns]
        # become [3 rows, 4 columns], the new one 1, 1, 0: heads get x, the MLP does not.
        n_head_rows = bisect_left(self.row_idxs, self.matrix.n_head_rows)
        of_x = self.weights.new_zeros((*self.weights.shape[:3], 1))
        of_x[:, :, :n_head_rows] = 1.0
        columns = self.columns
        if isinstance(columns, slice):
            assert columns.stop == self.inputs_slot
            columns = slice(columns.start, columns.stop + 1)
        else:
            slot = devices.index_tensor([self.inputs_slot], columns.device)
            columns = t.cat([columns, slot])
        return t.cat([self.weights.detach(), of_x], -1), columns

    def _multiply(
        self, weights: Weights, columns: Columns, to: Rows | None = None
    ) -> Rows:
        return t.bmm(self._per_token(weights), self._columns(columns), out=to)

    def _columns(self, columns: Columns) -> Float[Tensor, "token column d_model"]:
        if isinstance(columns, slice):
            return self.forward_pass.tokens()[:, columns]
        return self.forward_pass.tokens().index_select(1, columns)

    def _per_token(self, weights: Weights) -> Float[Tensor, "token row column"]:
        """The weights at each token; a view if it can be."""
        diff = self.forward_pass.diff
        assert diff is not None
        batch, seq = diff.shape[:2]
        weights = weights.to(diff.dtype)
        if weights.shape[:2] == (1, 1):
            # One matrix for all tokens, with stride 0: nothing is copied.
            return weights[0].expand(batch * seq, -1, -1)
        # Masks of 3 positions, [1 3 row column], for 2 examples: tokens 0..2 and 3..5 get
        # the positions 0, 1, 2 each, in the order of `ForwardPass.tokens`.
        return weights.expand(batch, seq, -1, -1).flatten(0, 1)

    # ----------------------------------------------------------------------- backwards

    def new_carriers(self) -> list[Carrier]:
        """A constant zero for each further port, whose gradient is that of its input."""
        tokens = self.forward_pass.tokens()
        zero = tokens.new_zeros(())
        return [
            zero.expand(tokens.shape[0], port.n_rows, tokens.shape[2])
            for port in self.matrix.ports[1:]
        ]

    def keep(self, carriers: Sequence[Carrier]) -> None:
        """Until their ports are reached."""
        self.carriers = dict(zip(self.matrix.ports[1:], carriers, strict=True))

    def collect(
        self, rows: Rows, grads: Sequence[InputOrCarrier | None], first: int = 0
    ) -> None:
        """Put the gradients of the inputs of all ports from the first on in their rows."""
        for port, grad in zip(self.matrix.ports[first:], grads, strict=True):
            # Keys of 12 heads, [batch seq 12 d_model], go to the rows 12..23 of each token.
            of_port = rows[:, self.matrix.rows(port)]
            if grad is None:
                of_port.zero_()
            else:
                of_port.copy_(grad.reshape(of_port.shape))

    def products(self, grads: Rows) -> Float[Tensor, "token row column"]:
        """The scalar products of gradients with the differences, at each token."""
        return t.bmm(grads, self.forward_pass.tokens()[:, self.columns].mT)

    def weights_grad(self, products: Float[Tensor, "token row column"]) -> Weights:
        """The gradient of the weights, from the products at each token."""
        diff = self.forward_pass.diff
        assert diff is not None
        # [token row column] -> [batch seq row column], summed over what one weight serves:
        # weights [1 3 row column] of 3 positions get sums over the examples.
        by_token = products.unflatten(0, diff.shape[:2])
        expanded = [dim for dim in (0, 1) if self.weights.shape[dim] == 1]
        if not expanded:
            return by_token.to(self.weights.dtype)
        return by_token.sum(expanded, keepdim=True, dtype=self.weights.dtype)

    def send_back(self, grads: Rows) -> None:
        """Add to the gradient of the differences what comes from the rows."""
        weights = self._per_token(self.weights).mT
        assert isinstance(self.columns, slice)
        self.forward_pass.add_gradient(self.columns.start, weights, grads)


class _ReadMatrix(Function):
    """Input plus patch at a matrix's first port; a carrier for each further port.

    The first port's input goes through here so that autograd knows that the matrix is
    downstream of its sources. A port of heads gets all rows, [token, row, d_model]; those
    after its own mean nothing to it.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Input, weights: Weights, work: MatrixWork
    ) -> tuple[InputOrCarrier, ...]:
        ctx.work, ctx.shape = work, x.shape
        ctx.set_materialize_grads(False)
        work.forward_pass.awaits_backward = True
        if work.matrix.n_head_rows:
            out = work.compute_inputs(x)
            work.delta = out.detach()
        else:
            work.delta = work.compute()
            out = work.add_delta(work.matrix.ports[0], x)
        return (out, *work.new_carriers())

    @staticmethod
    def backward(
        ctx: Any, *grads: InputOrCarrier | None
    ) -> tuple[Input | Weights | None, ...]:
        work, matrix = ctx.work, ctx.work.matrix
        work.forward_pass.enter_backward()
        tokens = work.forward_pass.tokens()
        grad_x = grads[0]
        if matrix.n_head_rows and grad_x is not None:
            # All rows, of which those of further ports are zero.
            rows = grad_x.clone(memory_format=t.contiguous_format)
            work.collect(rows, grads[1:], first=1)
            grad_x = rows[:, : matrix.n_head_rows].sum(1).reshape(ctx.shape)
        else:
            rows = tokens.new_empty((tokens.shape[0], matrix.n_rows, tokens.shape[2]))
            work.collect(rows, grads)
        grad_weights = None
        if ctx.needs_input_grad[1]:
            grad_weights = work.weights_grad(work.products(rows))
        if not work.does_nothing:
            work.send_back(rows)
        return grad_x, grad_weights, None


class _EnterPort(Function):
    """Add to a further port's input what its matrix holds for it."""

    @staticmethod
    def forward(
        ctx: Any, x: Input, carrier: Carrier, work: MatrixWork, port: DestPort
    ) -> Input:
        ctx.carrier_shape = carrier.shape
        return work.add_delta(port, x)

    @staticmethod
    def backward(ctx: Any, grad_out: Input) -> tuple[InputOrCarrier | None, ...]:  # type: ignore[override]
        return grad_out, grad_out.reshape(ctx.carrier_shape), None, None

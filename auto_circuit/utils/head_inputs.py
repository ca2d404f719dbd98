"""Heads that read inputs of their own, in models that give them all the same one.

A model computes the queries (keys, values) of all heads as one `linear(norm(x))`. Where
patches give head `h` an input x_h, its part is `weight[h] @ norm(x_h)`. Only the heads
whose input really differs are computed one by one, and a mask of zeros, whose gradient is
all that edge attribution patching asks for, costs no such inputs at all: the gradient of
head `h`'s input is `J(x)^T weight[h]^T grad[h]`, and the Jacobian J of a norm is a scaled
projection, which can be applied to the scalar products of the gradients instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch as t
from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function
from torch.nn import Module

from auto_circuit.model_utils.model_adapter import HeadInputs
from auto_circuit.utils.edge_blocks import DestPort, EdgeBlock
from auto_circuit.utils.forward_pass import (
    ForwardPass,
    fill_rows,
    forget_delta,
    new_handles,
    read_block,
)

HeadTokens = Float[Tensor, "token row d_model"]


def head_outputs(
    run: ForwardPass,
    block: EdgeBlock,
    port: DestPort,
    x: Float[Tensor, "batch seq d_model"],
    normed: Float[Tensor, "batch seq d_model"],
    base_outs: list[Tensor] | None,
) -> list[Tensor] | None:
    """What the heads' linear maps give with patched inputs: [batch seq width] for each.

    x, normed: the residual stream that the heads read, and the input that the model makes
        of it.
    base_outs: what they give for x, if that is not `normed`'s.
    None if that is what the model computes anyway.
    """
    heads, work = port.heads, run.works[block]
    assert heads is not None
    grad_of_weights = t.is_grad_enabled() and work.weights.requires_grad
    if grad_of_weights and work.does_nothing and _has_closed_form(heads):
        return _probed(run, block, port, x, normed)
    if grad_of_weights or (
        t.is_grad_enabled() and x.requires_grad and not work.does_nothing
    ):
        outs = _project(heads, _norm(heads, read_block(run, block, x)))
        return [out.unflatten(0, x.shape[:2]) for out in outs]
    _, changed = work.changes(block.rows(port))
    work.delta = run.compute_inputs(block, x) if changed else run.compute(block)
    inputs = work.delta
    forget_delta(work, block, port)
    if not changed or inputs is None:
        return None if base_outs is None else list(base_outs)
    return _with_changed_rows(heads, x.shape, normed, base_outs, inputs, changed)


def outputs_of(
    heads: HeadInputs, x: Float[Tensor, "batch seq d_model"]
) -> list[Float[Tensor, "batch seq width"]]:
    """What the linear maps give if all heads read x."""
    return _apply(heads, _norm(heads, x))


def linear_forward(linear: Module, x: Tensor) -> Tensor:
    """The linear map itself, whatever stands in for its `forward`."""
    return type(linear).forward(linear, x)  # type: ignore[no-any-return]


def _apply(heads: HeadInputs, normed: Tensor) -> list[Tensor]:
    return [linear_forward(linear, normed) for linear, _ in heads.linears]


def _norm(heads: HeadInputs, x: Tensor) -> Tensor:
    return x if heads.norm is None else heads.norm(x)


def _by_head(linear: Any, n_heads: int) -> Float[Tensor, "head d_head d_model"]:
    return linear.weight.unflatten(0, (n_heads, -1))


def _add_bias(linear: Any, out: Tensor) -> Tensor:
    return out if linear.bias is None else out + linear.bias


# --------------------------------------------------------------------- without gradients


def _with_changed_rows(
    heads: HeadInputs,
    shape: t.Size,
    normed: Tensor,
    base_outs: list[Tensor] | None,
    inputs: HeadTokens,
    changed: list[int],
) -> list[Tensor]:
    """The heads' outputs, where these have inputs of their own (the first of `inputs`)."""

    def base_out(i: int) -> Tensor:
        if base_outs is not None:
            return base_outs[i]
        return linear_forward(heads.linears[i][0], normed)

    inputs = _norm(heads, inputs)
    outs = []
    for i, ((linear, n_heads), rows) in enumerate(
        zip(heads.linears, heads.rows(), strict=True)
    ):
        here = [j for j, row in enumerate(changed) if rows.start <= row < rows.stop]
        if not here:
            outs.append(base_out(i))
            continue
        idxs = [changed[j] - rows.start for j in here]
        parts = _parts(linear, n_heads, idxs, inputs[:, here[0] : here[-1] + 1])
        if len(idxs) == n_heads:
            out = parts.flatten(1)
        else:
            out = base_out(i).flatten(0, 1).clone()
            out.unflatten(1, (n_heads, -1))[:, idxs] = parts
        outs.append(out.unflatten(0, shape[:2]))
    return outs


def _parts(
    linear: Any, n_heads: int, idxs: list[int], inputs: HeadTokens
) -> Float[Tensor, "token row d_head"]:
    """What some of the heads give, each for its own input."""
    weights = _by_head(linear, n_heads).mT
    if len(idxs) < n_heads:
        weights = _pick(weights, idxs)
    parts = t.bmm(inputs.transpose(0, 1), weights).transpose(0, 1)
    if linear.bias is None:
        return parts
    return parts + linear.bias.unflatten(0, (n_heads, -1))[idxs]


def _pick(
    weights: Float[Tensor, "head d_model d_head"], idxs: list[int]
) -> Float[Tensor, "idx d_model d_head"]:
    """`weights[idxs]`, read in the order in which the weights lie in memory."""
    return weights[idxs] if weights.stride(-1) == 1 else weights.mT[idxs].mT


# ------------------------------------------------------------------------ with gradients


def _project(heads: HeadInputs, inputs: HeadTokens) -> list[Tensor]:
    """Each head's part, from its own input: [token, width] for each linear map.

    Rows of `inputs` after the heads' are left out.
    """
    if any(linear.weight.requires_grad for linear, _ in heads.linears):
        weights = [_by_head(linear, n) for linear, n in heads.linears]
        parts = [
            t.einsum("nrd,red->nre", inputs[:, rows], weight)
            for weight, rows in zip(weights, heads.rows(), strict=True)
        ]
    else:
        parts = _ProjectHeads.apply(inputs, heads)
    return [
        _add_bias(linear, part.flatten(1))
        for (linear, _), part in zip(heads.linears, parts, strict=True)
    ]


class _ProjectHeads(Function):
    """`weight[h] @ input[h]`; backward writes all inputs' gradients into one tensor."""

    @staticmethod
    def forward(ctx: Any, inputs: HeadTokens, heads: HeadInputs) -> tuple[Tensor, ...]:
        ctx.heads, ctx.shape = heads, inputs.shape
        return tuple(
            t.bmm(
                inputs[:, rows].transpose(0, 1), _by_head(linear, n_heads).mT
            ).transpose(0, 1)
            for (linear, n_heads), rows in zip(heads.linears, heads.rows(), strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_inputs = grads[0].new_empty(ctx.shape)
        grad_inputs[:, ctx.heads.n_rows :] = 0.0
        weights = [_by_head(linear, n) for linear, n in ctx.heads.linears]
        _send_to_inputs(ctx.heads, grad_inputs, weights, grads)
        return grad_inputs, None


def _send_to_inputs(
    heads: HeadInputs,
    rows: HeadTokens,
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
) -> None:
    """Write `weight[h]^T grad[h]` into row h, for grads [token head d_head]."""
    for i, (of_linear, weight, grad) in enumerate(
        zip(heads.rows(), weights, grads, strict=True)
    ):
        out = rows[:, of_linear].transpose(0, 1)
        if i > 0 and heads.share_rows:
            out.baddbmm_(grad.transpose(0, 1), weight)
        else:
            t.bmm(grad.transpose(0, 1), weight, out=out)


def _has_closed_form(heads: HeadInputs) -> bool:
    """Can gradients of the inputs be had without running the norm for each head?

    Not if somebody's hook changes what the norm gives, or its gradient, or if weights are
    being trained.
    """
    modules = [linear for linear, _ in heads.linears]
    if heads.norm is not None:
        modules.append(heads.norm)
        hooks = (heads.norm._forward_hooks, heads.norm._forward_pre_hooks)
        if heads.closed_form is None or any(hooks):
            return False
    return not any(p.requires_grad for module in modules for p in module.parameters())


def _probed(
    run: ForwardPass, block: EdgeBlock, port: DestPort, x: Tensor, normed: Tensor
) -> list[Tensor]:
    """What the model computes, with gradients of the block's weights, which are zero."""
    assert port.heads is not None
    work = run.works[block]
    with t.no_grad():
        outs = _apply(port.heads, normed)
    results = _ProbeHeads.apply(work.weights, x, block, port, run, *outs)
    work.handles = dict(zip(block.ports[1:], results[len(outs) :], strict=True))
    return list(results[: len(outs)])


class _ProbeHeads(Function):
    """The heads' outputs, with the gradients of x and of weights that are zero.

    With J = (1 - C) / scale, where C projects on the normed input (and on the constant
    vector, if the norm subtracts the mean), the gradient of head h's input is
    `J gain weight[h]^T grad[h]`. Its product with a difference d is that of
    `gain weight[h]^T grad[h] / scale` with d, minus that of their parts in C.
    """

    @staticmethod
    def forward(
        ctx: Any,
        weights: Tensor,
        x: Tensor,
        block: EdgeBlock,
        port: DestPort,
        run: ForwardPass,
        *outs: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.x, ctx.block, ctx.port, ctx.run = x.detach(), block, port, run
        ctx.set_materialize_grads(False)
        run.awaits_backward = True
        return (*(out.view_as(out) for out in outs), *new_handles(run, block))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        block, port, run, x = ctx.block, ctx.port, ctx.run, ctx.x
        run.enter_backward()
        n_outs = len(port.heads.linears)
        basis, inverse_scale, gain = _projected_out(port.heads, x)
        # The rows of the block, and after them the vectors of C.
        rows = x.new_empty((len(basis), block.n_rows + basis.shape[1], x.shape[-1]))
        heads = rows[:, : block.n_head_rows]
        parts = _head_grads(port.heads, x, grads[:n_outs], inverse_scale)
        weights = [_by_head(linear, n) for linear, n in port.heads.linears]
        if isinstance(gain, Tensor):
            weights = [weight * gain for weight in weights]
        _send_to_inputs(port.heads, heads, weights, parts)
        fill_rows(rows, block, tuple(zip(block.ports[1:], grads[n_outs:], strict=True)))
        rows[:, block.n_rows :] = basis
        in_basis = t.bmm(heads, basis.mT)
        grad_weights = grad_x = None
        if ctx.needs_input_grad[0]:
            products = run.products(block, rows)
            products[:, : block.n_head_rows] -= t.bmm(
                in_basis, products[:, block.n_rows :]
            )
            grad_weights = run.weights_grad(block, products[:, : block.n_rows])
        if ctx.needs_input_grad[1]:
            total = heads.sum(1, keepdim=True)
            grad_x = total - t.bmm(in_basis.sum(1, keepdim=True), basis)
            grad_x = grad_x.reshape(x.shape)
        return (grad_weights, grad_x, None, None, None, *(None for _ in range(n_outs)))


def _head_grads(
    heads: HeadInputs,
    x: Tensor,
    grads: Sequence[Tensor | None],
    factor: Float[Tensor, "token 1"],
) -> list[Float[Tensor, "token head d_head"]]:
    """The gradients of the linear maps' outputs, by head, times a factor."""
    parts = []
    for grad, (linear, n_heads) in zip(grads, heads.linears, strict=True):
        if grad is None:
            width = linear.out_features
            grad = x.new_zeros((*x.shape[:2], int(width)))  # type: ignore[arg-type]
        parts.append((grad.flatten(0, 1) * factor).unflatten(1, (n_heads, -1)))
    return parts


def _projected_out(heads: HeadInputs, x: Tensor) -> tuple[Tensor, Tensor, Tensor | float]:
    """(orthonormal vectors that a norm's Jacobian takes out, 1 / its scale, its gain)

    The first [token, vector, d_model], the second [token, 1].
    """
    tokens = x.flatten(0, 1)
    norm = heads.closed_form
    if heads.norm is None or norm is None:
        no_vectors = tokens.new_empty((len(tokens), 0, tokens.shape[1]))
        return no_vectors, tokens.new_ones((len(tokens), 1)), 1.0
    exact = tokens.to(t.promote_types(x.dtype, t.float32))
    scale = norm.scale(exact)
    root = exact.shape[1] ** 0.5
    vectors = [norm.centre(exact) / (scale * root)]
    if norm.centred:
        vectors.append(t.ones_like(exact) / root)
    return t.stack(vectors, 1).to(x.dtype), (1 / scale).to(x.dtype), norm.gain()

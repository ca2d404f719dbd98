"""Heads that read inputs of their own, in models that give them all the same one.

A model computes the queries (keys, values) of all heads as one `linear(norm(x))`. Where
patches give head `h` an input x_h, its part is `weight[h] @ norm(x_h)`. Only the heads
whose input really differs are computed one by one, and none of these inputs is kept for
the backward pass. The gradient of head `h`'s input is `J(x_h)^T weight[h]^T grad[h]`, and
the Jacobian J of a norm is a scaled projection, which is known in closed form. A mask of
zeros, whose gradient is all that edge attribution patching asks for, costs no such inputs
at all: the projection is applied to the scalar products of the gradients instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch as t
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd import Function
from torch.nn import Module

from auto_circuit import devices
from auto_circuit.engine.forward_pass import Residual, Rows
from auto_circuit.engine.matrix_work import MatrixWork, Weights
from auto_circuit.model_utils.model_adapter import HeadInputs
from auto_circuit.weights import dense_weight

Outputs = Float[Tensor, "batch seq _"]
"""What one linear map gives for all its heads."""
OutputsOrCarrier = Float[Tensor, "_ _ _"]
TokenOutputs = Float[Tensor, "token _"]
Parts = Float[Tensor, "token _ _"]
"""The same by head: [token, head, d_head]. The maps' numbers of heads may differ."""
HeadWeights = Float[Tensor, "_ _ d_model"]
"""A linear map's weights by head: [head, d_head, d_model]."""
PerRow = Float[Tensor, "token row 1"]


def head_outputs(
    work: MatrixWork,
    x: Residual,
    normed: Residual,
    base_outs: Sequence[Outputs] | None,
) -> list[Outputs] | None:
    """What the heads' linear maps give with patched inputs.

    work: that of the matrix whose first port has the heads.
    x, normed: the residual stream that the heads read, and the input that the model makes
        of it.
    base_outs: what they give for x, if that is not `normed`'s.
    None if that is what the model computes anyway.
    """
    heads, port = _heads(work), work.matrix.ports[0]
    grad_of_weights = t.is_grad_enabled() and work.weights.requires_grad
    if grad_of_weights or (
        t.is_grad_enabled() and x.requires_grad and not work.does_nothing
    ):
        if has_closed_form(heads):
            return _in_closed_form(work, x, normed)
        outs = _project(heads, _norm(heads, work.read_with_gradients(x)))
        return [out.unflatten(0, x.shape[:2]) for out in outs]
    _, changed = work.changes(port)
    if changed:
        memory = work.forward_pass.row_memory(len(work.row_idxs))
        work.delta = work.compute_inputs(x, to=memory)
    else:
        work.delta = work.compute()
    inputs = work.delta
    work.forget_delta(port)
    if not changed or inputs is None:
        return None if base_outs is None else list(base_outs)
    return _with_changed_rows(heads, normed, base_outs, inputs, changed)


def _heads(work: MatrixWork) -> HeadInputs:
    heads = work.matrix.ports[0].heads
    assert heads is not None
    return heads


def outputs_of(heads: HeadInputs, x: Residual) -> list[Outputs]:
    """What the linear maps give if all heads read x."""
    return _apply(heads, _norm(heads, x))


def linear_forward(
    linear: Module, x: Float[Tensor, "*token d_in"]
) -> Float[Tensor, "*token d_out"]:
    """The linear map itself, whatever stands in for its `forward`."""
    return type(linear).forward(linear, x)  # type: ignore[no-any-return]


def _apply(heads: HeadInputs, normed: Residual) -> list[Outputs]:
    return [linear_forward(linear, normed) for linear, _ in heads.linears]


def _norm(
    heads: HeadInputs, x: Float[Tensor, "*token d_model"]
) -> Float[Tensor, "*token d_model"]:
    return x if heads.norm is None else heads.norm(x)


def _by_head(
    linear: Any, n_heads: int, dtype: t.dtype
) -> Float[Tensor, "{n_heads} d_head d_model"]:
    return dense_weight(linear, dtype).to(dtype).unflatten(0, (n_heads, -1))


def _add(
    bias: Float[Tensor, "width"] | None, out: Float[Tensor, "token width"]
) -> Float[Tensor, "token width"]:
    return out if bias is None else out + bias


# --------------------------------------------------------------------- without gradients


def _base_out(
    heads: HeadInputs, normed: Residual, base_outs: Sequence[Outputs] | None, i: int
) -> Outputs:
    """What a linear map makes of the input that no row changes."""
    if base_outs is not None:
        return base_outs[i]
    return linear_forward(heads.linears[i][0], normed)


def _with_changed_rows(
    heads: HeadInputs,
    normed: Residual,
    base_outs: Sequence[Outputs] | None,
    inputs: Rows,
    changed: list[int],
) -> list[Outputs]:
    """The heads' outputs, where these have inputs of their own (the first of `inputs`)."""
    inputs = _norm(heads, inputs)
    base_out = partial(_base_out, heads, normed, base_outs)
    outs = []
    for i, ((linear, n_heads), rows) in enumerate(
        zip(heads.linears, heads.rows(), strict=True)
    ):
        # Rows 1, 4 and 6 change. A linear map that reads the rows 4..7 finds two of them,
        # at 1 and 2 of the inputs: slice(1, 3). They are its heads 0 and 2.
        here = [j for j, row in enumerate(changed) if rows.start <= row < rows.stop]
        if not here:
            outs.append(base_out(i))
            continue
        here_rows = inputs[:, here[0] : here[-1] + 1]
        if len(here) == n_heads:
            out = _parts(linear, n_heads, None, here_rows).flatten(1)
        else:
            of_linear = [changed[j] - rows.start for j in here]
            idxs = devices.index_tensor(of_linear, inputs.device)
            out = base_out(i).flatten(0, 1).clone()
            parts = _parts(linear, n_heads, idxs, here_rows)
            out.unflatten(1, (n_heads, -1)).index_copy_(1, idxs, parts)
        outs.append(out.unflatten(0, normed.shape[:2]))
    return outs


def _parts(
    linear: Any, n_heads: int, idxs: Int[Tensor, "idx"] | None, inputs: Rows
) -> Float[Tensor, "token row d_head"]:
    """What some of the heads give (all, if None), each for its own input."""
    weights, bias = _by_head(linear, n_heads, inputs.dtype).mT, linear.bias
    bias = None if bias is None else bias.unflatten(0, (n_heads, -1))
    if idxs is not None:
        weights = _pick(weights, idxs)
        bias = None if bias is None else bias[idxs]
    parts = t.bmm(inputs.transpose(0, 1), weights).transpose(0, 1)
    return parts if bias is None else parts + bias


def _pick(
    weights: Float[Tensor, "head d_model d_head"], idxs: Int[Tensor, "idx"]
) -> Float[Tensor, "idx d_model d_head"]:
    """`weights[idxs]`, read in the order in which the weights lie in memory."""
    return weights[idxs] if weights.stride(-1) == 1 else weights.mT[idxs].mT


# ------------------------------------------------------------------------ with gradients


def _project(heads: HeadInputs, inputs: Rows) -> list[TokenOutputs]:
    """Each head's part, from its own input: [token, width] for each linear map.

    Rows of `inputs` after the heads' are left out.
    """
    if any(linear.weight.requires_grad for linear, _ in heads.linears):
        weights = [_by_head(linear, n, inputs.dtype) for linear, n in heads.linears]
        parts = [
            t.einsum("nrd,red->nre", inputs[:, rows], weight)
            for weight, rows in zip(weights, heads.rows(), strict=True)
        ]
    else:
        parts = _ProjectHeads.apply(inputs, heads)
    return [
        _add(linear.bias, part.flatten(1))  # type: ignore[arg-type]
        for (linear, _), part in zip(heads.linears, parts, strict=True)
    ]


class _ProjectHeads(Function):
    """`weight[h] @ input[h]`; backward writes all inputs' gradients into one tensor."""

    @staticmethod
    def forward(ctx: Any, inputs: Rows, heads: HeadInputs) -> tuple[Parts, ...]:
        ctx.heads, ctx.shape = heads, inputs.shape
        return tuple(
            t.bmm(
                inputs[:, rows].transpose(0, 1),
                _by_head(linear, n_heads, inputs.dtype).mT,
            ).transpose(0, 1)
            for (linear, n_heads), rows in zip(heads.linears, heads.rows(), strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *grads: Parts) -> tuple[Rows | None, ...]:
        grad_inputs = grads[0].new_empty(ctx.shape)
        grad_inputs[:, ctx.heads.n_rows :] = 0.0
        dtype = grads[0].dtype
        weights = [_by_head(linear, n, dtype) for linear, n in ctx.heads.linears]
        _send_to_inputs(ctx.heads, grad_inputs, weights, grads)
        return grad_inputs, None


def _send_to_inputs(
    heads: HeadInputs,
    rows: Rows,
    weights: Sequence[HeadWeights],
    grads: Sequence[Parts],
) -> None:
    """Write `weight[h]^T grad[h]` into row h, for grads [token head d_head]."""
    all_rows = heads.rows()
    for i, (of_linear, weight, grad) in enumerate(
        zip(all_rows, weights, grads, strict=True)
    ):
        # Queries of 2 heads in the rows 0..1, and keys in 2..3: each row is written once.
        # If they share rows, all are 0..1, and keys and values are added to the queries'.
        out = rows[:, of_linear].transpose(0, 1)
        is_first = of_linear not in all_rows[:i]
        # `bmm(..., out=out)` would make a copy, as `out` is not contiguous.
        out.baddbmm_(grad.transpose(0, 1), weight, beta=0 if is_first else 1)


def has_closed_form(heads: HeadInputs) -> bool:
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
    parameters = (p for module in modules for p in module.parameters())
    return not (t.is_grad_enabled() and any(p.requires_grad for p in parameters))


def _in_closed_form(work: MatrixWork, x: Residual, normed: Residual) -> list[Outputs]:
    """The heads' outputs, with gradients; if all weights are zero, the model's own."""
    heads = _heads(work)
    if work.does_nothing:
        with t.no_grad():
            outs = _apply(heads, normed)
        results = _ProbeHeads.apply(x, work.weights, work, *outs)
    else:
        results = _ReadHeads.apply(x, work.weights, work)
    n_outs = len(heads.linears)
    work.keep(results[n_outs:])  # type: ignore[index]
    work.forget_delta(work.matrix.ports[0])
    return list(results[:n_outs])  # type: ignore[index]


class _ReadHeads(Function):
    """The heads' outputs for patched inputs, which are made again in the backward pass.

    What this buys is memory, not time: 600 to 850 MB of GPT-2 small at 8 x 15 tokens.

    A head's output is `weight[h] @ (gain * centre(x_h)) / scale(x_h)`, plus a constant. So
    neither the inputs need to be kept (they are most of what a pass would keep) nor what
    the norm makes of them. With g = grad[h] / scale and o the output without the constant,
    the gradient of x_h is, one product added to another,

    `centre(gain * (weight[h]^T g) - x_h <g, o> / (scale d_model))`.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Residual, weights: Weights, work: MatrixWork
    ) -> tuple[OutputsOrCarrier, ...]:
        ctx.work = work
        ctx.set_materialize_grads(False)
        work.forward_pass.awaits_backward = True
        heads = _heads(work)
        memory = work.forward_pass.row_memory(work.matrix.n_rows)
        inputs = work.compute_inputs(x, to=memory)
        work.delta = inputs
        parts, inverse_scale = _normed_parts(heads, inputs)
        ctx.save_for_backward(x, inverse_scale, *parts)
        outs = _with_constants(heads, x.shape, parts)
        return (*outs, *work.new_carriers())

    @staticmethod
    def backward(
        ctx: Any, *grads: OutputsOrCarrier | None
    ) -> tuple[Residual | Weights | None, ...]:
        work, matrix, heads = ctx.work, ctx.work.matrix, _heads(ctx.work)
        x, inverse_scale, *parts = ctx.saved_tensors
        work.forward_pass.enter_backward()
        n_outs, n_heads = len(parts), matrix.n_head_rows
        rows = work.forward_pass.row_memory(matrix.n_rows)
        rows[:, n_heads:] = 0.0
        parts_grads = _head_grads(heads, x, grads[:n_outs], inverse_scale)
        _send_to_inputs(
            heads, rows[:, :n_heads], _gained_weights(heads, x.dtype), parts_grads
        )
        if heads.norm is not None:
            share = _head_products(heads, parts, parts_grads)
            factor = share.new_zeros((*rows.shape[:2], 1))
            # Rows after the heads' get the factor 0: an MLP in the same matrix has no norm.
            factor[:, :n_heads] = -share * inverse_scale / x.shape[-1]
            work.add_inputs(x, factor.to(x.dtype), rows)
            if heads.closed_form is not None and heads.closed_form.centred:
                rows -= rows.mean(-1, keepdim=True)
        work.collect(rows, grads[n_outs:], first=1)
        grad_weights = grad_x = None
        if ctx.needs_input_grad[1]:
            grad_weights = work.weights_grad(work.products(rows))
        if ctx.needs_input_grad[0]:
            grad_x = rows[:, :n_heads].sum(1).reshape(x.shape)
        work.send_back(rows)
        return grad_x, grad_weights, None


def _normed_parts(
    heads: HeadInputs, inputs: Rows
) -> tuple[list[Parts], Float[Tensor, "token of_heads 1"]]:
    """(Each linear map's outputs by head, without the constants; 1 / the norm's scale)

    The inputs are centred in place, if the norm does that; rows after theirs are not.
    """
    inverse_scale = _centre(heads, inputs[:, : heads.n_rows])
    parts, all_weights = [], _gained_weights(heads, inputs.dtype)
    for rows, weight in zip(heads.rows(), all_weights, strict=True):
        # Heads are the batch of the product: [token 2 d_model] -> [2 token d_model], times
        # [2 d_model d_head] -> [2 token d_head] -> [token 2 d_head]. The scale divides what
        # comes out, which is d_model / d_head times smaller than what goes in.
        part = t.bmm(inputs[:, rows].transpose(0, 1), weight.mT).transpose(0, 1)
        parts.append((part * inverse_scale[:, rows]).to(part.dtype))
    return parts, inverse_scale


def _with_constants(
    heads: HeadInputs, shape: t.Size, parts: Sequence[Parts]
) -> list[Outputs]:
    """The linear maps' outputs from `_normed_parts`."""
    return [
        _add(_constant(heads, linear), part.flatten(1)).unflatten(0, shape[:2])
        for (linear, _), part in zip(heads.linears, parts, strict=True)
    ]


def _centre(heads: HeadInputs, inputs: Rows) -> PerRow:
    """Take the mean from the inputs, in place, if their norm does; 1 / its scale."""
    norm = heads.closed_form
    if heads.norm is None or norm is None:
        return inputs.new_ones((*inputs.shape[:2], 1))
    if norm.centred:
        exact = t.promote_types(inputs.dtype, t.float32)
        inputs -= inputs.mean(-1, keepdim=True, dtype=exact)
    return 1 / norm.scale(inputs)


def _gained_weights(heads: HeadInputs, dtype: t.dtype) -> list[HeadWeights]:
    """The linear maps' weights, with the norm's gain in them."""
    weights = [_by_head(linear, n, dtype) for linear, n in heads.linears]
    gain = 1.0 if heads.closed_form is None else heads.closed_form.gain()
    return [w * gain for w in weights] if isinstance(gain, Tensor) else weights


def _constant(heads: HeadInputs, linear: Any) -> Float[Tensor, "width"] | None:
    """What a linear map gives where the normed input is zero before the norm's bias."""
    norm_bias = None if heads.closed_form is None else heads.closed_form.bias()
    if norm_bias is None:
        return linear.bias  # type: ignore[no-any-return]
    return linear_forward(linear, norm_bias)


def _head_products(
    heads: HeadInputs, parts: Sequence[Parts], grads: Sequence[Parts]
) -> PerRow:
    """The scalar products of outputs and gradients, summed over all that read a row."""
    products = [
        (part * grad).sum(-1, keepdim=True)
        for part, grad in zip(parts, grads, strict=True)
    ]
    # A query, key and value that read one row have one product, their sum: [token 2 1] for
    # 2 heads. With rows of their own they have three: [token 6 1].
    if heads.n_mlp_linears == 0 and not heads.share_rows:
        return t.cat(products, 1)
    total = products[0].new_zeros((len(products[0]), heads.n_rows, 1))
    for rows, product in zip(heads.rows(), products, strict=True):
        total[:, rows] += product
    return total


class _ProbeHeads(Function):
    """The heads' outputs, with the gradients of x and of weights that are zero.

    Edge attribution patching then costs 1.00 times the model's passes instead of 1.30.

    With J = (1 - C) / scale, where C projects on the normed input (and on the constant
    vector, if the norm subtracts the mean), the gradient of head h's input is
    `J gain weight[h]^T grad[h]`. Its product with a difference d is that of
    `gain weight[h]^T grad[h] / scale` with d, minus that of their parts in C.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Residual, weights: Weights, work: MatrixWork, *outs: Outputs
    ) -> tuple[OutputsOrCarrier, ...]:
        ctx.work = work
        ctx.save_for_backward(x)
        ctx.set_materialize_grads(False)
        work.forward_pass.awaits_backward = True
        return (*(out.view_as(out) for out in outs), *work.new_carriers())

    @staticmethod
    def backward(
        ctx: Any, *grads: OutputsOrCarrier | None
    ) -> tuple[Residual | Weights | None, ...]:
        work, matrix, heads = ctx.work, ctx.work.matrix, _heads(ctx.work)
        (x,) = ctx.saved_tensors
        work.forward_pass.enter_backward()
        n_outs = len(heads.linears)
        basis, inverse_scale = _projected_out(heads, x)
        # The rows of the matrix, and after them the vectors of C.
        rows = work.forward_pass.row_memory(matrix.n_rows + basis.shape[1])
        of_heads = rows[:, : matrix.n_head_rows]
        parts = _head_grads(heads, x, grads[:n_outs], inverse_scale)
        _send_to_inputs(heads, of_heads, _gained_weights(heads, x.dtype), parts)
        work.collect(rows, grads[n_outs:], first=1)
        rows[:, matrix.n_rows :] = basis
        # One product gives those of the rows and of the vectors with the differences. With
        # vectors c, the row r has lost sum_c <r, c> c: its product with a difference d has
        # lost sum_c <r, c> <c, d>, without the row being written again.
        in_basis = t.bmm(of_heads, basis.mT)
        grad_weights = grad_x = None
        if ctx.needs_input_grad[1]:
            products = work.products(rows)
            products[:, : matrix.n_head_rows] -= t.bmm(
                in_basis, products[:, matrix.n_rows :]
            )
            grad_weights = work.weights_grad(products[:, : matrix.n_rows])
        if ctx.needs_input_grad[0]:
            total = of_heads.sum(1, keepdim=True)
            grad_x = total - t.bmm(in_basis.sum(1, keepdim=True), basis)
            grad_x = grad_x.reshape(x.shape)
        return (grad_x, grad_weights, None, *(None for _ in range(n_outs)))


def _head_grads(
    heads: HeadInputs,
    x: Residual,
    grads: Sequence[Outputs | None],
    factor: PerRow,
) -> list[Parts]:
    """The gradients of the linear maps' outputs, by head, times a factor of its input."""
    parts = []
    for grad, (linear, n_heads), rows in zip(
        grads, heads.linears, heads.rows(), strict=True
    ):
        if grad is None:
            width = linear.out_features
            grad = x.new_zeros((*x.shape[:2], int(width)))  # type: ignore[arg-type]
        # [batch seq 6] of 2 heads that are 3 wide -> [token 6] -> [token 2 3].
        by_head = grad.flatten(0, 1).unflatten(1, (n_heads, -1))
        parts.append((by_head * factor[:, rows]).to(x.dtype))
    return parts


def _projected_out(
    heads: HeadInputs, x: Residual
) -> tuple[Float[Tensor, "token vector d_model"], PerRow]:
    """(the vectors v with J = (1 - sum v v^T) / scale, 1 / the scale)"""
    tokens = x.flatten(0, 1)
    norm = heads.closed_form
    if heads.norm is None or norm is None:
        no_vectors = tokens.new_empty((len(tokens), 0, tokens.shape[1]))
        return no_vectors, tokens.new_ones((len(tokens), heads.n_rows, 1))
    exact = tokens.to(t.promote_types(x.dtype, t.float32))
    centred = norm.centre(exact)
    scale = norm.scale(centred)
    root = exact.shape[1] ** 0.5
    vectors = [centred / (scale * root)]
    if norm.centred:
        vectors.append(t.ones_like(exact) / root)
    # All rows read the same x: [token 1] -> [token row 1], with stride 0.
    inverse_scale = (1 / scale).unsqueeze(1).expand(-1, heads.n_rows, -1)
    return t.stack(vectors, 1).to(x.dtype), inverse_scale

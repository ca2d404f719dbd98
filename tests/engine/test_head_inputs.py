"""Heads with inputs of their own, without a norm: numbers that are written out.

Two query heads and one key head of width 1 read a residual stream x = [1 2]. Their weights are
[1 0], [0 1] and [1 1]; one source is before them, whose difference is [10 20].
"""

from __future__ import annotations

import pytest
import torch as t
from torch import Tensor
from torch.nn import Identity, Linear

from auto_circuit.engine.edge_matrices import DestPort
from auto_circuit.engine.head_inputs import head_outputs
from auto_circuit.engine.matrix_work import MatrixWork
from auto_circuit.engine.patch_wrapper import PatchWrapperImpl
from auto_circuit.model_utils.model_adapter import HeadInputs
from tests.engine.planning import matrix_of, pass_of, work_of

X = t.tensor([[[1.0, 2.0]]])


def linear(*rows: list[float]) -> Linear:
    made = Linear(2, len(rows), bias=False).requires_grad_(False)
    made.weight.copy_(t.tensor(list(rows)))
    return made


def heads_work(*mask: float) -> MatrixWork:
    """The work of three rows: two queries and a key."""
    heads = HeadInputs(
        None, None, ((linear([1.0, 0.0], [0.0, 1.0]), 2), (linear([1.0, 1.0]), 1))
    )
    wrapper = PatchWrapperImpl("heads", is_dest=True, in_srcs=slice(0, 1))
    port = DestPort((wrapper,), Identity(), n_rows=3, heads=heads)
    # A second slot: x goes there while the heads' inputs are computed.
    forward_pass = pass_of([[[10.0, 20.0], [0.0, 0.0]]])
    return work_of(matrix_of(port), forward_pass, [[value] for value in mask])


def lists(outs: list[Tensor] | None) -> list[list[float]]:
    assert outs is not None
    return [out.flatten().tolist() for out in outs]


def test_rows_of_linear_maps() -> None:
    maps = ((linear([1.0, 0.0]), 4), (linear([1.0, 0.0]), 2), (linear([1.0, 0.0]), 2))
    apart = HeadInputs(None, None, maps)
    assert (apart.n_rows, apart.rows()) == (8, [slice(0, 4), slice(4, 6), slice(6, 8)])
    shared = HeadInputs(None, None, maps[1:], share_rows=True)
    assert (shared.n_rows, shared.rows()) == (2, [slice(0, 2)] * 2)
    # Queries, keys and values, and the two maps of an MLP that reads the same norm.
    mlp = ((linear([1.0, 0.0]), 1),) * 2
    with_mlp = HeadInputs(None, None, (*maps, *mlp), n_mlp_linears=2)
    assert (with_mlp.n_rows, with_mlp.rows()[3:]) == (9, [slice(8, 9)] * 2)
    shared = HeadInputs(None, None, (*maps[1:], *mlp), True, n_mlp_linears=2)
    assert shared.rows() == [slice(0, 2)] * 2 + [slice(2, 3)] * 2


def test_only_heads_with_an_input_of_their_own_differ() -> None:
    """The second query reads [11 22]; the others read [1 2]."""
    work = heads_work(0.0, 1.0, 0.0)
    assert lists(head_outputs(work, X, X, None)) == [[1.0, 22.0], [3.0]]


def test_a_row_that_is_left_out_is_not_computed() -> None:
    work = heads_work(0.0, 1.0, 0.5)
    work.weights, work.row_idxs = work.weights[:, :, 1:], [1, 2]
    assert lists(head_outputs(work, X, X, None)) == [[1.0, 22.0], [18.0]]


def test_without_a_change_the_model_computes_its_heads_itself() -> None:
    assert head_outputs(heads_work(0.0, 0.0, 0.0), X, X, None) is None


@pytest.mark.parametrize("mask", [(0.0, 0.0, 0.0), (0.5, 1.0, 0.0)])
def test_gradients_of_masks_and_of_the_residual_stream(mask: tuple[float, ...]) -> None:
    """d (sum of outputs) / d mask[h] = weight[h] . difference, whatever the mask is."""
    work, x = heads_work(*mask), X.clone().requires_grad_()
    work.weights.requires_grad_()
    outs = head_outputs(work, x, x, None)
    queries = [1.0 + 10.0 * mask[0], 2.0 + 20.0 * mask[1]]
    assert lists(outs) == [queries, [3.0]]
    assert outs is not None
    t.cat(outs, -1).sum().backward()
    assert work.weights.grad is not None and x.grad is not None
    assert work.weights.grad.flatten().tolist() == [10.0, 20.0, 30.0]
    assert x.grad.tolist() == [[[2.0, 2.0]]]

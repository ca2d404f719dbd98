"""One matrix in one pass: products, and their gradients, of numbers that are written out.

Two sources and two destinations, in a residual stream of width 2. The mask is
[[1, 0], [.5, 1]] and the differences are [1 2] and [10 20].
"""

from __future__ import annotations

import pytest
import torch as t
from torch.nn import Identity, Linear

from auto_circuit.engine.edge_matrices import SrcPort
from auto_circuit.engine.forward_pass import ForwardPass, write_source
from auto_circuit.engine.matrix_work import MatrixWork
from auto_circuit.engine.patch_wrapper import PatchWrapperImpl
from auto_circuit.errors import GraphError
from auto_circuit.model_utils.model_adapter import HeadInputs, SrcSite
from tests.engine.planning import matrix_of, pass_of, port, weights_of, work_of

MASK = [[1.0, 0.0], [0.5, 1.0]]
DIFFERENCES = [[[1.0, 2.0], [10.0, 20.0]]]  # one position
FIRST, SECOND = port("first", 0, 2), port("second", 0, 2)
MATRIX = matrix_of(FIRST, SECOND)


@pytest.fixture
def work() -> MatrixWork:
    return work_of(MATRIX, pass_of(DIFFERENCES), MASK)


def test_what_the_edges_change_at_each_row(work: MatrixWork) -> None:
    delta = work.compute()
    assert delta is not None
    assert delta.tolist() == [[[1.0, 2.0], [10.5, 21.0]]]


def test_each_port_adds_its_own_row(work: MatrixWork) -> None:
    x = t.tensor([[[100.0, 200.0]]])
    with t.no_grad():
        assert work.read(FIRST, x).tolist() == [[[101.0, 202.0]]]
        assert work.read(SECOND, x).tolist() == [[[110.5, 221.0]]]
    assert work.delta is None  # forgotten after the last one


def test_rows_that_change() -> None:
    """Of the rows 0..6, 1, 4 and 6 change; a port has the rows 0..3, another 4..6."""
    early, late = port("early", 0, 1, n_rows=4), port("late", 0, 1, n_rows=3)
    forward_pass = pass_of([[[1.0]]])
    work = work_of(matrix_of(early, late), forward_pass, [[1.0]] * 3, row_idxs=[1, 4, 6])
    assert work.changes(early) == (slice(0, 1), [1])
    assert work.changes(late) == (slice(1, 3), [0, 2])


def test_only_changed_heads_get_something_added() -> None:
    heads = port("heads", 0, 1, n_rows=3)
    work = work_of(matrix_of(heads), pass_of([[[5.0]]]), [[2.0]], row_idxs=[1])
    x = t.tensor([[[[1.0], [1.0], [1.0]]]])  # [batch seq head d_model]
    with t.no_grad():
        assert work.read(heads, x).tolist() == [[[[1.0], [11.0], [1.0]]]]


def test_columns_are_slots() -> None:
    """The differences of the sources 0 and 2 are in the slots 0 and 1."""
    forward_pass = pass_of([[[1.0], [100.0], [7.0]]])
    work = work_of(MATRIX, forward_pass, [[1.0, 2.0]] * 2, columns=slice(0, 2))
    delta = work.compute()
    assert delta is not None
    assert delta.tolist() == [[[201.0], [201.0]]]


@pytest.mark.parametrize("holds_patches", [False, True])
def test_inputs_of_heads_are_the_residual_stream_plus_the_same(
    holds_patches: bool,
) -> None:
    """x takes part as a third source; what was in its slot stays if it is needed."""
    forward_pass = pass_of([[*DIFFERENCES[0], [-1.0, -2.0]]])
    forward_pass.holds_patches = holds_patches
    head = port("head", 0, 2, heads=HeadInputs(None, None, ((Linear(2, 1), 1),)))
    work = work_of(matrix_of(head, SECOND), forward_pass, MASK)
    inputs = work.compute_inputs(t.tensor([[[100.0, 200.0]]]))
    # The second row is no head's: it gets what the edges change alone.
    assert inputs.tolist() == [[[101.0, 202.0], [10.5, 21.0]]]
    slot = [-1.0, -2.0] if holds_patches else [100.0, 200.0]
    assert forward_pass.tokens()[0, 2].tolist() == slot


def test_inputs_of_heads_are_made_again() -> None:
    """Times a factor for each row, as the backward pass needs them."""
    forward_pass = pass_of([[*DIFFERENCES[0], [-1.0, -2.0]]])
    head = port("head", 0, 2, heads=HeadInputs(None, None, ((Linear(2, 1), 1),)))
    work = work_of(matrix_of(head, SECOND), forward_pass, MASK)
    to = t.ones(1, 2, 2)
    work.add_inputs(t.tensor([[[100.0, 200.0]]]), t.tensor([[[2.0], [0.0]]]), to)
    assert to.tolist() == [[[203.0, 405.0], [1.0, 1.0]]]
    assert forward_pass.tokens()[0, 2].tolist() == [-1.0, -2.0]


def test_masks_of_positions_meet_their_own_tokens() -> None:
    """Two examples of two positions; the mask is 1 at the first position and 2 after."""
    differences = t.tensor([[[[1.0]], [[10.0]]], [[[100.0]], [[1000.0]]]])
    one = port("one", 0, 1)
    weights = t.tensor([[[[1.0]], [[2.0]]]])
    work = MatrixWork(
        matrix_of(one), ForwardPass(differences), weights, slice(0, 1), [0], False
    )
    delta = work.compute()
    assert delta is not None
    assert delta.flatten().tolist() == [1.0, 20.0, 100.0, 2000.0]
    # Their gradients are summed over the examples.
    products = work.products(t.ones(4, 1, 1))
    assert work.weights_grad(products).flatten().tolist() == [101.0, 1010.0]


def test_gradients_of_masks_are_products_with_the_differences(work: MatrixWork) -> None:
    grads = t.tensor([[[1.0, 1.0], [0.0, 3.0]]])  # of what the two rows read
    found = work.weights_grad(work.products(grads))
    assert found.tolist() == [[[[3.0, 30.0], [6.0, 60.0]]]]


def test_gradients_of_differences_are_added_up(work: MatrixWork) -> None:
    grads = t.tensor([[[1.0, 1.0], [0.0, 3.0]]])
    work.send_back(grads)
    expected = [[[1.0, 2.5], [0.0, 3.0]]]  # the mask, transposed, times grads
    buffer = work.forward_pass.grad_buffer
    assert buffer is not None and buffer.tolist() == expected
    work.send_back(grads)
    assert buffer.tolist() == [[[2.0, 5.0], [0.0, 6.0]]]


def test_a_matrix_of_late_sources_sends_to_their_slots_only() -> None:
    late = port("late", 1, 2)
    forward_pass = pass_of(DIFFERENCES)
    forward_pass.grad_buffer = t.full((1, 2, 2), 77.0)  # of an earlier backward pass
    work_of(matrix_of(late), forward_pass, [[2.0]]).send_back(t.tensor([[[1.0, 3.0]]]))
    assert forward_pass.grad_buffer.tolist() == [[[0.0, 0.0], [2.0, 6.0]]]


def test_a_source_subtracts_what_destinations_send_back(work: MatrixWork) -> None:
    """d loss / d source = what flows through the model - mask^T @ what destinations got."""
    out = t.zeros(1, 1, 2, requires_grad=True)
    wrapper = PatchWrapperImpl("source", is_src=True, src_idxs=slice(0, 1))
    source = SrcPort(wrapper, SrcSite(Identity()))
    written = write_source(work.forward_pass, source, out)
    work.weights.requires_grad_()
    first = work.read(FIRST, written)
    second = work.read(SECOND, written)
    (first.sum() + 3.0 * second[..., 1].sum()).backward()
    # Through the model [1 1] + [0 3]; sent back 1 * [1 1] + .5 * [0 3].
    assert out.grad is not None and out.grad.tolist() == [[[0.0, 1.5]]]
    assert work.weights.grad is not None
    assert work.weights.grad.tolist() == [[[[3.0, 30.0], [6.0, 60.0]]]]


def test_differences_that_are_gone_are_an_error(work: MatrixWork) -> None:
    work.forward_pass.diff = None
    with pytest.raises(GraphError, match="came after another forward pass"):
        work.products(t.zeros(1, 2, 2))


def test_memory_of_rows_is_taken_again() -> None:
    forward_pass = pass_of(DIFFERENCES)
    large = forward_pass.row_memory(5)
    small = forward_pass.row_memory(2)
    assert (large.shape, small.shape) == ((1, 5, 2), (1, 2, 2))
    assert small.data_ptr() == large.data_ptr()


def test_weights_serve_half_precision() -> None:
    work = work_of(MATRIX, pass_of(DIFFERENCES), MASK)
    half = ForwardPass(t.tensor([DIFFERENCES], dtype=t.bfloat16))
    delta = MatrixWork(
        MATRIX, half, weights_of(MASK), work.columns, [0, 1], False
    ).compute()
    assert delta is not None and delta.dtype == t.bfloat16
    assert delta.tolist() == [[[1.0, 2.0], [10.5, 21.0]]]

"""What a pass will do, from masks that are written out: rows, columns, slots and base."""

from __future__ import annotations

import torch as t
from torch import Tensor
from torch.nn import Identity

from auto_circuit.engine.edge_matrices import EdgeMatrix, PatchPlan, SrcPort
from auto_circuit.engine.forward_pass import ForwardPass
from auto_circuit.engine.pass_works import (
    UsedEdges,
    dense_works,
    edges_to_use,
    slots_of,
    sparse_work,
    sparse_works,
    stack_rows,
    used_edges,
    used_srcs,
)
from auto_circuit.engine.patch_wrapper import PatchWrapperImpl
from auto_circuit.model_utils.model_adapter import SrcSite
from tests.engine.planning import matrix_of, port, weights_of

HEADS, MLP = port("heads", 0, 3, n_rows=2), port("MLP", 0, 3)
MATRIX = matrix_of(HEADS, MLP)
END = matrix_of(port("end", 1, 5))
SOURCES = PatchWrapperImpl("sources", is_src=True, src_idxs=slice(0, 5))
PLAN = PatchPlan((), (), (SrcPort(SOURCES, SrcSite(Identity())),))

# ------------------------------------------------------------------- masks to weights


def mask(*rows: list[float]) -> Tensor:
    return weights_of(list(rows))


def test_rows_of_all_ports_are_stacked() -> None:
    masks = {
        HEADS.wrappers[0]: mask([1.0, 2.0, 3.0], [4.0, 5.0, 6.0]),
        MLP.wrappers[0]: mask([7.0, 8.0, 9.0]),
    }
    expected = [[[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]]]]
    assert stack_rows(MATRIX, masks).tolist() == expected


def test_a_matrix_takes_the_columns_of_its_own_sources() -> None:
    late = port("late", 1, 5)
    masks = {late.wrappers[0]: mask([1.0, 2.0, 3.0, 4.0])}  # of the sources 1..4
    assert stack_rows(EdgeMatrix((late,), 3, 5), masks).tolist() == [[[[3.0, 4.0]]]]


def test_heads_that_share_a_mask_have_rows_of_their_own() -> None:
    shared = port("shared", 0, 2, n_rows=4, mask_rows=(0, 0, 1, 1))
    masks = {shared.wrappers[0]: mask([1.0, 2.0], [3.0, 4.0])}
    found = stack_rows(matrix_of(shared), masks)
    assert found.tolist() == [[[[1.0, 2.0], [1.0, 2.0], [3.0, 4.0], [3.0, 4.0]]]]


def test_positions_of_one_port_are_repeated_for_the_other() -> None:
    by_position = t.tensor([[[[1.0, 2.0, 3.0]], [[4.0, 5.0, 6.0]]]])  # [1 2 1 3]
    masks = {HEADS.wrappers[0]: mask([0.0] * 3, [9.0] * 3)}
    masks[MLP.wrappers[0]] = by_position
    found = stack_rows(MATRIX, masks)
    assert found.shape == (1, 2, 3, 3)
    assert found[0, :, 2].tolist() == [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
    assert found[0, :, 1].tolist() == [[9.0] * 3] * 2


def test_weights_are_a_copy_of_the_masks() -> None:
    """The backward pass reads them again, when an optimizer may have changed the masks."""
    one = port("one", 0, 2)
    masks = {one.wrappers[0]: mask([1.0, 2.0])}
    found = stack_rows(matrix_of(one), masks)
    masks[one.wrappers[0]].zero_()
    assert found.tolist() == [[[[1.0, 2.0]]]]


# ------------------------------------------------------------------------- used edges


def test_edges_that_are_patched_and_edges_that_are_not_fully() -> None:
    weights = {
        MATRIX: weights_of([[0.0, 1.0, 0.0], [0.0, 0.5, 1.0], [0.0, 0.0, 0.0]]),
        END: weights_of([[1.0, 1.0, 0.0, 1.0]]),  # the sources 1..4
    }
    patched, unpatched = used_edges(weights)
    assert patched[MATRIX] == UsedEdges([1, 2], [0, 1])
    assert patched[END] == UsedEdges([1, 2, 4], [0])
    assert unpatched[MATRIX] == UsedEdges([0, 1, 2], [0, 1, 2], on_patched_base=True)
    assert unpatched[END] == UsedEdges([3], [0], on_patched_base=True)


def test_an_edge_is_used_if_it_is_at_any_position() -> None:
    end = t.zeros(1, 2, 1, 4)
    end[0, 1, 0, 2] = 1.0
    patched, _ = used_edges({END: end})
    assert patched[END] == UsedEdges([3], [0])


def test_the_base_with_fewer_sources_is_chosen() -> None:
    few, most = weights_of([[0.0, 1.0, 0.0, 0.0]]), weights_of([[1.0, 1.0, 0.0, 1.0]])
    for weights, is_free, expected in (
        (few, True, UsedEdges([2], [0])),
        (most, True, UsedEdges([3], [0], on_patched_base=True)),
        (most, False, UsedEdges([1, 2, 4], [0])),
        (weights_of([[1.0, 1.0, 0.0, 0.0]]), True, UsedEdges([1, 2], [0])),  # as many
    ):
        assert edges_to_use({END: weights}, [[END]], is_free) == {END: expected}


def test_an_additive_port_has_no_patched_base() -> None:
    additive = matrix_of(port("additive", 0, 2, additive=True))
    found = edges_to_use({additive: weights_of([[1.0, 1.0]])}, [[additive]], True)
    assert found == {additive: UsedEdges([0, 1], [0])}


def test_sources_that_are_used_anywhere_have_slots_in_their_order() -> None:
    edges = {MATRIX: UsedEdges([2, 0], [0]), END: UsedEdges([4, 2], [0])}
    assert used_srcs(edges) == [0, 2, 4]
    assert slots_of(used_srcs(edges)) == {0: 0, 2: 1, 4: 2}


# ------------------------------------------------------------------------------ works


def test_a_sparse_work_has_the_rows_and_the_recorded_columns() -> None:
    """The sources 0, 2 and 4 are recorded; this matrix has 0..2 and uses 2, in row 1."""
    weights = weights_of([[0.0, 0.0, 0.0], [0.0, 0.0, 0.7], [0.0, 0.0, 0.0]])
    slots = {0: 0, 2: 1, 4: 2}
    work = sparse_work(MATRIX, weights, UsedEdges([2], [1]), slots, ForwardPass())
    t.testing.assert_close(work.weights, weights_of([[0.0, 0.7]]))
    assert (work.columns, work.row_idxs) == (slice(0, 2), [1])
    assert (work.does_nothing, work.inputs_slot) == (False, 2)


def test_on_the_patched_base_what_is_kept_has_the_weight_minus_one() -> None:
    weights = weights_of([[1.0, 1.0, 0.0, 1.0]])
    used = UsedEdges([3], [0], on_patched_base=True)
    work = sparse_work(END, weights, used, {3: 0}, ForwardPass())
    assert work.weights.tolist() == [[[[-1.0]]]]
    assert (work.columns, work.inputs_slot) == (slice(0, 1), 1)


def test_a_matrix_without_used_edges_does_nothing() -> None:
    work = sparse_work(MATRIX, t.zeros(1, 1, 3, 3), UsedEdges([], []), {}, ForwardPass())
    assert work.does_nothing
    assert work.changes(HEADS) == (slice(0, 0), [])


def test_sparse_works_of_all_matrices() -> None:
    weights = {MATRIX: t.zeros(1, 1, 3, 3), END: weights_of([[1.0, 1.0, 0.0, 1.0]])}
    edges = edges_to_use(weights, [[MATRIX], [END]], True)
    works = sparse_works(weights, edges, slots_of(used_srcs(edges)), ForwardPass())
    assert (works.slots, works.recorded) == ({3: 0}, {3})
    assert works.patched_base == set(END.ports)
    assert [work.matrix for work in works.of_port[MLP]] == [MATRIX]
    assert works.of_port[HEADS][0].does_nothing


def test_dense_works_use_all_that_there_is() -> None:
    weights = {MATRIX: t.zeros(1, 1, 3, 3), END: weights_of([[0.0, 0.1, 0.0, 0.0]])}
    works = dense_works(weights, PLAN, ForwardPass())
    assert (works.slots, works.recorded) == ({i: i for i in range(5)}, set(range(5)))
    assert works.patched_base == frozenset()
    (of_mlp,), (of_end,) = works.of_port[MLP], works.of_port[END.ports[0]]
    assert (of_mlp.columns, of_mlp.row_idxs) == (slice(0, 3), [0, 1, 2])
    assert (of_end.columns, of_end.row_idxs) == (slice(1, 5), [0])
    assert (of_mlp.does_nothing, of_end.does_nothing) == (True, False)

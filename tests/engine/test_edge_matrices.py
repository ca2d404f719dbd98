"""How edges are cut into matrices, and what the sources of a module write: by hand."""

from __future__ import annotations

import torch as t
from torch.nn import Identity

from auto_circuit.engine.edge_matrices import (
    DestPort,
    EdgeMatrix,
    SrcPort,
    edge_matrix_groups,
)
from auto_circuit.engine.patch_wrapper import PatchWrapperImpl
from auto_circuit.model_utils.model_adapter import SrcSite
from tests.engine.planning import matrix_of, port

# Two heads in a block, and an MLP: the embeddings are source 0, the heads 1 and 2, the MLP 3.
QUERIES, KEYS, VALUES = (port(name, 0, 1, n_rows=2) for name in "QKV")
MLP, END = port("MLP", 0, 3), port("End", 0, 4)


def cut(*ports: DestPort) -> list[list[tuple[str, int, int]]]:
    """The groups of matrices, each as (its ports, its first source, the one after)."""
    return [
        [("".join(p.name[0] for p in m.ports), m.lo, m.hi) for m in group]
        for group in edge_matrix_groups(ports)
    ]


def test_ports_that_read_the_same_sources_are_one_matrix() -> None:
    assert cut(QUERIES, KEYS, VALUES) == [[("QKV", 0, 1)]]
    assert cut(MLP, END) == [[("ME", 0, 3), ("E", 3, 4)]]


def test_an_mlp_shares_a_matrix_with_the_heads_before_it() -> None:
    found = cut(QUERIES, KEYS, VALUES, MLP, END)
    assert found == [[("QKVM", 0, 1), ("M", 1, 3)], [("E", 0, 4)]]


def test_what_does_not_share_a_matrix() -> None:
    additive = port("additive", 0, 3, additive=True)
    assert cut(QUERIES, additive) == [[("Q", 0, 1)], [("a", 0, 3)]]
    more_rows = port("more", 0, 3, n_rows=2)
    assert cut(QUERIES, more_rows) == [[("Q", 0, 1)], [("m", 0, 3)]]
    # Not factorized: a layer reads only the one before it.
    late = port("late", 1, 3)
    assert cut(QUERIES, late) == [[("Q", 0, 1)], [("l", 1, 3)]]


def test_rows_of_ports_follow_each_other() -> None:
    matrix = matrix_of(QUERIES, KEYS, MLP)
    assert matrix.n_rows == 5
    assert [matrix.rows(p) for p in matrix.ports] == [
        slice(0, 2),
        slice(2, 4),
        slice(4, 5),
    ]
    assert EdgeMatrix((MLP,), 1, 3).rows(MLP) == slice(0, 1)


def test_the_matrices_of_all_groups_are_in_order() -> None:
    groups = edge_matrix_groups([QUERIES, MLP, END])
    assert [m.hi - m.lo for group in groups for m in group] == [1, 2, 4]


def src_port(lo: int, hi: int, head_dim: int | None, site: SrcSite) -> SrcPort:
    wrapper = PatchWrapperImpl("w", head_dim, is_src=True, src_idxs=slice(lo, hi))
    return SrcPort(wrapper, site)


def test_a_module_without_heads_is_one_source() -> None:
    out = t.tensor([[[1.0, 2.0]]])  # [batch seq d_model]
    port = src_port(3, 4, None, SrcSite(Identity()))
    assert port.outputs(out).tolist() == [[[[1.0, 2.0]]]]


def test_heads_write_their_values_through_their_weights() -> None:
    """Two heads of width 1: values 5 and 7, weights [1 2] and [10 20]."""
    weights = t.tensor([[[1.0, 2.0]], [[10.0, 20.0]]])
    port = src_port(1, 3, 2, SrcSite(Identity(), lambda n_heads: weights[:n_heads]))
    out = t.tensor([[[5.0, 7.0]]])
    assert port.outputs(out).tolist() == [[[[5.0, 10.0], [70.0, 140.0]]]]

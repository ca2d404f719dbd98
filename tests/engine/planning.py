"""Tiny ports, matrices and passes, to follow by hand."""

from __future__ import annotations

from typing import Any

import torch as t
from torch import Tensor
from torch.nn import Identity

from auto_circuit.engine.edge_matrices import DestPort, EdgeMatrix
from auto_circuit.engine.forward_pass import ForwardPass
from auto_circuit.engine.matrix_work import Columns, MatrixWork
from auto_circuit.engine.patch_wrapper import PatchWrapperImpl


def port(name: str, lo: int, hi: int, n_rows: int = 1, **kwargs: Any) -> DestPort:
    """A port with one wrapper, that reads the sources lo..hi-1."""
    wrapper = PatchWrapperImpl(name, is_dest=True, in_srcs=slice(lo, hi))
    return DestPort((wrapper,), Identity(), n_rows, **kwargs)


def matrix_of(*ports: DestPort) -> EdgeMatrix:
    return EdgeMatrix(ports, ports[0].srcs.start, ports[0].srcs.stop)


def weights_of(rows: list[list[float]]) -> Tensor:
    """One matrix for all examples and positions: [1 1 row column]."""
    return t.tensor([[rows]])


def pass_of(differences: list[list[list[float]]]) -> ForwardPass:
    """One example, whose differences are given for each position and slot."""
    return ForwardPass(t.tensor([differences]))


def work_of(
    matrix: EdgeMatrix,
    forward_pass: ForwardPass,
    rows: list[list[float]],
    columns: Columns | None = None,
    row_idxs: list[int] | None = None,
) -> MatrixWork:
    """A work of the given weights; of the whole matrix, if nothing else is said."""
    return MatrixWork(
        matrix,
        forward_pass,
        weights_of(rows),
        slice(matrix.lo, matrix.hi) if columns is None else columns,
        list(range(matrix.n_rows)) if row_idxs is None else row_idxs,
        does_nothing=not any(any(row) for row in rows),
        inputs_slot=matrix.hi,
    )

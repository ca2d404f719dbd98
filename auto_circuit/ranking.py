"""Which edges score best: scores as tensors, their order, ties, circuits of a size."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch as t
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from auto_circuit.checks import checked, shown
from auto_circuit.errors import GraphError
from auto_circuit.types import PerEdge, PruneScores


@checked
def score_tensors(prune_scores: Mapping[str, Any]) -> PruneScores:
    """Scores as dense tensors of real numbers or booleans, whose values are those given.

    numpy arrays and nested lists of numbers become tensors; whole numbers become float32,
    or float64 where that would change them. Raises GraphError, which names the module, for
    what cannot be turned into scores without a change, and if there are none.
    """
    if not prune_scores:
        raise GraphError("The prune scores are empty: they name no module.")
    return {name: _score_tensor(name, scores) for name, scores in prune_scores.items()}


def _score_tensor(name: str, scores: Any) -> Tensor:
    if not isinstance(name, str):
        raise GraphError(f"The scores name {shown(name)}; expected a module's name.")
    if not isinstance(scores, Tensor):
        scores = _array_tensor(name, scores)
    problem = None
    if scores.is_meta:
        problem = "have no values (they are on the device 'meta')"
    elif scores.is_complex():
        problem = f"are complex numbers ({scores.dtype})"
    elif scores.is_quantized:
        problem = f"are quantized ({scores.dtype})"
    if problem:
        raise GraphError(f"The scores of {name!r} {problem}; expected real numbers.")
    scores = scores.detach()
    if scores.layout != t.strided:
        scores = scores.to_dense()
    if scores.is_floating_point():
        # torch compares no numbers of 8 bits.
        return scores if scores.itemsize > 1 else scores.float()
    return scores if scores.dtype == t.bool else _as_floats(name, scores)


def _array_tensor(name: str, scores: Any) -> Tensor:
    try:
        array = np.array(scores) if isinstance(scores, (list, tuple)) else scores
    except (ValueError, TypeError, OverflowError, RuntimeError, RecursionError):
        array = None  # ragged, too large, nested without end
    is_array = isinstance(array, np.ndarray)
    if not is_array or array.dtype.kind not in "fiub" or array.dtype.itemsize > 8:
        kind = f"a {array.dtype} array" if is_array else shown(scores)
        raise GraphError(
            f"The scores of {name!r} are {kind}; expected a Tensor of real numbers, "
            "[position?, head?, source]."
        )
    if array.dtype.kind == "u" and array.size and array.max() > t.iinfo(t.int64).max:
        raise GraphError(f"The scores of {name!r} are too large to be told apart.")
    array = array.astype(np.int64) if array.dtype.kind == "u" else array
    # torch reads neither other byte orders nor arrays that run backwards.
    return t.from_numpy(array.astype(array.dtype.newbyteorder("="), order="C"))


def _as_floats(name: str, scores: Tensor) -> Tensor:
    """Whole numbers as floats, each of which is the same number."""
    wide = scores.long()
    limit = 0
    for dtype in (t.float32, t.float64):
        limit = round(2 / t.finfo(dtype).eps)
        if bool(((wide >= -limit) & (wide <= limit)).all()):
            return wide.to(dtype)
    raise GraphError(
        f"The scores of {name!r} are whole numbers above {limit}, which floating point "
        "does not tell apart. Divide them by a number."
    )


def score_in_dtype(what: str, value: int | float, dtype: t.dtype) -> float:
    """A score as a float. Raises GraphError if `dtype` would make it infinite or 0.

    what: what the error calls it. Infinite scores are scores; NaN is not.
    """
    try:
        score = float(value)
    except OverflowError:
        score = math.nan
    limits = t.finfo(dtype)
    too_large = abs(score) > limits.max and not math.isinf(score)
    too_small = 0 < abs(score) <= limits.tiny * limits.eps / 2
    if math.isnan(score) or too_large or too_small:
        raise GraphError(
            f"{what} is {shown(value)}; as a score ({dtype}) it must be a number whose size "
            f"is 0, from {limits.tiny:.1e} to {limits.max:.1e}, or infinite."
        )
    return score


@checked
def flat_prune_scores(prune_scores: Mapping[str, PerEdge]) -> Shaped[Tensor, "edges"]:
    """All scores in one dimension, module after module.

    Raises GraphError if there are none, and for what is no score (`score_tensors`).
    """
    tensors = list(score_tensors(prune_scores).values())
    device = tensors[0].device
    return t.cat([scores.flatten().to(device) for scores in tensors])


@checked
def desc_prune_scores(prune_scores: Mapping[str, PerEdge]) -> Float[Tensor, "edges"]:
    """All |scores|, the largest first.

    Raises GraphError if a score is NaN, which has no rank.
    """
    prune_scores = score_tensors(prune_scores)
    for module_name, scores in prune_scores.items():
        n_nan = int(scores.isnan().sum())
        if n_nan:
            raise GraphError(
                f"{n_nan} of the {scores.numel()} scores of {module_name!r} are NaN, "
                "so edges cannot be ranked. Look for an infinite loss or a division by "
                "0 in the algorithm that made them."
            )
    return _magnitudes(flat_prune_scores(prune_scores)).sort(descending=True).values


@checked
def prune_scores_threshold(
    prune_scores: Mapping[str, PerEdge] | Float[Tensor, "edges"], edge_count: int
) -> Float[Tensor, ""]:
    """The |score| of the edge of rank `edge_count`; +inf for 0 edges.

    prune_scores: scores, or all |scores| in descending order. For which edges are in a
    circuit use `circuit_mask`: infinite scores are not below a threshold of +inf.

    Raises GraphError for more edges than there are, fewer than 0, and NaN scores.
    """
    if isinstance(prune_scores, Tensor):
        desc_scores = prune_scores
    else:
        desc_scores = desc_prune_scores(prune_scores)
    n_edges = desc_scores.numel()
    if not 0 <= edge_count <= n_edges:
        raise GraphError(
            f"A circuit of {edge_count} edges was asked for; the graph has {n_edges}, "
            f"so give a number from 0 to {n_edges}."
        )
    if edge_count == 0:
        return desc_scores.new_tensor(t.inf)
    return desc_scores[edge_count - 1]


@checked
def circuit_mask(
    prune_scores: PruneScores,
    edge_count: int,
    desc_scores: Float[Tensor, "edges"] | None = None,
) -> tuple[dict[str, Bool[Tensor, "*mask"]], int]:
    """Which edges are in the circuit of a size, and how many these really are.

    The circuit has the `edge_count` edges with the largest |score| and all that tie
    with the last of them, so the real number may be larger. The circuit of 0 edges is
    empty, whatever the scores are.

    desc_scores: `desc_prune_scores(prune_scores)`, to sort them once for many sizes.
    Returns ({module: tensor like its scores, True in the circuit}, number of edges).
    Raises GraphError for more edges than there are, fewer than 0, and NaN scores.
    """
    prune_scores = score_tensors(prune_scores)
    if desc_scores is None:
        desc_scores = desc_prune_scores(prune_scores)
    threshold = prune_scores_threshold(desc_scores, edge_count)
    mask = {
        module_name: (
            _magnitudes(scores).to(threshold.dtype) >= threshold.to(scores.device)
            if edge_count > 0
            else t.zeros_like(scores, dtype=t.bool)
        )
        for module_name, scores in prune_scores.items()
    }
    return mask, int(sum(in_circuit.sum() for in_circuit in mask.values()))


def _magnitudes(scores: Shaped[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """|scores| as floating point (circuits may be given as booleans)."""
    return scores.abs() if scores.is_floating_point() else scores.float().abs()

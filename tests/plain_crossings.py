"""Edges through attention, patched in plain Hugging Face models by hooks: no code of ours.

What a head reads at a position is `sum_i p_i v_i`. Its values are what the model's own linear
map gives; its scores are what the model hands to its softmax, whatever positions, masks, norms
and caps are in them; a key's other score is what the softmax gets when the linear map of keys
gives what it gave in the other run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal
from unittest import mock

import torch as t
from torch import Tensor

from tests.plain_patching import PlainModel, hooks


@dataclass(frozen=True)
class CrossingEdge:
    """What a head reads at position `to` of the position `come_from`."""

    kind: Literal["key", "value"]
    block: int
    head: int
    to: int
    come_from: int


@dataclass(frozen=True)
class Read:
    """What one block's heads read: scores [1 head to from], values [1 head from d_head].

    Of scores there may be one more than of positions (a sink), of which nothing is read;
    all are then how far they are from it.
    """

    scores: Tensor
    values: Tensor
    linear_keys: Tensor


def patch_each_crossing(
    plain: PlainModel, clean: Tensor, corrupt: Tensor, edges: Sequence[CrossingEdge]
) -> Tensor:
    """[edge seq vocab]: the logits on `clean` [1 seq] with one edge's `corrupt` each."""
    with t.no_grad():
        on_clean, on_corrupt = reads(plain, clean), reads(plain, corrupt)
        other_scores = [
            scores_with_keys(plain, clean, block, read.linear_keys)
            for block, read in enumerate(on_corrupt)
        ]
        with hooks() as add:
            for block, read in enumerate(on_clean):
                of_edges = [
                    (
                        change(edge, read, on_corrupt[block].values, other_scores[block])
                        if edge.block == block
                        else t.zeros_like(read.values)
                    )
                    for edge in edges
                ]
                add(
                    plain.part(block, plain.plan.output),
                    before=added(t.cat(of_edges).transpose(1, 2).flatten(2)),
                )
            return plain.logits(clean.expand(len(edges), -1))


def added(change: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: x + change.reshape(x.shape)


def change(
    edge: CrossingEdge, read: Read, other_values: Tensor, other_scores: Tensor
) -> Tensor:
    """How an edge changes what heads read: [1 head seq d_head]."""
    found = t.zeros_like(read.values)
    head, to, come_from = edge.head, edge.to, edge.come_from
    n_tokens = read.values.shape[2]
    before = read.scores[0, head, to].softmax(-1)
    if edge.kind == "value":
        moved = other_values[0, head, come_from] - read.values[0, head, come_from]
        found[0, head, to] = before[come_from] * moved
    else:
        scores = read.scores[0, head, to].clone()
        scores[come_from] = other_scores[0, head, to, come_from]
        found[0, head, to] = (scores.softmax(-1) - before)[:n_tokens] @ read.values[
            0, head
        ]
    return found


def reads(plain: PlainModel, tokens: Tensor) -> list[Read]:
    """What the heads of each block read."""
    linears: dict[tuple[int, int], Tensor] = {}
    with softmax_inputs() as scores, hooks() as add:
        for block in range(plain.n_blocks):
            for part in (1, 2):
                add(plain.qkv(block, part), after=keep(linears, (block, part)))
        plain.logits(tokens)
    assert len(scores) == plain.n_blocks
    return [
        Read(scores[block], values(plain, block, linears[block, 2]), linears[block, 1])
        for block in range(plain.n_blocks)
    ]


def keep(found: dict[Any, Tensor], place: Any) -> Callable[[Tensor], None]:
    # A copy: some models clamp or rotate in place.
    return lambda x: found.update({place: x.clone()})


def values(plain: PlainModel, block: int, linear: Tensor) -> Tensor:
    """[1 head seq d_head]: each head's, those of a group are the same."""
    group = plain.sizes.heads // plain.sizes.kv_heads
    linear = linear.reshape(1, -1, linear.shape[-1])
    of_heads = [linear[..., rows] for rows in plain.stripes(block, 2)]
    return t.stack(of_heads, 1).repeat_interleave(group, 1)


def scores_with_keys(
    plain: PlainModel, tokens: Tensor, block: int, linear_keys: Tensor
) -> Tensor:
    """The scores of a block whose keys are those of another run."""
    stripes = plain.stripes(block, 1)

    def replace(out: Tensor) -> Tensor:
        out, other = out.clone(), linear_keys.reshape(out.shape)
        for rows in stripes:
            out[..., rows] = other[..., rows]
        return out

    with softmax_inputs() as scores, hooks() as add:
        add(plain.qkv(block, 1), after=replace)
        plain.logits(tokens)
    return scores[block]


@contextmanager
def softmax_inputs() -> Iterator[list[Tensor]]:
    """Inside, keeps what the softmax of each attention is given: [1 head to from]."""
    found: list[Tensor] = []
    plain_softmax = t.nn.functional.softmax

    def softmax(scores: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if scores.ndim >= 3:  # else the weights of experts
            from_sink = scores[..., -1:] if scores.shape[-1] > scores.shape[-2] else 0
            found.append((scores - from_sink).reshape(1, *scores.shape[-3:]))
        return plain_softmax(scores, *args, **kwargs)

    with mock.patch.object(t.nn.functional, "softmax", softmax):
        yield found

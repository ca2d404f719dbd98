"""A small model and its batches, for metrics that need no more.

`auto_circuit` is not imported at the top: see the conftest of all tests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch as t
from torch import Tensor

if TYPE_CHECKING:
    from auto_circuit.data import PromptPairBatch

VOCAB = 6


class LookupModel:
    """Looks up the logits that follow each token; counts how often it is run."""

    def __init__(self, out_slice: Any = (slice(None), -1)) -> None:
        self.out_slice = out_slice
        self.logits = t.randn(VOCAB, VOCAB, generator=t.Generator().manual_seed(0))
        self.n_runs = 0

    def __call__(self, tokens: Tensor, **kwargs: Any) -> Tensor:
        self.n_runs += 1
        return self.logits.to(tokens.device)[tokens]


def split_batches(sizes: list[int], n_prompts: int = 6) -> list[PromptPairBatch]:
    """The same prompts, in batches of the given sizes."""
    from auto_circuit.data import PromptPairBatch

    clean = t.tensor([[0, i % VOCAB] for i in range(n_prompts)])
    corrupt = t.tensor([[0, (i + 2) % VOCAB] for i in range(n_prompts)])
    answers = t.tensor([[(i + 1) % VOCAB] for i in range(n_prompts)])
    wrong_answers = [
        t.tensor([i % VOCAB] if i % 2 else [i % VOCAB, (i + 3) % VOCAB])
        for i in range(n_prompts)
    ]
    batches, start = [], 0
    for key, size in enumerate(sizes):
        rows = slice(start, start + size)
        batches.append(
            PromptPairBatch(
                key=key,
                batch_diverge_idx=1,
                clean=clean[rows],
                corrupt=corrupt[rows],
                answers=answers[rows],
                wrong_answers=wrong_answers[rows],
            )
        )
        start += size
    assert start == n_prompts
    return batches


def outs_of_model(
    model: LookupModel, batches: list[PromptPairBatch], side: str = "clean"
) -> dict[int, Tensor]:
    """The model's outputs as those of a circuit."""
    return {batch.key: model(getattr(batch, side))[model.out_slice] for batch in batches}


@pytest.fixture
def model() -> LookupModel:
    """A LookupModel whose last position counts."""
    return LookupModel()


@pytest.fixture
def batches() -> list[PromptPairBatch]:
    """Six prompts in two batches of different size."""
    return split_batches([4, 2])


@pytest.fixture
def make_batches() -> Callable[[list[int]], list[PromptPairBatch]]:
    """`split_batches`."""
    return split_batches


@pytest.fixture
def outs_of() -> Callable[..., dict[int, Tensor]]:
    """`outs_of_model`."""
    return outs_of_model

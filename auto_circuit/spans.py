"""Spans: parts of prompts that mean the same in all of them, whatever their lengths.

Where a graph tells positions apart, each token has edges of its own, and all prompts must have
the same length. With spans each span has them, and prompts differ in how many tokens a span has.
What spans are: see `token_spans`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from jaxtyping import Shaped
from torch import Tensor

from auto_circuit.checks import checked
from auto_circuit.data import PromptDataLoader
from auto_circuit.errors import DataError
from auto_circuit.token_spans import (
    Spans,
    Tokens,
    TokenSpans,
    check_spans,
    known_spans,
    spans_of_labels,
)

__all__ = ["Spans", "TokenSpans", "check_spans", "spans_of_labels", "spans_of_prompts"]


@checked
def spans_of_prompts(
    by_loader: Mapping[PromptDataLoader, Sequence[TokenSpans]],
    names: Sequence[str] | None = None,
) -> Spans:
    """The spans of the prompts of some loaders.

    by_loader: a loader -> the spans of each of its prompts, in its order, which are those of
        the clean and of the corrupt one. names: of all spans, in order; those of the prompt
        that has most of them if None.

    Raises DataError for spans that overlap, leave tokens out or come in another order, for
    too few or too many, and for a prompt that has two different ones.
    """
    every: list[tuple[Tokens, TokenSpans]] = []
    for loader, of_loader in by_loader.items():
        prompts = list(_prompts(loader))
        if len(prompts) != len(of_loader):
            raise DataError(
                f"There are spans of {len(of_loader)} prompts, and the loader has "
                f"{len(prompts)}; expected those of each, in the loader's order."
            )
        pairs = zip(prompts, of_loader, strict=True)
        every += [(tokens, spans) for sides, spans in pairs for tokens in sides]
    if names is None:
        names = max((list(spans) for _, spans in every), key=len, default=[])
    return known_spans(names, every)


def _prompts(loader: PromptDataLoader) -> Iterable[tuple[Tokens, Tokens]]:
    """The tokens of each clean and corrupt prompt, without padding."""
    for batch in loader:
        sides = [
            _texts(batch.clean, batch.clean_attention_mask),
            _texts(batch.corrupt, batch.corrupt_attention_mask),
        ]
        yield from zip(*sides, strict=True)


def _texts(
    tokens: Shaped[Tensor, "batch seq"], mask: Shaped[Tensor, "batch seq"] | None
) -> list[Tokens]:
    if mask is None:
        return [tuple(row) for row in tokens.tolist()]
    return [
        tuple(row[is_text.bool()].tolist())
        for row, is_text in zip(tokens, mask, strict=True)
    ]

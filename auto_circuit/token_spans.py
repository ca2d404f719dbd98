"""Spans: parts of prompts that mean the same in all of them, whatever their lengths.

Where a graph tells positions apart, each token has edges of its own, and all prompts must have
the same length. With spans each span has them, and prompts differ in how many tokens a span has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

import torch as t
from jaxtyping import Int, Shaped
from torch import Tensor

from auto_circuit.checks import checked, is_whole_number, shown
from auto_circuit.errors import DataError

TokenSpans = Mapping[str, tuple[int, int]]
"""The spans of one prompt: name -> (its first token, the first one after it)."""
Tokens = tuple[int, ...]
NamedSpans = tuple[Sequence[str], Sequence[tuple[Tokens, TokenSpans]]]
"""(The names of all spans in order; each prompt's tokens, with its spans)"""


@checked
@dataclass(frozen=True, eq=False)
class Spans:
    """The spans of prompts.

    names: of all spans, in the order in which they come.
    find: the tokens of a prompt, without padding -> where its spans are. The spans cover all
        tokens, do not overlap, and come in the order of `names`; some may be missing.

    Raises DataError for names that are none, or stand there twice. What `find` gives is looked
    at whenever a prompt is run.
    """

    names: tuple[str, ...]
    find: Callable[[Tokens], TokenSpans]

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(self.names))
        if not self.names or len(set(self.names)) < len(self.names):
            raise DataError(
                f"The names of spans are {shown(self.names)}; expected at least one, and "
                "no name twice."
            )

    def __len__(self) -> int:
        return len(self.names)

    def positions(
        self,
        tokens: Int[Tensor, "batch seq"],
        attention_mask: Shaped[Tensor, "batch _"] | None = None,
    ) -> Int[Tensor, "batch seq"]:
        """The number of each token's span; -1 at padding.

        attention_mask: 0 at padding; it may cover a prefix before the tokens too. Raises
        DataError for spans that overlap, leave tokens out or come in another order.
        """
        rows = tokens.tolist()
        masks: list[Any] = [[1] * len(row) for row in rows]
        if attention_mask is not None:
            masks = attention_mask[:, -tokens.shape[1] :].tolist()
        found = [self._of_row(row, mask) for row, mask in zip(rows, masks, strict=True)]
        return t.tensor(found, device=tokens.device)

    def _of_row(self, row: list[int], mask: list[int]) -> list[int]:
        text = tuple(token for token, is_text in zip(row, mask, strict=True) if is_text)
        numbers = iter(self.of_prompt(text))
        return [next(numbers) if is_text else -1 for is_text in mask]

    def of_prompt(self, tokens: Tokens) -> list[int]:
        """The number of the span of each token of a prompt. Raises DataError."""
        spans = self.find(tokens)
        check_spans(spans, len(tokens), self.names)
        in_order = sorted(spans.items(), key=lambda item: tuple(item[1]))
        return [
            self.names.index(name)
            for name, (start, stop) in in_order
            for _ in range(start, stop)
        ]


def check_spans(spans: Any, n_tokens: int, names: Sequence[str]) -> None:
    """Raise DataError unless these are spans of a prompt of so many tokens."""
    if not isinstance(spans, Mapping):
        raise DataError(
            f"The spans of a prompt are {shown(spans)}; expected {{name: (start, stop)}}."
        )
    for name, span in spans.items():
        if name not in names:
            raise DataError(
                f"A prompt has a span {shown(name)}; the spans are named {list(names)}."
            )
        is_pair = isinstance(span, (tuple, list)) and len(span) == 2
        if not is_pair or not all(is_whole_number(end) for end in span):
            raise DataError(
                f"The span {name!r} is {shown(span)}; expected (its first token, the first "
                "token after it)."
            )
        if not 0 <= span[0] <= span[1] <= n_tokens:
            raise DataError(
                f"The span {name!r} is {tuple(span)}, in a prompt of {n_tokens} tokens."
            )
        if span[0] == span[1]:
            raise DataError(
                f"The span {name!r} is {tuple(span)}, which is empty. Leave out what a "
                "prompt does not have."
            )
    _check_cover(spans, n_tokens, names)


def _check_cover(spans: TokenSpans, n_tokens: int, names: Sequence[str]) -> None:
    in_order = sorted(spans, key=lambda name: tuple(spans[name]))
    edges = [(None, (0, 0)), *((name, spans[name]) for name in in_order)]
    edges.append((None, (n_tokens, n_tokens)))
    for (first, (_, stop)), (second, (start, _)) in pairwise(edges):
        if start < stop:
            raise DataError(
                f"The spans {first!r} and {second!r} overlap: {tuple(spans[first or ''])} and "
                f"{tuple(spans[second or ''])}. Each token must be in one span."
            )
        if start > stop:
            raise DataError(
                f"The spans {dict(spans)} leave out the tokens {stop} to {start - 1} of a "
                f"prompt of {n_tokens}. Each token must be in one span."
            )
    if in_order != sorted(in_order, key=list(names).index):
        raise DataError(
            f"The spans of a prompt come in the order {in_order}; expected that of all "
            f"prompts, {list(names)}."
        )


@checked
def spans_of_labels(seq_labels: Sequence[str]) -> Spans:
    """The spans of prompts of one length, from a label for each token (`loader.seq_labels`).

    Tokens in a row that have the same label are one span. A label that comes back begins
    another one, which has a number: "the", "the (2)". Raises DataError for no labels; prompts
    of another length are refused when they are run.
    """
    if isinstance(seq_labels, str) or not seq_labels:
        raise DataError(
            f"`seq_labels` is {seq_labels!r}; expected a label for each token."
        )
    spans: dict[str, tuple[int, int]] = {}
    start = 0
    for label, group in groupby(seq_labels):
        stop = start + len(list(group))
        spans[_new_name(label, spans)] = (start, stop)
        start = stop
    return Spans(tuple(spans), lambda tokens: spans)


def _new_name(label: str, taken: Mapping[str, object]) -> str:
    name, number = label, 1
    while name in taken:
        number += 1
        name = f"{label} ({number})"
    return name


def known_spans(
    names: Sequence[str], of_each: Iterable[tuple[Tokens, TokenSpans]]
) -> Spans:
    """The spans of certain prompts, each given by its tokens. Raises DataError."""
    by_tokens: dict[Tokens, TokenSpans] = {}
    for tokens, spans in of_each:
        check_spans(spans, len(tokens), names)
        if dict(by_tokens.setdefault(tokens, spans)) != dict(spans):
            raise DataError(
                f"A prompt has two different spans: {dict(by_tokens[tokens])} and "
                f"{dict(spans)}."
            )
    return Spans(tuple(names), lambda tokens: _known(by_tokens, tokens))


def _known(by_tokens: Mapping[Tokens, TokenSpans], tokens: Tokens) -> TokenSpans:
    if tokens not in by_tokens:
        raise DataError(
            f"A prompt of {len(tokens)} tokens is run whose spans nobody has given: "
            f"{list(tokens[:8])} ... Give those of all loaders to `spans_of_prompts`."
        )
    return by_tokens[tokens]


def cut_spans(of_prompts: NamedSpans, n_cut: int) -> NamedSpans:
    """The same without the prompts' first tokens, and without spans of these alone."""
    names, of_each = of_prompts
    rest = []
    for tokens, spans in of_each:
        cut = {n: (max(a - n_cut, 0), max(b - n_cut, 0)) for n, (a, b) in spans.items()}
        rest.append((tokens[n_cut:], {n: span for n, span in cut.items() if span[1]}))
    left = {name for _, spans in rest for name in spans}
    return [name for name in names if name in left], rest

"""Prompts as tokens of one length: what texts, token ids and numbers mean to a model.

What does not fit the model is an error here, before the model runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal
from warnings import warn

import torch as t
from jaxtyping import Int
from torch import Tensor

from auto_circuit.errors import ConfigError, DataError
from auto_circuit.prompt_files import Prompt, is_whole, numbers_shape

Side = Literal["clean", "corrupt"]
OTHER_SIDE: dict[Side, Side] = {"clean": "corrupt", "corrupt": "clean"}
AnswerName = Literal["answers", "wrong_answers"]


class DegeneratePromptsWarning(UserWarning):
    """Some prompt pairs have no difference between clean and corrupt, or in answers."""


@dataclass(frozen=True, eq=False)
class EncodedPrompts:
    """All prompts, as tokens of one length. The mask is None if nothing is padded.

    clean, corrupt, mask: [prompt seq ...]; answers, wrong_answers: a [n ...] per prompt.
    has_bos: was BOS asked for? n_added: how many tokens, 0 or 1, were put before the file's
    own, by side and prompt.
    """

    clean: Tensor
    corrupt: Tensor
    answers: list[Tensor]
    wrong_answers: list[Tensor]
    mask: Tensor | None = None
    has_bos: bool = False
    n_added: Mapping[str, list[int]] = field(default_factory=dict)

    def to(self, device: t.device | str) -> EncodedPrompts:
        """The same on a device."""
        return replace(
            self,
            clean=self.clean.to(device),
            corrupt=self.corrupt.to(device),
            answers=[row.to(device) for row in self.answers],
            wrong_answers=[row.to(device) for row in self.wrong_answers],
            mask=None if self.mask is None else self.mask.to(device),
        )


# ------------------------------------------------------------------------------- numbers


def encode_numbers(prompts: Sequence[Prompt]) -> EncodedPrompts:
    """Prompts of numbers, for a model without a tokenizer.

    Whole numbers stay what they are (token ids, say); with any other among them, all of
    a field are float32. Raises ConfigError for texts, DataError for unequal shapes.
    """
    for prompt in prompts:
        values = (prompt.clean, prompt.corrupt, *prompt.answers, *prompt.wrong_answers)
        if any(isinstance(value, str) for value in values):
            raise ConfigError(
                f"{prompt.where} has texts, which need a `model` with a tokenizer."
            )
    shape = numbers_shape(list(prompts[0].clean), prompts[0].where)
    for prompt in prompts:
        for side in (prompt.clean, prompt.corrupt):
            found = numbers_shape(list(side), prompt.where)
            if found != shape or 0 in shape:
                raise DataError(
                    f"{prompt.where} has numbers of shape {found}, and the first one of "
                    f"shape {shape}; prompts of numbers must all have one shape, clean "
                    "and corrupt, and not be empty."
                )
    clean = [_numbers(prompt.clean, prompt.where) for prompt in prompts]
    corrupt = [_numbers(prompt.corrupt, prompt.where) for prompt in prompts]
    sides = _of_one_type(clean + corrupt)
    answers = _of_one_type(
        [_numbers(prompt.answers, prompt.where) for prompt in prompts]
        + [_numbers(prompt.wrong_answers, prompt.where) for prompt in prompts]
    )
    n = len(prompts)
    return EncodedPrompts(
        t.stack(sides[:n]), t.stack(sides[n:]), answers[:n], answers[n:]
    )


def _numbers(values: Any, where: str) -> Tensor:
    flat = _flat(values)
    if all(is_whole(value) for value in flat):
        for value in flat:
            if not -(2**63) <= value < 2**63:
                raise DataError(f"{where}: {str(value):.30} is too large a number.")
        return t.tensor(values, dtype=t.int64)
    numbers = t.tensor(values, dtype=t.float32)
    if not numbers.isfinite().all():
        raise DataError(
            f"{where}: some number is too large for float32 (at most "
            f"{t.finfo(t.float32).max:.2e})."
        )
    return numbers


def _flat(values: Any) -> list[Any]:
    if not isinstance(values, list):
        return [values]
    return [number for value in values for number in _flat(value)]


def _of_one_type(rows: list[Tensor]) -> list[Tensor]:
    is_float = any(row.is_floating_point() for row in rows)
    return [row.to(t.float32) for row in rows] if is_float else rows


# --------------------------------------------------------------------------------- texts


def encode_texts(
    prompts: Sequence[Prompt], model: Any, prepend_bos: bool, pad: bool
) -> EncodedPrompts:
    """Prompts as the tokens of a model: texts, or token ids as they are.

    Raises DataError, with the prompt, for what the tokenizer or the model does not know:
    unequal lengths, answers of several tokens, unknown words, ids beyond the vocabulary,
    more tokens than the model's context; ConfigError without a tokenizer.
    """
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise ConfigError(
            f"The model ({type(model).__name__}) has no tokenizer, which texts and token "
            "ids need; prompts of numbers need model=None."
        )
    bos = tokenizer.bos_token_id if prepend_bos else None
    clean, clean_added = _encode_side(prompts, "clean", tokenizer, bos)
    corrupt, corrupt_added = _encode_side(prompts, "corrupt", tokenizer, bos)
    answers, wrong = (
        [_encode_answers(prompt, name, tokenizer) for prompt in prompts]
        for name in ("answers", "wrong_answers")
    )
    for rows in (clean, corrupt, answers, wrong):
        _check_vocabulary(prompts, rows, model)
    for prompt, ids, other_ids in zip(prompts, clean, corrupt, strict=True):
        if len(ids) != len(other_ids):
            raise DataError(
                f"{prompt.where}: clean and corrupt must have the same number of tokens: "
                f"{prompt.clean!r:.200} has {len(ids)} "
                f"({tokenizer.convert_ids_to_tokens(ids)!s:.300}), "
                f"{prompt.corrupt!r:.200} has {len(other_ids)} "
                f"({tokenizer.convert_ids_to_tokens(other_ids)!s:.300})."
            )
    lengths = [len(ids) for ids in clean]
    is_padded = len(set(lengths)) > 1
    if is_padded and not pad:
        raise DataError(
            f"The prompts have {min(lengths)} to {max(lengths)} tokens; with pad=False "
            "all must have the same number."
        )
    _check_context(prompts, lengths, model)
    pad_id = _first_not_none(tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return EncodedPrompts(
        _left_padded(clean, pad_id),
        _left_padded(corrupt, pad_id),
        [t.tensor(ids, dtype=t.int64) for ids in answers],
        [t.tensor(ids, dtype=t.int64) for ids in wrong],
        _left_padded([[1] * length for length in lengths], 0) if is_padded else None,
        has_bos=bos is not None,
        n_added={"clean": clean_added, "corrupt": corrupt_added},
    )


def _first_not_none(*values: int | None) -> int:
    return next(value for value in values if value is not None)


def _encode_side(
    prompts: Sequence[Prompt], side: Side, tokenizer: Any, bos: int | None
) -> tuple[list[list[int]], list[int]]:
    """Tokens, with exactly one BOS in front if asked for, whatever the tokenizer does.

    And how many tokens, 0 or 1, were added to each prompt.
    """
    rows = _token_rows([getattr(prompt, side) for prompt in prompts], tokenizer)
    unk = tokenizer.unk_token_id
    for prompt, ids in zip(prompts, rows, strict=True):
        value = getattr(prompt, side)
        where = f"{prompt.where}: the {side} prompt {value!r:.200}"
        if isinstance(value, list) and not all(is_whole(token) for token in ids):
            raise DataError(
                f"{where} is no text, so it must be a list of token ids, whole numbers."
            )
        if not ids:
            raise DataError(f"{where} has no tokens.")
        if unk is not None and unk in ids and isinstance(value, str):
            if unk != tokenizer.bos_token_id:
                raise DataError(
                    f"{where} has words that the tokenizer does not know: "
                    f"{tokenizer.convert_ids_to_tokens(ids)!s:.300}."
                )
    n_added = [int(bos is not None and ids[0] != bos) for ids in rows]
    return [[bos] * n + ids for n, ids in zip(n_added, rows, strict=True)], n_added  # type: ignore[list-item]


def _token_rows(values: Sequence[Any], tokenizer: Any) -> list[list[Any]]:
    """The tokens of each text; lists, which should be of token ids, as they are."""
    texts = [value for value in values if isinstance(value, str)]
    found = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    of_texts = iter(found)
    return [next(of_texts) if isinstance(v, str) else list(v) for v in values]


def _encode_answers(prompt: Prompt, name: AnswerName, tokenizer: Any) -> list[int]:
    values = getattr(prompt, name)
    rows = _token_rows([v if isinstance(v, str) else [v] for v in values], tokenizer)
    unk = tokenizer.unk_token_id
    for value, ids in zip(values, rows, strict=True):
        where = f"{prompt.where}, field {name!r}: {value!r:.200}"
        if len(ids) != 1:
            tokens = tokenizer.convert_ids_to_tokens(ids)
            raise DataError(
                f"{where} must be one token, but it is {tokens!s:.300}. If an answer "
                "continues a word, give its token id (an int) in place of the text."
            )
        if not is_whole(ids[0]):
            raise DataError(f"{where} is no text and no token id, a whole number.")
        is_text = isinstance(value, str)
        if is_text and unk is not None and ids[0] == unk and value != tokenizer.unk_token:
            raise DataError(f"{where} is not in the tokenizer's vocabulary.")
    return [ids[0] for ids in rows]


def _check_vocabulary(
    prompts: Sequence[Prompt], rows: list[list[int]], model: Any
) -> None:
    n_words = _size(model, "d_vocab")
    for prompt, ids in zip(prompts, rows, strict=True):
        wrong = [token for token in ids if not 0 <= token < n_words]
        if wrong:
            raise DataError(
                f"{prompt.where} has the token id {str(wrong[0]):.30}, but the model has "
                f"the words 0 to {n_words - 1}. Does the tokenizer belong to the model?"
            )


def _check_context(prompts: Sequence[Prompt], lengths: list[int], model: Any) -> None:
    context = _size(model, "n_ctx")
    for prompt, length in zip(prompts, lengths, strict=True):
        if length > context:
            raise DataError(
                f"{prompt.where} has {length} tokens (with BOS, if there is one), but the "
                f"model's context has {context}. Shorten it, or leave it out."
            )


def _size(model: Any, name: str) -> int:
    """A size in a model's configuration; one that no tensor has, if it says none."""
    size = getattr(getattr(model, "cfg", None), name, None)
    return size if isinstance(size, int) and size > 0 else 2**62


def _left_padded(rows: list[list[int]], pad_id: int) -> Int[Tensor, "prompt seq"]:
    length = max(len(row) for row in rows)
    return t.tensor([[pad_id] * (length - len(row)) + row for row in rows])


# ------------------------------------------------------------------------- degenerate pairs


def check_pairs_differ(encoded: EncodedPrompts) -> None:
    """Warn of pairs that cannot show anything; raise DataError if all of them are such.

    If clean and corrupt prompt are equal, all effects of patching are 0; if answers and
    wrong answers are equal, so are all their differences. Answers that are numbers are
    targets, which may well be equal; the wrong ones are then not compared with.
    """
    same_prompt = (encoded.clean == encoded.corrupt).flatten(1).all(1).tolist()
    answers = list(zip(encoded.answers, encoded.wrong_answers, strict=True))
    same_answer = [_are_equal(*pair) for pair in answers]
    shared = [_overlap(*pair) for pair in answers]
    n = len(answers)
    if all(one or other for one, other in zip(same_prompt, same_answer, strict=True)):
        raise DataError(
            f"All {n} prompt pairs are degenerate: clean equals corrupt in "
            f"{sum(same_prompt)}, and the answers equal the wrong answers in "
            f"{sum(same_answer)}. Patching then changes nothing that is measured."
        )
    problems = {
        "clean equals corrupt": sum(same_prompt),
        "an answer is also a wrong answer": sum(shared),
    }
    found = [f"{text} in {count} of {n}" for text, count in problems.items() if count]
    if found:
        warn(
            f"Some prompt pairs are degenerate: {', and '.join(found)}. They weaken every "
            "score and metric; take them out of the file.",
            DegeneratePromptsWarning,
            stacklevel=3,
        )


def _are_equal(answers: Tensor, wrong: Tensor) -> bool:
    """Are the sets of token ids the same, at each position if there are several?"""
    if answers.is_floating_point() or answers.shape[:-1] != wrong.shape[:-1]:
        return False
    rows = zip(_positions(answers), _positions(wrong), strict=True)
    return all(one and one == other for one, other in rows)


def _overlap(answers: Tensor, wrong: Tensor) -> bool:
    """The same, or for answers at one position alone: is any of them on both sides?"""
    if answers.is_floating_point() or answers.ndim > 1:
        return _are_equal(answers, wrong)
    return bool(set(answers.tolist()) & set(wrong.flatten().tolist()))


def _positions(answers: Tensor) -> list[set[int]]:
    rows = answers[None] if answers.ndim == 1 else answers.flatten(0, -2)
    return [set(row) for row in rows.tolist()]

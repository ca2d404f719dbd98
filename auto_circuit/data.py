"""Prompts: from a prompt file to batches of tokens.

The way of the data: file -> parsed and checked prompts (`prompt_files`) -> shuffled and
cut to size -> tokens of equal length (`prompt_encoding`) -> common prefix cut off -> train
and test loader.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import islice, product
from pathlib import Path
from typing import Any, SupportsIndex
from warnings import warn

import torch as t
from jaxtyping import Int, Shaped
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from auto_circuit.checks import (
    check_count,
    check_device,
    checked,
    is_whole_number,
    seeded_generator,
    shown,
)
from auto_circuit.errors import ConfigError, DataError
from auto_circuit.padding import remember_mask
from auto_circuit.prefix_cache import (
    PrefixCache,
    begin_with,
    is_exact,
    make_prefix_cache,
)
from auto_circuit.prompt_encoding import (
    EncodedPrompts,
    Side,
    check_pairs_differ,
    encode_numbers,
    encode_texts,
)
from auto_circuit.prompt_files import (
    BOS_LABEL,
    Prompt,
    PromptFile,
    is_text,
    is_whole,
    read_prompt_files,
)
from auto_circuit.token_spans import (
    NamedSpans,
    Spans,
    check_spans,
    cut_spans,
    known_spans,
)
from auto_circuit.types import BatchKey

Answers = Tensor | list[Tensor]
PerSplit = SupportsIndex | tuple[SupportsIndex, SupportsIndex]
"""A whole number (numpy's too), or two: for (train, test)."""
LOGGER = logging.getLogger(__name__)
MAX_BATCH_SIZE = 2**31 - 1


class NoPrefixWarning(UserWarning):
    """A common prefix was to be cut off, and the model gives no KV cache for it."""


@dataclass(frozen=True, eq=False)
class PromptPair:
    """A clean prompt, a corrupt one of equal length, and what to answer to the clean one.

    clean, corrupt: [seq ...] tokens (or numbers); answers, wrong_answers: [n ...], which
    is [0] if there are no wrong answers.
    The attention masks [seq] are 0 at padding; None if there is none. idx: the place of
    the pair in its data set.

    Raises DataError for tensors that do not fit together.
    """

    clean: Tensor
    corrupt: Tensor
    answers: Tensor
    wrong_answers: Tensor
    clean_attention_mask: Tensor | None = None
    corrupt_attention_mask: Tensor | None = None
    idx: int = 0

    def __post_init__(self) -> None:
        _check_sides(self, n_lead=1)
        _check_answers([self.answers], [self.wrong_answers])


@dataclass(frozen=True, eq=False)
class PromptPairBatch:
    """Several prompt pairs, stacked.

    key: the same for the same batch in every process, and different for every batch.
    batch_diverge_idx: the first position at which a clean prompt differs from its
        corrupt one (0 if one of them is the same).
    clean, corrupt: [batch seq ...]; `model(batch.clean)` of a PatchableModel finds the
        attention mask of these very tensors by itself.
    answers, wrong_answers: [batch n ...], or a list of [n ...] if the numbers differ.
    Attention masks: [batch seq], or None.

    For functions of answers alone, clean and corrupt may be two single numbers, [].
    Raises DataError for tensors that do not fit together.
    """

    key: BatchKey
    batch_diverge_idx: int
    clean: Tensor
    corrupt: Tensor
    answers: Answers
    wrong_answers: Answers
    clean_attention_mask: Tensor | None = None
    corrupt_attention_mask: Tensor | None = None

    def __post_init__(self) -> None:
        if _are_placeholders(self.clean, self.corrupt):
            n_prompts = _n_rows("answers", self.answers)
        else:
            _check_sides(self, n_lead=2)
            n_prompts = len(self.clean)
        _check_answers(
            *(
                _answer_rows(name, getattr(self, name), n_prompts)
                for name in ("answers", "wrong_answers")
            )
        )
        remember_mask(self.clean, self.clean_attention_mask)
        remember_mask(self.corrupt, self.corrupt_attention_mask)

    def __reduce__(self) -> tuple[Any, ...]:
        """Made anew when it is copied, or comes from a loader's worker."""
        return type(self), tuple(getattr(self, f.name) for f in fields(self))

    @checked
    def model_input(
        self, side: Side
    ) -> tuple[Shaped[Tensor, "*batch_seq"], dict[str, Shaped[Tensor, "batch all_seq"]]]:
        """What to call the model with: `model(tokens, **kwargs)`.

        The keyword arguments hold the attention mask, if the prompts are padded.
        """
        is_clean = side == "clean"
        mask = self.clean_attention_mask if is_clean else self.corrupt_attention_mask
        tokens = self.clean if is_clean else self.corrupt
        return tokens, {} if mask is None else {"attention_mask": mask}


def _are_placeholders(clean: Any, corrupt: Any) -> bool:
    """Single numbers in the places of prompts, which nobody will read."""
    return all(isinstance(side, Tensor) and not side.ndim for side in (clean, corrupt))


def _check_sides(prompts: PromptPair | PromptPairBatch, n_lead: int) -> None:
    """Clean and corrupt must be alike; n_lead: how many dimensions come before [...]."""
    clean, corrupt = prompts.clean, prompts.corrupt
    for name, side in (("clean", clean), ("corrupt", corrupt)):
        _check_tensor(name, side, n_lead)
        if not side.shape[n_lead - 1]:
            raise DataError(f"`{name}` is {_shown(side)}; expected at least one token.")
    masks = {
        "clean_attention_mask": prompts.clean_attention_mask,
        "corrupt_attention_mask": prompts.corrupt_attention_mask,
    }
    if _kind(clean) != _kind(corrupt):
        raise DataError(
            f"`clean` is {_shown(clean)}, and `corrupt` {_shown(corrupt)}; expected the "
            "same shape, type and device."
        )
    for name, mask in masks.items():
        if mask is None:
            continue
        _check_tensor(name, mask, n_lead, is_mask=True)
        if mask.shape != clean.shape[:n_lead] or mask.device != clean.device:
            raise DataError(
                f"`{name}` is {_shown(mask)}, and the prompts {_shown(clean)}; expected a "
                "number for each token, on the same device."
            )


def _answer_rows(name: str, answers: Any, n_prompts: int) -> list[Any]:
    """The answers of a batch: of all its prompts in one tensor, or a row for each."""
    found = _n_rows(name, answers)
    if found != n_prompts:
        raise DataError(
            f"`{name}` has {found} rows, but the batch has {n_prompts} prompts; expected a "
            "row for each."
        )
    return answers if isinstance(answers, list) else [answers]


def _n_rows(name: str, answers: Any) -> int:
    if not isinstance(answers, list):
        _check_tensor(name, answers, 2)
    return len(answers)


def _check_answers(answers: list[Any], wrong_answers: list[Any]) -> None:
    for name, rows in (("answers", answers), ("wrong_answers", wrong_answers)):
        for row in rows:
            _check_tensor(name, row, 1)
    rows = [row for row in (*answers, *wrong_answers) if row.numel()]
    if len({(row.is_floating_point(), row.device) for row in rows}) > 1:
        kinds = sorted({_shown(row) for row in rows})
        raise DataError(
            f"`answers` and `wrong_answers` are {kinds[0]} and {kinds[-1]}; expected token "
            "ids (integers) in all of them, or other numbers in all, on one device."
        )


def _check_tensor(name: str, value: Any, n_dims: int, is_mask: bool = False) -> None:
    if not isinstance(value, Tensor):
        raise DataError(f"`{name}` is {value!r:.100}; expected a tensor.")
    no_numbers = value.is_complex() or value.is_meta
    no_numbers |= value.dtype == t.bool and not is_mask
    if value.ndim < n_dims or no_numbers:
        raise DataError(
            f"`{name}` is {_shown(value)}; expected token ids or other numbers, with at "
            f"least {n_dims} dimension{'s' if n_dims > 1 else ''}."
        )


def _kind(value: Tensor) -> tuple[t.Size, t.dtype, t.device]:
    return value.shape, value.dtype, value.device


def _shown(value: Tensor) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)} on {value.device}"


Rows = Sequence[Shaped[Tensor, "*_of_prompt"]] | Shaped[Tensor, "_prompt *_of_prompt"]
"""A tensor for each prompt, in a list or as the rows of one."""


class PromptDataset(Dataset[PromptPair]):
    """Prompt pairs by index.

    Raises DataError if the parts have different lengths, types or devices, and for pairs
    whose tensors do not fit together. Without wrong answers, give empty tensors.
    """

    def __init__(
        self,
        clean_prompts: Rows,
        corrupt_prompts: Rows,
        answers: Rows,
        wrong_answers: Rows,
        clean_attention_masks: Shaped[Tensor, "_prompt _seq"] | None = None,
        corrupt_attention_masks: Shaped[Tensor, "_prompt _seq"] | None = None,
    ) -> None:
        self.clean_prompts, self.corrupt_prompts = clean_prompts, corrupt_prompts
        self.answers, self.wrong_answers = answers, wrong_answers
        self.clean_attention_masks = clean_attention_masks
        self.corrupt_attention_masks = corrupt_attention_masks
        self._check()

    def _check(self) -> None:
        masks = (self.clean_attention_masks, self.corrupt_attention_masks)
        parts = (
            *(self.clean_prompts, self.corrupt_prompts, self.answers, self.wrong_answers),
            *(mask for mask in masks if mask is not None),
        )
        for part in parts:
            is_rows = isinstance(part, Sequence) and not isinstance(part, (str, bytes))
            if not is_rows and not (isinstance(part, Tensor) and part.ndim):
                raise DataError(
                    "The parts of a data set are lists of tensors, or tensors of rows; one "
                    f"is {part!r:.100}."
                )
        lengths = [len(part) for part in parts]
        if len(set(lengths)) != 1:
            raise DataError(
                "A data set needs as many clean prompts as corrupt prompts, answers and "
                f"wrong answers (and attention masks, if any); got {lengths}."
            )
        first, *others = (self[idx] for idx in range(len(self))) if len(self) else (None,)
        for other in others:
            assert first is not None
            pairs = ((first.clean, other.clean), (first.answers, other.answers))
            if any(
                (one.dtype, one.device) != (another.dtype, another.device)
                for one, another in pairs
            ):
                raise DataError(
                    f"Prompt {other.idx} has prompts of {_shown(other.clean)} and answers "
                    f"of {_shown(other.answers)}, and the first one {_shown(first.clean)} "
                    f"and {_shown(first.answers)}; expected one type and device."
                )

    def __len__(self) -> int:
        return len(self.clean_prompts)

    def __getitem__(self, idx: int) -> PromptPair:
        clean_masks, corrupt_masks = (
            self.clean_attention_masks,
            self.corrupt_attention_masks,
        )
        return PromptPair(
            self.clean_prompts[idx],
            self.corrupt_prompts[idx],
            self.answers[idx],
            self.wrong_answers[idx],
            None if clean_masks is None else clean_masks[idx],
            None if corrupt_masks is None else corrupt_masks[idx],
            idx,
        )


def collate_fn(batch: list[PromptPair]) -> PromptPairBatch:
    """Stack prompt pairs into a batch. Raises DataError if their lengths differ."""
    _check_same_shapes(pair.clean for pair in batch)
    clean = t.stack([pair.clean for pair in batch])
    corrupt = t.stack([pair.corrupt for pair in batch])
    answers = _stack_if_equal([pair.answers for pair in batch])
    wrong_answers = _stack_if_equal([pair.wrong_answers for pair in batch])
    return PromptPairBatch(
        key=_batch_key(batch[0].idx, clean, corrupt, answers, wrong_answers),
        batch_diverge_idx=_first_difference(clean, corrupt),
        clean=clean,
        corrupt=corrupt,
        answers=answers,
        wrong_answers=wrong_answers,
        clean_attention_mask=_stack_masks([p.clean_attention_mask for p in batch]),
        corrupt_attention_mask=_stack_masks([p.corrupt_attention_mask for p in batch]),
    )


def _check_names(seq_len: int | None, seq_labels: Any, word_idxs: Any) -> None:
    if seq_labels is not None:
        is_list = isinstance(seq_labels, list) and all(map(is_text, seq_labels))
        if not is_list or (seq_len is not None and len(seq_labels) != seq_len):
            raise DataError(
                f"`seq_labels` is {seq_labels!r:.200}; expected a text for each of "
                f"{'the' if seq_len is None else seq_len} positions, or None."
            )
    if word_idxs is not None and not (
        isinstance(word_idxs, Mapping)
        and all(is_text(word) and is_whole(idx) for word, idx in word_idxs.items())
    ):
        raise DataError(
            f"`word_idxs` is {word_idxs!r:.200}; expected {{word: position}}, or None."
        )


def _check_same_shapes(prompts: Iterable[Tensor]) -> None:
    shapes = {tuple(prompt.shape) for prompt in prompts}
    if len(shapes) > 1:
        raise DataError(
            f"Prompts of shapes {sorted(shapes)[:4]} cannot be one batch. Pad them on the "
            "left (with attention masks), or use batch_size=1."
        )


def _stack_if_equal(rows: list[Tensor]) -> Answers:
    return t.stack(rows) if len({row.shape for row in rows}) == 1 else rows


def _stack_masks(masks: list[Tensor | None]) -> Tensor | None:
    present = [mask for mask in masks if mask is not None]
    return t.stack(present) if present else None


def _first_difference(clean: Tensor, corrupt: Tensor) -> int:
    """The first position at which any pair of prompts differs; 0 if one does not at all."""
    differs = clean != corrupt
    differs = differs.flatten(2).any(2) if differs.ndim > 2 else differs
    return int(differs.int().argmax(1).min())


def _batch_key(first_idx: int, *parts: Answers) -> BatchKey:
    # Python's hash of a text differs from process to process.
    values = [
        [row.tolist() for row in part] if isinstance(part, list) else part.tolist()
        for part in parts
    ]
    digest = hashlib.sha256(json.dumps([first_idx, *values]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class PromptDataLoader(DataLoader[PromptPairBatch]):
    """Batches of prompt pairs: the same ones, in the same order, whenever it is read.

    seq_len: the number of tokens of each prompt, if all have the same and positions are
        told apart. diverge_idx: how many tokens were cut off into `kv_cache`.
    seq_labels: a name for each position. word_idxs: the positions of named words, counted
        from the start of the uncut prompt.
    spans: the spans of the prompts, if their file names them (see `auto_circuit.spans`).
    missing: why there are fewer prompts than were asked for; who reads them is told.
    shuffle, seed: put the prompts in another order, once, which depends on `seed` (or on
        `generator`, if that is given) and nothing else. Batch keys stay true.
    sampler: the places of the prompts in the data set, in the order in which they come; a
        torch Sampler is asked once.
    kwargs: torch's DataLoader options: batch_size, drop_last, num_workers, generator ...

    The last batch may be smaller (`drop_last=True` drops it), and `shuffle` draws one order,
    not a new one whenever the loader is read: outputs could not be told by their batches'
    keys then.
    Raises ConfigError for options that torch's loader refuses and that would change what a
    batch is (`collate_fn`, `batch_sampler`); DataError for prompts of different lengths in
    one batch, or that are not `seq_len` long, and, when it is read, if prompts are missing.
    """

    def __init__(
        self,
        prompt_dataset: PromptDataset | Subset[PromptPair],
        seq_len: int | None,
        diverge_idx: int,
        kv_cache: PrefixCache | None = None,
        seq_labels: list[str] | None = None,
        word_idxs: Mapping[str, int] | None = None,
        *,
        spans: Spans | None = None,
        missing: str | None = None,
        shuffle: bool | None = None,
        seed: int = 0,
        sampler: Iterable[int] | None = None,
        **kwargs: Any,
    ) -> None:
        prompt_dataset, places = _unwrapped(prompt_dataset)
        diverge_idx = check_count("diverge_idx", diverge_idx, at_least=0)
        if kv_cache is not None and kv_cache.seq_len != diverge_idx:
            raise ConfigError(
                f"`kv_cache` holds {kv_cache.seq_len} tokens but `diverge_idx` is "
                f"{diverge_idx}; they must be equal."
            )
        _check_options(kwargs)
        # An iteration draws a seed for its workers: not from the global generator.
        generator = kwargs.pop("generator", None)
        if _checked_flag("shuffle", shuffle):
            if sampler is not None:
                raise ConfigError("Give `shuffle` or a `sampler`, not both.")
            sampler = _shuffled(len(places), seed, generator)
        order = range(len(places)) if sampler is None else _order(sampler, len(places))
        try:
            super().__init__(
                prompt_dataset,  # type: ignore[arg-type]
                sampler=[places[i] for i in order],
                collate_fn=collate_fn,
                generator=t.Generator() if generator is None else generator,
                **kwargs,
            )
        except (TypeError, ValueError) as error:
            raise ConfigError(f"The loader's options do not fit: {error}.") from error
        if seq_len is not None:
            seq_len = check_count("seq_len", seq_len)
        _check_names(seq_len, seq_labels, word_idxs)
        self.seq_len = seq_len
        self.diverge_idx = diverge_idx
        self.kv_cache = kv_cache
        self.seq_labels = seq_labels
        self.word_idxs = dict(word_idxs or {})
        self.spans = spans
        self.missing = missing
        self._check_lengths(prompt_dataset.clean_prompts)

    def _check_lengths(self, prompts: Sequence[Tensor] | Tensor) -> None:
        lengths = {len(prompts[place]) for place in self.places}
        if self.seq_len is not None and lengths - {self.seq_len}:
            raise DataError(
                f"`seq_len` is {self.seq_len}, but prompts have {sorted(lengths)[:8]} "
                "tokens; expected that number in all of them."
            )
        assert self.batch_sampler is not None
        for idxs in self.batch_sampler:
            _check_same_shapes(prompts[idx] for idx in idxs)

    def check_complete(self) -> None:
        """Raise DataError if there are fewer prompts than were asked for."""
        if self.missing is not None:
            raise DataError(self.missing)

    def __iter__(self) -> Any:
        self.check_complete()
        # The seed for its workers is drawn on the generator's device, not on the default.
        with t.device("cpu"):
            return super().__iter__()

    @property
    def prompt_dataset(self) -> PromptDataset:
        """The data set that it loads."""
        return self.dataset  # type: ignore[return-value]

    @property
    def places(self) -> list[int]:
        """Where the prompts of all batches are in the data set, in their order."""
        assert self.batch_sampler is not None
        return [place for batch in self.batch_sampler for place in batch]

    @property
    def n_prompts(self) -> int:
        """The number of prompts in all batches."""
        return len(self.places)


def _check_options(options: dict[str, Any]) -> None:
    """Raise ConfigError for options of torch's loader that a PromptDataLoader cannot have."""
    for option, instead in (
        ("collate_fn", "its batches are made by `auto_circuit.data.collate_fn`"),
        ("batch_sampler", "give `batch_size`, and a `sampler` for the order"),
    ):
        if options.pop(option, None) is not None:
            raise ConfigError(
                f"A PromptDataLoader does not take `{option}`: {instead}. Leave it out."
            )
    options["batch_size"] = check_count(
        "batch_size", options.get("batch_size", 1), at_most=MAX_BATCH_SIZE
    )
    options["drop_last"] = _checked_flag("drop_last", options.get("drop_last"))


def _checked_flag(name: str, value: Any) -> bool:
    if value is None or isinstance(value, bool):
        return bool(value)
    raise ConfigError(f"`{name}` is {shown(value)}; expected True or False.")


def _shuffled(count: int, seed: Any, generator: Any) -> list[int]:
    if generator is None:
        generator = seeded_generator(seed)
    if not isinstance(generator, t.Generator):
        raise ConfigError(
            f"`generator` is {shown(generator)}; expected a torch.Generator."
        )
    return t.randperm(count, generator=generator, device=generator.device).tolist()


def _unwrapped(dataset: Any) -> tuple[PromptDataset, Sequence[int]]:
    """The data set, and the places of its prompts that a Subset (of a Subset) means."""
    if isinstance(dataset, Subset):
        whole, places = _unwrapped(dataset.dataset)
        return whole, [places[i] for i in _order(dataset.indices, len(places))]
    if not isinstance(dataset, PromptDataset):
        raise ConfigError(
            f"A PromptDataLoader loads a PromptDataset, or a Subset of one; got "
            f"{dataset!r:.100}."
        )
    return dataset, range(len(dataset))


def _order(sampler: Any, count: int) -> list[int]:
    """What a sampler yields, once. Raises ConfigError for what are no places in the data."""
    try:
        places = list(islice(sampler, len(sampler)))
    except TypeError as error:
        raise ConfigError(
            f"`sampler` is {shown(sampler)}; expected places in the data set, as a list or "
            "a torch Sampler with a length."
        ) from error
    for place in places:
        if not is_whole_number(place) or not 0 <= place < count:
            raise ConfigError(
                f"`sampler` yields {shown(place)}; expected places from 0 to {count - 1}."
            )
    return [int(place) for place in places]


NEED_NO_WRONG_ANSWERS = (
    "the metrics 'Clean KL Div', 'Corrupt KL Div', 'Clean MSE', 'Answer Logit', 'Answer "
    "Prob', 'Answer Logprob', 'Correct Answer Percent'; the algorithms 'EAP (log prob)', "
    "'Act Mag', 'ACDC', 'SEP', 'STP', 'CP', 'TP', 'EP' and those whose names end in "
    "'(MSE)'; of the options answer_function='avg_val' and 'mse', faithfulness_target="
    "'kl_div', 'mse', 'answer' and 'correct_percent'"
)


def check_wrong_answers(
    prompts: Iterable[PromptPairBatch] | Sequence[Prompt], who: str
) -> None:
    """Raise DataError if some prompt has no wrong answers, which `who` compares with.

    The prompts of a loader, or as their file has them.
    """
    rows: list[Tensor | list[Any]]
    if isinstance(prompts, PromptDataLoader):
        every = prompts.prompt_dataset.wrong_answers
        rows = [every[place] for place in prompts.places]
    else:
        rows = [
            row
            for one in prompts
            for row in (
                [one.wrong_answers] if isinstance(one, Prompt) else one.wrong_answers
            )
        ]
    n_without = sum(not len(row) for row in rows)
    if n_without:
        raise DataError(
            f"{n_without} of {len(rows)} prompts have no `wrong_answers`, which {who} "
            f"compares with. These need none: {NEED_NO_WRONG_ANSWERS}."
        )


# ------------------------------------------------------------------------------ loading


@checked
def load_datasets_from_json(
    model: Any | None,
    path: Path | str | Sequence[Path | str],
    device: t.device | str = "cpu",
    prepend_bos: bool | None = None,
    batch_size: PerSplit = 32,
    train_test_size: tuple[SupportsIndex, SupportsIndex] = (128, 128),
    return_seq_length: bool = False,
    tail_divergence: bool = False,
    shuffle: bool = True,
    random_seed: int = 42,
    pad: bool = True,
) -> tuple[PromptDataLoader, PromptDataLoader]:
    """A train and a test loader from one or more prompt files, in the formats below.

    model: has the tokenizer, and computes the prefix cache. None for prompts of numbers.
    path: of one or more files. Of several, labels and word positions are the first one's.
    prepend_bos: put the tokenizer's BOS token first (once, also if the tokenizer does).
        None: as the model's own `to_tokens` does (`cfg.default_prepend_bos`): models that
        were trained without BOS, such as Qwen, get none.
    batch_size, train_test_size: numbers of prompts, for (train, test).
    return_seq_length: tell positions apart: all prompts must have the same length.
    tail_divergence: cut off the tokens that all prompts of both loaders start with, and
        keep the model's keys and values for them in `kv_cache`. Prompts stay whole, with a
        NoPrefixWarning, if the model gives none.
    shuffle, random_seed: once, before the prompts are split; no global seed is touched.
    pad: pad shorter prompts on the left; their attention masks are kept in the batches.

    The suffix names the format:
    .json: `{"prompts": [{"clean", "corrupt", "answers", "wrong_answers"}],
        "seq_labels": [...], "word_idxs": {...}}`, the last two optional. clean, corrupt: a
        text, or a list of token ids. answers, wrong_answers: a list of texts of one token
        each, and of token ids (ints), for what no text can say, such as an answer that
        continues a word. wrong_answers may be missing or empty: whatever compares with
        them is then an error. Without a model, all are (nested) lists of numbers.
        A prompt may have "spans", `{name: [its first token, the first token after it]}`, or
        `{"clean": {...}, "corrupt": {...}}`: see docs/how-to/positions.md.
    .jsonl: one such prompt per line. seq_labels and word_idxs may be in the first line.
    .csv: a first line with these names, then a prompt per line. A cell is a text, or a
        JSON list: `[" Bob", 29946]`. The answers may also have several columns, answers_1,
        answers_2 ...; empty cells are left out. seq_labels and word_idxs (JSON) may be in
        the first prompt's line. spans are JSON.

    Raises DataError, with file, prompt and field, for anything that is not as it must be:
    unequal lengths of clean and corrupt, an answer that is not one token of the
    vocabulary, token ids that the model does not have, more tokens than its context, too
    few prompts (for the test loader, when it is read), pairs that are all degenerate
    (clean equals corrupt, or the answers the wrong ones); a DegeneratePromptsWarning if
    some are. ConfigError for options of other types and values, and for those that do not
    go together.

    The prefix that is cut off is common to all prompts, and its cache fits every batch size.
    The tokenizer and the global random state are left alone.
    """
    batch_sizes = per_split("batch_size", batch_size, at_most=MAX_BATCH_SIZE)
    n_train, n_test = sizes = _checked_sizes(train_test_size)
    random_seed = check_count("random_seed", random_seed, at_least=0)
    device = check_device("device", device)
    if prepend_bos and model is not None and getattr(model, "tokenizer", None):
        _check_has_bos(model.tokenizer)
    if prepend_bos is None:
        prepend_bos = default_prepend_bos(model)
    if model is None and (prepend_bos or tail_divergence):
        raise ConfigError(
            "Without a model there is no tokenizer and no cache: `prepend_bos` and "
            "`tail_divergence` must be False."
        )
    file = read_prompt_files(path)
    missing = missing_prompts(file.prompts, sizes)
    prompts = pick_prompts(file.prompts, sizes, random_seed if shuffle else None)
    with t.device("cpu"):  # whatever the caller's default is
        if model is None:
            encoded = encode_numbers(prompts)
        else:
            encoded = encode_texts(prompts, model, prepend_bos, pad)
    if encoded.has_bos:
        file = file.with_bos()
    check_pairs_differ(encoded)
    if return_seq_length:
        _check_positions(encoded, file)
    every_span = _spans_of_file(prompts, encoded, file.span_names)
    encoded = encoded.to(device)
    seq_len = encoded.clean.shape[1] if return_seq_length else None
    prefix = None
    if tail_divergence:
        prefix = _prefix_cache(model, encoded)
    diverge_idx = 0 if prefix is None else prefix.seq_len
    spans = (
        None if every_span is None else known_spans(*cut_spans(every_span, diverge_idx))
    )
    LOGGER.info("prefix of %d tokens, prompts of %s", diverge_idx, encoded.clean.shape)
    splits = (slice(0, n_train), slice(n_train, n_train + n_test))
    train_loader, test_loader = (
        PromptDataLoader(
            _dataset(encoded, split, diverge_idx),
            seq_len=None if seq_len is None else seq_len - diverge_idx,
            diverge_idx=diverge_idx,
            kv_cache=prefix,
            seq_labels=file.seq_labels and file.seq_labels[diverge_idx:],
            word_idxs=file.word_idxs,
            spans=spans,
            batch_size=size,
            missing=lacks,
        )
        for split, size, lacks in zip(splits, batch_sizes, (None, missing), strict=True)
    )
    return train_loader, test_loader


@checked
def loader_of_prompts(
    prompts: Sequence[Prompt],
    model: Any,
    prepend_bos: bool = True,
    batch_size: int = 32,
    device: t.device | str = "cpu",
) -> PromptDataLoader:
    """A loader of prompts that were read already, in their order.

    model: has the tokenizer. prepend_bos: put its BOS token first, if it has one. Shorter
    prompts are padded on the left.

    Raises DataError as `load_datasets_from_json` does.
    """
    batch_size = check_count("batch_size", batch_size, at_most=MAX_BATCH_SIZE)
    if not prompts:
        raise DataError("There are no prompts to load.")
    device = check_device("device", device)
    with t.device("cpu"):
        encoded = encode_texts(prompts, model, prepend_bos, pad=True)
    check_pairs_differ(encoded)
    dataset = _dataset(encoded.to(device), slice(None), 0)
    return PromptDataLoader(dataset, None, 0, batch_size=batch_size)


def default_prepend_bos(model: Any | None) -> bool:
    """Does the model's `to_tokens` put a BOS token first?

    True for a model that does not say so, False without a model.
    """
    config = getattr(model, "cfg", None)
    return model is not None and getattr(config, "default_prepend_bos", True) is not False


def _check_has_bos(tokenizer: Any) -> None:
    if tokenizer.bos_token_id is None:
        raise ConfigError(
            "`prepend_bos` is True, but this tokenizer has no BOS token. Leave it None, "
            "or give the tokenizer a `bos_token`."
        )


def per_split(
    name: str, value: Any, at_least: int = 1, at_most: int | None = None
) -> tuple[int, int]:
    """Numbers for (train, test), given as one for both or as two.

    Raises ConfigError, with the argument's name, for anything else.
    """
    parts = value if isinstance(value, (tuple, list)) else (value, value)
    if len(parts) != 2:
        raise ConfigError(
            f"`{name}` is {value!r:.100}; expected a number, or two: (train, test)."
        )
    first, second = (check_count(name, part, at_least, at_most) for part in parts)
    return first, second


def _checked_sizes(train_test_size: Any) -> tuple[int, int]:
    if isinstance(train_test_size, (tuple, list)):
        sizes = per_split("train_test_size", train_test_size, at_least=0)
        if sum(sizes):
            return sizes
    raise ConfigError(
        f"`train_test_size` is {train_test_size!r:.100}; expected two numbers of prompts, "
        "not both 0."
    )


def missing_prompts(prompts: list[Prompt], sizes: tuple[int, int]) -> str | None:
    """What to say if there are too few prompts. Raises it if the train split lacks some."""
    n_prompts = sum(sizes)
    if n_prompts <= len(prompts):
        return None
    text = (
        f"{prompts[0].where.rpartition(', ')[0]} has {len(prompts)} prompts, but "
        f"train_test_size={sizes} needs {n_prompts}. Ask for fewer, or write more with the "
        "file's generator (`--n-prompts`)."
    )
    if not 0 < sizes[0] <= len(prompts):
        raise DataError(text)
    return text


def pick_prompts(
    prompts: list[Prompt], sizes: tuple[int, int], seed: int | None
) -> list[Prompt]:
    """The (train, test) prompts of a file: the first ones, after shuffling with a seed."""
    picked = list(prompts)
    if seed is not None:
        random.Random(seed).shuffle(picked)
    return picked[: sum(sizes)]


def _dataset(encoded: EncodedPrompts, split: slice, start: int) -> PromptDataset:
    """Some of the prompts, without their first `start` tokens."""
    mask = None if encoded.mask is None else encoded.mask[split, start:]
    return PromptDataset(
        encoded.clean[split, start:],
        encoded.corrupt[split, start:],
        encoded.answers[split],
        encoded.wrong_answers[split],
        mask,
        mask,
    )


# ----------------------------------------------------------------- positions and prefixes


def _spans_of_file(
    prompts: Sequence[Prompt], encoded: EncodedPrompts, names: tuple[str, ...] | None
) -> NamedSpans | None:
    """The spans of all prompts, as tokens of the model; None if the file names none.

    Where BOS was put before a prompt, it is a span of its own. Raises DataError.
    """
    if names is None:
        return None
    found: list[tuple[tuple[int, ...], dict[str, tuple[int, int]]]] = []
    sides: dict[Side, Tensor] = {"clean": encoded.clean, "corrupt": encoded.corrupt}
    for (side, rows), (i, prompt) in product(sides.items(), enumerate(prompts)):
        if rows.ndim != 2 or rows.is_floating_point():
            raise DataError(
                f"{prompt.where} has spans, which only prompts of tokens have."
            )
        row = rows[i] if encoded.mask is None else rows[i][encoded.mask[i].bool()]
        n_added = encoded.n_added[side][i] if encoded.n_added else 0
        given = {n: (a, b) for n, (a, b) in (prompt.spans or {})[side].items()}
        try:
            check_spans(given, len(row) - n_added, names)
        except DataError as error:
            raise DataError(f"{prompt.where}, field 'spans' ({side}): {error}") from None
        shifted = {n: (a + n_added, b + n_added) for n, (a, b) in given.items()}
        with_bos = {BOS_LABEL: (0, 1)} if n_added else {}
        found.append((tuple(row.tolist()), with_bos | shifted))
    has_bos = any(BOS_LABEL in spans for _, spans in found) and BOS_LABEL not in names
    return (BOS_LABEL, *names) if has_bos else names, found


def _check_positions(encoded: EncodedPrompts, file: PromptFile) -> None:
    if encoded.mask is not None:
        lengths = encoded.mask.sum(1)
        raise DataError(
            "Positions can be told apart (`return_seq_length`, a token circuit) only if "
            f"all prompts have the same length; these have {int(lengths.min())} to "
            f"{int(lengths.max())} tokens."
        )
    seq_len = encoded.clean.shape[1]
    if file.seq_labels is not None and len(file.seq_labels) != seq_len:
        raise DataError(
            f"The file has {len(file.seq_labels)} `seq_labels`, but its prompts have "
            f"{seq_len} tokens."
        )
    for word, idx in file.word_idxs.items():
        if not 0 <= idx < seq_len:
            raise DataError(
                f"`word_idxs` puts {word!r} at position {idx} of prompts with {seq_len} "
                "tokens."
            )


def _common_prefix_len(encoded: EncodedPrompts, bos: int | None) -> int:
    """How many tokens all prompts start with; not all, since some pair differs.

    What is left over never begins with the prefix again, nor with a second BOS: so that a
    cut prompt can be told from a whole one.
    """
    rows = t.cat([encoded.clean, encoded.corrupt])
    is_common = (rows == rows[0]).all(dim=0)
    if encoded.mask is not None:
        is_common &= (encoded.mask == 1).all(dim=0)
    length = int(is_common.int().cumprod(0).sum())
    while length > 0 and _begins_again(rows, length, bos):
        length -= 1
    return length


def _begins_again(rows: Int[Tensor, "row seq"], length: int, bos: int | None) -> bool:
    prefix, rest = rows[0, :length], rows[:, length:]
    has_bos_again = bool((prefix[0] == bos) & (rest[:, 0] == bos).any())
    return has_bos_again or bool(begin_with(rest, prefix).any())


def _prefix_cache(model: Any, encoded: EncodedPrompts) -> PrefixCache | None:
    """The model's keys and values for the common prefix; None if there is none."""
    bos = getattr(model.tokenizer, "bos_token_id", None)
    length = _common_prefix_len(encoded, bos)
    if length == 0:
        return None
    try:
        prefix = make_prefix_cache(model, encoded.clean[0, :length])
    except ConfigError as error:
        warn(
            f"{error} So `tail_divergence` cuts nothing off: `diverge_idx` is 0, and prompts "
            "run from their start, which gives the same numbers and takes longer.",
            NoPrefixWarning,
            stacklevel=4,
        )
        return None
    if is_exact(model, prefix, encoded.clean[0, length:]):
        return prefix
    LOGGER.warning(
        "This model says something else of a prompt whose first %d tokens come from a KV "
        "cache, so no prefix is cut off.",
        length,
    )
    return None

"""Prompts: from a JSON file to batches of tokens.

The way of the data: file -> parsed and checked prompts -> shuffled and cut to size ->
tokens of equal length -> common prefix cut off -> train and test loader.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch as t
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from auto_circuit.errors import ConfigError, DataError
from auto_circuit.types import BatchKey

Side = Literal["clean", "corrupt"]
Answers = Tensor | list[Tensor]
LOGGER = logging.getLogger(__name__)
BOS_LABEL = "<|BOS|>"


@dataclass(frozen=True, eq=False)
class PromptPair:
    """A clean prompt, a corrupt one of equal length, and what to answer to the clean one.

    clean, corrupt: [seq ...] tokens (or numbers); answers, wrong_answers: [n ...].
    The attention masks [seq] are 0 at padding; None if there is none. idx: the place of
    the pair in its data set.
    """

    clean: Tensor
    corrupt: Tensor
    answers: Tensor
    wrong_answers: Tensor
    clean_attention_mask: Tensor | None = None
    corrupt_attention_mask: Tensor | None = None
    idx: int = 0


@dataclass(frozen=True, eq=False)
class PromptPairBatch:
    """Several prompt pairs, stacked.

    key: the same for the same batch in every process, and different for every batch.
    batch_diverge_idx: the first position at which a clean prompt differs from its
        corrupt one (0 if one of them is the same).
    clean, corrupt: [batch seq ...]. answers, wrong_answers: [batch n ...], or a list of
        [n ...] if the numbers differ. Attention masks: [batch seq], or None.
    """

    key: BatchKey
    batch_diverge_idx: int
    clean: Tensor
    corrupt: Tensor
    answers: Answers
    wrong_answers: Answers
    clean_attention_mask: Tensor | None = None
    corrupt_attention_mask: Tensor | None = None

    def model_input(self, side: Side) -> tuple[Tensor, dict[str, Tensor]]:
        """What to call the model with: `model(tokens, **kwargs)`.

        The keyword arguments hold the attention mask, if the prompts are padded.
        """
        is_clean = side == "clean"
        mask = self.clean_attention_mask if is_clean else self.corrupt_attention_mask
        tokens = self.clean if is_clean else self.corrupt
        return tokens, {} if mask is None else {"attention_mask": mask}


@dataclass(frozen=True, eq=False)
class PrefixCache:
    """The keys and values of a prefix that all prompts of a data set share.

    tokens: [prefix]. keys, values: per layer [1 kv_head prefix d_head].
    """

    tokens: Int[Tensor, "prefix"]
    keys: tuple[Float[Tensor, "1 kv_head prefix d_head"], ...]
    values: tuple[Float[Tensor, "1 kv_head prefix d_head"], ...]

    @property
    def seq_len(self) -> int:
        """The number of tokens in the prefix."""
        return len(self.tokens)

    def past_key_values(self, batch_size: int) -> Any:
        """A new Hugging Face cache that holds the prefix for a batch of any size.

        The model extends the cache that it is given, so each call needs a new one.
        """
        from transformers import DynamicCache

        cache = DynamicCache()
        for layer, (key, value) in enumerate(zip(self.keys, self.values, strict=True)):
            shape = (batch_size, -1, -1, -1)
            cache.update(key.expand(shape), value.expand(shape), layer)
        return cache


class PromptDataset(Dataset[PromptPair]):
    """Prompt pairs by index. Raises DataError if the parts have different lengths."""

    def __init__(
        self,
        clean_prompts: Sequence[Tensor] | Tensor,
        corrupt_prompts: Sequence[Tensor] | Tensor,
        answers: Sequence[Tensor],
        wrong_answers: Sequence[Tensor],
        clean_attention_masks: Tensor | None = None,
        corrupt_attention_masks: Tensor | None = None,
    ) -> None:
        parts = (clean_prompts, corrupt_prompts, answers, wrong_answers)
        lengths = [len(part) for part in parts]
        if len(set(lengths)) != 1:
            raise DataError(
                "A data set needs as many clean prompts as corrupt prompts, answers and "
                f"wrong answers; got {lengths}."
            )
        self.clean_prompts, self.corrupt_prompts = clean_prompts, corrupt_prompts
        self.answers, self.wrong_answers = answers, wrong_answers
        self.clean_attention_masks = clean_attention_masks
        self.corrupt_attention_masks = corrupt_attention_masks

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
    """Stack prompt pairs into a batch."""
    clean = t.stack([pair.clean for pair in batch])
    corrupt = t.stack([pair.corrupt for pair in batch])
    answers = _stack_if_equal([pair.answers for pair in batch])
    wrong_answers = _stack_if_equal([pair.wrong_answers for pair in batch])
    return PromptPairBatch(
        key=_batch_key(batch[0].idx, clean, corrupt, answers, wrong_answers),
        batch_diverge_idx=min(
            _first_difference(c, d) for c, d in zip(clean, corrupt, strict=True)
        ),
        clean=clean,
        corrupt=corrupt,
        answers=answers,
        wrong_answers=wrong_answers,
        clean_attention_mask=_stack_masks([p.clean_attention_mask for p in batch]),
        corrupt_attention_mask=_stack_masks([p.corrupt_attention_mask for p in batch]),
    )


def _stack_if_equal(rows: list[Tensor]) -> Answers:
    return t.stack(rows) if len({row.shape for row in rows}) == 1 else rows


def _stack_masks(masks: list[Tensor | None]) -> Tensor | None:
    present = [mask for mask in masks if mask is not None]
    return t.stack(present) if present else None


def _first_difference(clean: Tensor, corrupt: Tensor) -> int:
    differs = (clean != corrupt).flatten(1).any(1) if clean.ndim > 1 else clean != corrupt
    return int(differs.int().argmax())


def _batch_key(first_idx: int, *parts: Answers) -> BatchKey:
    # Python's hash of a text differs from process to process.
    values = [
        [row.tolist() for row in part] if isinstance(part, list) else part.tolist()
        for part in parts
    ]
    digest = hashlib.sha256(json.dumps([first_idx, *values]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class PromptDataLoader(DataLoader[PromptPairBatch]):
    """Batches of prompt pairs, always in the same order; none is dropped.

    seq_len: the number of tokens of each prompt, if all have the same and positions are
        told apart. diverge_idx: how many tokens were cut off into `kv_cache`.
    seq_labels: a name for each position. word_idxs: the positions of named words, counted
        from the start of the uncut prompt.

    Differs from auto-circuit: the last batch may be smaller, where it was dropped.
    Raises ConfigError for options that shuffle or drop.
    """

    def __init__(
        self,
        prompt_dataset: PromptDataset,
        seq_len: int | None,
        diverge_idx: int,
        kv_cache: PrefixCache | None = None,
        seq_labels: list[str] | None = None,
        word_idxs: Mapping[str, int] | None = None,
        **kwargs: Any,
    ) -> None:
        for option in ("shuffle", "drop_last"):
            if kwargs.pop(option, False):
                raise ConfigError(
                    f"A PromptDataLoader does not take `{option}`: prompts keep their "
                    "order and none is dropped. Shuffle when you load them."
                )
        if kv_cache is not None and kv_cache.seq_len != diverge_idx:
            raise ConfigError(
                f"`kv_cache` holds {kv_cache.seq_len} tokens but `diverge_idx` is "
                f"{diverge_idx}; they must be equal."
            )
        # An iteration draws a seed for its workers: not from the global generator.
        kwargs.setdefault("generator", t.Generator())
        super().__init__(
            prompt_dataset,  # type: ignore[arg-type]
            collate_fn=collate_fn,
            **kwargs,
        )
        self.seq_len = seq_len
        self.diverge_idx = diverge_idx
        self.kv_cache = kv_cache
        self.seq_labels = seq_labels
        self.word_idxs = dict(word_idxs or {})

    @property
    def n_prompts(self) -> int:
        """The number of prompts in all batches."""
        return len(self.dataset)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------ loading


def load_datasets_from_json(
    model: Any | None,
    path: Path | str | Sequence[Path | str],
    device: t.device | str = "cpu",
    prepend_bos: bool | None = None,
    batch_size: int | tuple[int, int] = 32,
    train_test_size: tuple[int, int] = (128, 128),
    return_seq_length: bool = False,
    tail_divergence: bool = False,
    shuffle: bool = True,
    random_seed: int = 42,
    pad: bool = True,
) -> tuple[PromptDataLoader, PromptDataLoader]:
    """A train and a test loader from one or more prompt files.

    model: has the tokenizer, and computes the prefix cache. None for prompts of numbers.
    path: JSON: `{"prompts": [{"clean", "corrupt", "answers", "wrong_answers"}],
        "seq_labels": [...], "word_idxs": {...}}`, the last two optional. Of several
        files, labels and word positions are the first one's.
    prepend_bos: put the tokenizer's BOS token first (once, also if the tokenizer does).
        None: as the model's own `to_tokens` does (`cfg.default_prepend_bos`): models that
        were trained without BOS, such as Qwen, get none.
    batch_size, train_test_size: numbers of prompts, for (train, test).
    return_seq_length: tell positions apart: all prompts must have the same length.
    tail_divergence: cut off the tokens that all prompts of both loaders start with, and
        keep the model's keys and values for them in `kv_cache`.
    shuffle, random_seed: once, before the prompts are split; no global seed is touched.
    pad: pad shorter prompts on the left; their attention masks are kept in the batches.

    Raises DataError, with file, prompt and field, for anything that is not as it must be:
    unequal lengths of clean and corrupt, an answer that is not one token of the
    vocabulary, too few prompts; ConfigError for options that do not go together.

    Differs from auto-circuit: attention masks are kept; the prefix is common to all
    prompts (not only to the two of a pair) and its cache fits every batch size; without a
    model, positions are told apart only if `return_seq_length`; the tokenizer and the
    global random state are left alone.
    """
    sizes = _checked_sizes(train_test_size, batch_size)
    if prepend_bos and model is not None and getattr(model, "tokenizer", None):
        _check_has_bos(model.tokenizer)
    if prepend_bos is None:
        prepend_bos = default_prepend_bos(model)
    if model is None and (prepend_bos or tail_divergence):
        raise ConfigError(
            "Without a model there is no tokenizer and no cache: `prepend_bos` and "
            "`tail_divergence` must be False."
        )
    paths = [Path(path)] if isinstance(path, (str, Path)) else [Path(p) for p in path]
    file = _read_files(paths)
    prompts = list(file.prompts)
    if shuffle:
        random.Random(random_seed).shuffle(prompts)
    n_prompts = sum(sizes.prompts)
    if n_prompts > len(prompts):
        raise DataError(
            f"{paths[0]} has {len(prompts)} prompts, but train_test_size="
            f"{train_test_size} needs {n_prompts}. Ask for fewer, or write more with the "
            "file's generator (`--n-prompts`)."
        )
    prompts = prompts[:n_prompts]
    if model is None:
        encoded = _encode_numbers(prompts)
    else:
        encoded = _encode_texts(prompts, model.tokenizer, prepend_bos, pad)
        if prepend_bos and encoded.has_bos:
            file = file.with_bos()
    encoded = encoded.to(device)
    if return_seq_length:
        _check_positions(encoded, file)
    seq_len = encoded.clean.shape[1] if return_seq_length else None
    prefix = None
    if tail_divergence:
        prefix = _prefix_cache(model, encoded)
    diverge_idx = 0 if prefix is None else prefix.seq_len
    LOGGER.info("prefix of %d tokens, prompts of %s", diverge_idx, encoded.clean.shape)
    splits = (slice(0, sizes.prompts[0]), slice(sizes.prompts[0], n_prompts))
    train_loader, test_loader = (
        PromptDataLoader(
            encoded.dataset(split, diverge_idx),
            seq_len=None if seq_len is None else seq_len - diverge_idx,
            diverge_idx=diverge_idx,
            kv_cache=prefix,
            seq_labels=file.seq_labels and file.seq_labels[diverge_idx:],
            word_idxs=file.word_idxs,
            batch_size=size,
        )
        for split, size in zip(splits, sizes.batch, strict=True)
    )
    return train_loader, test_loader


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


@dataclass(frozen=True)
class _Sizes:
    prompts: tuple[int, int]
    batch: tuple[int, int]


def _checked_sizes(
    train_test_size: tuple[int, int], batch_size: int | tuple[int, int]
) -> _Sizes:
    batch = (batch_size, batch_size) if isinstance(batch_size, int) else batch_size
    if min(batch) < 1:
        raise ConfigError(f"`batch_size` is {batch_size}; expected at least 1.")
    if min(train_test_size) < 0 or sum(train_test_size) == 0:
        raise ConfigError(
            f"`train_test_size` is {train_test_size}; expected two numbers of prompts, "
            "not both 0."
        )
    return _Sizes(train_test_size, batch)


# ------------------------------------------------------------------- reading and checking

Prompt = dict[str, Any]
FIELDS = ("clean", "corrupt", "answers", "wrong_answers")


@dataclass(frozen=True)
class _PromptFile:
    prompts: list[Prompt]
    seq_labels: list[str] | None = None
    word_idxs: dict[str, int] = field(default_factory=dict)

    def with_bos(self) -> _PromptFile:
        labels = self.seq_labels and [BOS_LABEL, *self.seq_labels]
        idxs = {word: idx + 1 for word, idx in self.word_idxs.items()}
        return replace(self, seq_labels=labels, word_idxs=idxs)


def _read_files(paths: Sequence[Path]) -> _PromptFile:
    if not paths:
        raise ConfigError("`path` is an empty list; give at least one prompt file.")
    files = [read_prompt_file(path) for path in paths]
    return replace(files[0], prompts=[p for file in files for p in file.prompts])


def read_prompt_file(path: Path) -> _PromptFile:
    """The checked content of a prompt file. Raises DataError, which says what is wrong."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"There is no prompt file {path}.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not JSON: {error}.") from None
    if not isinstance(content, dict) or not isinstance(content.get("prompts"), list):
        raise DataError(f'{path} must hold an object with a list "prompts".')
    if not content["prompts"]:
        raise DataError(f"{path} has no prompts.")
    for i, prompt in enumerate(content["prompts"]):
        _check_prompt(prompt, f"{path}, prompt {i}")
    labels, idxs = content.get("seq_labels"), content.get("word_idxs") or {}
    if labels is not None and not _is_list_of(labels, str):
        raise DataError(f'{path}: "seq_labels" must be a list of texts.')
    if not isinstance(idxs, dict) or not _is_list_of(list(idxs.values()), int):
        raise DataError(f'{path}: "word_idxs" must map words to positions.')
    return _PromptFile(content["prompts"], labels, idxs)


def _check_prompt(prompt: Any, where: str) -> None:
    if not isinstance(prompt, dict):
        raise DataError(f"{where} is a {type(prompt).__name__}; expected an object.")
    for name in FIELDS:
        if name not in prompt:
            raise DataError(f"{where} has no field {name!r}; it needs {list(FIELDS)}.")
    is_text = isinstance(prompt["clean"], str)
    for name in ("clean", "corrupt"):
        if not (isinstance(prompt[name], str) if is_text else _is_numbers(prompt[name])):
            raise DataError(
                f"{where}, field {name!r}: expected "
                + ("a text, as the clean prompt is." if is_text else "a list of numbers.")
            )
    for name in ("answers", "wrong_answers"):
        values = prompt[name]
        if not (_is_list_of(values, str) if is_text else _is_numbers(values)):
            kind = "texts" if is_text else "numbers"
            raise DataError(f"{where}, field {name!r}: expected a list of {kind}.")
        if not values:
            raise DataError(f"{where}, field {name!r}: the list is empty.")


def _is_list_of(values: Any, kind: type) -> bool:
    return isinstance(values, list) and all(isinstance(v, kind) for v in values)


def _is_numbers(values: Any) -> bool:
    """A list of numbers, or of lists of numbers, and so on."""
    return isinstance(values, list) and all(
        (
            _is_numbers(v)
            if isinstance(v, list)
            else isinstance(v, (int, float)) and not isinstance(v, bool)
        )
        for v in values
    )


# ------------------------------------------------------------------------------ encoding


@dataclass(frozen=True, eq=False)
class _Encoded:
    """All prompts, as tokens of one length. Masks are None if nothing is padded."""

    clean: Tensor
    corrupt: Tensor
    answers: list[Tensor]
    wrong_answers: list[Tensor]
    mask: Tensor | None = None
    has_bos: bool = False

    def to(self, device: t.device | str) -> _Encoded:
        return replace(
            self,
            clean=self.clean.to(device),
            corrupt=self.corrupt.to(device),
            answers=[row.to(device) for row in self.answers],
            wrong_answers=[row.to(device) for row in self.wrong_answers],
            mask=None if self.mask is None else self.mask.to(device),
        )

    def dataset(self, split: slice, start: int) -> PromptDataset:
        """Some of the prompts, without their first `start` tokens."""
        mask = None if self.mask is None else self.mask[split, start:]
        return PromptDataset(
            self.clean[split, start:],
            self.corrupt[split, start:],
            self.answers[split],
            self.wrong_answers[split],
            mask,
            mask,
        )


def _encode_numbers(prompts: list[Prompt]) -> _Encoded:
    if any(isinstance(prompt["clean"], str) for prompt in prompts):
        raise ConfigError("These prompts are texts: `model` must have a tokenizer.")
    try:
        sides = [t.tensor([prompt[side] for prompt in prompts]) for side in FIELDS[:2]]
    except ValueError as error:
        raise DataError(f"Prompts of numbers must all have one shape: {error}.") from None
    clean, corrupt = sides
    if clean.shape != corrupt.shape:
        raise DataError(
            f"Clean prompts have shape {tuple(clean.shape)}, corrupt ones "
            f"{tuple(corrupt.shape)}; they must be equal."
        )
    answers, wrong = (
        [t.tensor(prompt[name]) for prompt in prompts] for name in FIELDS[2:]
    )
    return _Encoded(clean, corrupt, answers, wrong)


def _encode_texts(
    prompts: list[Prompt], tokenizer: Any, prepend_bos: bool, pad: bool
) -> _Encoded:
    if tokenizer is None or not isinstance(prompts[0]["clean"], str):
        raise ConfigError(
            "Texts need a model with a tokenizer; prompts of numbers need model=None."
        )
    bos = tokenizer.bos_token_id if prepend_bos else None
    clean = _encode_side(prompts, "clean", tokenizer, bos)
    corrupt = _encode_side(prompts, "corrupt", tokenizer, bos)
    for prompt, ids, other_ids in zip(prompts, clean, corrupt, strict=True):
        if len(ids) != len(other_ids):
            raise DataError(
                "Clean and corrupt prompt must have the same number of tokens: "
                f"{prompt['clean']!r} has {len(ids)} "
                f"({tokenizer.convert_ids_to_tokens(ids)}), {prompt['corrupt']!r} has "
                f"{len(other_ids)} ({tokenizer.convert_ids_to_tokens(other_ids)})."
            )
    lengths = [len(ids) for ids in clean]
    is_padded = len(set(lengths)) > 1
    if is_padded and not pad:
        raise DataError(
            f"The prompts have {min(lengths)} to {max(lengths)} tokens; with pad=False "
            "all must have the same number."
        )
    answers, wrong = (
        [_encode_answers(prompt, name, tokenizer) for prompt in prompts]
        for name in FIELDS[2:]
    )
    pad_id = _first_not_none(tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return _Encoded(
        _left_padded(clean, pad_id),
        _left_padded(corrupt, pad_id),
        answers,
        wrong,
        _left_padded([[1] * length for length in lengths], 0) if is_padded else None,
        has_bos=bos is not None,
    )


def _first_not_none(*values: int | None) -> int:
    return next(value for value in values if value is not None)


def _encode_side(
    prompts: list[Prompt], side: Side, tokenizer: Any, bos: int | None
) -> list[list[int]]:
    """Tokens, with exactly one BOS in front if asked for, whatever the tokenizer does."""
    texts = [prompt[side] for prompt in prompts]
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    unk = tokenizer.unk_token_id
    for text, ids in zip(texts, rows, strict=True):
        if not ids:
            raise DataError(f"The {side} prompt {text!r} has no tokens.")
        if unk is not None and unk in ids and unk != tokenizer.bos_token_id:
            raise DataError(
                f"The {side} prompt {text!r} has words that the tokenizer does not know: "
                f"{tokenizer.convert_ids_to_tokens(ids)}."
            )
    if bos is None:
        return rows
    return [ids if ids[0] == bos else [bos, *ids] for ids in rows]


def _encode_answers(prompt: Prompt, name: str, tokenizer: Any) -> Int[Tensor, "n"]:
    rows = tokenizer(prompt[name], add_special_tokens=False)["input_ids"]
    unk = tokenizer.unk_token_id
    for text, ids in zip(prompt[name], rows, strict=True):
        where = f"Prompt {prompt['clean']!r}, field {name!r}: {text!r}"
        if len(ids) != 1:
            tokens = tokenizer.convert_ids_to_tokens(ids)
            raise DataError(f"{where} must be one token, but it is {tokens}.")
        if unk is not None and ids[0] == unk and text != tokenizer.unk_token:
            raise DataError(f"{where} is not in the tokenizer's vocabulary.")
    return t.tensor([ids[0] for ids in rows])


def _left_padded(rows: list[list[int]], pad_id: int) -> Int[Tensor, "prompt seq"]:
    length = max(len(row) for row in rows)
    return t.tensor([[pad_id] * (length - len(row)) + row for row in rows])


# ----------------------------------------------------------------- positions and prefixes


def _check_positions(encoded: _Encoded, file: _PromptFile) -> None:
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


def _common_prefix_len(encoded: _Encoded) -> int:
    """How many tokens all prompts start with; at least one is left over."""
    rows = t.cat([encoded.clean, encoded.corrupt])
    is_common = (rows == rows[0]).all(dim=0)
    if encoded.mask is not None:
        is_common &= (encoded.mask == 1).all(dim=0)
    return min(int(is_common.int().cumprod(0).sum()), rows.shape[1] - 1)


def _prefix_cache(model: Any, encoded: _Encoded) -> PrefixCache | None:
    """The model's keys and values for the common prefix; None if there is none."""
    tokens = encoded.clean[0, : _common_prefix_len(encoded)]
    if len(tokens) == 0:
        return None
    try:
        with t.no_grad():
            _, cache = model(tokens[None], return_type="logits_and_cache", use_cache=True)
        layers = [(layer.keys, layer.values) for layer in cache.layers]
    except (AttributeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"This {type(model).__name__} gives no KV cache ({error}), so "
            "`tail_divergence` must be False."
        ) from error
    return PrefixCache(
        tokens,
        tuple(keys.detach().clone() for keys, _ in layers),
        tuple(values.detach().clone() for _, values in layers),
    )

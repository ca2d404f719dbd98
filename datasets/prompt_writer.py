"""What the generators share: seeds, templates, tokens of words, and how files are written.

A generator is a script: `python datasets/<name>_generator.py --help`. It writes the same
bytes whenever it is run with the same arguments. Those for texts take any tokenizer of
Hugging Face, keep the words that are one token of it, and state its name in the file.
"""

from __future__ import annotations

import json
import random
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Prompt = dict[str, Any]
DATASETS = Path(__file__).resolve().parent


@dataclass(frozen=True)
class PromptFile:
    """The content of a prompt file, see `auto_circuit.data.load_datasets_from_json`."""

    prompts: Sequence[Prompt]
    seq_labels: Sequence[str] | None = None
    word_idxs: Mapping[str, int] = field(default_factory=dict)

    def write(self, path: Path, tokenizer_name: str | None = None) -> None:
        """Write the file, a line per prompt."""
        head: dict[str, Any] = {}
        if tokenizer_name is not None:
            head["tokenizer"] = tokenizer_name
        if self.seq_labels is not None:
            head["seq_labels"] = list(self.seq_labels)
        if self.word_idxs:
            head["word_idxs"] = dict(self.word_idxs)
        fields = [
            f"{json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()
        ]
        rows = ",\n".join(json.dumps(prompt) for prompt in self.prompts)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{" + ",\n".join([*fields, f'"prompts": [\n{rows}\n]']) + "}\n")
        print(f"{path}: {len(self.prompts)} prompts")


@dataclass(frozen=True)
class TextConfig:
    """For whom prompts of text are written, and where."""

    tokenizer: str = "gpt2"
    """A Hugging Face hub name, or the folder of a tokenizer."""
    tokenizer_name: str = ""
    """What the file says about it; `tokenizer` if empty."""
    out: Path = DATASETS
    """The folder of the prompt files."""
    n_prompts: int = 1000
    seed: int = 0

    @property
    def stated_name(self) -> str:
        """The name of the tokenizer that is written into the file."""
        return self.tokenizer_name or self.tokenizer

    def load_tokenizer(self) -> Any:
        """The tokenizer, from its folder or the hub."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.tokenizer)


def different_prompts(sample: Callable[[], Prompt], count: int) -> list[Prompt]:
    """`count` prompts with different clean texts. Raises ValueError if there are fewer."""
    prompts: dict[str, Prompt] = {}
    failures = 0
    while len(prompts) < count:
        prompt = sample()
        failures = failures + 1 if prompt["clean"] in prompts else 0
        if failures > 1000:
            raise ValueError(
                f"The words that are one token each make only {len(prompts)} different "
                f"prompts; {count} were asked for. Lower `n_prompts`."
            )
        prompts.setdefault(prompt["clean"], prompt)
    return list(prompts.values())


def subject_pairs(
    answers: Mapping[str, str],
    text: Callable[[str], str],
    count: int,
    rng: random.Random,
) -> list[Prompt]:
    """`count` pairs of subjects with different answers, in random order.

    answers: subject -> its answer. text: the prompt about a subject. Raises ValueError if
    there are fewer pairs.
    """
    pairs = [
        (subject, other)
        for subject in answers
        for other in answers
        if answers[subject] != answers[other]
    ]
    if len(pairs) < count:
        raise ValueError(
            f"The words that are one token each make only {len(pairs)} different prompts; "
            f"{count} were asked for. Lower `n_prompts`."
        )
    return [
        {
            "clean": text(subject),
            "corrupt": text(other),
            "answers": [f" {answers[subject]}"],
            "wrong_answers": [f" {answers[other]}"],
        }
        for subject, other in rng.sample(pairs, count)
    ]


# ------------------------------------------------------------------------------- tokens


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text, without any that the tokenizer adds."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def single_token_words(
    tokenizer: Any, words: Iterable[str], at_least: int = 1, prefix: str = " "
) -> list[str]:
    """The words that are one token after a space. Raises ValueError for too few."""
    words = list(words)
    kept = [
        word
        for word in words
        if len(ids := token_ids(tokenizer, prefix + word)) == 1
        and tokenizer.decode(ids).strip() == word
    ]
    if len(kept) < at_least:
        raise ValueError(
            f"Only {len(kept)} of {len(words)} words ({', '.join(words[:5])}, ...) are one "
            f"token of this tokenizer; {at_least} are needed. Add words to the list."
        )
    return kept


@dataclass(frozen=True)
class Rendered:
    """A filled template, and which characters of it each field fills."""

    text: str
    spans: dict[str, tuple[int, int]]


def render(template: str, **words: str) -> Rendered:
    """Fill a template such as "{S1} met {IO}"; each field occurs once."""
    text, spans = "", {}
    for literal, name, _, _ in string.Formatter().parse(template):
        text += literal
        if name is not None:
            spans[name] = (len(text), len(text) + len(words[name]))
            text += words[name]
    return Rendered(text, spans)


def token_labels(tokenizer: Any, rendered: Rendered) -> list[str]:
    """For each token the field that it belongs to, or else its own text."""
    encoded = tokenizer(
        rendered.text, add_special_tokens=False, return_offsets_mapping=True
    )
    labels = []
    for start, end in encoded["offset_mapping"]:
        fields = [
            name
            for name, (first, last) in rendered.spans.items()
            if start < last and first < end
        ]
        text = rendered.text[start:end]
        labels.append(fields[0] if fields else text.strip() or repr(text)[1:-1])
    return labels


def word_idxs(labels: Sequence[str], words: Iterable[str]) -> dict[str, int]:
    """The position of each word's (last) token, and `end`, that of the last token."""
    last = {label: idx for idx, label in enumerate(labels)}
    return {word: last[word] for word in words} | {"end": len(labels) - 1}


def check_aligned(tokenizer: Any, prompts: Iterable[Prompt]) -> None:
    """Raise ValueError unless each pair is equally long and each answer is one token."""
    for prompt in prompts:
        lengths = {
            side: len(token_ids(tokenizer, prompt[side])) for side in ("clean", "corrupt")
        }
        if lengths["clean"] != lengths["corrupt"]:
            raise ValueError(f"{prompt['clean']!r} and {prompt['corrupt']!r}: {lengths}")
        for answer in (*prompt["answers"], *prompt["wrong_answers"]):
            if len(token_ids(tokenizer, answer)) != 1:
                raise ValueError(f"The answer {answer!r} is not one token.")

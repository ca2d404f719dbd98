"""Indirect object identification: which of two names is meant.

"When Mary and John walked to the store, John gave a drink to" -> " Mary". In the corrupt
prompt the three names are three others, all different, so that no name is the answer.
Writes `ioi_prompts.json` (all templates, both orders: of different lengths) and
`ioi_vanilla_template_prompts.json` (one template, with labels and word positions), and
with `--single-templates` the same for each template and order,
`ioi_<order>_template_<i>_prompts.json`: 30 files, committed with `--n-prompts 100`.

The task is that of Wang et al. 2022, "Interpretability in the Wild"; the templates are
others.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from prompt_writer import (  # noqa: E402  # pyright: ignore
    Prompt,
    PromptFile,
    TextConfig,
    check_aligned,
    different_prompts,
    render,
    single_token_words,
    token_labels,
    word_idxs,
)

Order = Literal["ABBA", "BABA"]
ORDERS: tuple[Order, ...] = ("ABBA", "BABA")
"""ABBA names the indirect object first, BABA the subject."""

# {A} and {B} are the two names in the order of the text, {S2} is the subject again. A name
# is never the first word: most tokenizers know " Mary" as one token, but not "Mary".
TEMPLATES = (
    "After {A} and {B} arrived at the {PLACE}, {S2} handed a {OBJECT} to",
    "Then {A} and {B} met near the {PLACE}, and {S2} offered a {OBJECT} to",
    "Last week {A} and {B} walked to the {PLACE}. Later {S2} lent the {OBJECT} to",
    "While {A} and {B} were waiting in the {PLACE}, {S2} showed a {OBJECT} to",
    "On Monday {A} and {B} worked at the {PLACE}. At noon {S2} brought a {OBJECT} to",
    "Since {A} and {B} could not find the {PLACE}, {S2} returned the {OBJECT} to",
    "Once {A} and {B} had seen the {PLACE}, {S2} decided to give a {OBJECT} to",
    "Before {A} and {B} left the {PLACE}, {S2} sold the old {OBJECT} to",
    "Today {A} and {B} opened the {PLACE} together. In the evening {S2} gave the {OBJECT} to",
    "Friends {A} and {B} found a {OBJECT} at the {PLACE}, and {S2} passed it to",
    "As {A} and {B} drove past the {PLACE}, {S2} gave back the {OBJECT} to",
    "When {A} and {B} got a {OBJECT} at the {PLACE}, {S2} decided to give it to",
    "In spring {A} and {B} cleaned the {PLACE}. Afterwards {S2} handed the {OBJECT} to",
    "Both {A} and {B} were tired of the {PLACE}, so {S2} threw the {OBJECT} to",
    "Yesterday {A} and {B} stayed at the {PLACE} until {S2} mailed a {OBJECT} to",
)
VANILLA_TEMPLATE = "When {A} and {B} walked to the {PLACE}, {S2} gave a {OBJECT} to"

NAMES = (
    "Adam Alan Albert Alex Alice Amanda Amber Amy Andrea Andrew Angela Anna Anthony Arthur "
    "Ashley Barbara Ben Brandon Brian Bruce Carl Carol Charles Chris Christian Claire Dan "
    "Daniel David Dean Dennis Diana Donald Edward Elizabeth Emily Eric Erin Felix Frances "
    "Frank Gary George Grace Graham Harry Heather Helen Henry Jack Jacob James Jamie Jane "
    "Jason Jeff Jennifer Jeremy Jessica Joan John Jonathan Jordan Joseph Joshua Julia "
    "Justin Karen Kate Keith Kelly Kevin Kyle Laura Leon Linda Lisa Louis Lucy Luke Marcus "
    "Margaret Maria Mark Martin Mary Matthew Max Michael Michelle Nathan Nicholas Nicole "
    "Oliver Oscar Patrick Paul Peter Rachel Richard Robert Rose Russell Ruth Ryan Samuel "
    "Sarah Scott Sean Simon Stephen Steven Susan Thomas Tom Victor Vincent Walter William"
).split()
PLACES = "store park school office garden station market library beach museum".split()
OBJECTS = "drink book ring basket letter flower snack ticket hat key".split()


@dataclass(frozen=True)
class Words:
    """The words that are one token of a tokenizer."""

    names: list[str]
    places: list[str]
    objects: list[str]

    @staticmethod
    def of(tokenizer: Any) -> Words:
        """Filter the lists of this file."""
        return Words(
            single_token_words(tokenizer, NAMES, at_least=5),
            single_token_words(tokenizer, PLACES),
            single_token_words(tokenizer, OBJECTS),
        )


def sample_ioi(
    rng: random.Random, words: Words, templates: Sequence[str], orders: Sequence[Order]
) -> Prompt:
    """A prompt of one of the templates, in one of the orders."""
    io, subject, *others = rng.sample(words.names, 5)
    template, order = rng.choice(templates), rng.choice(orders)
    first, second = (io, subject) if order == "ABBA" else (subject, io)
    fixed = {"PLACE": rng.choice(words.places), "OBJECT": rng.choice(words.objects)}
    return {
        "clean": template.format(A=first, B=second, S2=subject, **fixed),
        "corrupt": template.format(A=others[0], B=others[1], S2=others[2], **fixed),
        "answers": [f" {io}"],
        "wrong_answers": [f" {subject}"],
    }


def ioi_prompts(tokenizer: Any, n_prompts: int = 1000, seed: int = 0) -> PromptFile:
    """All templates, both orders; prompts have different lengths."""
    rng, words = random.Random(seed), Words.of(tokenizer)
    prompts = different_prompts(
        lambda: sample_ioi(rng, words, TEMPLATES, ORDERS), n_prompts
    )
    check_aligned(tokenizer, prompts)
    return PromptFile(prompts)


def ioi_template_prompts(
    tokenizer: Any,
    template: str = VANILLA_TEMPLATE,
    order: Order = "ABBA",
    n_prompts: int = 1000,
    seed: int = 0,
) -> PromptFile:
    """One template in one order: each token has the same meaning in every prompt.

    word_idxs (without BOS): IO, S1, S2, IO-1, IO+1, S1-1, S1+1, end.
    """
    rng, words = random.Random(seed), Words.of(tokenizer)
    prompts = different_prompts(
        lambda: sample_ioi(rng, words, [template], [order]), n_prompts
    )
    check_aligned(tokenizer, prompts)
    first, second = ("IO", "S1") if order == "ABBA" else ("S1", "IO")
    named = template.replace("{A}", f"{{{first}}}").replace("{B}", f"{{{second}}}")
    fields = {"PLACE": words.places[0], "OBJECT": words.objects[0]}
    names = dict(zip(("IO", "S1", "S2"), words.names[:3], strict=True))
    labels = token_labels(tokenizer, render(named, **fields, **names))
    idxs = word_idxs(labels, ["IO", "S1", "S2"])
    around = {
        f"{word}{offset:+}": idxs[word] + offset
        for word in ("IO", "S1")
        for offset in (-1, 1)
    }
    return PromptFile(prompts, labels, idxs | around)


@dataclass(frozen=True)
class Config(TextConfig):
    """Which prompts to write."""

    out: Path = Path(__file__).resolve().parent
    """The folder of the prompt files."""
    single_templates: bool = False
    """Write a file for each template and order instead."""


def files(config: Config) -> dict[str, PromptFile]:
    """The prompt files by name."""
    tokenizer, count, seed = config.load_tokenizer(), config.n_prompts, config.seed
    if config.single_templates:
        return {
            f"ioi_{order}_template_{i}_prompts": ioi_template_prompts(
                tokenizer, template, order, count, seed
            )
            for order in ORDERS
            for i, template in enumerate(TEMPLATES)
        }
    vanilla = ioi_template_prompts(tokenizer, n_prompts=count, seed=seed)
    return {
        "ioi_prompts": ioi_prompts(tokenizer, count, seed),
        "ioi_vanilla_template_prompts": vanilla,
    }


if __name__ == "__main__":
    config = tyro.cli(Config, description=__doc__)
    for name, file in files(config).items():
        file.write(config.out / f"{name}.json", config.stated_name)

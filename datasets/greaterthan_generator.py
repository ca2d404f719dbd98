"""Greater-than: a later year of the same century.

"The war lasted from the year 1742 to the year 17" -> any of "43" ... "99". In the corrupt
prompt the first year ends in 01. Only years that the tokenizer splits into century and
year are used. Writes `greaterthan_gpt2-small_prompts.json`.

The task is that of Hanna et al. 2023, "How does GPT-2 compute greater-than?"; the nouns
are others.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import tyro
from prompt_writer import (
    Prompt,
    PromptFile,
    Rendered,
    TextConfig,
    check_aligned,
    different_prompts,
    render,
    single_token_words,
    token_ids,
    token_labels,
    word_idxs,
)

TEMPLATE = "The {NOUN} lasted from the year {CENTURY}{YEAR} to the year {CENTURY2}"
NOUNS = (
    "war siege reign drought famine voyage strike plague truce festival debate trial "
    "expedition dynasty rebellion exhibition campaign blockade journey feud project mission "
    "alliance tour battle conflict crisis revolution struggle dispute search program "
    "study treaty occupation boom custom tradition fashion boycott riot colony empire "
    "partnership experiment construction peace epidemic league contract"
).split()
CENTURIES = tuple(range(11, 18))
FIRST_YEAR, LAST_YEAR = 2, 98


def two_digits(number: int) -> str:
    """As in a year: 7 is 07."""
    return f"{number:02}"


def splits_year(tokenizer: Any, century: int, year: int) -> bool:
    """Is the year two tokens, of which the second is that of its two digits alone?"""
    parts = (f" {century}", two_digits(year))
    ids = [token_ids(tokenizer, part) for part in parts]
    whole = token_ids(tokenizer, "".join(parts))
    return [len(part) for part in ids] == [1, 1] and whole == [*ids[0], *ids[1]]


def split_years(tokenizer: Any) -> list[tuple[int, int]]:
    """(century, year) of all usable years. Raises ValueError if there are none."""
    years = [
        (century, year)
        for century in CENTURIES
        if splits_year(tokenizer, century, 1)
        for year in range(FIRST_YEAR, LAST_YEAR + 1)
        if splits_year(tokenizer, century, year)
    ]
    if not years:
        raise ValueError(
            "This tokenizer splits no year into century and year, so the answers are not "
            "single tokens; the task cannot be asked of its models."
        )
    return years


def fill(noun: str, century: int, year: int) -> Rendered:
    """The template about this event."""
    numbers = {"CENTURY": str(century), "CENTURY2": str(century)}
    return render(TEMPLATE, NOUN=noun, YEAR=two_digits(year), **numbers)


def sample_greaterthan(
    rng: random.Random, nouns: list[str], years: list[tuple[int, int]]
) -> Prompt:
    """A prompt about a random event and year."""
    noun, (century, year) = rng.choice(nouns), rng.choice(years)
    return {
        "clean": fill(noun, century, year).text,
        "corrupt": fill(noun, century, 1).text,
        "answers": [two_digits(later) for later in range(year + 1, 100)],
        "wrong_answers": [two_digits(earlier) for earlier in range(year + 1)],
    }


def greaterthan_prompts(
    tokenizer: Any, n_prompts: int = 1000, seed: int = 0
) -> PromptFile:
    """Prompts with labels; word_idxs (without BOS): NOUN, CENTURY, YEAR, end."""
    rng, years = random.Random(seed), split_years(tokenizer)
    nouns = single_token_words(tokenizer, NOUNS)
    prompts = different_prompts(lambda: sample_greaterthan(rng, nouns, years), n_prompts)
    check_aligned(tokenizer, prompts)
    labels = token_labels(tokenizer, fill(nouns[0], *years[0]))
    return PromptFile(prompts, labels, word_idxs(labels, ["NOUN", "CENTURY", "YEAR"]))


@dataclass(frozen=True)
class Config(TextConfig):
    """Which prompts to write."""

    model_name: str = "gpt2-small"
    """For the name of the file."""


if __name__ == "__main__":
    config = tyro.cli(Config, description=__doc__)
    file = greaterthan_prompts(config.load_tokenizer(), config.n_prompts, config.seed)
    path = config.out / f"greaterthan_{config.model_name}_prompts.json"
    file.write(path, config.stated_name)

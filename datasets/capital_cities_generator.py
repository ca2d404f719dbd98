"""The capital of a country.

"The capital of France is the city of" -> " Paris"; the corrupt prompt is about another
country, whose capital is the wrong answer. Only countries and capitals that are one token
each; pairs of them, in random order. Writes `capital_cities_<model>_prompts.json`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import tyro
from prompt_writer import (
    PromptFile,
    TextConfig,
    check_aligned,
    render,
    single_token_words,
    subject_pairs,
    token_labels,
    word_idxs,
)

TEMPLATE = "The capital of {country} is the city of"
CAPITALS = {
    "Austria": "Vienna",
    "Belgium": "Brussels",
    "Bulgaria": "Sofia",
    "Canada": "Ottawa",
    "Chile": "Santiago",
    "China": "Beijing",
    "Cuba": "Havana",
    "Denmark": "Copenhagen",
    "Egypt": "Cairo",
    "Finland": "Helsinki",
    "France": "Paris",
    "Germany": "Berlin",
    "Greece": "Athens",
    "Hungary": "Budapest",
    "Indonesia": "Jakarta",
    "Iran": "Tehran",
    "Iraq": "Baghdad",
    "Ireland": "Dublin",
    "Italy": "Rome",
    "Japan": "Tokyo",
    "Kenya": "Nairobi",
    "Lebanon": "Beirut",
    "Norway": "Oslo",
    "Peru": "Lima",
    "Poland": "Warsaw",
    "Portugal": "Lisbon",
    "Qatar": "Doha",
    "Romania": "Bucharest",
    "Russia": "Moscow",
    "Serbia": "Belgrade",
    "Spain": "Madrid",
    "Sweden": "Stockholm",
    "Syria": "Damascus",
    "Thailand": "Bangkok",
    "Turkey": "Ankara",
    "Ukraine": "Kiev",
}


def capital_cities_prompts(
    tokenizer: Any, n_prompts: int = 200, seed: int = 0
) -> PromptFile:
    """Prompts with labels; word_idxs (without BOS): country, end."""
    countries = [
        country
        for country in single_token_words(tokenizer, CAPITALS)
        if single_token_words(tokenizer, [CAPITALS[country]], at_least=0)
    ]
    prompts = subject_pairs(
        {country: CAPITALS[country] for country in countries},
        lambda country: TEMPLATE.format(country=country),
        n_prompts,
        random.Random(seed),
    )
    check_aligned(tokenizer, prompts)
    labels = token_labels(tokenizer, render(TEMPLATE, country=countries[0]))
    return PromptFile(prompts, labels, word_idxs(labels, ["country"]))


@dataclass(frozen=True)
class Config(TextConfig):
    """Which prompts to write."""

    tokenizer: str = "EleutherAI/pythia-70m-deduped"
    """A Hugging Face hub name, or the folder of a tokenizer."""
    n_prompts: int = 200
    model_name: str = "pythia-70m-deduped"
    """For the name of the file."""


if __name__ == "__main__":
    config = tyro.cli(Config, description=__doc__)
    file = capital_cities_prompts(config.load_tokenizer(), config.n_prompts, config.seed)
    path = config.out / f"capital_cities_{config.model_name}_prompts.json"
    file.write(path, config.stated_name)

"""What an animal eats.

"The cows ate some" -> " grass"; the corrupt prompt is about an animal with other food,
which is the wrong answer. Pairs of animals with different food, in random order. Writes
`animal_diet_short_prompts.json`.
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

TEMPLATE = "The {animal} ate some"
FOODS = {
    "cows": "grass",
    "sheep": "grass",
    "goats": "leaves",
    "horses": "hay",
    "rabbits": "carrots",
    "dogs": "meat",
    "cats": "fish",
    "birds": "seeds",
    "chickens": "corn",
    "monkeys": "fruit",
    "bears": "honey",
    "lions": "meat",
    "tigers": "meat",
    "wolves": "meat",
    "mice": "cheese",
    "rats": "cheese",
    "deer": "leaves",
    "pigs": "corn",
    "frogs": "insects",
    "bats": "insects",
    "elephants": "leaves",
    "whales": "fish",
    "bees": "honey",
    "snakes": "mice",
    "ducks": "bread",
    "eagles": "fish",
    "spiders": "flies",
    "worms": "leaves",
    "ants": "sugar",
    "foxes": "mice",
    "donkeys": "hay",
    "buffalo": "grass",
    "camels": "grass",
    "kangaroos": "grass",
    "penguins": "fish",
    "sharks": "fish",
    "owls": "mice",
    "pigeons": "bread",
    "squirrels": "nuts",
    "parrots": "nuts",
    "zebra": "grass",
    "hens": "corn",
    "bulls": "grass",
    "turkeys": "corn",
    "crows": "seeds",
    "dolphins": "fish",
    "lizards": "insects",
    "turtles": "leaves",
}


def animal_diet_prompts(
    tokenizer: Any, n_prompts: int = 500, seed: int = 0
) -> PromptFile:
    """Prompts with labels; word_idxs (without BOS): animal, end."""
    animals = [
        animal
        for animal in single_token_words(tokenizer, FOODS)
        if single_token_words(tokenizer, [FOODS[animal]], at_least=0)
    ]
    prompts = subject_pairs(
        {animal: FOODS[animal] for animal in animals},
        lambda animal: TEMPLATE.format(animal=animal),
        n_prompts,
        random.Random(seed),
    )
    check_aligned(tokenizer, prompts)
    labels = token_labels(tokenizer, render(TEMPLATE, animal=animals[0]))
    return PromptFile(prompts, labels, word_idxs(labels, ["animal"]))


@dataclass(frozen=True)
class Config(TextConfig):
    """Which prompts to write."""

    n_prompts: int = 500


if __name__ == "__main__":
    config = tyro.cli(Config, description=__doc__)
    file = animal_diet_prompts(config.load_tokenizer(), config.n_prompts, config.seed)
    file.write(config.out / "animal_diet_short_prompts.json", config.stated_name)

"""Indirect object identification: which of two names is meant.

"After Mary and John arrived at the store, John handed a drink to" -> " Mary". In the
corrupt prompt the three names are three others, all different, so that no name is the
answer. Writes `ioi_prompts.json` (all templates, both orders) and
`ioi_single_template_prompts.json` (one template, for circuits by position).
"""

from __future__ import annotations

import random

from prompt_file import Prompt, held_out_prompts, is_held_out, write_prompts
from vocabulary import NAMES, OBJECTS, PLACES

TEMPLATES = (
    "After {first} and {second} arrived at the {place}, {giver} handed a {object} to",
    "Then {first} and {second} met near the {place}, and {giver} offered a {object} to",
    "Last week {first} and {second} walked to the {place}. Later {giver} lent the "
    "{object} to",
    "While {first} and {second} were waiting in the {place}, {giver} showed a {object} to",
    "On Monday {first} and {second} worked at the {place}. At noon {giver} brought a "
    "{object} to",
    "Since {first} and {second} could not find the {place}, {giver} returned the {object} "
    "to",
    "{first} and {second} had fun at the {place} until {giver} threw a {object} to",
    "Before {first} and {second} left the {place}, {giver} sold the old {object} to",
)
SINGLE_TEMPLATE_LABELS = (
    "After IO and S1 arrived at the PLACE , S2 handed a OBJECT to".split()
)
SINGLE_TEMPLATE_WORDS = {"IO": 1, "S1": 3, "S1+1": 4, "S2": 9, "end": 13}


def sample_ioi(
    rng: random.Random,
    held_out: bool,
    templates: tuple[str, ...] = TEMPLATES,
    orders: tuple[str, ...] = ("ABBA", "BABA"),
) -> Prompt:
    """A prompt whose pair of names is held out of training, or is not.

    The orders: ABBA names the indirect object first, BABA the subject.
    """
    while True:
        io, subject, *others = rng.sample(NAMES, 5)
        if is_held_out("ioi", *sorted((io, subject))) == held_out:
            break
    template, order = rng.choice(templates), rng.choice(orders)
    words = {"place": rng.choice(PLACES), "object": rng.choice(OBJECTS)}
    first, second = (io, subject) if order == "ABBA" else (subject, io)
    return {
        "clean": template.format(first=first, second=second, giver=subject, **words),
        "corrupt": template.format(
            first=others[0], second=others[1], giver=others[2], **words
        ),
        "answers": [f" {io}"],
        "wrong_answers": [f" {subject}"],
    }


def sample_single_template(rng: random.Random, held_out: bool) -> Prompt:
    """A prompt of the first template, in the order ABBA."""
    return sample_ioi(rng, held_out, TEMPLATES[:1], ("ABBA",))


def main() -> None:
    """Write the files."""
    write_prompts("ioi_prompts", held_out_prompts(sample_ioi, seed=1))
    write_prompts(
        "ioi_single_template_prompts",
        held_out_prompts(sample_single_template, seed=2),
        SINGLE_TEMPLATE_LABELS,
        SINGLE_TEMPLATE_WORDS,
    )


if __name__ == "__main__":
    main()

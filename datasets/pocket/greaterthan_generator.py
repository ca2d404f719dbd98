"""Greater-than: a later year of the same century.

"The war lasted from the year 1742 to the year 17" -> any of "43" ... "99". In the corrupt
prompt the first year ends in 01. Writes `greaterthan_prompts.json`.
"""

from __future__ import annotations

import random

from prompt_file import Prompt, held_out_prompts, is_held_out, write_prompts
from vocabulary import CENTURIES, NOUNS

FIRST_YEAR, LAST_YEAR = 2, 98


def sample_greaterthan(rng: random.Random, held_out: bool) -> Prompt:
    """A prompt whose noun and year are held out of training, or are not."""
    while True:
        noun, century = rng.choice(NOUNS), rng.choice(CENTURIES)
        year = rng.randint(FIRST_YEAR, LAST_YEAR)
        if is_held_out("greaterthan", noun, str(century), str(year)) == held_out:
            break
    text = f"The {noun} lasted from the year {century}{{:02}} to the year {century}"
    return {
        "clean": text.format(year),
        "corrupt": text.format(1),
        "answers": [f"{later:02}" for later in range(year + 1, 100)],
        "wrong_answers": [f"{earlier:02}" for earlier in range(year + 1)],
    }


def main() -> None:
    """Write the file."""
    prompts = held_out_prompts(sample_greaterthan, seed=3)
    write_prompts("greaterthan_prompts", prompts)


if __name__ == "__main__":
    main()

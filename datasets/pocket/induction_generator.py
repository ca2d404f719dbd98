"""Induction: what followed this word before, in a list of random words.

"scale leaf table offset path job row mode field clock path" -> " job". In the corrupt prompt
the word's first occurrence and another word have changed places, so that the other word's
follower is the answer ("offset Brian" -> "offset key", "key" -> ...). The same words, the
same length, the same last word: what differs is which word stands before which, so that no
token says the answer by itself, nor does any place. Writes `induction_prompts.json`.
"""

from __future__ import annotations

import random

from prompt_file import Prompt, held_out_prompts, is_held_out, write_prompts
from vocabulary import ARGUMENTS

N_WORDS = 10


def sample_induction(
    rng: random.Random, held_out: bool, n_words: int = N_WORDS, n_repeated: int = 1
) -> Prompt:
    """A prompt whose words and their followers are held out of training, or are not.

    The last `n_repeated` words are some that stand beside each other in the list.
    """
    while True:
        words = rng.sample(ARGUMENTS, n_words)
        first = rng.randrange(n_words - n_repeated)
        asked = first + n_repeated - 1
        pairs = zip(words[first : asked + 1], words[first + 1 : asked + 2], strict=True)
        if all(is_held_out("induction", *pair) == held_out for pair in pairs):
            break
    # Another word that has a follower, and is no neighbour.
    other = rng.choice([i for i in range(n_words - 1) if abs(i - asked) > 1])
    swapped = list(words)
    swapped[asked], swapped[other] = words[other], words[asked]
    repeated = words[first : asked + 1]
    return {
        "clean": " ".join([*words, *repeated]),
        "corrupt": " ".join([*swapped, *repeated]),
        "answers": [f" {words[asked + 1]}"],
        "wrong_answers": [f" {words[other + 1]}"],
    }


def sample_repeated_words(rng: random.Random, held_out: bool) -> Prompt:
    """The same for training: short lists too, and several repeated words, which all teach."""
    n_words = rng.randint(5, N_WORDS)
    n_repeated = rng.randint(1, n_words - 2)
    prompt = sample_induction(rng, held_out, n_words, n_repeated)
    return {**prompt, "n_asked": n_repeated}


def main() -> None:
    """Write the file."""
    write_prompts("induction_prompts", held_out_prompts(sample_induction, seed=5))


if __name__ == "__main__":
    main()

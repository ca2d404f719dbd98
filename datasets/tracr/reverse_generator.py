"""Reverse a sequence: the prompts of the compiled model `reverse`.

All sequences of five of 1, 2 and 3, as the model's token ids: [BOS, ...]. The answers are
the reversed sequence, one token id per position after BOS; the corrupt prompt is another
sequence, and the wrong answers are its answers, some of which may be right as well.
Writes `tracr_reverse_len_5_prompts.json`.
"""

from __future__ import annotations

import itertools
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from prompt_writer import PromptFile  # noqa: E402  # pyright: ignore

BOS, WORDS, LENGTH = 3, (0, 1, 2), 5
"""The token ids of BOS and of the words 1, 2, 3."""
SEQ_LABELS = ["BOS", *(f"token {idx}" for idx in range(LENGTH))]


def answers(sequence: tuple[int, ...]) -> list[list[int]]:
    """[position, 1]: the sequence from its end."""
    return [[word] for word in reversed(sequence)]


def reverse_prompts(seed: int = 0) -> PromptFile:
    """A prompt for each sequence."""
    rng = random.Random(seed)
    sequences = list(itertools.product(WORDS, repeat=LENGTH))
    prompts = []
    for clean in sequences:
        corrupt = rng.choice([other for other in sequences if other != clean])
        prompts.append(
            {
                "clean": [BOS, *clean],
                "corrupt": [BOS, *corrupt],
                "answers": answers(clean),
                "wrong_answers": answers(corrupt),
            }
        )
    return PromptFile(prompts, SEQ_LABELS)


if __name__ == "__main__":
    path = Path(__file__).parent / "tracr_reverse_len_5_prompts.json"
    reverse_prompts().write(path)

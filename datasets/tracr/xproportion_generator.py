"""Which share of the letters so far are "x": the prompts of the model `xproportion`.

All sequences of five of w, x, y and z, as the model's token ids: [BOS, ...]. The answers
are numbers, one per position after BOS; the corrupt prompt is another sequence, and the
wrong answers are its answers, some of which may be right as well. Writes
`tracr_xproportion_len_5_prompts.json`.
"""

from __future__ import annotations

import itertools
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from prompt_writer import PromptFile  # noqa: E402  # pyright: ignore

BOS, WORDS, X, LENGTH = 0, (2, 3, 4, 5), 3, 5
"""The token ids of BOS, of w, x, y, z, and of x."""
SEQ_LABELS = ["BOS", *(f"token {idx}" for idx in range(LENGTH))]


def answers(sequence: tuple[int, ...]) -> list[list[float]]:
    """[position, 1]: the share of x up to and with that position."""
    return [[sequence[:n].count(X) / n] for n in range(1, LENGTH + 1)]


def xproportion_prompts(seed: int = 0) -> PromptFile:
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
    path = Path(__file__).parent / "tracr_xproportion_len_5_prompts.json"
    xproportion_prompts().write(path)

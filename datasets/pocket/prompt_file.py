"""How the pocket prompts are written down, and which of them the model never sees."""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

# Last: that folder has generators of the same names as this one.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from prompt_writer import Prompt, PromptFile, different_prompts  # noqa: E402

N_PROMPTS = 500
HELD_OUT_SHARE = 5  # one in five


def is_held_out(*words: str) -> bool:
    """Is a prompt about these words kept out of the training of the pocket model?

    From a hash: the same in every process, and for every order in which prompts are made.
    """
    digest = hashlib.sha256(" ".join(words).encode()).digest()
    return digest[0] % HELD_OUT_SHARE == 0


def held_out_prompts(
    sample: Callable[[random.Random, bool], Prompt], seed: int, count: int = N_PROMPTS
) -> list[Prompt]:
    """`count` different prompts that are kept out of training."""
    rng = random.Random(seed)
    return different_prompts(lambda: sample(rng, True), count)


def write_prompts(
    name: str,
    prompts: Sequence[Prompt],
    seq_labels: Sequence[str] | None = None,
    word_idxs: Mapping[str, int] | None = None,
) -> None:
    """Write `<name>.json` beside this file, a line per prompt."""
    path = Path(__file__).parent / f"{name}.json"
    file = PromptFile(prompts, seq_labels, word_idxs or {})
    file.write(path, "auto_circuit/pocket_model")

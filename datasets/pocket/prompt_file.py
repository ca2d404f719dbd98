"""How the pocket prompts are written down, and which of them the model never sees."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Prompt = dict[str, Any]
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
    prompts: dict[str, Prompt] = {}
    while len(prompts) < count:
        prompt = sample(rng, True)
        prompts.setdefault(prompt["clean"], prompt)
    return list(prompts.values())


def write_prompts(
    name: str,
    prompts: Sequence[Prompt],
    seq_labels: Sequence[str] | None = None,
    word_idxs: Mapping[str, int] | None = None,
) -> None:
    """Write `<name>.json` beside this file, a line per prompt."""
    head: dict[str, Any] = {"tokenizer": "auto_circuit/pocket_model"}
    if seq_labels is not None:
        head["seq_labels"] = list(seq_labels)
    if word_idxs is not None:
        head["word_idxs"] = dict(word_idxs)
    fields = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    rows = ",\n".join(json.dumps(prompt) for prompt in prompts)
    path = Path(__file__).parent / f"{name}.json"
    path.write_text("{" + ",\n".join([*fields, f'"prompts": [\n{rows}\n]']) + "}\n")
    print(f"{path}: {len(prompts)} prompts")

"""Docstring completion: the next argument, in the order of the definition.

def send(self, mode, root, size, file, port, scale):
    \"\"\"shared current
    :param size: main total
    :param file: global second
    :param                            -> " port"

In the corrupt prompt the definition's three arguments and the documented ones are others,
so that no argument is the answer. All prompts have the same length. Writes
`docstring_prompts.json`.
"""

from __future__ import annotations

import random

from prompt_file import Prompt, held_out_prompts, is_held_out, write_prompts
from vocabulary import ARGUMENTS, DESCRIPTIONS, FUNCTIONS

TEXT = '''def {function}(self, {before[0]}, {before[1]}, {defined}, {after}):
    """{words[0]} {words[1]}
    :param {documented[0]}: {words[2]} {words[3]}
    :param {documented[1]}: {words[4]} {words[5]}
    :param'''
LABELS = (
    'def FUNCTION ( self , ARG1 , ARG2 , A_def , B_def , C_def , ARG6 ) : """ D1 D2 '
    ": param A_doc : D3 D4 : param B_doc : D5 D6 : param"
).split()
WORDS = ("A_def", "B_def", "C_def", "A_doc", "B_doc")


def sample_docstring(rng: random.Random, held_out: bool) -> Prompt:
    """A prompt whose three arguments are held out of training, or are not."""
    while True:
        args = rng.sample(ARGUMENTS, 11)
        if is_held_out("docstring", *args[:3]) == held_out:
            break
    matching, before, after, other = args[:3], args[3:5], args[5], args[6:]
    fixed = {
        "function": rng.choice(FUNCTIONS),
        "before": before,
        "after": after,
        "words": [rng.choice(DESCRIPTIONS) for _ in range(6)],
    }
    return {
        "clean": TEXT.format(**fixed, defined=", ".join(matching), documented=matching),
        "corrupt": TEXT.format(
            **fixed, defined=", ".join(other[:3]), documented=other[3:]
        ),
        "answers": [f" {matching[2]}"],
        "wrong_answers": [f" {arg}" for arg in (*matching[:2], *before, after)],
    }


def main() -> None:
    """Write the file."""
    idxs = {word: LABELS.index(word) for word in WORDS} | {"end": len(LABELS) - 1}
    prompts = held_out_prompts(sample_docstring, seed=4)
    write_prompts("docstring_prompts", prompts, LABELS, idxs)


if __name__ == "__main__":
    main()

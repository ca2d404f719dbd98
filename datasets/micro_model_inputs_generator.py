"""Inputs of the micro model: one prompt, as often as tests ask for it.

The prompt is [[3, 3], [2, 2], [1, 1]], the corrupt one its negative; the micro model gives
[25, 49] at the last position of the one and [-25, -49] of the other. All prompts are equal,
so that whatever is measured on some of them can be worked out by hand from one.

`micro_model_inputs.json`: output 1 is the answer, 0 the wrong one.
`micro_model_inputs_multiple_answers.json`: outputs 0 and 1 are answers; the wrong ones are 2
and 3, which the micro model does not have: for what looks at answers alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from prompt_writer import DATASETS, PromptFile

ROWS = ((3.0, 3.0), (2.0, 2.0), (1.0, 1.0))
N_PROMPTS = 1000


def micro_model_prompts(
    answers: Sequence[int] = (1,), wrong_answers: Sequence[int] = (0,)
) -> PromptFile:
    """Prompts [row, 2], all equal."""
    prompt = {
        "clean": ROWS,
        "corrupt": [[-value for value in row] for row in ROWS],
        "answers": answers,
        "wrong_answers": wrong_answers,
    }
    return PromptFile([prompt] * N_PROMPTS)


if __name__ == "__main__":
    micro_model_prompts().write(DATASETS / "micro_model_inputs.json")
    micro_model_prompts((0, 1), (2, 3)).write(
        DATASETS / "micro_model_inputs_multiple_answers.json"
    )

"""Inputs of the micro model: rows of numbers, their negatives, and which output is larger.

Of outputs 0 and 1 of the micro model, 1 is larger for positive inputs. Prompt i is
[[3, 3], [2, 2], [1, 1]] times 1, 2, ..., N_PROMPTS over N_PROMPTS, so that no two are the
same; the largest is exactly this. Writes `micro_model_inputs.json`.
"""

from __future__ import annotations

from prompt_writer import DATASETS, PromptFile

ROWS = ((3.0, 3.0), (2.0, 2.0), (1.0, 1.0))
N_PROMPTS = 64  # a power of two: every number is exact


def micro_model_prompts() -> PromptFile:
    """Prompts [row, 2] of growing size."""
    prompts = []
    for i in range(1, N_PROMPTS + 1):
        clean = [[value * i / N_PROMPTS for value in row] for row in ROWS]
        corrupt = [[-value for value in row] for row in clean]
        prompts.append(
            {"clean": clean, "corrupt": corrupt, "answers": [1], "wrong_answers": [0]}
        )
    return PromptFile(prompts)


if __name__ == "__main__":
    micro_model_prompts().write(DATASETS / "micro_model_inputs.json")

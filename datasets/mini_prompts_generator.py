"""Two words and an answer: prompts that are as small as texts can be.

For tests of random models, which need a clean and a corrupt prompt that differ and nothing
else. The words are single tokens of GPT-2's tokenizer and of the pocket model's. All
prompts are equal. Writes `mini_prompts.json`.
"""

from __future__ import annotations

from prompt_writer import DATASETS, PromptFile

N_PROMPTS = 4


def mini_prompts() -> PromptFile:
    """The same prompt, `N_PROMPTS` times."""
    prompt = {
        "clean": "Anna brought",
        "corrupt": "Anna returned",
        "answers": [" flower"],
        "wrong_answers": [" letter"],
    }
    return PromptFile([prompt] * N_PROMPTS)


if __name__ == "__main__":
    mini_prompts().write(DATASETS / "mini_prompts.json")

'''Docstring completion: the next argument, in the order of the definition.

def render(self, mode, root, size, file, port, scale):
    """shared current main

    :param size: first total
    :param file: global second
    :param                            -> " port"

In the corrupt prompt the definition's three arguments and the documented ones are others,
so that no argument is the answer. All prompts have the same length. Writes
`docstring_prompts.json`, with labels and word positions.

The task is that of Heimersheim & Janiak 2023, "A circuit for Python docstrings in a
4-layer attention-only transformer"; the words are others.
'''

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import tyro
from prompt_writer import (
    Prompt,
    PromptFile,
    TextConfig,
    check_aligned,
    different_prompts,
    render,
    single_token_words,
    token_labels,
    word_idxs,
)

TEMPLATE = '''
def {FUNCTION}(self, {ARG1}, {ARG2}, {A_def}, {B_def}{,_B} {C_def}, {ARG6}):
    """{D1} {D2} {D3}

    :{param_1} {A_doc}: {D4} {D5}
    :{param_2} {B_doc}: {D6} {D7}
    :{param_3}'''
FIXED = {",_B": ",", "param_1": "param", "param_2": "param", "param_3": "param"}
"""What these fields are always filled with: they only give tokens a name."""

DEFINED, DOCUMENTED = ("A_def", "B_def", "C_def"), ("A_doc", "B_doc")
OTHERS = ("ARG1", "ARG2", "ARG6")
DESCRIBED = tuple(f"D{i}" for i in range(1, 8))
WORDS = ("A_def", "B_def", ",_B", "C_def", "A_doc", "param_2", "B_doc", "param_3")

ARGUMENTS = (
    "load size files port host path index count width height depth color shape label name "
    "value key mode style format buffer offset limit range start stop step speed angle "
    "weight mass force field image frame page line word letter token block node edge graph "
    "table row column list queue stack tree root leaf user group role state event task job "
    "timer clock signal filter scale model item part unit code type date time level rate"
).split()
FUNCTIONS = (
    "send parse build draw merge split check update render open close read write"
).split()
DESCRIPTIONS = (
    "first second third main default optional extra total current local global shared new "
    "old last next small large full empty simple common general special public private"
).split()
"""Descriptions of arguments; they say nothing about which argument it is."""


def sample_docstring(
    rng: random.Random,
    arguments: list[str],
    functions: list[str],
    descriptions: list[str],
) -> Prompt:
    """A prompt about random arguments.

    Answer: the definition's third argument. Wrong: the ten others of both prompts.
    """
    args = rng.sample(arguments, 11)
    matching, others, defined, documented = args[:3], args[3:6], args[6:9], args[9:]
    fixed = {
        **FIXED,
        "FUNCTION": rng.choice(functions),
        **dict(zip(OTHERS, others, strict=True)),
        **{name: rng.choice(descriptions) for name in DESCRIBED},
    }

    def text(definition: list[str], docs: list[str]) -> str:
        named = zip((*DEFINED, *DOCUMENTED), (*definition, *docs), strict=True)
        return render(TEMPLATE, **fixed, **dict(named)).text

    return {
        "clean": text(matching, matching[:2]),
        "corrupt": text(defined, documented),
        "answers": [f" {matching[2]}"],
        "wrong_answers": [
            f" {arg}" for arg in (*matching[:2], *others, *defined, *documented)
        ],
    }


def docstring_prompts(tokenizer: Any, n_prompts: int = 1000, seed: int = 0) -> PromptFile:
    """Prompts with labels; word_idxs (without BOS): WORDS and end."""
    rng = random.Random(seed)
    arguments = single_token_words(tokenizer, ARGUMENTS, at_least=11)
    functions = single_token_words(tokenizer, FUNCTIONS)
    # The first description follows the quotes without a space.
    bare = single_token_words(tokenizer, DESCRIPTIONS, prefix="")
    descriptions = single_token_words(tokenizer, bare)
    prompts = different_prompts(
        lambda: sample_docstring(rng, arguments, functions, descriptions), n_prompts
    )
    check_aligned(tokenizer, prompts)
    words = {name: arguments[0] for name in (*DEFINED, *DOCUMENTED, *OTHERS)}
    words |= {name: descriptions[0] for name in DESCRIBED}
    rendered = render(TEMPLATE, FUNCTION=functions[0], **FIXED, **words)
    labels = token_labels(tokenizer, rendered)
    return PromptFile(prompts, labels, word_idxs(labels, WORDS))


@dataclass(frozen=True)
class Config(TextConfig):
    """Which prompts to write."""

    model_name: str = ""
    """For the name of the file, which is `docstring_prompts.json` if empty."""


if __name__ == "__main__":
    config = tyro.cli(Config, description=__doc__)
    file = docstring_prompts(config.load_tokenizer(), config.n_prompts, config.seed)
    stem = "_".join(word for word in ("docstring", config.model_name, "prompts") if word)
    file.write(config.out / f"{stem}.json", config.stated_name)

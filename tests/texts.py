"""Small tokenizers, text models and prompt files. No download."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources._bridge_builder import (
    build_bridge_from_module,
)
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from tests.models import randomize

NAMES = "Ann Bob Cat Dan Eve".split()
WORDS = "and met at the store . later gave a ring to big".split()
CORPUS = [
    f"{a} and {b} met at the store. later {a} gave a ring to {b}"
    for a in NAMES
    for b in NAMES
]


def word_tokenizer(adds_bos: bool = False) -> PreTrainedTokenizerFast:
    """Each word is a token; padding, BOS and unknown words have tokens of their own."""
    vocabulary = ["<pad>", "<bos>", "<unk>", *NAMES, *WORDS]
    tokenizer = Tokenizer(
        WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = WhitespaceSplit()
    if adds_bos:
        tokenizer.post_processor = TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        unk_token="<unk>",
        padding_side="right",
    )


def bpe_tokenizer() -> PreTrainedTokenizerFast:
    """As GPT-2's: bytes, merged; one token is BOS, EOS and padding."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=end, eos_token=end, pad_token=end
    )


def text_model(tokenizer: Any, n_words: int | None = None) -> TransformerBridge:
    """A random GPT-2 that speaks the tokenizer's language, or only its first words."""
    n_words = n_words or len(tokenizer)
    config = GPT2Config(
        n_layer=2, n_head=4, n_embd=32, vocab_size=n_words, n_positions=32
    )
    model = GPT2LMHeadModel(config)
    randomize(model)
    bridge = build_bridge_from_module(model, "GPT2LMHeadModel", hf_config=config)
    # Not handed in: TransformerLens would load it again, from a folder or the hub.
    bridge.tokenizer = tokenizer
    return bridge.eval().requires_grad_(False)


def prompt(
    clean: Any = "Ann met Bob at the store",
    corrupt: Any = "Dan met Eve at the store",
    answers: Any = (" Bob",),
    wrong_answers: Any = (" Ann",),
) -> dict[str, Any]:
    return {
        "clean": clean,
        "corrupt": corrupt,
        "answers": list(answers),
        "wrong_answers": list(wrong_answers),
    }


def name_prompts(
    count: int, text: str = "{} met {} at the store"
) -> list[dict[str, Any]]:
    """Prompts that differ in their names."""
    pairs = [(a, b) for a in NAMES for b in NAMES if a != b]
    return [
        prompt(
            text.format(a, b),
            text.format(b, a),
            answers=(f" {b}",),
            wrong_answers=(f" {a}",),
        )
        for a, b in (pairs * (count // len(pairs) + 1))[:count]
    ]


def write_prompts(
    folder: Path, prompts: Sequence[Any], name: str = "prompts", **fields: Any
) -> Path:
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"prompts": list(prompts), **fields}))
    return path

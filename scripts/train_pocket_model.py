"""Train the pocket model: a small language model that shows three behaviours.

It learns indirect object identification, greater-than and docstring completion from the
generators in `datasets/pocket`, on prompts that their files do not hold, and is written to
`auto_circuit/pocket_model/` in Hugging Face format. `make pocket-model` runs this; it takes
about five minutes on two cores.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch as t
import tyro
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO / "datasets" / "pocket"))

from docstring_generator import TEXT, sample_docstring  # noqa: E402
from greaterthan_generator import sample_greaterthan  # noqa: E402
from ioi_generator import TEMPLATES, sample_ioi  # noqa: E402
from vocabulary import all_words  # noqa: E402

PAD, BOS, UNK = "<pad>", "<bos>", "<unk>"
SPECIAL_TOKENS = (PAD, BOS, UNK)
PAD_ID, BOS_ID = 0, 1
NUMBERS = tuple(f"{number:02}" for number in range(100))
# Years are two tokens of two digits; a word, a docstring's quotes and any other sign are
# one token each; spaces and line breaks are none.
TOKEN = r'[0-9][0-9]|\w+|"""|[^\w\s]'
CONTEXT = 64
SAMPLERS = (sample_ioi, sample_greaterthan, sample_docstring)


@dataclass(frozen=True)
class TrainConfig:
    """How the pocket model is trained."""

    out: Path = REPO / "auto_circuit" / "pocket_model"
    """The folder that the model is written to."""
    seed: int = 0
    """Of the initial weights and of the prompts."""
    n_steps: int = 2000
    prompts_per_task: int = 32
    """In every batch."""
    learning_rate: float = 2e-3
    """The highest one, of a one-cycle schedule."""
    weight_decay: float = 0.1
    n_layers: int = 4
    n_heads: int = 8
    d_model: int = 128


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer that knows every word of the prompts."""
    splitter = Split(Regex(TOKEN), behavior="removed", invert=True)
    fixed = " ".join([*TEMPLATES, TEXT, "The lasted from the year to the year", "."])
    template_words = [
        word for word, _ in splitter.pre_tokenize_str(_without_fields(fixed))
    ]
    words = dict.fromkeys([*SPECIAL_TOKENS, *NUMBERS, *template_words, *all_words()])
    vocabulary = {word: idx for idx, word in enumerate(words)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=UNK))
    tokenizer.pre_tokenizer = splitter
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=BOS,
        pad_token=PAD,
        unk_token=UNK,
        padding_side="left",
        model_max_length=CONTEXT,
    )


def _without_fields(text: str) -> str:
    """A template without what stands in braces."""
    parts = text.split("{")
    return parts[0] + " ".join(part.split("}", 1)[1] for part in parts[1:])


def batches(
    tokenizer: PreTrainedTokenizerFast, config: TrainConfig
) -> Iterator[tuple[t.Tensor, t.Tensor, t.Tensor]]:
    """(tokens [batch seq], attention mask, position of the last token before the answer).

    A prompt is followed by one of its answers, picked at random.
    """
    rng = random.Random(config.seed)
    while True:
        prompts = [
            sample(rng, False)
            for sample in SAMPLERS
            for _ in range(config.prompts_per_task)
        ]
        texts = [f"{p['clean']} {rng.choice(p['answers'])}" for p in prompts]
        ids = [
            [BOS_ID, *row]
            for row in tokenizer(texts, add_special_tokens=False)["input_ids"]
        ]
        length = max(len(row) for row in ids)
        tokens = t.tensor([row + [PAD_ID] * (length - len(row)) for row in ids])
        last = t.tensor([len(row) - 2 for row in ids])
        yield tokens, (tokens != PAD_ID).long(), last


def loss_on(
    model: GPT2LMHeadModel, tokens: t.Tensor, mask: t.Tensor, last: t.Tensor
) -> t.Tensor:
    """Cross entropy of every next word, and once more that of the answers."""
    logits = model(input_ids=tokens, attention_mask=mask).logits
    targets = tokens[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
    words = cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten())
    rows = t.arange(len(tokens))
    return words + cross_entropy(logits[rows, last], tokens[rows, last + 1])


def train(config: TrainConfig) -> tuple[GPT2LMHeadModel, PreTrainedTokenizerFast]:
    """The trained model and its tokenizer."""
    t.manual_seed(config.seed)
    tokenizer = make_tokenizer()
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=CONTEXT,
            n_embd=config.d_model,
            n_layer=config.n_layers,
            n_head=config.n_heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=BOS_ID,
            eos_token_id=BOS_ID,
            pad_token_id=PAD_ID,
        )
    )
    optimizer = t.optim.AdamW(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
    )
    schedule = t.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=config.learning_rate, total_steps=config.n_steps
    )
    model.train()
    for step, batch in zip(
        range(config.n_steps), batches(tokenizer, config), strict=False
    ):
        loss = loss_on(model, *batch)
        optimizer.zero_grad()
        loss.backward()
        t.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == config.n_steps - 1:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    return model.eval(), tokenizer


def save(model: GPT2LMHeadModel, tokenizer: Any, folder: Path) -> None:
    """Write model and tokenizer in Hugging Face format."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    for path in sorted(folder.iterdir()):
        print(f"{path}: {path.stat().st_size:,} bytes")


def main(config: TrainConfig) -> None:
    """Train and save."""
    t.use_deterministic_algorithms(True)
    save(*train(config), config.out)


if __name__ == "__main__":
    main(tyro.cli(TrainConfig))

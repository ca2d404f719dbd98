"""Train the pocket models: small language models that show a few behaviours.

    python scripts/train_pocket_model.py llama    # or gpt2, gemma2

They learn indirect object identification, greater-than, docstring completion and induction
from the generators in `datasets/pocket`, on prompts that their files do not hold, and are
written to folders in Hugging Face format. `make pocket-model` trains all of them, each in
up to ten minutes on two cores.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch as t
import tyro
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO / "datasets" / "pocket"))

from docstring_generator import TEXT, sample_docstring  # noqa: E402
from greaterthan_generator import sample_greaterthan  # noqa: E402
from induction_generator import sample_induction, sample_repeated_words  # noqa: E402
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
SAMPLERS = {
    "ioi": sample_ioi,
    "greaterthan": sample_greaterthan,
    "docstring": sample_docstring,
    "induction": sample_induction,
}
TRAIN_SAMPLERS = SAMPLERS | {"induction": sample_repeated_words}
HELD_OUT_SEED = 1000
"""Of the prompts that the accuracy is measured on."""


@dataclass(frozen=True)
class TrainConfig:
    """How a pocket model is trained."""

    family: str
    """The architecture: a key of FAMILIES."""
    out: Path
    """The folder that the model is written to."""
    behaviours: tuple[str, ...] = tuple(SAMPLERS)
    """What it learns: keys of SAMPLERS."""
    seed: int = 0
    """Of the initial weights and of the prompts."""
    n_steps: int = 1500
    prompts_per_task: tuple[int, ...] = (32, 6, 6, 16)
    """In every step, of each behaviour: most of those that take longest to learn."""
    in_one_batch: bool = False
    """Are the prompts of all behaviours padded to one length? Slower, and every word counts
    the same, so that behaviours of long prompts count more."""
    learning_rate: float = 3e-3
    """The highest one, of a one-cycle schedule."""
    weight_decay: float = 0.1
    n_layers: int = 3
    n_heads: int = 4
    d_model: int = 128


MODELS = {
    "gpt2": TrainConfig(
        "gpt2",
        REPO / "auto_circuit" / "pocket_model",
        behaviours=("ioi", "greaterthan", "docstring"),
        n_steps=2000,
        prompts_per_task=(32, 32, 32),
        in_one_batch=True,
        learning_rate=2e-3,
        n_layers=4,
        n_heads=8,
    ),
    "llama": TrainConfig("llama", REPO / "auto_circuit" / "pocket_llama"),
    "gemma2": TrainConfig("gemma2", REPO / "auto_circuit" / "pocket_gemma", seed=1),
}


# ------------------------------------------------------------------------ architectures


def gpt2(config: TrainConfig, shared: dict[str, Any]) -> PreTrainedConfig:
    """Layer norm, learned positions, an MLP of four times the width."""
    return GPT2Config(
        n_positions=CONTEXT,
        n_embd=config.d_model,
        n_layer=config.n_layers,
        n_head=config.n_heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        **shared,
    )


def llama(config: TrainConfig, shared: dict[str, Any]) -> PreTrainedConfig:
    """RMS norm, rotary positions, a key and value for two heads, a gated MLP."""
    return LlamaConfig(**_grouped(config), **shared)


def gemma2(config: TrainConfig, shared: dict[str, Any]) -> PreTrainedConfig:
    """As `llama`, with norms after attention and MLP too, and Gemma 2's soft caps."""
    return Gemma2Config(
        **_grouped(config),
        head_dim=config.d_model // config.n_heads,
        query_pre_attn_scalar=config.d_model // config.n_heads,
        sliding_window=CONTEXT,
        **shared,
    )


def _grouped(config: TrainConfig) -> dict[str, Any]:
    return {
        "hidden_size": config.d_model,
        "intermediate_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_heads // 2,
        "max_position_embeddings": CONTEXT,
        "attn_implementation": "eager",  # the one that knows soft caps
        # Of width 1 / sqrt(width), not the 0.02 of large models: copying, which takes the
        # product of several matrices, is learned ten times as fast.
        "initializer_range": config.d_model**-0.5,
    }


FAMILIES: dict[str, Callable[[TrainConfig, dict[str, Any]], PreTrainedConfig]] = {
    "gpt2": gpt2,
    "llama": llama,
    "gemma2": gemma2,
}


def make_model(config: TrainConfig, vocab_size: int) -> PreTrainedModel:
    """The model, untrained."""
    shared = {
        "vocab_size": vocab_size,
        "bos_token_id": BOS_ID,
        "eos_token_id": BOS_ID,
        "pad_token_id": PAD_ID,
    }
    model = AutoModelForCausalLM.from_config(FAMILIES[config.family](config, shared))
    if config.family == "llama":
        # As large as what the layers add to them; Gemma 2 multiplies by it when it runs.
        model.get_input_embeddings().weight.data *= config.d_model**0.5
    return model


# ------------------------------------------------------------------------------ prompts


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


def encoded(
    tokenizer: PreTrainedTokenizerFast, texts: list[str]
) -> tuple[t.Tensor, t.Tensor]:
    """(tokens [batch seq], attention mask), padded on the right."""
    ids = [
        [BOS_ID, *row] for row in tokenizer(texts, add_special_tokens=False)["input_ids"]
    ]
    length = max(len(row) for row in ids)
    tokens = t.tensor([row + [PAD_ID] * (length - len(row)) for row in ids])
    return tokens, (tokens != PAD_ID).long()


Batch = tuple[t.Tensor, t.Tensor, t.Tensor]
"""(tokens [batch seq], attention mask, share of the answers that each position asks for)"""


def steps(
    tokenizer: PreTrainedTokenizerFast, config: TrainConfig
) -> Iterator[list[Batch]]:
    """The batches of each step: one for each behaviour, or one for all.

    A prompt is followed by one of its answers, picked at random.
    """
    rng = random.Random(config.seed)
    while True:
        prompts = [
            TRAIN_SAMPLERS[behaviour](rng, False)
            for behaviour, count in zip(
                config.behaviours, config.prompts_per_task, strict=True
            )
            for _ in range(count)
        ]
        texts = [f"{p['clean']} {rng.choice(p['answers'])}" for p in prompts]
        counts = [p.get("n_asked", 1) for p in prompts]
        sizes = (len(prompts),) if config.in_one_batch else config.prompts_per_task
        batches = []
        for size, end in zip(sizes, accumulate(sizes), strict=True):
            tokens, mask = encoded(tokenizer, texts[end - size : end])
            batches.append((tokens, mask, _asked(mask, counts[end - size : end])))
        yield batches


def _asked(mask: t.Tensor, counts: list[int]) -> t.Tensor:
    """For every prompt, [batch seq]: the share of its answers that each position asks for."""
    from_end = mask.sum(1, keepdim=True) - 1 - t.arange(mask.shape[1])
    n_asked = t.tensor(counts)[:, None]
    return ((0 < from_end) & (from_end <= n_asked)) / n_asked


def accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, behaviour: str
) -> float:
    """How often an answer is the likeliest of all words, on 200 held-out prompts."""
    rng = random.Random(HELD_OUT_SEED)
    prompts = [SAMPLERS[behaviour](rng, True) for _ in range(200)]
    tokens, mask = encoded(tokenizer, [p["clean"] for p in prompts])
    with t.no_grad():
        logits = model(input_ids=tokens, attention_mask=mask).logits
    best = logits[t.arange(len(tokens)), mask.sum(1) - 1].argmax(-1).tolist()
    answers = [{answer.strip() for answer in prompt["answers"]} for prompt in prompts]
    words = tokenizer.convert_ids_to_tokens(best)
    return sum(map(set.__contains__, answers, words)) / len(prompts)


# ----------------------------------------------------------------------------- training


def loss_on(
    model: PreTrainedModel, tokens: t.Tensor, mask: t.Tensor, asked: t.Tensor
) -> t.Tensor:
    """Cross entropy of every next word, and once more that of the answers."""
    logits = model(input_ids=tokens, attention_mask=mask).logits
    targets = tokens[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
    per_word = cross_entropy(
        logits[:, :-1].flatten(0, 1), targets.flatten(), reduction="none"
    )
    words = per_word.sum() / (targets != -100).sum()
    return words + (per_word * asked[:, :-1].flatten()).sum() / len(tokens)


def train(config: TrainConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The trained model and its tokenizer."""
    t.manual_seed(config.seed)
    tokenizer = make_tokenizer()
    model = make_model(config, len(tokenizer))
    optimizer = t.optim.AdamW(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
    )
    schedule = t.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=config.learning_rate, total_steps=config.n_steps
    )
    model.train()
    for step, batches in zip(
        range(config.n_steps), steps(tokenizer, config), strict=False
    ):
        optimizer.zero_grad()
        loss = 0.0
        for batch in batches:
            of_batch = loss_on(model, *batch) / len(batches)
            of_batch.backward()
            loss += of_batch.item()
        t.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == config.n_steps - 1:
            print(f"step {step}: loss {loss:.3f}", flush=True)
        if step % 250 == 249 or step == config.n_steps - 1:
            print(
                {b: accuracy(model, tokenizer, b) for b in config.behaviours}, flush=True
            )
    return model.eval(), tokenizer


def as_json(config: TrainConfig) -> dict[str, Any]:
    """All of it but where it is written, for `training.json` beside the model."""
    return {name: value for name, value in asdict(config).items() if name != "out"}


def save(model: PreTrainedModel, tokenizer: Any, config: TrainConfig) -> None:
    """Write model and tokenizer in Hugging Face format, and how they were trained."""
    folder = config.out
    model.save_pretrained(folder)
    (folder / "training.json").write_text(json.dumps(as_json(config), indent=2) + "\n")
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    for path in sorted(folder.iterdir()):
        print(f"{path}: {path.stat().st_size:,} bytes")


def main(config: TrainConfig) -> None:
    """Train and save."""
    t.use_deterministic_algorithms(True)
    save(*train(config), config)


if __name__ == "__main__":
    main(
        tyro.extras.overridable_config_cli(
            {name: (c.family, c) for name, c in MODELS.items()}
        )
    )

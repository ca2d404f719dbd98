"""The same models and prompts for both sides: weights from names, prompts from a formula.

Imported by our tests and, in the published version's own environment, by
`make_expected.py`. So nothing here may import what only one of the two has.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any, NamedTuple

import torch as t
from torch import Tensor
from torch.nn import Module
from transformers import GPT2Config, GPT2LMHeadModel

VOCAB, N_CTX = 30, 50
N_PROMPTS, SEQ_LEN, BATCH_SIZE = 6, 4, 2


class Size(NamedTuple):
    """How large a model is."""

    n_layers: int = 2
    n_heads: int = 2
    d_head: int = 8

    @property
    def d_model(self) -> int:
        return self.n_heads * self.d_head


SMALL = Size()
GPT2_SMALL_GRAPH = Size(12, 12, 2)
ATTN_ONLY_4L_GRAPH = Size(4, 8, 2)
"""As many layers and heads as the models of the known circuits, and few weights."""

REPOSITORY = Path(__file__).parents[2]
POCKET_MODEL = REPOSITORY / "auto_circuit/pocket_model"
POCKET_PROMPTS = REPOSITORY / "datasets/pocket/ioi_single_template_prompts.json"


def weights_by_name(name: str, shape: tuple[int, ...]) -> Tensor:
    """Random numbers that follow from the parameter's name; norms scale by about 1."""
    generator = t.Generator().manual_seed(zlib.crc32(name.encode()))
    noise = 0.3 * t.randn(shape, generator=generator)
    is_norm = ".ln" in name or name.startswith("ln")
    return 1 + noise if is_norm and name.endswith("weight") else noise


def set_weights(model: Module) -> None:
    """Give every parameter the weights of its name (shared ones those of the first)."""
    for name, parameter in model.named_parameters():
        parameter.data = weights_by_name(name, tuple(parameter.shape))


def random_gpt2(size: Size = SMALL) -> GPT2LMHeadModel:
    config = GPT2Config(
        n_layer=size.n_layers,
        n_head=size.n_heads,
        n_embd=size.d_model,
        vocab_size=VOCAB,
        n_positions=N_CTX,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config).eval()
    set_weights(model)
    return model


def attention_only_weights(size: Size = SMALL) -> dict[str, Tensor]:
    """The parameters of a model with attention only, by TransformerLens 4's names."""
    width = size.d_model
    shapes: dict[str, tuple[int, ...]] = {
        "tok_embed.weight": (VOCAB, width),
        "pos.weight": (N_CTX, width),
        "ln_out.weight": (width,),
        "ln_out.bias": (width,),
        "head.weight": (VOCAB, width),
    }
    for layer in range(size.n_layers):
        prefix = f"layers.{layer}."
        shapes |= {f"{prefix}ln1.weight": (width,), f"{prefix}ln1.bias": (width,)}
        for part in "qkvo":
            shapes[f"{prefix}attn.{part}.weight"] = (width, width)
            shapes[f"{prefix}attn.{part}.bias"] = (width,)
    return {name: weights_by_name(name, shape) for name, shape in shapes.items()}


def prompt_tokens(seed: int) -> Tensor:
    """[prompt seq]: words by a formula, 1 to VOCAB - 1."""
    numbers = t.arange(N_PROMPTS * SEQ_LEN) * 7 + 11 * seed
    return (1 + (numbers * numbers + 3 * seed) % (VOCAB - 1)).view(N_PROMPTS, SEQ_LEN)


class Prompts(NamedTuple):
    """The parts of a `PromptDataset`."""

    clean: Tensor
    corrupt: Tensor
    answers: list[Tensor]
    wrong_answers: list[Tensor]


def prompts(several_answers: str = "one") -> Prompts:
    """several_answers: "one" right and one wrong answer, "equal" numbers, or "ragged"."""
    counts = {"one": [1] * 6, "equal": [2] * 6, "ragged": [1, 3, 2, 1, 2, 3]}
    answers, wrong_answers = [], []
    for idx, n_answers in enumerate(counts[several_answers]):
        words = (t.arange(6) * 5 + 3 * idx) % VOCAB
        answers.append(words[:n_answers])
        wrong_answers.append(words[3 : 3 + n_answers])
    return Prompts(prompt_tokens(1), prompt_tokens(2), answers, wrong_answers)


def numbered_scores(model: Any) -> dict[str, Tensor]:
    """Scores of all sizes and both signs, from the fixed order of edges by name."""
    edges = edges_by_name(model)
    scores = model.new_prune_scores()
    for idx, edge in enumerate(edges):
        size = 1 + (idx * 37) % len(edges)
        value = float(size if idx % 2 else -size)
        scores[edge.dest.module_name][edge.patch_idx] = value
    return scores


def edges_by_name(model: Any) -> list[Any]:
    """An order that does not depend on how either side keeps its edges."""
    return sorted(
        model.edges,
        key=lambda edge: (-1 if edge.seq_idx is None else edge.seq_idx, edge.name),
    )

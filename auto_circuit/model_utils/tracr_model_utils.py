"""Two transformers that were compiled, not trained: their circuits are known exactly.

`reverse` reverses a sequence of 1, 2 and 3; `xproportion` says at each position which
share of the letters up to it are "x". tracr (Lindner et al. 2023, "Tracr: Compiled
Transformers as a Laboratory for Interpretability") compiled them from RASP programs;
`scripts/compile_tracr_models.py` wrote the weights that are loaded here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch as t
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge

from auto_circuit.checks import checked
from auto_circuit.errors import DataError
from auto_circuit.model_utils.transformer_lens_utils import native_bridge

TRACR_TASK_KEY = Literal["reverse", "xproportion"]
BOS = "BOS"
"""The word that every input starts with."""

REVERSE_VOCAB = (1, 2, 3)
XPROPORTION_VOCAB = ("w", "x", "y", "z")
MAX_SEQ_LEN = 5
"""The longest input, without BOS."""

Word = int | str
_WORDS: dict[TRACR_TASK_KEY, tuple[Word, ...]] = {
    "reverse": REVERSE_VOCAB,
    "xproportion": XPROPORTION_VOCAB,
}
_WEIGHTS = Path(__file__).parent / "tracr_weights"
_MODULES = {
    "attn.query": "attn.q",
    "attn.key": "attn.k",
    "attn.value": "attn.v",
    "attn.linear": "attn.o",
    "mlp.linear_1": "mlp.fc_in",
    "mlp.linear_2": "mlp.fc_out",
}


@dataclass(frozen=True)
class TracrEncoding:
    """What a tracr model's tokens, outputs and residual dimensions mean.

    key: which model. token_ids: the id of each word that it reads, and of BOS (tracr's
        id for padding is not used). output_labels: what each output is, such as
        "reverse_1:2" (the word 2) or "frac_prevs_7" (a number). residual_labels: what
        each dimension of the residual stream is, in tracr's words.
    """

    key: TRACR_TASK_KEY
    token_ids: dict[Word, int]
    output_labels: tuple[str, ...]
    residual_labels: tuple[str, ...]

    def encode(self, words: Sequence[Word]) -> list[int]:
        """The token ids of [BOS, up to MAX_SEQ_LEN words]. Raises DataError for others."""
        if not words or words[0] != BOS or len(words) > MAX_SEQ_LEN + 1:
            raise DataError(
                f"The model {self.key!r} reads {BOS!r} and up to {MAX_SEQ_LEN} words; got "
                f"{list(words)}."
            )
        unknown = [word for word in words if word not in self.token_ids]
        if unknown:
            raise DataError(
                f"The model {self.key!r} does not know {unknown}; its words are "
                f"{list(self.token_ids)}."
            )
        return [self.token_ids[word] for word in words]

    def decode(self, outputs: Float[Tensor, "seq out"]) -> list[Word | float]:
        """What the model says at each position: the likeliest words, or numbers.

        Its output at the first position, BOS, has no meaning; BOS stands for it.
        """
        if len(self.output_labels) == 1:
            return [BOS, *outputs[1:, 0].tolist()]
        words = [word for word in self.token_ids if word != BOS]
        return [BOS, *(words[i] for i in outputs[1:].argmax(-1).tolist())]


@checked
def get_tracr_model(
    tracr_task_key: TRACR_TASK_KEY, device: t.device | str = "cpu"
) -> tuple[TransformerBridge, TracrEncoding]:
    """A compiled model, ready for `patchable_model`, and what its tokens mean.

    It has bidirectional attention, ReLU, no layer norm, no tokenizer; its weights need no
    gradients. Outputs [batch seq out]: for "reverse" an indicator of each of the words 1,
    2, 3 (1 if it is the answer, else 0), for "xproportion" the share itself. They mean
    nothing at position 0, which is BOS: use `slice_output="not_first_seq"`.

    Raises ConfigError for an unknown key.

    The weights were compiled before, so JAX and tracr are not needed; their encoding is
    returned in place of tracr's assembled model (whose `apply` is `encode`, the model,
    `decode`). The outputs are those dimensions of the residual stream that hold the result.
    """
    path = _WEIGHTS / f"{tracr_task_key}.safetensors"
    meaning = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    # The weights that a new model gets are random, and overwritten.
    with t.random.fork_rng(devices=[]):
        model = native_bridge(_config(meaning))
    tensors = _parameters(model.cfg.n_layers, load_file(path))
    for name, parameter in model.named_parameters():
        parameter.data = tensors[name.replace("._original_component", "")]
    model = model.to(device, print_details=False).eval().requires_grad_(False)
    return model, _encoding(tracr_task_key, meaning)


def _config(meaning: dict[str, Any]) -> TransformerBridgeConfig:
    return TransformerBridgeConfig(
        n_layers=meaning["n_layers"],
        n_heads=meaning["n_heads"],
        d_model=meaning["d_model"],
        d_head=meaning["d_head"],
        d_mlp=meaning["d_mlp"],
        n_ctx=meaning["max_seq_len"] + 1,
        d_vocab=len(meaning["vocabulary"]),
        d_vocab_out=len(meaning["outputs"]),
        act_fn="relu",
        normalization_type=None,
        attention_dir="bidirectional",
        architecture="TransformerLensNative",
    )


def _encoding(key: TRACR_TASK_KEY, meaning: dict[str, Any]) -> TracrEncoding:
    ids = {word: idx for idx, word in enumerate(meaning["vocabulary"])}
    return TracrEncoding(
        key=key,
        token_ids={word: ids[str(word)] for word in (*_WORDS[key], BOS)},
        output_labels=tuple(meaning["outputs"]),
        residual_labels=tuple(meaning["residual_labels"]),
    )


def _parameters(n_layers: int, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """tracr's weights, [input output], under TransformerLens's names, [output input]."""
    tensors = {
        "tok_embed.weight": weights["embed"],
        "pos.weight": weights["pos_embed"],
        "head.weight": weights["unembed"].T.contiguous(),
    }
    for layer in range(n_layers):
        for theirs, ours in _MODULES.items():
            name = f"layers.{layer}.{ours}"
            tensors[f"{name}.weight"] = weights[
                f"layer_{layer}.{theirs}.w"
            ].T.contiguous()
            tensors[f"{name}.bias"] = weights[f"layer_{layer}.{theirs}.b"]
    return tensors

"""Models that are loaded wrong, or by halves, are errors that say what is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch as t
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformer_lens.config import TransformerBridgeConfig
from transformers import AutoTokenizer

from auto_circuit.errors import ConfigError, ModelError
from auto_circuit.experiment_utils import load_tl_model
from auto_circuit.model_utils.load_model import (
    check_log_probs,
    load_transformer,
    probe_log_probs,
)
from auto_circuit.model_utils.transformer_lens_utils import native_bridge
from auto_circuit.tasks import POCKET_MODEL
from tests.models import SIZES, gpt2, randomize

WEIGHT = "transformer.h.1.attn.c_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(POCKET_MODEL, tmp_path / "model"))


def configure(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def truncate(folder: Path, n_bytes: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:n_bytes])


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "more layers": (lambda f: configure(f, n_layer=6), r"24 that.*lack.*h\.4\.attn"),
    "fewer layers": (lambda f: configure(f, n_layer=3), r"no place for.*h\.3\.attn"),
    "more words": (lambda f: configure(f, vocab_size=400), r"another shape.*wte"),
    "a weight less": (
        lambda f: change_weights(f, lambda weights: weights.pop(WEIGHT)),
        rf"there are 1 that the model needs.*{WEIGHT}",
    ),
    "a weight more": (
        lambda f: change_weights(f, lambda weights: weights.update(other=t.ones(2))),
        r"no place for \(other\)",
    ),
    "NaN": (
        lambda f: change_weights(f, lambda weights: weights[WEIGHT][3].fill_(t.nan)),
        rf"1 hold NaN or infinity \({WEIGHT}\)",
    ),
    "infinity": (
        lambda f: change_weights(f, lambda weights: weights[WEIGHT][3].fill_(t.inf)),
        "hold NaN or infinity",
    ),
    "half a file": (lambda f: truncate(f, 2_000_000), "Cannot load.*each of them whole"),
    "an empty file": (lambda f: truncate(f, 0), "Cannot load.*each of them whole"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "Cannot load.*safetens"),
    "half a config": (lambda f: (f / "config.json").write_text("{"), "Cannot load"),
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "half a tokenizer": (lambda f: (f / "tokenizer.json").write_text("{"), "Cannot load"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder(folder: Path, damage: str) -> None:
    do_damage, message = DAMAGES[damage]
    do_damage(folder)
    with pytest.raises(ModelError, match=message):
        load_tl_model(folder)


def test_paths_and_devices_that_are_not_there(folder: Path) -> None:
    for name in (folder / "config.json", folder / "x", Path("x"), "./x", "/x"):
        with pytest.raises(ModelError, match="must be a folder in Hugging Face format"):
            load_tl_model(name)
    for device in ("x", "cuda:77", "meta"):
        with pytest.raises(ConfigError, match="`device` is .*, which cannot be used"):
            load_tl_model(folder, device)


WRONG_IN_TRANSFORMER_LENS: dict[str, dict[str, Any]] = {
    "GptOss": {
        **SIZES,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "Falcon": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_kv_heads": 2,
        "new_decoder_architecture": True,
    },
}


@pytest.mark.parametrize(
    "name", ["GptOss", pytest.param("Falcon", marks=pytest.mark.slow)]
)
def test_a_model_that_transformer_lens_loads_wrong(tmp_path: Path, name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(POCKET_MODEL)
    sizes = {**WRONG_IN_TRANSFORMER_LENS[name], "vocab_size": len(tokenizer)}
    config = getattr(transformers, f"{name}Config")(**sizes)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    randomize(model)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="loads the model .* wrong|Cannot load"):
        load_tl_model(tmp_path)


def test_log_probs_of_another_model() -> None:
    model = gpt2()
    said = probe_log_probs(model, model.cfg.d_vocab)
    check_log_probs(model, said, "a GPT-2")
    weight = next(model.parameters())
    weight.data += 0.02 * t.linspace(-1, 1, weight.shape[-1])
    with pytest.raises(ModelError, match="TransformerLens loads a GPT-2 wrong"):
        check_log_probs(model, said, "a GPT-2")
    with pytest.raises(ModelError, match="the shape"):
        check_log_probs(model, said[..., 1:], "a GPT-2")


def test_a_rotary_native_model() -> None:
    sizes: dict[str, Any] = {"n_layers": 1, "n_heads": 2, "d_model": 8, "d_head": 4}
    config = TransformerBridgeConfig(
        **sizes,
        n_ctx=8,
        d_vocab=5,
        act_fn="relu",
        architecture="TransformerLensNative",
        positional_embedding_type="rotary",
    )
    with pytest.raises(ConfigError, match="`positional_embedding_type` is 'rotary'"):
        native_bridge(config)


def test_value_biases_are_folded_in_float32_only() -> None:
    """What zero ablations take away depends on it (`AblationType`)."""
    for dtype, are_folded in ((t.float32, True), (t.bfloat16, False)):
        model: Any = load_transformer(POCKET_MODEL, dtype=dtype)
        biases = t.stack([block.attn.b_V for block in model.blocks])
        assert biases.dtype == dtype and bool((biases == 0).all()) == are_folded

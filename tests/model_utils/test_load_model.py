"""Models that are loaded wrong, or by halves, are errors that say what is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch as t
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge.sources._bridge_builder import (
    build_bridge_from_module,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from auto_circuit.errors import ConfigError, ModelError
from auto_circuit.experiment_utils import load_tl_model
from auto_circuit.model_utils import load_model
from auto_circuit.model_utils.load_model import (
    check_log_probs,
    check_whole_blocks,
    load_transformer,
    probe_log_probs,
)
from auto_circuit.model_utils.transformer_lens_utils import native_bridge
from auto_circuit.tasks import POCKET_MODEL
from auto_circuit.utils.graph_utils import patchable_model
from tests.families import bridge_of, make
from tests.models import SIZES, gpt2, randomize, tokens

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


# TransformerLens folds their norms wrongly.
FOLDED_WRONGLY: dict[str, dict[str, Any]] = {
    "Gemma2": {**SIZES, "num_key_value_heads": 2, "head_dim": 8},
    "GptOss": {
        **SIZES,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}
# It makes another model of it also without folding.
FALCON: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_kv_heads": 2,
    "new_decoder_architecture": True,
}


def saved(folder: Path, name: str, sizes: dict[str, Any]) -> Any:
    """A random model in a folder, with the pocket models' tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(POCKET_MODEL)
    sizes = {**sizes, "vocab_size": len(tokenizer)}
    config = getattr(transformers, f"{name}Config")(**sizes)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    randomize(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    "name", ["Gemma2", pytest.param("GptOss", marks=pytest.mark.slow)]
)
def test_norms_that_would_be_folded_wrongly_are_not_folded(
    tmp_path: Path, name: str
) -> None:
    model = saved(tmp_path, name, FOLDED_WRONGLY[name])
    tokens = t.arange(3, 20)[None]
    with t.no_grad():
        t.testing.assert_close(load_tl_model(tmp_path)(tokens), model(tokens).logits)


def test_a_model_that_transformer_lens_loads_wrong(tmp_path: Path) -> None:
    saved(tmp_path, "Falcon", FALCON)
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


# ------------------------------------------------------------------ models that are loaded


def hugging_face_model(**changes: Any) -> Any:
    config = transformers.LlamaConfig(**{**SIZES, "num_key_value_heads": 2, **changes})
    model = transformers.LlamaForCausalLM(config)
    randomize(model)
    return model.eval()


@pytest.mark.parametrize("dtype", [None, t.bfloat16, t.float64])
def test_a_hugging_face_model(dtype: t.dtype | None) -> None:
    given = hugging_face_model()
    inputs = tokens(2, 5)
    with t.no_grad():
        expected = given(inputs).logits
    model = load_tl_model(given, dtype=dtype)
    assert model.original_model is given and model.tokenizer is None
    assert next(model.parameters()).dtype == (dtype or t.float32)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    atol = 0.1 if dtype == t.bfloat16 else 1e-5
    t.testing.assert_close(model(inputs).float(), expected, atol=atol, rtol=0)
    graph = patchable_model(model, True, "last_seq", separate_qkv=True)
    assert {mask.dtype for mask in graph.patch_masks.values()} == {
        t.float64 if dtype == t.float64 else t.float32
    }
    # As it is, so that it can be given again.
    assert load_tl_model(model) is model


def test_a_hugging_face_model_with_its_tokenizer() -> None:
    tokenizer = AutoTokenizer.from_pretrained(POCKET_MODEL)
    given = AutoModelForCausalLM.from_pretrained(POCKET_MODEL)
    model = load_tl_model(given, tokenizer=tokenizer)
    named = load_transformer(POCKET_MODEL)
    text = "When Mary and John went"
    assert model.to_tokens(text).tolist() == named.to_tokens(text).tolist()
    expected, found = (m(text).log_softmax(-1) for m in (named, model))
    t.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_a_model_that_was_loaded_before_is_the_same(name: str) -> None:
    model = make(name, t.float32)
    first = load_tl_model(model)
    n_edges = patchable_model(first, True, separate_qkv=True).n_edges
    n_weights = len(model.state_dict())
    assert load_tl_model(model) is first
    assert patchable_model(first, True, separate_qkv=True).n_edges == n_edges
    assert len(model.state_dict()) == n_weights
    copy = load_tl_model(deepcopy(model), dtype=t.bfloat16)
    assert copy is not first and next(copy.parameters()).dtype == t.bfloat16
    assert next(first.parameters()).dtype == t.float32
    assert patchable_model(copy, True, separate_qkv=True).n_edges == n_edges
    bridged = make(name, t.float32)
    bridge_of(bridged)
    with pytest.raises(ModelError, match="is part of a TransformerBridge already"):
        load_tl_model(bridged)


def test_a_model_whose_bridge_says_something_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def build(model: Any, *args: Any, **kwargs: Any) -> Any:
        bridge = build_bridge_from_module(model, *args, **kwargs)
        bridge.blocks[1].mlp.out.weight.data *= 1.5
        return bridge

    monkeypatch.setattr(load_model, "build_bridge_from_module", build)
    with pytest.raises(ModelError, match="loads this LlamaForCausalLM wrong"):
        load_tl_model(hugging_face_model())


def test_models_that_are_none() -> None:
    broken = hugging_face_model()
    next(broken.parameters()).data[3, 2] = t.nan
    for given, message in (
        (t.nn.Linear(2, 2), "this Linear is none.*adapter="),
        (broken, "this LlamaForCausalLM.*NaN"),
        (_t5(), "an encoder and a decoder.*Use a decoder-only"),
    ):
        with pytest.raises(ModelError, match=message):
            load_tl_model(given)


def _t5() -> Any:
    sizes: Any = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    config = transformers.T5Config(**sizes, vocab_size=20)
    return transformers.T5ForConditionalGeneration(config)


def test_a_device_map() -> None:
    model: Any = load_tl_model(POCKET_MODEL, device_map={"": "cpu"})
    plain: Any = load_transformer(POCKET_MODEL)
    inputs = tokens(2, 5)
    found, expected = (m(inputs).log_softmax(-1) for m in (model, plain))
    t.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert not bool((model.blocks[0].attn.b_V == 0).all())  # as it was published


SPLITS: tuple[dict[str, Any], ...] = (
    {"transformer.h.0.attn": 0, "transformer.h.0.mlp": 1},
    {"transformer.h.0": "cpu", "transformer.h.0.mlp": "disk"},
    {"transformer.h": 0, "transformer.h.3.mlp.c_fc": 1},
    {"": 0, "transformer.h.3.attn": 1},
)


@pytest.mark.parametrize("split", SPLITS)
def test_a_device_map_that_splits_a_block(split: dict[str, Any]) -> None:
    with pytest.raises(
        ConfigError, match=r"splits the block 'transformer.h.\d' over the"
    ):
        load_tl_model("no such model is asked for", device_map=split)
    check_whole_blocks({"transformer.h.0": 0, "transformer.h.1": 1, "lm_head": 1})
    check_whole_blocks({"transformer.h.0.attn": 0, "transformer.h.0.mlp": 0, "x.h.1": 1})


MAPS: tuple[tuple[Any, str], ...] = (
    ({"transformers": "cpu", "": "cpu"}, "names 'transformers'.*mean 'transformer'"),
    (
        {"transformer.h": "cpu"},
        r"not say where 'transformer.wte.weight' goes \(\d weights",
    ),
    ({"": "no-device"}, r"device_map\[''\].*cannot be used"),
    ("cpus", "`device_map` is 'cpus', which cannot be used"),
    ({}, "`device_map` is a dict; expected auto"),
)


@pytest.mark.parametrize(("device_map", "message"), MAPS)
def test_a_device_map_that_cannot_be(device_map: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_tl_model(POCKET_MODEL, device_map=device_map)


class LowRank(t.nn.Linear):
    """A linear map that computes more than its weight says, as LoRA's do."""

    def __init__(self, plain: t.nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=False)
        self.weight = plain.weight

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + input.mean(-1, keepdim=True)


def test_heads_whose_linear_maps_do_more_than_their_weights() -> None:
    """What single heads read and write would be another model's."""
    for has_switches_on in (True, False):
        given: Any = make("llama")
        attention = given.model.layers[0].self_attn
        attention.v_proj = LowRank(attention.v_proj).requires_grad_(False)
        for _ in range(2):  # the model is as it was, so the same is said again
            with pytest.raises(
                ModelError, match="something else where.*merge_and_unload"
            ):
                if has_switches_on:
                    load_tl_model(given)
                else:
                    patchable_model(load_transformer(given), True, separate_qkv=True)


def test_what_was_compiled_has_the_model_in_it() -> None:
    compiled: Any = t.nn.Module()  # `torch.compile` itself takes seconds to import
    compiled._orig_mod = hugging_face_model()
    with pytest.raises(ModelError, match="torch.compile.*_orig_mod"):
        load_tl_model(compiled)


def test_arguments_that_do_not_go_together() -> None:
    given = hugging_face_model()
    calls: tuple[tuple[Callable[[], Any], str], ...] = (
        (
            lambda: load_tl_model("gpt2", "cpu", device_map="auto"),
            "`device` or `device_map`",
        ),
        (lambda: load_tl_model(given, device_map="auto"), "from_pretrained"),
        (lambda: load_tl_model("gpt2", tokenizer=object()), "`tokenizer` is for a given"),
    )
    for call, message in calls:
        with pytest.raises(ConfigError, match=message):
            call()
    with pytest.raises(ModelError, match="`dtype` is torch.int8; expected one of"):
        load_tl_model(given, dtype=t.int8)


def test_a_model_on_the_meta_device_has_a_bridge() -> None:
    with t.device("meta"):
        config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2)
        given = transformers.LlamaForCausalLM(config)
    graph = patchable_model(load_tl_model(given), True, separate_qkv=True)
    assert len(graph.find_edges("A0.1->A1.1.K")) == 1

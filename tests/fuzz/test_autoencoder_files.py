"""Autoencoders' folders that are damaged in any way, and autoencoders put anywhere."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch as t
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from auto_circuit.model_utils.features.autoencoder import Autoencoder
from auto_circuit.model_utils.features.autoencoder_files import (
    load_autoencoder_folder,
    save_autoencoder,
)
from auto_circuit.model_utils.features.places import Neurons
from auto_circuit.model_utils.features.spliced import spliced
from auto_circuit.utils.graph_utils import patchable_model
from tests.fuzzing import only_our_errors
from tests.models import D_MODEL, gpt2

FOLDER, N = Path(tempfile.mkdtemp()) / "sae", 5
GPT2 = gpt2()


def random(*shape: int) -> t.Tensor:
    return t.randn(shape, generator=t.Generator().manual_seed(sum(shape)))


WHOLE = Autoencoder(
    kind="jumprelu",
    encoder_weight=random(N, D_MODEL),
    encoder_bias=random(N),
    decoder_weight=random(N, D_MODEL),
    decoder_bias=random(D_MODEL),
    threshold=random(N).abs(),
    hook_name="blocks.1.hook_resid_pre",
)
save_autoencoder(WHOLE, FOLDER)
CONFIG = json.loads((FOLDER / "cfg.json").read_text())
WEIGHTS = load_file(FOLDER / "sae_weights.safetensors")
BYTES = (FOLDER / "sae_weights.safetensors").read_bytes()
KINDS = ("standard", "jumprelu", "topk", "batchtopk", "gated", "transcoder", "x")
VALUES = st.recursive(
    st.one_of(
        *(st.none(), st.booleans(), st.integers(), st.text(max_size=8)),
        st.floats(allow_nan=False, allow_infinity=False),
        st.sampled_from([*KINDS, "layer_norm", "expected_average_only_in"]),
    ),
    lambda parts: st.one_of(
        st.lists(parts, max_size=3), st.dictionaries(st.text(max_size=4), parts)
    ),
    max_leaves=4,
)
NAMES = (
    *CONFIG,
    *("k", "d_out", "activation_fn", "activation_fn_kwargs", "hook_name", "hook_point"),
    *("hook_name_out", "rescale_acts_by_decoder_norm", "norm_scaling_factor"),
    *("hook_head_index", "finetuning_scaling_factor"),
)


def write(config: Any, weights: bytes) -> None:
    (FOLDER / "cfg.json").write_text(json.dumps(config))
    (FOLDER / "sae_weights.safetensors").write_bytes(weights)


@given(
    st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=4), st.floats() | st.none()
)
def test_any_configuration(changes: dict[str, Any], norm_factor: float | None) -> None:
    write({**CONFIG, **changes}, BYTES)
    with only_our_errors():
        read = load_autoencoder_folder(FOLDER, norm_factor)
        assert read.encode(t.zeros(2, read.d_in)).shape == (2, read.n_latents)


@given(
    st.dictionaries(
        st.sampled_from(
            [*WEIGHTS, "b_gate", "b_mag", "r_mag", "topk_threshold", "scaling_factor"]
        ),
        st.tuples(
            st.lists(st.sampled_from([0, 1, N, D_MODEL]), max_size=3),
            st.sampled_from([t.float32, t.bfloat16, t.int64, t.float64, t.bool]),
        )
        | st.none(),
    ),
    st.sampled_from(KINDS),
)
def test_any_weights(changes: dict[str, Any], kind: str) -> None:
    given_weights = {
        name: None if change is None else t.ones(change[0]).to(change[1])
        for name, change in changes.items()
    }
    weights = {k: w for k, w in {**WEIGHTS, **given_weights}.items() if w is not None}
    write({**CONFIG, "architecture": kind, "k": 2}, BYTES)
    save_file(weights, FOLDER / "sae_weights.safetensors")
    with only_our_errors():
        read = load_autoencoder_folder(FOLDER)
        assert read(t.zeros(2, read.d_in)).shape == (2, read.d_out)


@given(st.integers(0, len(BYTES) - 1), st.binary(max_size=6))
def test_any_damage(place: int, damage: bytes) -> None:
    write(CONFIG, BYTES[:place] + damage + BYTES[place + 2 * len(damage) :])
    with only_our_errors():
        load_autoencoder_folder(FOLDER)


@given(st.binary(max_size=40))
def test_any_text(text: bytes) -> None:
    (FOLDER / "cfg.json").write_bytes(text)
    with only_our_errors():
        load_autoencoder_folder(FOLDER)


HOOKS = st.one_of(
    st.none(),
    st.text(max_size=12),
    st.builds(
        "blocks.{}.{}".format,
        st.integers(-1, 3),
        st.sampled_from(
            [
                *("hook_resid_pre", "hook_out", "hook_resid_mid", "hook_mlp_out"),
                *("attn.hook_z", "mlp.hook_post", "ln2.hook_normalized", "mlp.hook_in"),
                "hook_attn_out",
            ]
        ),
    ),
)


@given(
    st.lists(st.tuples(HOOKS, HOOKS) | st.integers(-1, 3), max_size=2),
    st.none() | st.lists(st.none() | st.lists(st.integers(-1, 6)), max_size=2),
)
def test_any_place(places: list[Any], latents: Any) -> None:
    items = [
        (
            Neurons(place)
            if isinstance(place, int)
            else replace(
                WHOLE,
                hook_name=place[0],
                hook_name_out=place[1],
                centres_input=place[1] is None,
            )
        )
        for place in places
    ]
    with only_our_errors():
        model = spliced(GPT2, items, latents)
        assert patchable_model(model, True, separate_qkv=True).n_edges > 0

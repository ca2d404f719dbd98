"""Autoencoders in SAELens's format: numbers against its formulas, and damaged files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as t
from safetensors.torch import load_file, save_file
from torch import Tensor

from auto_circuit.errors import AutoCircuitError, ConfigError, DataError, ModelError
from auto_circuit.model_utils.features.autoencoder import Autoencoder
from auto_circuit.model_utils.features.autoencoder_files import (
    load_autoencoder_folder,
    save_autoencoder,
)

D_IN, N = 6, 9
EXACT: Any = {"rtol": 0, "atol": 1e-5}
BIASES = {
    "standard": ("b_enc",),
    "jumprelu": ("b_enc", "threshold"),
    "topk": ("b_enc",),
    "batchtopk": ("b_enc", "threshold"),
    "gated": ("b_gate", "b_mag", "r_mag"),
    "transcoder": ("b_enc",),
    "skip_transcoder": ("b_enc",),
    "jumprelu_skip_transcoder": ("b_enc", "threshold"),
}
X = 2 * t.randn(40, D_IN, generator=t.Generator().manual_seed(5))


def write(folder: Path, kind: str = "standard", **config: Any) -> dict[str, Any]:
    """Files as SAELens writes them; their weights."""
    generator = t.Generator().manual_seed(0)
    shapes = {"W_enc": (D_IN, N), "W_dec": (N, D_IN), "b_dec": (D_IN,)}
    shapes |= {name: (N,) for name in BIASES[kind]}
    if "skip" in kind:
        shapes["W_skip"] = (D_IN, D_IN)
    weights = {k: 0.5 * t.randn(s, generator=generator) for k, s in shapes.items()}
    if kind == "batchtopk":
        weights["threshold"] = t.full((N,), 0.7)
    if kind == "topk":
        config = {"k": 3, **config}
    base: dict[str, Any] = {
        "architecture": kind,
        "d_in": D_IN,
        "d_sae": N,
        "dtype": "float32",
        "device": "cpu",
        "metadata": {"hook_name": "blocks.0.hook_resid_pre", "sae_lens_version": "6.1.0"},
    }
    if "transcoder" in kind:
        base["metadata"]["hook_name_out"] = "blocks.0.hook_mlp_out"
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps({**base, **config}))
    return weights


def formula(architecture: str, w: dict[str, Tensor], x: Tensor, centres: bool) -> Tensor:
    """What SAELens's documentation says that each kind computes."""
    x = x - w["b_dec"] if centres else x
    if architecture == "gated":
        gate = x @ w["W_enc"] + w["b_gate"]
        size = x @ (w["W_enc"] * w["r_mag"].exp()) + w["b_mag"]
        return (gate > 0) * size.clamp(min=0)
    pre = x @ w["W_enc"] + w["b_enc"]
    if architecture == "topk":
        best = pre.argsort(-1, descending=True)[:, :3]
        kept = t.zeros_like(pre).scatter(1, best, 1.0)
        return (pre * kept).clamp(min=0)
    above = pre > w["threshold"] if "threshold" in w else t.ones_like(pre)
    return pre.clamp(min=0) * above


@pytest.mark.parametrize("architecture", BIASES)
@pytest.mark.parametrize("centres", [True, False])
def test_all_kinds_have_the_right_numbers(
    tmp_path: Path, architecture: str, centres: bool
) -> None:
    w = write(tmp_path / "sae", architecture, apply_b_dec_to_input=centres)
    read = load_autoencoder_folder(tmp_path / "sae")
    is_transcoder = "transcoder" in architecture
    latents = formula(architecture, w, X, centres and not is_transcoder)
    assert (latents > 0).any() and (latents == 0).any()
    t.testing.assert_close(read.encode(X), latents, **EXACT)
    out = latents @ w["W_dec"] + w["b_dec"]
    if "W_skip" in w:
        out = out + t.einsum("oi,ni->no", w["W_skip"], X)
    t.testing.assert_close(read(X), out, **EXACT)
    assert read.hook_name == "blocks.0.hook_resid_pre"
    # And again, from what we write.
    save_autoencoder(read, tmp_path / "ours")
    again = load_autoencoder_folder(tmp_path / "ours")
    assert (again.kind, again.hook_name) == (read.kind, read.hook_name)
    assert t.equal(again.encode(X), read.encode(X)) and t.equal(again(X), read(X))
    names = load_file(tmp_path / "ours" / "sae_weights.safetensors").keys()
    assert names == w.keys()


def test_a_transcoder_has_other_sizes_on_both_sides(tmp_path: Path) -> None:
    generator = t.Generator().manual_seed(0)
    read = Autoencoder(
        kind="jumprelu",
        encoder_weight=t.randn(N, D_IN, generator=generator),
        encoder_bias=t.randn(N, generator=generator),
        decoder_weight=t.randn(N, 4, generator=generator),
        decoder_bias=t.randn(4, generator=generator),
        threshold=t.rand(N, generator=generator),
        centres_input=False,
        hook_name="blocks.1.ln2.hook_normalized",
        hook_name_out="blocks.1.hook_mlp_out",
    )
    save_autoencoder(read, tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "cfg.json").read_text())
    assert config["architecture"] == "jumprelu_transcoder"
    assert (config["d_in"], config["d_sae"], config["d_out"]) == (D_IN, N, 4)
    again = load_autoencoder_folder(tmp_path / "ours")
    assert again.is_transcoder and again(X).shape == (40, 4)
    assert t.equal(again(X), read(X))
    assert again.hook_name_out == "blocks.1.hook_mlp_out"


def test_older_files(tmp_path: Path) -> None:
    """Before version 6: hook names at the top, TopK as an activation."""
    w = write(
        tmp_path / "sae", "topk", architecture="standard", activation_fn_str="topk",
        activation_fn_kwargs={"k": 3}, k=None, metadata=None, hook_point="blocks.0.x",
    )  # fmt: skip
    read = load_autoencoder_folder(tmp_path / "sae")
    assert (read.kind, read.k, read.hook_name) == ("topk", 3, "blocks.0.x")
    t.testing.assert_close(read.encode(X), formula("topk", w, X, True), **EXACT)


def test_factors_are_folded(tmp_path: Path) -> None:
    average = {"normalize_activations": "expected_average_only_in"}
    w = write(tmp_path / "sae", "jumprelu", **average)
    read = load_autoencoder_folder(tmp_path / "sae", norm_factor=0.3)
    latents = formula("jumprelu", w, 0.3 * X, True)
    t.testing.assert_close(read.encode(X), latents, **EXACT)
    expected = (latents @ w["W_dec"] + w["b_dec"]) / 0.3
    t.testing.assert_close(read(X), expected, **EXACT)
    write(tmp_path / "said", "jumprelu", norm_scaling_factor=0.3, **average)
    assert t.equal(load_autoencoder_folder(tmp_path / "said")(X), read(X))
    w = write(tmp_path / "topk", "topk", rescale_acts_by_decoder_norm=True)
    read = load_autoencoder_folder(tmp_path / "topk")
    norms = w["W_dec"].norm(dim=-1)
    scaled = {**w, "W_enc": w["W_enc"] * norms, "b_enc": w["b_enc"] * norms}
    latents = formula("topk", scaled, X, True)
    t.testing.assert_close(read.encode(X), latents, **EXACT)
    expected = (latents / norms) @ w["W_dec"] + w["b_dec"]
    t.testing.assert_close(read(X), expected, **EXACT)


def test_what_other_versions_write(tmp_path: Path) -> None:
    """Checkpoints of trainings, factors that mean nothing, and true for an average."""
    folder = tmp_path / "sae"
    w = write(folder, "jumprelu")
    plain = load_autoencoder_folder(folder)
    change(folder, threshold=None, log_threshold=w["threshold"].abs().log())
    logs = load_autoencoder_folder(folder)
    positive = {**w, "threshold": w["threshold"].abs()}
    t.testing.assert_close(
        logs.encode(X), formula("jumprelu", positive, X, True), **EXACT
    )
    write(folder, "batchtopk", architecture="matryoshka_batchtopk", k=2.5)
    change(folder, threshold=None, topk_threshold=t.tensor(0.7, dtype=t.float64))
    trained = load_autoencoder_folder(folder)
    constant = {**w, "threshold": t.full((N,), 0.7)}
    assert trained.kind == "batchtopk"
    expected = formula("jumprelu", constant, X, True)
    t.testing.assert_close(trained.encode(X), expected, **EXACT)
    write(folder, "jumprelu")
    change(folder, scaling_factor=t.ones(N))
    assert t.equal(load_autoencoder_folder(folder)(X), plain(X))
    change(folder, scaling_factor=2 * t.ones(N))
    with pytest.raises(ModelError, match="does not say whether it is used"):
        load_autoencoder_folder(folder)
    write(folder, "jumprelu", finetuning_scaling_factor=True)
    change(folder, scaling_factor=2 * t.ones(N))
    expected = 2 * plain.encode(X) @ w["W_dec"] + w["b_dec"]
    t.testing.assert_close(load_autoencoder_folder(folder)(X), expected, **EXACT)
    write(folder, "jumprelu", normalize_activations=True)
    average = load_autoencoder_folder(folder, norm_factor=0.3)
    t.testing.assert_close(average(X), plain(0.3 * X) / 0.3, **EXACT)
    write(folder, "jumprelu", normalize_activations=False)
    assert t.equal(load_autoencoder_folder(folder)(X), plain(X))


@pytest.mark.parametrize("file", ["params.npz", "params.safetensors"])
def test_files_of_gemma_scope(tmp_path: Path, file: str) -> None:
    """JumpReLU without a configuration; the second release has other names, and skips."""
    w = write(tmp_path / "sae", "jumprelu")
    skip = t.randn(D_IN, D_IN, generator=t.Generator().manual_seed(7))
    out = formula("jumprelu", w, X, False) @ w["W_dec"] + w["b_dec"]
    (tmp_path / "scope").mkdir()
    if file.endswith("npz"):
        arrays: dict[str, Any] = {name: weight.numpy() for name, weight in w.items()}
        np.savez(tmp_path / "scope" / file, **arrays)
    else:
        lower = {name.lower(): weight for name, weight in w.items()}
        save_file({**lower, "affine_skip_connection": skip}, tmp_path / "scope" / file)
        out = out + X @ skip
    read = load_autoencoder_folder(tmp_path / "scope")
    assert (read.kind, read.hook_name, read.centres_input) == ("jumprelu", None, False)
    t.testing.assert_close(read(X), out, **EXACT)
    with pytest.raises(ModelError, match="needs no `norm_factor`"):
        load_autoencoder_folder(tmp_path / "scope", norm_factor=2.0)
    path = tmp_path / "scope" / file
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ModelError, match="is damaged"):
        load_autoencoder_folder(tmp_path / "scope")


@pytest.mark.parametrize("normalization", ["layer_norm", "constant_norm_rescale"])
def test_activations_are_normalised(tmp_path: Path, normalization: str) -> None:
    w = write(tmp_path / "sae", "standard", normalize_activations=normalization)
    read = load_autoencoder_folder(tmp_path / "sae")
    if normalization == "layer_norm":
        centre, scale = X.mean(-1, keepdim=True), X.std(-1, keepdim=True)
        normed = (X - centre) / (scale + 1e-5)
    else:
        centre, scale = t.zeros(40, 1), X.norm(dim=-1, keepdim=True) / D_IN**0.5
        normed = X / scale
    latents = formula("standard", w, normed, True)
    t.testing.assert_close(read.encode(X), latents, **EXACT)
    expected = (latents @ w["W_dec"] + w["b_dec"]) * scale + centre
    t.testing.assert_close(read(X), expected, **EXACT)
    with pytest.raises(ConfigError, match="depends on what was encoded"):
        read.decode(latents)


def change(folder: Path, **weights: Tensor | None) -> None:
    path = folder / "sae_weights.safetensors"
    whole = {**load_file(path), **weights}
    save_file({k: v for k, v in whole.items() if v is not None}, path)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    cases: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
        ("standard", {"architecture": "temporal"}, {}, "of the kind 'temporal'"),
        ("standard", {"architecture": ["x"]}, {}, r"of the kind \['x'\]"),
        ("standard", {"d_in": 7}, {}, r"W_enc of the shape \(6, 9\).*says \(7, 9\)"),
        ("standard", {"d_sae": "many"}, {}, "W_enc of the shape"),
        ("standard", {}, {"b_enc": t.zeros(4)}, r"encoder_bias has the shape \(4,\)"),
        ("standard", {}, {"W_dec": t.zeros(N)}, r"W_dec of the shape \(9,\)"),
        ("standard", {}, {"b_enc": None}, "has the weights"),
        ("standard", {}, {"b_dec": t.full((D_IN,), t.nan)}, "b_dec that are not finite"),
        ("standard", {}, {"b_dec": t.zeros(D_IN, dtype=t.int64)}, "of the type"),
        ("gated", {}, {"r_mag": None}, "one of the kind 'gated' has"),
        ("jumprelu", {}, {"threshold": t.zeros(2)}, "threshold has the shape"),
        ("batchtopk", {}, {"threshold": None}, "no `threshold`"),
        ("topk", {"k": None}, {}, "`k` is None"),
        ("topk", {"k": 90}, {}, "keeps the k = 90 largest of 9"),
        ("standard", {"metadata": 3}, {}, "`metadata` that is none"),
        ("standard", {"metadata": {"hook_name": 3}}, {}, "`hook_name` is 3"),
        ("standard", {"hook_head_index": 2, "metadata": {}}, {}, "`hook_head_index` 2"),
        (
            "standard",
            {"hook_point_head_index": 1, "metadata": {}},
            {},
            "of a single head",
        ),
        ("skip_transcoder", {}, {"W_skip": None}, "'skip_transcoder' has.*W_skip"),
        ("skip_transcoder", {}, {"W_skip": t.zeros(2, 2)}, "skip_weight has the shape"),
        ("transcoder", {}, {"W_skip": t.zeros(D_IN, D_IN)}, r"has the weights.*'W_skip'"),
        ("standard", {}, {"encoder.weight": t.zeros(1)}, "read once SAELens has saved"),
        ("standard", {"apply_b_dec_to_input": "no"}, {}, "expected true or false"),
        (
            "standard",
            {"normalize_activations": "expected_average_only_in"},
            {},
            "no factor is said",
        ),
        ("standard", {"normalize_activations": "mean"}, {}, "`normalize_activations`"),
    ]
    for architecture, config, weights, message in cases:
        write(tmp_path / "sae", architecture, **config)
        change(tmp_path / "sae", **weights)
        with pytest.raises(ModelError, match=message):
            load_autoencoder_folder(tmp_path / "sae")
    write(tmp_path / "sae")
    with pytest.raises(ModelError, match="another factor is said"):
        load_autoencoder_folder(tmp_path / "sae", norm_factor=2.0)
    path = tmp_path / "sae" / "sae_weights.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ModelError, match="is damaged"):
        load_autoencoder_folder(tmp_path / "sae")
    path.unlink()
    with pytest.raises(ModelError, match="0 .safetensors files"):
        load_autoencoder_folder(tmp_path / "sae")
    (tmp_path / "sae" / "cfg.json").write_text("{")
    with pytest.raises(DataError, match="is not JSON"):
        load_autoencoder_folder(tmp_path / "sae")
    with pytest.raises(DataError, match="There is no file"):
        load_autoencoder_folder(tmp_path / "nowhere")


def test_a_folder_is_written_whole_or_not(tmp_path: Path, monkeypatch: Any) -> None:
    write(tmp_path / "sae")
    read = load_autoencoder_folder(tmp_path / "sae")
    before = read(X)
    from auto_circuit.model_utils.features import autoencoder_files

    def fails(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(autoencoder_files, "save_file", fails)
    with pytest.raises(AutoCircuitError, match="No space left"):
        save_autoencoder(read, tmp_path / "sae")
    assert t.equal(load_autoencoder_folder(tmp_path / "sae")(X), before)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["sae"]

"""Latents of autoencoders as sources: the laws of every graph, and each edge by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch as t
from safetensors.torch import save_file
from torch import Tensor

from auto_circuit.errors import ConfigError, DataError, ModelError
from auto_circuit.model_utils.sparse_autoencoders import sparse_autoencoder
from auto_circuit.model_utils.sparse_autoencoders.autoencoder_transformer import (
    AutoencoderTransformer,
    sae_model,
)
from auto_circuit.model_utils.sparse_autoencoders.sparse_autoencoder import (
    SparseAutoencoder,
    load_autoencoder,
)
from auto_circuit.prune import run_circuits
from auto_circuit.prune_algos.edge_attribution_patching import (
    edge_attribution_patching_prune_scores,
)
from auto_circuit.prune_algos.mask_gradient import mask_gradient_prune_scores
from auto_circuit.robustness import LEFT_OUT, Choices, robustness_rows, variations
from auto_circuit.tasks import POCKET_IOI_TASK, POCKET_MODEL, Task
from auto_circuit.types import AlgoPruneScores, AutoencoderInput, PatchType
from auto_circuit.utils.ablation_activations import src_ablations
from auto_circuit.utils.graph_utils import patch_mode, patchable_model, set_all_masks
from auto_circuit.utils.patchable_model import PatchableModel
from tests.models import D_MODEL, attn_only, gemma2, gpt2, llama, pythia, tokens
from tests.models import state_snapshot as snapshot
from tests.test_prune import token_loader

CLEAN, CORRUPT = tokens(3, 6), tokens(3, 6, seed=1)
EXACT: Any = {"rtol": 0, "atol": 1e-5}
N_LATENTS = 6
INPUTS = ("resid_delta_mlp", "mlp_post_act")


def make(
    model: Any, sae_input: Any = "resid_delta_mlp", **options: Any
) -> PatchableModel:
    saes = sae_model(model, sae_input, load_pretrained=False, n_latents=N_LATENTS)
    options = {"factorized": True, "separate_qkv": True, **options}
    return patchable_model(saes, slice_output="last_seq", **options)


@pytest.mark.parametrize("sae_input", INPUTS)
@pytest.mark.parametrize(
    "architecture", [gpt2, pythia, pytest.param(llama, marks=pytest.mark.slow)]
)
def test_the_laws_of_every_graph(architecture: Any, sae_input: AutoencoderInput) -> None:
    bridge = architecture()
    with t.no_grad():
        clean, corrupt = bridge(CLEAN), bridge(CORRUPT)
    before = snapshot(bridge)
    model = make(bridge, sae_input)
    with t.no_grad():
        assert t.equal(model(CLEAN), clean)  # bit for bit the bare model
        patch = src_ablations(model, CORRUPT)
        for value, expected in ((0.0, clean), (1.0, corrupt)):
            set_all_masks(model, value)
            with patch_mode(model, patch):
                t.testing.assert_close(model(CLEAN), expected, **EXACT)
    assert snapshot(bridge) == before


def test_sources_are_latents_and_an_error() -> None:
    model = make(gpt2())
    names = [src.name for src in model.srcs]
    per_block = [
        *(f"A0.{head}" for head in range(4)),
        *(f"MLP 0 Latent {latent}" for latent in range(N_LATENTS)),
        "MLP 0 Error",
    ]
    assert names == [
        "Resid Start",
        *per_block,
        *(name.replace("A0", "A1").replace("MLP 0", "MLP 1") for name in per_block),
    ]
    assert [src.src_idx for src in model.srcs] == list(range(len(names)))
    assert {"MLP 0", "MLP 1", "A1.2.K"} <= {dest.name for dest in model.dests}
    assert "MLP 0 Latent 3->MLP 1" in model.edge_name_dict[None]


@pytest.mark.parametrize("sae_input", INPUTS)
def test_each_edge_of_a_latent_by_hand(sae_input: AutoencoderInput) -> None:
    bridge = gpt2()
    model = make(bridge, sae_input)
    sae = model.wrapped_model.saes[0]
    hook = {"resid_delta_mlp": "hook_mlp_out", "mlp_post_act": "mlp.hook_post"}[sae_input]
    encoded, written = [], []
    for inputs in (CLEAN, CORRUPT):
        _, cache = bridge.run_with_cache(inputs)
        encoded.append(sae.encode(cache[f"blocks.0.{hook}"]))
        written.append(cache["blocks.0.hook_mlp_out"])
    directions = sae.decoder_weight.T
    if sae_input == "mlp_post_act":
        directions = directions @ bridge.blocks[0].mlp.W_out
    parts = [latents.unsqueeze(-1) * directions for latents in encoded]
    changes = {
        f"MLP 0 Latent {k}": (parts[1] - parts[0])[:, :, k] for k in range(N_LATENTS)
    }
    errors = [out - part.sum(2) for out, part in zip(written, parts, strict=True)]
    changes["MLP 0 Error"] = errors[1] - errors[0]
    patch = src_ablations(model, CORRUPT)
    bridge.set_use_hook_mlp_in(True)
    for name, change in changes.items():
        with t.no_grad(), patch_mode(model, patch, [f"{name}->MLP 1"]):
            ours = model(CLEAN)

        def add(activation: Tensor, hook: Any, change: Tensor = change) -> Tensor:
            return activation + change

        expected = bridge.run_with_hooks(CLEAN, fwd_hooks=[("blocks.1.hook_mlp_in", add)])
        t.testing.assert_close(ours, expected, **EXACT)
    bridge.set_use_hook_mlp_in(False)
    assert sum(bool(change.abs().max() > 1e-4) for change in changes.values()) > 3


def test_attribution_of_latents_is_the_mask_gradient_and_adds_up_to_the_mlps() -> None:
    bridge = gpt2()
    model, plain = (
        make(bridge),
        patchable_model(bridge, True, "last_seq", separate_qkv=True),
    )
    loader = token_loader(3, 2)
    eap = edge_attribution_patching_prune_scores(model, loader, None)
    gradients = mask_gradient_prune_scores(
        model, loader, None, "logit", "avg_diff", mask_val=0.0
    )
    for name, scores in eap.items():
        t.testing.assert_close(scores, gradients[name], **EXACT)
    of_mlps = edge_attribution_patching_prune_scores(plain, loader, None)
    end = "blocks.1.hook_resid_post"
    for block, first in ((0, 5), (1, 5 + N_LATENTS + 1 + 4)):
        parts = eap[end][first : first + N_LATENTS + 1]
        t.testing.assert_close(parts.sum(), of_mlps[end][5 * (block + 1)], **EXACT)


def test_circuits_of_latents_run() -> None:
    model = make(gpt2(), seq_len=5)
    loader = token_loader(3, 2)
    scores = edge_attribution_patching_prune_scores(model, loader, None)
    outs = run_circuits(
        model, loader, [0, 40, model.n_edges], scores, PatchType.TREE_PATCH
    )
    for batch in loader:
        full, none = outs[model.n_edges][batch.key], outs[0][batch.key]
        t.testing.assert_close(full, model(batch.clean)[:, -1], **EXACT)
        t.testing.assert_close(none, model(batch.corrupt)[:, -1], **EXACT)


def test_pruned_latents_go_into_the_error() -> None:
    bridge = gpt2()
    saes = sae_model(bridge, "resid_delta_mlp", False, n_latents=N_LATENTS)
    loader = token_loader(3, 2)
    pruned = saes.pruned(loader, max_latents=2)
    sums = [t.zeros(N_LATENTS) for _ in range(2)]
    for batch in loader:
        _, cache = bridge.run_with_cache(batch.clean)
        for block in range(2):
            latents = saes.saes[block].encode(cache[f"blocks.{block}.hook_mlp_out"])
            sums[block] += latents.sum((0, 1))
    for block in range(2):
        best = sorted(sums[block].topk(2).indices.tolist())
        assert list(pruned.saes[block].latent_idxs) == best
    model = patchable_model(pruned, True, "last_seq", separate_qkv=True)
    kept = [f"MLP 0 Latent {idx}" for idx in pruned.saes[0].latent_idxs]
    assert [s.name for s in model.srcs if s.name.startswith("MLP 0")] == [
        *kept,
        "MLP 0 Error",
    ]
    corrupt_out = bridge(CORRUPT)
    with t.no_grad(), patch_mode(model, src_ablations(model, CORRUPT), model.edges):
        t.testing.assert_close(model(CLEAN), corrupt_out, **EXACT)


# ------------------------------------------------------------------- files and the task


def weights(n_latents: int = 3, n_inputs: int = D_MODEL) -> dict[str, Tensor]:
    generator = t.Generator().manual_seed(0)
    shapes = {
        "pre_bias": (n_inputs,),
        "encoder.weight": (n_latents, n_inputs),
        "latent_bias": (n_latents,),
        "decoder.weight": (n_inputs, n_latents),
    }
    return {name: t.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sparse_autoencoder, "CACHE_FOLDER", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_published_weights_are_read_without_running_anything(
    suffix: str, folder: Path
) -> None:
    bridge = gpt2()
    bridge.cfg.model_name = "openai/gpt2"
    for block in range(2):
        path = folder / f"gpt2_resid_delta_mlp_{block}.{suffix}"
        if suffix == "pt":
            t.save({**weights(), "config": 3}, path)
        else:
            save_file(weights(), path)
    saes = sae_model(bridge, "resid_delta_mlp", load_pretrained=True)
    assert [sae.n_latents for sae in saes.saes.values()] == [3, 3]
    x = t.randn(2, 4, D_MODEL, generator=t.Generator().manual_seed(1))
    expected = weights()
    latents = (
        (x - expected["pre_bias"]) @ expected["encoder.weight"].T
        + expected["latent_bias"]
    ).relu()
    t.testing.assert_close(saes.saes[1].encode(x), latents)
    t.testing.assert_close(
        saes.saes[1](x), latents @ expected["decoder.weight"].T + expected["pre_bias"]
    )


def test_a_pickle_is_not_run(folder: Path) -> None:
    class Bad:
        def __reduce__(self) -> Any:
            return (Path.touch, (folder / "ran",))

    t.save({"x": Bad()}, folder / "gpt2_resid_delta_mlp_0.pt")
    bridge = gpt2()
    bridge.cfg.model_name = "gpt2"
    with pytest.raises(ModelError, match="not only tensors|cannot be read"):
        load_autoencoder(bridge, bridge, 0, "resid_delta_mlp")
    assert not (folder / "ran").exists()


def sae_lens_folder(folder: Path, block: int = 0, **config: Any) -> dict[str, Tensor]:
    """A published autoencoder as SAELens writes it; its weights."""
    generator = t.Generator().manual_seed(block)
    shapes = {"W_enc": (32, 7), "W_dec": (7, 32), "b_enc": (7,), "b_dec": (32,)}
    if config.get("architecture") == "jumprelu":
        shapes["threshold"] = (7,)
    weights = {k: t.randn(shape, generator=generator) for k, shape in shapes.items()}
    path = folder / f"tiny_resid_delta_mlp_{block}"
    path.mkdir(exist_ok=True)
    save_file(weights, path / "sae_weights.safetensors")
    (path / "cfg.json").write_text(json.dumps({"d_in": 32, "d_sae": 7, **config}))
    return weights


@pytest.mark.parametrize("architecture", ["standard", "jumprelu"])
@pytest.mark.parametrize("centres", [True, False])
def test_autoencoders_of_sae_lens(folder: Path, architecture: str, centres: bool) -> None:
    config = {"architecture": architecture, "apply_b_dec_to_input": centres}
    weights = sae_lens_folder(folder, **config)
    bridge: Any = gpt2()
    bridge.cfg.model_name = "tiny"
    sae = load_autoencoder(bridge, bridge, 0, "resid_delta_mlp")
    x = 3 * t.randn(50, 32, generator=t.Generator().manual_seed(9))
    pre = (x - weights["b_dec"] * centres) @ weights["W_enc"] + weights["b_enc"]
    latents = pre.relu() * (pre > weights.get("threshold", t.zeros(7)))
    assert (latents == 0).any() and (latents > 0).any()
    t.testing.assert_close(sae.encode(x), latents, rtol=0, atol=1e-4)
    expected = latents @ weights["W_dec"] + weights["b_dec"]
    t.testing.assert_close(sae(x), expected, rtol=0, atol=1e-3)
    some = sae.pruned([5, 2]).encode(x)
    t.testing.assert_close(some, latents[:, [2, 5]], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architecture": "topk", "k": 3}, "of the kind 'topk'.*Use `spliced`"),
        ({"architecture": "matching_pursuit"}, "of the kind 'matching_pursuit'"),
        ({"activation_fn_str": "tanh"}, "activation 'tanh'"),
        ({"normalize_activations": "layer_norm"}, "`normalize_activations` 'layer_norm'"),
    ],
)
def test_other_autoencoders_of_sae_lens(
    folder: Path, config: dict[str, Any], message: str
) -> None:
    sae_lens_folder(folder, **config)
    bridge: Any = gpt2()
    bridge.cfg.model_name = "tiny"
    with pytest.raises(ModelError, match=message):
        load_autoencoder(bridge, bridge, 0, "resid_delta_mlp")


def test_damaged_autoencoders_of_sae_lens(folder: Path) -> None:
    weights = sae_lens_folder(folder)
    path = folder / "tiny_resid_delta_mlp_0"
    bridge: Any = gpt2()
    bridge.cfg.model_name = "tiny"
    whole = (path / "sae_weights.safetensors").read_bytes()
    (path / "sae_weights.safetensors").write_bytes(whole[:100])
    with pytest.raises(ModelError, match="sae_weights.safetensors is damaged"):
        load_autoencoder(bridge, bridge, 0, "resid_delta_mlp")
    (path / "cfg.json").write_text("{")
    with pytest.raises(DataError, match="cfg.json is not JSON"):
        load_autoencoder(bridge, bridge, 0, "resid_delta_mlp")
    with pytest.raises(ModelError, match="an autoencoder of SAELens.*cfg.json"):
        SparseAutoencoder.from_state_dict(bridge, weights)


@pytest.fixture()
def latents_task(folder: Path) -> Task:
    task = replace(
        POCKET_IOI_TASK,
        batch_size=4,
        batch_count=1,
        autoencoder_input="resid_delta_mlp",
        autoencoder_max_latents=2,
        autoencoder_prune_with_corrupt=True,
    )
    name = Path(POCKET_MODEL).name
    bridge: Any = task._bare_model
    for block in range(bridge.cfg.n_layers):
        file = weights(5, bridge.cfg.d_model)
        save_file(file, folder / f"{name}_resid_delta_mlp_{block}.safetensors")
    return task


def test_the_task_asks_for_latents(latents_task: Task) -> None:
    task = latents_task
    bridge: Any = task._bare_model
    latents = [src.name for src in task.model.srcs if "Latent" in src.name]
    assert 0 < len(latents) <= 2 * bridge.cfg.n_layers
    batch = next(iter(task.test_loader))
    plain = Task(
        key="Plain",
        name="Plain",
        batch_size=4,
        batch_count=1,
        token_circuit=False,
        _model_def=bridge,
        _dataset_name="pocket/ioi_prompts",
    )
    tokens, kwargs = batch.model_input("clean")
    assert t.equal(task.model(tokens, **kwargs), plain.model(tokens, **kwargs))


def test_circuits_of_latents_are_tested_in_other_ways(latents_task: Task) -> None:
    def find_scores(task: Task) -> AlgoPruneScores:
        return {
            "EAP": edge_attribution_patching_prune_scores(
                task.model, task.train_loader, None
            )
        }

    rows = robustness_rows(latents_task, Choices(), [0.05, 1.0], find_scores)
    tested = {(row.choice, row.value) for row in rows}
    every = {(v.choice, v.value) for v in variations(Choices(token_positions=False))}
    assert {choice for choice, _ in every - tested} == {"Positions", "Unit"} & set(
        LEFT_OUT
    )
    whole = [row.percent for row in rows if row.is_base and row.share == 1.0]
    assert whole and whole == pytest.approx([100.0] * len(whole))


def test_what_cannot_be_done_is_refused(folder: Path) -> None:
    bridge = gpt2()
    assert set(INPUTS) < set(get_args(AutoencoderInput))
    with pytest.raises(ConfigError, match="residual stream itself is no source"):
        sae_model(bridge, "resid", False, n_latents=3)
    with pytest.raises(ConfigError, match="need `n_latents`"):
        sae_model(bridge, "resid_delta_mlp", False)
    with pytest.raises(ModelError, match="There is no autoencoder .*Put the published"):
        sae_model(bridge, "resid_delta_mlp", True, pythia_size="2_32768")
    with pytest.raises(ModelError, match="no MLPs"):
        sae_model(attn_only(), "resid_delta_mlp", False, n_latents=3)
    with pytest.raises(ModelError, match="normalises what its MLPs write"):
        sae_model(gemma2(), "mlp_post_act", False, n_latents=3)
    sae = SparseAutoencoder(bridge, 3, 7)
    with pytest.raises(ConfigError, match="encodes 7 numbers, but .* has 32"):
        AutoencoderTransformer(bridge, [sae])
    with pytest.raises(ConfigError, match="for block 2; the model has 2 blocks"):
        AutoencoderTransformer(bridge, {2: sae})
    with pytest.raises(ConfigError, match=r"no latents \[3\]; it has 3, up to 2"):
        sae.pruned([0, 3])
    with pytest.raises(ConfigError, match="a factorized graph only"):
        make(bridge, factorized=False)
    with pytest.raises(ModelError, match=r"has the weights \['x'\]; expected"):
        SparseAutoencoder.from_state_dict(bridge, {"x": t.zeros(2)})
    wrong = {**weights(), "latent_bias": t.zeros(2)}
    with pytest.raises(ModelError, match=r"latent_bias has the shape \(2,\).*\(3,\)"):
        SparseAutoencoder.from_state_dict(bridge, wrong)


def test_an_argument_that_means_nothing_any_more() -> None:
    with pytest.warns(UserWarning, match="`new_instance=False`.*never changed.*leave it"):
        sae_model(gpt2(), "resid_delta_mlp", False, N_LATENTS, new_instance=False)

"""Keywords of TransformerLens 2 in calls of a model: they work, or an error says what does."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch as t
from torch import Tensor

from auto_circuit.data import PromptDataLoader, load_datasets_from_json
from auto_circuit.errors import ConfigError, GraphError
from auto_circuit.experiment_utils import load_tl_model
from auto_circuit.model_utils.loaded_bridge import LoadedBridge, as_loaded
from auto_circuit.tasks import POCKET_MODEL
from auto_circuit.utils.graph_utils import patch_mode, patchable_model
from auto_circuit.utils.patchable_model import PatchableModel
from tests.texts import (
    bpe_tokenizer,
    name_prompts,
    prompt,
    text_model,
    word_tokenizer,
    write_prompts,
)

CLOSE: Any = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(scope="module")
def pocket() -> LoadedBridge:
    model = load_tl_model(POCKET_MODEL)
    assert isinstance(model, LoadedBridge)
    return model


@pytest.fixture(scope="module")
def bridge() -> LoadedBridge:
    """A random GPT-2."""
    return as_loaded(text_model(word_tokenizer()))


@pytest.fixture(scope="module")
def loaders(
    bridge: LoadedBridge, tmp_path_factory: pytest.TempPathFactory
) -> tuple[PromptDataLoader, PromptDataLoader]:
    """The same prompts, with a prefix cut off and whole."""
    folder = tmp_path_factory.mktemp("prompts")
    path = write_prompts(folder, name_prompts(4, "at the store {} met {}"))
    options: Any = {"batch_size": 4, "train_test_size": (4, 0), "shuffle": False}
    cut, _ = load_datasets_from_json(bridge, path, tail_divergence=True, **options)
    whole, _ = load_datasets_from_json(bridge, path, **options)
    assert cut.kv_cache is not None and cut.diverge_idx == 4
    return cut, whole


def batches(loaders: tuple[PromptDataLoader, PromptDataLoader]) -> tuple[Tensor, Tensor]:
    (cut,), (whole,) = loaders
    return cut.clean, whole.clean


def graph(bridge: LoadedBridge, **options: Any) -> PatchableModel:
    return patchable_model(bridge, True, separate_qkv=True, **options)


def test_past_kv_cache_is_used(bridge: LoadedBridge, loaders: Any) -> None:
    prefix = loaders[0].kv_cache
    cut, whole = batches(loaders)
    expected = bridge(whole)[:, prefix.seq_len :]
    assert (bridge(cut) - expected).abs().max() > 0.1  # the prefix matters
    plain, with_prefix = graph(bridge), graph(bridge, kv_caches=(prefix,))
    cache: Any = prefix.past_key_values(len(cut))
    for found in (
        bridge(cut, past_kv_cache=prefix),
        bridge(cut, past_kv_cache=cache),
        plain(cut, past_kv_cache=prefix),
        plain(input=cut, past_kv_cache=prefix),
        plain.run_with_cache(cut, past_kv_cache=prefix)[0],
        plain.run_with_hooks(cut, past_kv_cache=prefix),
        bridge.run_with_cache(cut, past_kv_cache=prefix)[0],
        with_prefix(cut),
        with_prefix(cut, past_kv_cache=prefix),
    ):
        t.testing.assert_close(found, expected, **CLOSE)
    # As there: None, said aloud, means without the model's own prefix.
    t.testing.assert_close(with_prefix(cut, past_kv_cache=None), bridge(cut))


def test_past_kv_cache_of_another_model_or_of_other_weights(
    bridge: LoadedBridge, loaders: Any
) -> None:
    other = deepcopy(bridge)
    for weight in other.parameters():
        weight.data.mul_(1.1)
    cut, whole = batches(loaders)
    prefix = loaders[0].kv_cache
    found = other(cut, past_kv_cache=prefix)
    t.testing.assert_close(found, other(whole)[:, prefix.seq_len :], **CLOSE)


def test_keywords_that_nothing_stands_for(bridge: LoadedBridge, loaders: Any) -> None:
    cut, _ = batches(loaders)
    model: Any
    options: Any
    for model in (bridge, graph(bridge)):
        for options, message in (
            ({"shortformer_pos_embed": cut}, "`shortformer_pos_embed` is not supported"),
            ({"tokens": cut}, "`tokens` is not supported"),
            ({"past_kv_cache": [1]}, "`past_kv_cache` is .*expected the `kv_cache`"),
            (
                {"past_kv_cache": loaders[0].kv_cache, "past_key_values": object()},
                "not both",
            ),
        ):
            for call in (model, model.run_with_cache, model.run_with_hooks):
                with pytest.raises(ConfigError, match=message):
                    call(cut, **options)
        assert model(cut, tokens=None, shortformer_pos_embed=None).shape[0] == 4


@pytest.mark.parametrize("return_type", ["logits", "loss"])
def test_keywords_that_stayed(
    bridge: LoadedBridge, loaders: Any, return_type: Any
) -> None:
    """What TransformerLens 2 knew and 4 knows: the same through a PatchableModel."""
    _, whole = batches(loaders)
    model = graph(bridge)
    options: Any = {"return_type": return_type, "loss_per_token": return_type == "loss"}
    for name in ("__call__", "run_with_cache", "run_with_hooks"):
        found, expected = (getattr(m, name)(whole, **options) for m in (model, bridge))
        if name == "run_with_cache":
            found, expected = found[0], expected[0]
        t.testing.assert_close(found, expected)
    text = "Ann met Bob"
    for options in (
        {"prepend_bos": False},
        {"prepend_bos": True},
        {"padding_side": "left"},
        {"move_to_device": False, "truncate": False},
    ):
        assert t.equal(
            model.to_tokens([text, "Ann"], **options),
            bridge.to_tokens([text, "Ann"], **options),
        )
    residual = model(whole, stop_at_layer=1)
    t.testing.assert_close(model(residual, start_at_layer=1), model(whole), **CLOSE)
    _, cache = model.run_with_cache(
        whole, names_filter="blocks.1.hook_resid_pre", pos_slice=-1, device="cpu"
    )
    t.testing.assert_close(cache["blocks.1.hook_resid_pre"], residual[:, -1:])


def test_input_to_embed_goes_on_after_the_prefix(
    bridge: LoadedBridge, loaders: Any
) -> None:
    cut, whole = batches(loaders)
    prefix = loaders[0].kv_cache
    expected = bridge.input_to_embed(whole)[0]
    t.testing.assert_close(graph(bridge).input_to_embed(whole)[0], expected)
    found, tokens, none, _ = graph(bridge, kv_caches=(prefix,)).input_to_embed(cut)
    t.testing.assert_close(found, expected[:, prefix.seq_len :], **CLOSE)
    assert t.equal(tokens, cut) and none is None


def test_generate(bridge: LoadedBridge, loaders: Any) -> None:
    _, whole = batches(loaders)
    options: Any = {"max_new_tokens": 2, "do_sample": False, "verbose": False}
    found, expected = (
        model.generate(whole, **options) for model in (graph(bridge), bridge)
    )
    assert isinstance(expected, Tensor) and isinstance(found, Tensor)
    assert t.equal(found, expected)
    with pytest.raises(GraphError, match="`generate` knows neither patches nor the pref"):
        graph(bridge, kv_caches=(loaders[0].kv_cache,)).generate(whole, **options)


# ------------------------------------------------------------------ padding of a loader

RAGGED = [
    prompt("Ann met Bob", "Dan met Bob"),
    prompt("at the store Ann met Bob", "at the store Dan met Bob"),
]


def ragged_loader(model: Any, folder: Path, **options: Any) -> PromptDataLoader:
    path = write_prompts(folder, RAGGED)
    loader, _ = load_datasets_from_json(
        model, path, batch_size=2, train_test_size=(2, 0), shuffle=False, **options
    )
    return loader


@pytest.mark.parametrize(
    ("prepend_bos", "n_workers"),
    [(True, 0), (False, 0), pytest.param(True, 1, marks=pytest.mark.slow)],
)
def test_batches_know_their_padding(
    tmp_path: Path, prepend_bos: bool, n_workers: int
) -> None:
    """GPT-2 pads with its BOS token, so that padding cannot be seen from tokens alone."""
    bridge = as_loaded(text_model(bpe_tokenizer()))
    loader = ragged_loader(bridge, tmp_path, prepend_bos=prepend_bos)
    loader = PromptDataLoader(
        loader.prompt_dataset, None, 0, batch_size=2, num_workers=n_workers
    )
    (batch,) = loader
    alone = [
        bridge(row[mask.bool()][None])[0, -1]
        for row, mask in zip(batch.clean, batch.clean_attention_mask, strict=True)
    ]
    model = graph(bridge, slice_output="last_seq")
    for found in (
        model(batch.clean)[:, -1],
        model.run_with_cache(batch.clean)[0][:, -1],
        deepcopy(model)(deepcopy(batch).clean)[:, -1],
        bridge(batch.clean)[:, -1],
    ):
        t.testing.assert_close(found, t.stack(alone), **CLOSE)
    with pytest.raises(GraphError, match="padding cannot be told from text"):
        model(batch.clean.clone())


def test_padded_batches_behind_a_prefix(tmp_path: Path) -> None:
    """A prefix that is passed by hand goes before the padding of the batch."""
    bridge = as_loaded(text_model(word_tokenizer()))
    (batch,) = ragged_loader(bridge, tmp_path, prepend_bos=False)
    prefix_tokens = bridge.to_tokens("Eve at", prepend_bos=False)[0]
    from auto_circuit.prefix_cache import make_prefix_cache

    prefix = make_prefix_cache(bridge, prefix_tokens)
    for row in range(2):
        text = batch.clean[row][batch.clean_attention_mask[row].bool()]
        expected = bridge(t.cat([prefix_tokens, text])[None])[0, -1]
        for model in (bridge, graph(bridge)):
            found = model(batch.clean, past_kv_cache=prefix)[row, -1]
            t.testing.assert_close(found, expected, **CLOSE)


# --------------------------------------------------------------- hooks of single heads


def test_a_loaded_model_shows_what_heads_read_and_write(pocket: LoadedBridge) -> None:
    tokens = pocket.to_tokens("Anna and David")
    with t.no_grad():
        _, cache = pocket.run_with_cache(tokens)
    n_heads, d_model = pocket.cfg.n_heads, pocket.cfg.d_model
    for block in range(pocket.cfg.n_layers):
        name = f"blocks.{block}"
        result = cache[f"{name}.attn.hook_result"]
        assert result.shape == (1, tokens.shape[1], n_heads, d_model)
        # All that heads write, and the bias of the output, is what attention writes.
        written = result.sum(2) + pocket.b_O[block]
        t.testing.assert_close(written, cache[f"{name}.hook_attn_out"], **CLOSE)
        before = cache[f"{name}.hook_resid_pre"]
        for part in "qkv":
            read = cache[f"{name}.hook_{part}_input"]
            t.testing.assert_close(read, before[:, :, None].expand_as(read), **CLOSE)
        mlp_in = cache[f"{name}.hook_mlp_in"]
        after = before + cache[f"{name}.hook_attn_out"]
        t.testing.assert_close(mlp_in, after, **CLOSE)


def test_the_graph_of_a_loaded_model_is_that_without_switches(
    pocket: LoadedBridge,
) -> None:
    off = deepcopy(pocket)
    for switch in ("use_attn_result", "use_split_qkv_input", "use_hook_mlp_in"):
        assert getattr(pocket.cfg, switch) is True
        getattr(off, f"set_{switch}")(False)
    tokens = pocket.to_tokens(["Anna and David", "Carol and David"])
    outputs = []
    for bridge in (pocket, off):
        model = graph(bridge, slice_output="last_seq")
        acts = t.zeros(model.plan.n_srcs, 2, tokens.shape[1], bridge.cfg.d_model)
        with t.no_grad(), patch_mode(model, acts, ["A0.1->MLP 1", "MLP 0->A1.1.Q"]):
            outputs.append(model(tokens))
        assert bridge.cfg.use_attn_result is (bridge is pocket)
    t.testing.assert_close(*outputs, **CLOSE)


def test_a_graph_over_any_bridge_caches_heads_too(bridge: LoadedBridge) -> None:
    tokens = bridge.to_tokens("Ann met Bob")
    assert not bridge.cfg.use_attn_result
    _, cache = graph(bridge).run_with_cache(tokens)
    assert "blocks.1.attn.hook_result" in cache and "blocks.0.hook_q_input" in cache
    seen = []
    graph(bridge).run_with_hooks(
        tokens,
        fwd_hooks=[("blocks.1.attn.hook_result", lambda x, hook: seen.append(x.shape))],
    )
    assert seen == [(1, 3, 4, 32)]
    assert not bridge.cfg.use_attn_result


def test_attn_in_beside_split_inputs(bridge: LoadedBridge) -> None:
    """auto-circuit's own lines set both, which TransformerLens 4 refuses."""
    model = deepcopy(bridge)
    model.cfg.use_attn_result = True
    model.cfg.use_split_qkv_input = True
    for switch in (
        lambda: setattr(model.cfg, "use_attn_in", True),
        lambda: model.set_use_attn_in(True),
    ):
        with pytest.warns(UserWarning, match="not both.*`hook_attn_in` stays off"):
            switch()
    model.cfg.use_hook_mlp_in = True
    assert not model.cfg.use_attn_in and model.cfg.use_split_qkv_input
    assert graph(model)(model.to_tokens("Ann met Bob")).isfinite().all()
    model.set_use_split_qkv_input(False)
    model.set_use_attn_in(True)
    assert model.cfg.use_attn_in

"""Caches know what they were made from: weights, tokens, windows of attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch as t
import transformers
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources._bridge_builder import (
    build_bridge_from_module,
)

from auto_circuit import data, devices
from auto_circuit.data import PromptDataLoader, PromptDataset, load_datasets_from_json
from auto_circuit.errors import ConfigError, DataError, GraphError
from auto_circuit.prefix_cache import begin_with, is_exact, make_prefix_cache
from auto_circuit.prune import run_circuits
from auto_circuit.utils.ablation_activations import src_ablations
from auto_circuit.utils.graph_utils import patch_mode, patchable_model, set_all_masks
from auto_circuit.utils.patchable_model import PatchableModel
from auto_circuit.weights import WeightFingerprint
from tests.models import SIZES, VOCAB, gpt2, llama, randomize, tokens
from tests.texts import name_prompts, text_model, word_tokenizer, write_prompts

EXACT: dict[str, Any] = {"atol": 1e-5, "rtol": 0.0}


def patchable(model: TransformerBridge, loader: PromptDataLoader) -> PatchableModel:
    return patchable_model(model, True, "last_seq", None, True, (loader.kv_cache,))


@pytest.fixture
def loader_and_model(tmp_path: Path) -> tuple[PromptDataLoader, TransformerBridge]:
    model = text_model(word_tokenizer())
    path = write_prompts(tmp_path, name_prompts(6, "later the {} met {} at the store"))
    loader, _ = load_datasets_from_json(
        model, path, batch_size=3, train_test_size=(6, 0), tail_divergence=True
    )
    assert loader.kv_cache is not None and loader.kv_cache.seq_len == 3
    return loader, model


def whole_outputs(model: TransformerBridge, loader: PromptDataLoader) -> Tensor:
    """The last logits of all clean prompts, by a model that knows of no prefix."""
    assert loader.kv_cache is not None
    return t.cat(
        [
            model(t.cat([loader.kv_cache.tokens.expand(len(b.clean), -1), b.clean], 1))
            for b in loader
        ]
    )[:, -1]


def outputs(model: PatchableModel, loader: PromptDataLoader) -> Tensor:
    return t.cat([model.sliced(batch.clean) for batch in loader])


# ------------------------------------------------------------------------------ weights


def by_step(model: TransformerBridge) -> None:
    with t.no_grad():
        for parameter in model.parameters():
            parameter.add_(t.linspace(-0.3, 0.3, parameter.shape[-1]))


def by_state_dict(model: TransformerBridge) -> None:
    state = {name: 1.5 * values.flip(-1) for name, values in model.state_dict().items()}
    model.load_state_dict(state, strict=False)


def by_data(model: TransformerBridge) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.flip(-1)


def in_data(model: TransformerBridge) -> None:
    """Changes neither the address nor the version."""
    for parameter in model.parameters():
        parameter.data.copy_(parameter.data.flip(-1))


def by_parameter(model: TransformerBridge) -> None:
    """Another Parameter in the place of the first."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                other = t.nn.Parameter(parameter.flip(-1), requires_grad=False)
                module._parameters[name] = other


CHANGES = [by_step, by_state_dict, by_data, in_data, by_parameter]


@pytest.mark.parametrize("change", CHANGES)
def test_a_prefix_follows_the_weights(
    loader_and_model: tuple[PromptDataLoader, TransformerBridge],
    change: Callable[[TransformerBridge], None],
) -> None:
    loader, model = loader_and_model
    graph = patchable(model, loader)
    before = outputs(graph, loader)
    t.testing.assert_close(before, whole_outputs(model, loader), **EXACT)
    change(model)
    after = whole_outputs(model, loader)
    assert (after - before).abs().max() > 0.01
    t.testing.assert_close(outputs(graph, loader), after, **EXACT)
    # A graph made now of the old loader's cache, and patched passes of the first one.
    t.testing.assert_close(outputs(patchable(model, loader), loader), after, **EXACT)
    n_edges = graph.n_edges
    circuits = run_circuits(graph, loader, [n_edges], graph.new_prune_scores(1.0))
    by_batch = t.cat([circuits[n_edges][batch.key] for batch in loader])
    t.testing.assert_close(by_batch, after, **EXACT)


@pytest.mark.parametrize("change", CHANGES)
def test_a_fingerprint_notices(change: Callable[[TransformerBridge], None]) -> None:
    model = gpt2()
    fingerprint = WeightFingerprint(model)
    assert fingerprint.holds() and fingerprint.is_of(model)
    assert not fingerprint.is_of(gpt2())
    change(model)
    assert not fingerprint.holds() and not fingerprint.is_of(model)


def test_a_fingerprint_of_a_large_model_looks_at_every_matrix() -> None:
    model = t.nn.Sequential(*[t.nn.Linear(256, 256) for _ in range(8)])
    fingerprint = WeightFingerprint(model)
    for weight in (layer.weight.data for layer in model):
        assert isinstance(weight, Tensor)
        for part in (weight[3], weight[:, 3], weight):
            part += 1
            assert not fingerprint.holds()
            part -= 1
            fingerprint = WeightFingerprint(model)


def test_a_buffer_is_a_weight() -> None:
    """Rotary frequencies, which decide what keys are, are no parameters."""
    model: Any = llama()
    fingerprint = WeightFingerprint(model)
    frequencies = model.original_model.model.rotary_emb.inv_freq
    frequencies.mul_(2)
    assert not fingerprint.holds()
    frequencies.div_(2)
    fingerprint = WeightFingerprint(model)
    assert fingerprint.holds() and fingerprint.is_of(model)
    frequencies.data.mul_(2)
    assert not fingerprint.holds() and not fingerprint.is_of(model)


def test_a_prefix_is_not_computed_under_hooks() -> None:
    model: Any = gpt2()
    prefix = t.arange(3)
    model.add_hook("blocks.0.hook_mlp_out", lambda x, hook: 2 * x)
    with pytest.raises(ConfigError, match="hooks on the model.*`reset_hooks`"):
        make_prefix_cache(model, prefix)
    model.reset_hooks()
    assert make_prefix_cache(model, prefix).seq_len == 3


def test_a_single_weight_of_a_small_model_is_noticed() -> None:
    model = gpt2()
    for place in (3, 4, 5):
        fingerprint = WeightFingerprint(model)
        list(model.parameters())[5].data.view(-1)[place] += 0.1
        assert not fingerprint.holds()


def test_a_single_weight_of_a_large_model_is_noticed_if_torch_changes_it() -> None:
    model = t.nn.Linear(512, 512)
    fingerprint = WeightFingerprint(model)
    with t.no_grad():
        model.weight[7, 3] += 1
    assert not fingerprint.holds()


@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_change_inside_of_patch_mode(
    change: Callable[[TransformerBridge], None],
) -> None:
    """What was remembered of the patched-in run is forgotten."""
    patch_tokens, clean = tokens(2, 5, seed=1), tokens(2, 5, seed=2)
    results = []
    for is_inside in (True, False):
        model = gpt2()
        graph = patchable_model(model, True, "last_seq", None, True)
        patch = src_ablations(graph, patch_tokens)
        edge = next(iter(graph.edges))
        if not is_inside:
            change(model)
        with t.no_grad(), patch_mode(graph, patch):
            set_all_masks(graph, 1.0)
            edge.patch_mask(graph).data[edge.patch_idx] = 0.0
            if is_inside:
                graph(clean)
                change(model)
            results.append(graph.sliced(clean))
    t.testing.assert_close(results[0], results[1], **EXACT)


def test_a_prefix_cannot_follow_weights_inside_of_patch_mode(
    loader_and_model: tuple[PromptDataLoader, TransformerBridge],
) -> None:
    loader, model = loader_and_model
    graph = patchable(model, loader)
    batch = next(iter(loader))
    patch = src_ablations(graph, batch.corrupt)
    with patch_mode(graph, patch):
        graph(batch.clean)
        in_data(model)
        with pytest.raises(GraphError, match="weights have changed inside of"):
            graph(batch.clean)


# ------------------------------------------------------------------------ whole prompts


def test_whole_prompts_are_not_given_the_prefix_again(
    loader_and_model: tuple[PromptDataLoader, TransformerBridge],
) -> None:
    loader, model = loader_and_model
    graph = patchable(model, loader)
    assert loader.kv_cache is not None
    batch = next(iter(loader))
    whole = t.cat([loader.kv_cache.tokens.expand(len(batch.clean), -1), batch.clean], 1)
    t.testing.assert_close(graph(whole), model(whole), **EXACT)
    padded = t.cat([t.zeros(len(whole), 2, dtype=t.long), whole], 1)
    t.testing.assert_close(graph(padded)[:, -1], model(whole)[:, -1], **EXACT)
    hooked = graph.run_with_hooks(batch.clean, fwd_hooks=[])
    t.testing.assert_close(hooked[:, -1], model(whole)[:, -1], **EXACT)
    other = whole.clone()
    other[0, 1] += 1
    for wrong in (other, other[:1], other[:, :2]):
        with pytest.raises(DataError, match="puts a prefix of 3 tokens before.*<bos>"):
            graph(wrong)


def test_a_prefix_before_padding_counts(
    loader_and_model: tuple[PromptDataLoader, TransformerBridge],
) -> None:
    loader, model = loader_and_model
    graph, batch = patchable(model, loader), next(iter(loader))
    expected = whole_outputs(model, loader)[: len(batch.clean)]
    padding = t.zeros(len(batch.clean), 2, dtype=t.long)
    padded = t.cat([padding, batch.clean], 1)
    mask = t.cat([padding, t.ones_like(batch.clean)], 1)
    for kwargs in ({}, {"attention_mask": mask}):
        t.testing.assert_close(graph.sliced(padded, **kwargs), expected, **EXACT)


def test_which_rows_begin_with_a_prefix() -> None:
    rows = t.tensor([[0, 5, 6, 7], [5, 6, 5, 5], [5, 7, 6, 5]])
    assert begin_with(rows, t.tensor([5, 6])).tolist() == [False, True, False]
    starts = t.tensor([1, 0, 2])
    assert begin_with(rows, t.tensor([5, 6]), starts).tolist() == [True, True, False]
    # At the end there is room for one token alone.
    assert begin_with(rows, t.tensor([5, 5]), t.tensor([3, 3, 3])).tolist() == [False] * 3
    assert begin_with(rows[:, :1], t.tensor([5, 6])).tolist() == [False] * 3


def test_a_cut_prompt_never_looks_like_a_whole_one(tmp_path: Path) -> None:
    """All begin with 'Ann', and one goes on with 'Ann'."""
    model = text_model(word_tokenizer())
    prompts = name_prompts(1, "Ann Ann {} met {}") + name_prompts(1, "Ann big {} met {}")
    path = write_prompts(tmp_path, prompts)
    options: Any = {"batch_size": 1, "train_test_size": (2, 0), "prepend_bos": False}
    loader, _ = load_datasets_from_json(model, path, tail_divergence=True, **options)
    whole, _ = load_datasets_from_json(model, path, **options)
    expected = t.cat([model(batch.clean)[:, -1] for batch in whole])
    t.testing.assert_close(outputs(patchable(model, loader), loader), expected, **EXACT)


def test_another_loaders_prefix(
    loader_and_model: tuple[PromptDataLoader, TransformerBridge], tmp_path: Path
) -> None:
    loader, model = loader_and_model
    path = write_prompts(tmp_path, name_prompts(6, "later big {} met {} at the store"))
    other, _ = load_datasets_from_json(
        model, path, batch_size=3, train_test_size=(6, 0), tail_divergence=True
    )
    graph = patchable(model, loader)
    assert other.kv_cache is not None and other.kv_cache.seq_len == 3
    with pytest.raises(DataError, match="which the model does not have"):
        run_circuits(graph, other, [0], graph.new_prune_scores(1.0))
    with pytest.raises(ConfigError, match="two different prefixes"):
        patchable_model(
            model, True, "last_seq", None, True, (loader.kv_cache, other.kv_cache)
        )


def test_a_prefix_of_another_models_weights(
    loader_and_model: tuple[PromptDataLoader, TransformerBridge],
) -> None:
    loader, _ = loader_and_model
    other = text_model(word_tokenizer())
    randomize(other, seed=5)
    graph = patchable(other, loader)
    t.testing.assert_close(outputs(graph, loader), whole_outputs(other, loader), **EXACT)


# ---------------------------------------------------------------------- sliding windows

WINDOW = 4
MIXED = ["sliding_attention", "full_attention"]
SLIDING: dict[str, dict[str, Any]] = {
    "Gemma2": {"head_dim": 8},
    "Mistral": {},
    "Gemma3": {"head_dim": 8, "layer_types": MIXED},
    "Phi3": {"pad_token_id": 0},
    "Starcoder2": {},
    "Olmo3": {"layer_types": MIXED},
    "Mixtral": {"num_local_experts": 2},
    "Qwen2": {"use_sliding_window": True, "max_window_layers": 1},
}


def sliding_model(name: str) -> TransformerBridge:
    sizes = {**SIZES, "num_key_value_heads": 2, "sliding_window": WINDOW}
    config_name = "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config"
    config = getattr(transformers, config_name)(**sizes, **SLIDING[name])
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    randomize(model)
    model.set_attn_implementation("eager")
    bridge = build_bridge_from_module(model, type(model).__name__, hf_config=config)
    return bridge.eval().requires_grad_(False)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name == "Gemma2" else pytest.mark.slow)
        for name in SLIDING
    ],
)
def test_a_prefix_longer_than_the_window_is_exact(name: str) -> None:
    model = sliding_model(name)
    for n_prefix in (WINDOW - 1, WINDOW, WINDOW + 3):
        whole = tokens(3, n_prefix + 5)
        whole[:, :n_prefix] = whole[0, :n_prefix]
        prefix = make_prefix_cache(model, whole[0, :n_prefix])
        rest = whole[:, n_prefix:]
        assert is_exact(model, prefix, rest[0])
        graph = patchable_model(model, True, None, None, True, (prefix,))
        clean, corrupt = model(whole)[:, n_prefix:], rest.flip(0)
        t.testing.assert_close(graph(rest), clean, **EXACT)
        with patch_mode(graph, src_ablations(graph, corrupt)):
            t.testing.assert_close(graph(rest), clean, **EXACT)
            set_all_masks(graph, 1.0)
            patched = graph(rest)
        t.testing.assert_close(patched, clean.flip(0), **EXACT)
        set_all_masks(graph, 0.0)


def test_a_prefix_is_computed_in_eval_mode() -> None:
    """Dropout would change half of its numbers, and autograd would keep them all."""
    model: Any = gpt2(n_layers=1, dropout=0.5)
    prefix = tokens(1, 5)[0]
    expected = make_prefix_cache(model, prefix)
    model.train()
    model.original_model.train()
    found = make_prefix_cache(model, prefix)
    assert model.training
    for one, other in zip(found.keys, expected.keys, strict=True):
        assert t.equal(one, other) and not one.requires_grad


class Forgetful(t.nn.Module):
    """Its cache lacks a position, as one with a sliding window may."""

    def forward(self, tokens: Tensor, past_key_values: Any, use_cache: bool) -> None:
        part = t.zeros(1, 1, tokens.shape[1] - 1, 2)
        past_key_values.update(part, part, 0)


def test_a_cache_that_lacks_a_position_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"it holds \[3\] of 4 positions"):
        make_prefix_cache(Forgetful(), tokens(1, 4)[0])


def test_a_cache_that_is_not_exact_is_noticed() -> None:
    model = gpt2()
    whole = tokens(1, 9)[0]
    prefix = make_prefix_cache(model, whole[:4])
    assert is_exact(model, prefix, whole[4:])
    wrong = replace(prefix, keys=tuple(keys + 0.01 for keys in prefix.keys))
    assert not is_exact(model, wrong, whole[4:])


def test_a_prefix_that_is_not_exact_is_not_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "is_exact", lambda *args: False)
    path = write_prompts(tmp_path, name_prompts(4, "later the {} met {} at the store"))
    options: Any = {"batch_size": 4, "train_test_size": (4, 0), "shuffle": False}
    model = text_model(word_tokenizer())
    cut, _ = load_datasets_from_json(model, path, tail_divergence=True, **options)
    whole, _ = load_datasets_from_json(model, path, **options)
    assert cut.kv_cache is None and cut.diverge_idx == 0
    assert t.equal(next(iter(cut)).clean, next(iter(whole)).clean)


def test_token_ids_and_lengths_that_the_model_does_not_have() -> None:
    graph = patchable_model(gpt2(), True, "last_seq", None, True)
    with pytest.raises(
        DataError, match=f"from 1 to {VOCAB}, but the model has the words"
    ):
        graph(t.tensor([[1, VOCAB]]))
    with pytest.raises(DataError, match="from -1 to 1, but the model"):
        src_ablations(graph, t.tensor([[1, -1]]))
    with pytest.raises(DataError, match="has 17 positions; the model's context has 16"):
        graph(tokens(1, 17))
    with pytest.raises(ConfigError, match="calls it `past_key_values`"):
        graph(tokens(1, 3), past_kv_cache=[1])


def test_token_ids_on_a_gpu_are_looked_at_before_the_model_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where to look them up would end all that the process does on the GPU."""
    graph, given = patchable_model(gpt2(), True, "last_seq", None, True), tokens(1, 3)
    expected, ran = graph(given), []
    of = devices.device_of
    monkeypatch.setattr(
        devices, "device_of", lambda x: t.device("cuda") if x is given else of(x)
    )
    graph.wrapped_model.register_forward_pre_hook(lambda *_: ran.append(1))
    assert graph(given).equal(expected) and graph(given).equal(expected)
    given[0, 1] = VOCAB
    with pytest.raises(DataError, match=f"to {VOCAB}, but the model has the words"):
        graph(given)
    assert len(ran) == 2


def test_prompts_and_model_on_two_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, given = patchable_model(gpt2(), True, "last_seq", None, True), tokens(1, 3)

    def fail(*_: object) -> None:
        raise RuntimeError("Expected all tensors to be on the same device")

    graph.wrapped_model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="same device"):
        graph(given)  # what is not explained stays as it is
    of = devices.device_of
    monkeypatch.setattr(
        devices, "device_of", lambda x: of(x) if x is given else t.device("cuda")
    )
    with pytest.raises(
        DataError, match="prompts are on the device 'cpu', the model is on 'cuda'"
    ):
        graph(given)


def test_batches_of_one_dataset_share_the_models_prefix() -> None:
    """Loaders made by hand have no prefix."""
    row = [t.tensor([1])]
    dataset = PromptDataset([tokens(1, 4)[0]], [tokens(1, 4, 1)[0]], row, row)
    loader = PromptDataLoader(dataset, None, 0)
    model = gpt2()
    prefix = make_prefix_cache(model, tokens(1, 3)[0])
    graph = patchable_model(model, True, "last_seq", None, True, (prefix,))
    with pytest.raises(DataError, match="these prompts were not cut"):
        run_circuits(graph, loader, [0], graph.new_prune_scores(1.0))

"""The study of the IOI circuit on single templates, on a random model of GPT-2's shape."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch as t
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources._bridge_builder import (
    build_bridge_from_module,
)
from transformers import GPT2Config, GPT2LMHeadModel

from auto_circuit.data import load_datasets_from_json
from auto_circuit.errors import ConfigError, DataError
from auto_circuit.experiment_utils import (
    IOI_CIRCUIT_TYPE,
    ioi_circuit_single_template_logit_diff_percent,
)
from auto_circuit.metrics.official_circuits.circuits.ioi_official import (
    HEAD_PLACES,
    HEADS,
)
from auto_circuit.types import AblationType, PatchType
from tests.models import randomize
from tests.test_datasets import bpe_tokenizer

IOI = Path(__file__).parents[1] / "datasets" / "ioi"
TEMPLATE_IDX = 3
study = ioi_circuit_single_template_logit_diff_percent


def prompt_file(order: str, template_idx: int = TEMPLATE_IDX) -> Path:
    return IOI / f"ioi_{order}_template_{template_idx}_prompts.json"


@cache
def gpt2_shape() -> TransformerBridge:
    """12 layers of 12 heads, random, that knows the words of the templates."""
    prompts = [
        prompt
        for order in ("ABBA", "BABA")
        for prompt in json.loads(prompt_file(order).read_text())["prompts"]
    ]
    texts = [prompt[side] for prompt in prompts for side in ("clean", "corrupt")]
    tokenizer = bpe_tokenizer(texts)
    config = GPT2Config(
        n_layer=12, n_head=12, n_embd=48, vocab_size=len(tokenizer), n_positions=32
    )
    model = GPT2LMHeadModel(config)
    randomize(model)
    bridge = build_bridge_from_module(model, "GPT2LMHeadModel", hf_config=config)
    bridge.tokenizer = tokenizer
    return bridge.eval().requires_grad_(False)


def percents_by_hooks(order: str, n_prompts: int) -> list[float]:
    """The node circuit's percentages without our engine: other heads' results replaced."""
    model = gpt2_shape()
    _, loader = load_datasets_from_json(
        model,
        prompt_file(order),
        batch_size=n_prompts,
        train_test_size=(0, n_prompts),
        shuffle=False,
    )
    (batch,) = loader
    kept = t.zeros(12, batch.clean.shape[1], 12, dtype=t.bool)
    for group, heads in HEADS.items():
        for layer, head in heads:
            kept[layer, loader.word_idxs[HEAD_PLACES[group]], head] = True
    model.set_use_attn_result(True)
    try:
        _, cache = model.run_with_cache(batch.corrupt)

        def replace_other_heads(result: Tensor, hook: Any) -> Tensor:
            layer = int(hook.name.split(".")[1])
            mean = cache[hook.name].mean(0, keepdim=True).expand_as(result)
            return t.where(kept[layer][None, :, :, None], result, mean)

        names = [f"blocks.{layer}.attn.hook_result" for layer in range(12)]
        circuit = model.run_with_hooks(
            batch.clean, fwd_hooks=[(name, replace_other_heads) for name in names]
        )
        full = model(batch.clean)
    finally:
        model.set_use_attn_result(False)
    assert isinstance(batch.answers, Tensor) and isinstance(batch.wrong_answers, Tensor)
    diffs = [
        (
            logits[:, -1].gather(1, batch.answers)
            - logits[:, -1].gather(1, batch.wrong_answers)
        )[:, 0].double()
        for logits in (circuit, full)
    ]
    return (100 * diffs[0] / diffs[1]).tolist()


@pytest.mark.parametrize("order", ["ABBA", "BABA"])
def test_the_node_circuit_is_that_of_hooks(order: Any) -> None:
    model, tokens = gpt2_shape(), t.arange(6)[None]
    before = model(tokens)
    result = study(model, 8, True, order, TEMPLATE_IDX)
    assert t.equal(model(tokens), before)
    assert not model.cfg.use_attn_result
    n_edges, mean, std, percents, prune_scores = result
    expected = t.tensor(percents_by_hooks(order, 8))
    t.testing.assert_close(percents, expected, rtol=2e-3, atol=0.05)
    t.testing.assert_close(t.tensor(mean), percents.mean())
    t.testing.assert_close(t.tensor(std), percents.std())
    assert n_edges == sum(int(scores.sum()) for scores in prune_scores.values())
    by_two = study(gpt2_shape(), 8, True, order, TEMPLATE_IDX, batch_size=2)
    t.testing.assert_close(by_two.percents, expected, rtol=2e-3, atol=0.05)


def test_the_difference_of_means_has_no_points() -> None:
    result = study(
        gpt2_shape(), 8, True, "ABBA", TEMPLATE_IDX, diff_of_mean_logit_diff=True
    )
    assert result.std == 0 and result.percents.shape == (0,)
    per_prompt = study(gpt2_shape(), 8, True, "ABBA", TEMPLATE_IDX)
    assert result.mean != pytest.approx(per_prompt.mean)


@pytest.mark.parametrize(
    ("circuit", "patch_type", "n_edges"),
    [
        (IOI_CIRCUIT_TYPE.NODES, PatchType.EDGE_PATCH, 6540),
        (IOI_CIRCUIT_TYPE.EDGES, PatchType.TREE_PATCH, 771),
        (IOI_CIRCUIT_TYPE.EDGES_MLP_0_ONLY, PatchType.EDGE_PATCH, 242),
    ],
)
def test_published_sizes_without_positions(
    circuit: IOI_CIRCUIT_TYPE, patch_type: PatchType, n_edges: int
) -> None:
    result = study(
        gpt2_shape(),
        2,
        False,
        "BABA",
        TEMPLATE_IDX,
        factorized=True,
        circuit=circuit,
        ablation_type=AblationType.RESAMPLE,
        tok_pos=False,
        patch_type=patch_type,
    )
    assert result.n_edges == n_edges
    assert len(result.percents) == 2


@pytest.mark.slow
def test_a_learned_circuit_is_as_large_as_the_published_one() -> None:
    arguments: Any = dict(tok_pos=False, ablation_type=AblationType.RESAMPLE)
    published = study(gpt2_shape(), 4, True, "ABBA", TEMPLATE_IDX, **arguments)
    learned = study(
        gpt2_shape(),
        4,
        True,
        "ABBA",
        TEMPLATE_IDX,
        learned=True,
        learned_epochs=5,
        **arguments,
    )
    assert published.n_edges == 62
    assert 62 <= learned.n_edges <= 64  # ties of the last one may be in it
    assert any(
        not t.equal(learned.prune_scores[name], scores)
        for name, scores in published.prune_scores.items()
    )


def test_every_template_has_its_file() -> None:
    for order in ("ABBA", "BABA"):
        for idx in range(15):
            file = json.loads(prompt_file(order, idx).read_text())
            assert len(file["prompts"]) == 100 and file["tokenizer"] == "gpt2"
            assert {"IO", "S1", "S1+1", "S2", "end"} <= set(file["word_idxs"])
            words = file["word_idxs"]
            assert (words["IO"] < words["S1"]) == (order == "ABBA")
            assert file["seq_labels"][words["S2"]] == "S2"


def test_what_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no IOI template 'ABBA' 15; .*from 0 to 14"):
        study(gpt2_shape(), 4, True, "ABBA", 15)
    write_more = "has 100. Write .*ioi_generator.py --single-templates --n-prompts"
    with pytest.raises(DataError, match=f"needs 101 prompts, .*{write_more} 101`"):
        study(gpt2_shape(), 101, True, "ABBA", TEMPLATE_IDX)
    with pytest.raises(DataError, match=f"needs 450 prompts, .*{write_more} 450`"):
        study(gpt2_shape(), 50, True, "ABBA", TEMPLATE_IDX, learned=True)
    with pytest.raises(ConfigError, match="`factorized=True`; this one has"):
        study(gpt2_shape(), 4, True, "ABBA", 3, circuit=IOI_CIRCUIT_TYPE.EDGES)

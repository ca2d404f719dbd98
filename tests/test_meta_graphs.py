"""Graphs of models on the meta device: shapes without weights."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch as t
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources._bridge_builder import (
    build_bridge_from_module,
)
from transformers import LlamaConfig, LlamaForCausalLM

from auto_circuit.circuits import circuit_of_scores
from auto_circuit.errors import ModelError
from auto_circuit.utils.ablation_activations import src_ablations
from auto_circuit.utils.graph_utils import patch_mode, patchable_model, set_all_masks
from tests.models import SIZES, llama, tokens

GROUPED: Any = {**SIZES, "num_key_value_heads": 2}


def meta_llama() -> TransformerBridge:
    with t.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**GROUPED))
    return build_bridge_from_module(model, "LlamaForCausalLM", hf_config=model.config)


def test_it_is_the_graph_of_the_model_with_weights() -> None:
    graph = patchable_model(meta_llama(), True, "last_seq", 3, separate_qkv=True)
    real = patchable_model(llama(), True, "last_seq", 3, separate_qkv=True)
    assert graph.edges == real.edges and graph.nodes == real.nodes
    assert {mask.device.type for mask in graph.patch_masks.values()} == {"meta"}
    assert graph.find_edges("A0.1->A1.1.K @ 2") == real.find_edges("A0.1->A1.1.K @ 2")
    set_all_masks(graph, 1.0)
    # Scores that were found elsewhere keep their values.
    scores = {name: t.rand_like(mask) for name, mask in real.patch_masks.items()}
    circuit = circuit_of_scores(graph, scores, 7)
    assert circuit.names == circuit_of_scores(real, scores, 7).names


def test_it_cannot_be_run_and_says_so() -> None:
    graph = patchable_model(meta_llama(), True, separate_qkv=True)
    with pytest.raises(ModelError, match="on the meta device, where tensors have shapes"):
        src_ablations(graph, tokens(1, 5))
    patch = t.zeros(len(graph.srcs), 1, 5, 32)
    with pytest.raises(ModelError, match="nothing can be run or patched"):
        with patch_mode(graph, patch):
            pass
    with pytest.raises(ModelError, match=r"scores would have no values.*device='cpu'"):
        graph.circuit_prune_scores(["A0.1->A1.1.K"])
    with_masks = patchable_model(meta_llama(), True, separate_qkv=True, device="cpu")
    scores = with_masks.circuit_prune_scores(["A0.1->A1.1.K"])
    assert sum(float(score.sum()) for score in scores.values()) == 1.0


@pytest.mark.slow
def test_graphs_of_large_models_take_no_time_and_memory() -> None:
    """In a process of its own: the checks of types in a test take ten times as long."""
    code = (
        "from benchmarks.graphs import *\n"
        "for name, shape in SHAPES.items():\n"
        "    found = measured(name, 100)\n"
        "    assert found.n_edges == shape.n_edges(100), found\n"
        # A busy machine may take longer.
        "    assert found.build_seconds < 2 * shape.seconds, found\n"
        "    assert found.name_seconds < 2.0 and found.megabytes < 300, found\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

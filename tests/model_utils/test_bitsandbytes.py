"""Models that bitsandbytes itself has packed in 8 or 4 bits; it runs on the CPU too.

`test_quantised_weights.py` has stand-ins for its classes, which are exact.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch as t
from torch import Tensor
from torch.nn import Linear
from transformers import LlamaConfig, LlamaForCausalLM

from auto_circuit.errors import ModelError
from auto_circuit.experiment_utils import load_tl_model
from auto_circuit.prune_algos.edge_attribution_patching import (
    edge_attribution_patching_prune_scores,
)
from auto_circuit.types import PruneScores
from auto_circuit.utils.ablation_activations import src_ablations
from auto_circuit.utils.graph_utils import patch_mode, patchable_model, set_all_masks
from auto_circuit.utils.patchable_model import PatchableModel
from auto_circuit.weights import QUANTISED, dense_weight, input_rounding
from tests.models import SIZES, randomize, tokens
from tests.test_prune import token_loader

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="bitsandbytes is installed on Linux only"
)
WIDTHS: dict[str, Any] = SIZES | {"hidden_size": 64, "intermediate_size": 128}
"""Multiples of 64, bitsandbytes' block."""
CLEAN, CORRUPT = tokens(2, 5, seed=1), tokens(2, 5, seed=2)


def plain_llama() -> LlamaForCausalLM:
    model = LlamaForCausalLM(LlamaConfig(**WIDTHS, num_key_value_heads=2)).eval()
    randomize(model)
    return model


def packed_llama(kind: str) -> LlamaForCausalLM:
    """Its blocks' linear maps in 8 bits, or in 4 bits of a kind."""
    packed: Any = import_module("bitsandbytes").nn
    model: Any = plain_llama()
    for name, linear in list(model.model.layers.named_modules()):
        if not isinstance(linear, Linear):
            continue
        sizes, weight = (linear.in_features, linear.out_features), linear.weight.data
        if kind == "int8":
            of_kind = packed.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False)
            of_kind.weight = packed.Int8Params(
                weight.clone(), requires_grad=False, has_fp16_weights=False
            )
        else:
            of_kind = packed.Linear4bit(*sizes, bias=False, quant_type=kind)
            of_kind.weight = packed.Params4bit(
                weight.clone(), requires_grad=False, quant_type=kind
            )
        parent, _, part = name.rpartition(".")
        setattr(model.model.layers.get_submodule(parent), part, of_kind)
    return model.to("cpu").eval()


def unpacked(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """A plain model with the numbers that the packed weights stand for."""
    plain = plain_llama()
    for name, module in model.model.layers.named_modules():
        if type(module).__name__ in QUANTISED:
            numbers: Any = plain.model.layers.get_submodule(name)
            numbers.weight.data = dense_weight(module, t.float32).clone()
    return plain


def graphs(kind: str, ungroup: bool = False) -> tuple[PatchableModel, PatchableModel]:
    """(The packed model's graph, that of the numbers)"""
    packed = packed_llama(kind)
    plain = unpacked(packed)
    of_packed, of_plain = (
        patchable_model(
            load_tl_model(model), True, "last_seq", separate_qkv=True, ungroup=ungroup
        )
        for model in (packed, plain)
    )
    return of_packed, of_plain


def outputs(model: PatchableModel, edges: list[str] | None) -> Tensor:
    with t.no_grad(), patch_mode(model, src_ablations(model, CORRUPT), edges):
        return model(CLEAN)


def scores(model: PatchableModel) -> PruneScores:
    return edge_attribution_patching_prune_scores(model, token_loader(), None)


EDGES = ("A0.0->A1.2.Q", "A0.3->A1.1.K", "A0.1->A1.0.V", "MLP 0->MLP 1")


@pytest.mark.parametrize(
    ("kind", "ungroup"),
    [("nf4", True), pytest.param("fp4", False, marks=pytest.mark.slow)],
)
def test_four_bits_are_patched_as_the_numbers_that_they_stand_for(
    kind: str, ungroup: bool
) -> None:
    packed, plain = graphs(kind, ungroup)
    assert input_rounding(packed.wrapped_model) == 0.0
    for edge in EDGES:
        expected = outputs(plain, [edge])
        assert (expected - outputs(plain, [])).abs().max() > 1e-5
        t.testing.assert_close(outputs(packed, [edge]), expected, atol=2e-6, rtol=0)
    set_all_masks(packed, 1.0)
    everything = outputs(packed, None)
    t.testing.assert_close(everything, packed(CORRUPT), atol=1e-5, rtol=0)
    of_plain = scores(plain)
    for name, score in scores(packed).items():
        assert of_plain[name].abs().max() > 1e-6
        t.testing.assert_close(score, of_plain[name], atol=1e-6, rtol=1e-3)


def test_eight_bits_are_patched_as_their_numbers_but_for_rounding() -> None:
    """It rounds what goes in too: heads are not quite shares of what is written."""
    packed, plain = graphs("int8")
    assert input_rounding(packed.wrapped_model) == 0.5 / 127
    spread = float(outputs(plain, []).std())
    for edge in EDGES:
        t.testing.assert_close(
            outputs(packed, [edge]), outputs(plain, [edge]), atol=0.1 * spread, rtol=0
        )
    of_plain = t.cat([score.flatten() for score in scores(plain).values()])
    of_packed = t.cat([score.flatten() for score in scores(packed).values()])
    correlation = t.corrcoef(t.stack([of_plain, of_packed]))[0, 1]
    assert correlation > 0.98


def test_four_bits_that_the_first_pass_has_packed_for_the_cpu() -> None:
    """On a CPU with instructions for bfloat16; a pass there has no gradients."""
    model = packed_llama("nf4")
    with t.no_grad():
        model(CLEAN)
    linear: Any = model.model.layers[0].self_attn.o_proj
    if not linear.support_avx512bf16_for_cpu:  # the same as if it were
        linear.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ModelError, match="before you run it, or run it on a GPU"):
        dense_weight(linear)


def test_offloaded_weights(tmp_path: Path) -> None:
    """What accelerate keeps on a disk is not there between passes."""
    from accelerate import dispatch_model

    names = [name for name, _ in plain_llama().named_children()]
    places: dict[str, Any] = {name: "cpu" for name in names if name != "model"}
    for name, _ in plain_llama().model.named_children():
        places[f"model.{name}"] = "cpu"
    del places["model.layers"]
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    model: Any = dispatch_model(plain_llama(), places, offload_dir=str(tmp_path))
    with pytest.raises(
        ModelError, match=r"weights .* offloaded, such as 'model\.layers\.1"
    ):
        load_tl_model(model)

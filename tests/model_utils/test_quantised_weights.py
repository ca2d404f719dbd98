"""Models whose linear maps are packed in 8 or 4 bits, as bitsandbytes packs them.

bitsandbytes itself rounds what it multiplies by weights of 8 bits, so no comparison with it
is exact (see `test_bitsandbytes.py`). Its two classes are built here from their documented
formats: an 8-bit row is whole numbers and a scale, a 4-bit block is codes of a table and a
scale.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch as t
from torch import Tensor
from torch.nn import Linear, Parameter
from torch.nn.functional import linear
from transformers import LlamaConfig, LlamaForCausalLM

from auto_circuit.errors import ModelError
from auto_circuit.experiment_utils import load_tl_model
from auto_circuit.types import PruneScores
from auto_circuit.utils.ablation_activations import src_ablations
from auto_circuit.utils.graph_utils import (
    patch_mode,
    patchable_model,
    set_all_masks,
    train_mask_mode,
)
from auto_circuit.utils.patchable_model import PatchableModel
from auto_circuit.weights import dense_weight
from tests.models import SIZES, randomize, tokens

BLOCK = 16
TABLE = t.linspace(-1.0, 1.0, 16)
CLEAN, CORRUPT = tokens(2, 5, seed=1), tokens(2, 5, seed=2)


class Int8Params(Parameter):
    SCB: Tensor


class Params4bit(Parameter):
    quant_state: Any


class Linear8bitLt(Linear):
    """Rows of whole numbers from -127 to 127, and a scale for each."""

    def __init__(self, plain: Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=False)
        scale = plain.weight.data.abs().amax(1)
        numbers = (plain.weight.data / scale[:, None] * 127).round().to(t.int8)
        self.weight = Int8Params(numbers, requires_grad=False)
        self.weight.SCB = scale
        self.state = SimpleNamespace(CB=None, SCB=None)

    def plain_weight(self) -> Tensor:
        rows = zip(self.weight.tolist(), self.weight.SCB.tolist(), strict=True)
        return t.tensor([[n * scale / 127 for n in row] for row, scale in rows])

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.plain_weight())


class Linear4bit(Linear):
    """Two codes in a byte, and a scale for each block of them."""

    def __init__(self, plain: Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=False)
        blocks = plain.weight.data.reshape(-1, BLOCK)
        scales = blocks.abs().amax(1, keepdim=True)
        codes = ((blocks / scales)[..., None] - TABLE).abs().argmin(-1).flatten()
        packed = (codes[::2] * 16 + codes[1::2]).to(t.uint8)[:, None]
        self.weight = Params4bit(packed, requires_grad=False)
        self.weight.quant_state = SimpleNamespace(scales=scales, shape=plain.weight.shape)

    def plain_weight(self) -> Tensor:
        return dequantize_4bit(self.weight.data, self.weight.quant_state)

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.plain_weight())


def dequantize_4bit(packed: Tensor, state: Any) -> Tensor:
    codes = t.cat([packed // 16, packed % 16], 1).flatten().long()
    return (TABLE[codes].reshape(-1, BLOCK) * state.scales).reshape(state.shape)


@pytest.fixture(autouse=True)
def bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    functional = SimpleNamespace(dequantize_4bit=dequantize_4bit)
    fake: Any = SimpleNamespace(functional=functional)
    monkeypatch.setitem(sys.modules, "bitsandbytes", fake)


def models(ungroup: bool) -> tuple[PatchableModel, PatchableModel]:
    """A model with packed weights, and one with the numbers that they stand for."""
    config = LlamaConfig(**SIZES, num_key_value_heads=2)
    packed, plain = LlamaForCausalLM(config), LlamaForCausalLM(config)
    for model in (packed, plain):
        randomize(model)
    for name, module in list(packed.model.layers.named_modules()):
        if isinstance(module, Linear):
            parent, _, part = name.rpartition(".")
            quantised = Linear8bitLt(module)
            setattr(packed.model.layers.get_submodule(parent), part, quantised)
            numbers: Any = plain.model.layers.get_submodule(name)
            numbers.weight.data = quantised.plain_weight()
    graphs = [
        patchable_model(load_tl_model(m), True, separate_qkv=True, ungroup=ungroup)
        for m in (packed, plain)
    ]
    return graphs[0], graphs[1]


def outputs(model: PatchableModel, edges: list[str] | None) -> Tensor:
    patch = src_ablations(model, CORRUPT)
    with t.no_grad(), patch_mode(model, patch, edges):
        return model(CLEAN)


def gradients(model: PatchableModel, value: float) -> PruneScores:
    patch = src_ablations(model, CORRUPT)
    with train_mask_mode(model) as masks:
        set_all_masks(model, value)
        with patch_mode(model, patch):
            model(CLEAN)[:, -1].log_softmax(-1)[:, 3].sum().backward()
        return {name: mask.grad.clone() for name, mask in masks.items()}  # type: ignore[union-attr]


@pytest.mark.parametrize("ungroup", [False, True], ids=["grouped", "ungrouped"])
def test_they_are_patched_as_the_numbers_that_they_stand_for(ungroup: bool) -> None:
    packed, plain = models(ungroup)
    assert "attn.hook_result" in packed.srcs[1].module_name
    set_all_masks(packed, 1.0)
    t.testing.assert_close(outputs(packed, None), packed(CORRUPT), atol=1e-5, rtol=0)
    for name in ("A0.1->A1.2.Q", "A0.3->A1.1.K", "A0.2->A1.0.V", "A1.3->MLP 1"):
        expected = outputs(plain, [name])
        assert (expected - plain(CLEAN)).abs().max() > 1e-4
        t.testing.assert_close(outputs(packed, [name]), expected, atol=2e-6, rtol=0)
    for value in (0.0, 0.5):
        expected = gradients(plain, value)
        for name, grad in gradients(packed, value).items():
            assert expected[name].abs().max() > 1e-5
            t.testing.assert_close(grad, expected[name], atol=1e-4, rtol=1e-3)


def test_the_dtype_of_dense_weights() -> None:
    plain = Linear(32, 4, bias=False)
    for kind, default in ((Linear8bitLt, t.float32), (Linear4bit, t.float32)):
        packed = kind(plain)
        assert dense_weight(packed).dtype == default
        assert dense_weight(packed, t.bfloat16).dtype == t.bfloat16
        found = dense_weight(packed, t.float32)
        t.testing.assert_close(found, packed.plain_weight(), atol=1e-6, rtol=1e-6)
    # After bitsandbytes' first pass they lie elsewhere.
    packed = Linear8bitLt(plain)
    expected = packed.plain_weight()
    packed.state = SimpleNamespace(CB=packed.weight.data, SCB=packed.weight.SCB)
    del packed.weight.SCB
    t.testing.assert_close(dense_weight(packed, t.float32), expected)
    assert dense_weight(plain, t.bfloat16) is plain.weight


def test_weights_that_nobody_can_read(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = Linear4bit(Linear(32, 4, bias=False))
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(
        ModelError, match="4 bits of bitsandbytes, which is not installed"
    ):
        dense_weight(packed)
    packed.weight = Parameter(packed.weight.data, requires_grad=False)  # type: ignore[assignment]
    with pytest.raises(ModelError, match="Linear4bit has packed weights .torch.uint8"):
        dense_weight(packed)

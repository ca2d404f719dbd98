"""Masks' gradients a few sources at a time are those of all sources together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch as t

from auto_circuit.engine.kept_sources import KeptSources, kept_alone, kept_with_sums
from auto_circuit.utils.ablation_activations import src_ablations
from auto_circuit.utils.graph_utils import (
    patch_mode,
    patchable_model,
    set_all_masks,
    train_mask_mode,
)
from auto_circuit.utils.patchable_model import PatchableModel
from tests.models import gpt2, llama, mixtral, olmo, pythia, tokens

# Embeddings, two heads, an MLP, two heads.
MODULES = [slice(0, 1), slice(1, 3), slice(3, 4), slice(4, 6)]
CLEAN, CORRUPT = tokens(2, 4, seed=1), tokens(2, 4, seed=2)


def test_others_are_left_out_or_added_up_by_module() -> None:
    assert kept_alone(range(2, 4)).slots == (range(2, 3), range(3, 4))
    assert kept_alone(range(2, 4), also=[0]).slots == (
        *(range(0, 1), range(2, 3), range(3, 4)),
    )
    assert kept_with_sums(range(2, 4), MODULES).slots == (
        *(range(0, 1), range(1, 2), range(2, 3), range(3, 4), range(4, 6)),
    )
    assert kept_with_sums(range(0, 1), MODULES).slots == (
        *(range(0, 1), range(1, 3), range(3, 4), range(4, 6)),
    )


def test_slots_of_sources() -> None:
    kept = kept_with_sums(range(4, 5), MODULES)
    assert [kept.of(srcs) for srcs in MODULES] == [
        *(slice(0, 1), slice(1, 2), slice(2, 3), slice(3, 5)),
    ]
    assert kept_alone(range(4, 5)).of(slice(1, 3)) == slice(0, 0)


def test_heads_are_added_up_and_their_gradients_spread() -> None:
    kept = KeptSources((range(1, 3), range(3, 4)), range(3, 4))
    heads = t.tensor([[[[1.0], [2.0], [4.0]]]])  # of the sources 1..3
    assert kept.added_up(slice(1, 4), heads).flatten().tolist() == [3.0, 4.0]
    of_slots = t.tensor([[[5.0], [7.0]]])
    assert kept.spread(slice(1, 4), of_slots).flatten().tolist() == [5.0, 5.0, 7.0]
    left_out = KeptSources((range(3, 4),), range(3, 4))
    assert left_out.spread(slice(1, 4), of_slots).flatten().tolist() == [0.0, 0.0, 5.0]


def test_only_its_own_masks_get_gradients() -> None:
    weights = t.ones(1, 1, 1, 3, requires_grad=True)  # of the sources 1..3
    kept = KeptSources((range(1, 3), range(3, 4)), range(3, 4))
    picked = kept.columns(1, 4, weights)
    picked.backward(t.full_like(picked, 2.0))
    assert weights.grad is not None
    assert weights.grad.flatten().tolist() == [0.0, 0.0, 2.0]
    assert not kept.columns(1, 3, weights).requires_grad


def gradients(
    model: PatchableModel, value: float, kept: KeptSources | None
) -> dict[str, t.Tensor]:
    whole = model.plan
    model.plan = replace(whole, kept=kept)
    try:
        patch = src_ablations(model, CORRUPT)
        with train_mask_mode(model) as masks:
            set_all_masks(model, value)
            with patch_mode(model, patch, overwrite_patch=True):
                logits = model.sliced(CLEAN)
                (logits[:, 1] - logits[:, 2]).sum().backward()
            grads = {name: mask.grad for name, mask in masks.items()}
        return {
            name: t.zeros_like(masks[name]) if grad is None else grad.clone()
            for name, grad in grads.items()
        }
    finally:
        model.plan = whole


@pytest.mark.parametrize("value", [0.0, 0.5])
@pytest.mark.parametrize(
    "make",
    [
        *(gpt2, olmo),
        *(
            pytest.param(make, marks=pytest.mark.slow)
            for make in (llama, pythia, mixtral)
        ),
    ],
)
def test_chunks_add_up_to_the_whole(
    make: Callable[[], t.nn.Module], value: float
) -> None:
    model = patchable_model(make().double(), True, "last_seq", separate_qkv=True)
    modules = [port.srcs for port in model.plan.src_ports]
    whole = gradients(model, value, None)
    total = {name: t.zeros_like(grad) for name, grad in whole.items()}
    n_srcs = model.plan.n_srcs
    for lo in range(0, n_srcs, 3):
        own = range(lo, min(lo + 3, n_srcs))
        # A mask that is not zero changes what destinations read, whosever gradient it is.
        kept = kept_with_sums(own, modules) if value else kept_alone(own)
        for name, grad in gradients(model, value, kept).items():
            total[name] += grad
    for name, grad in whole.items():
        largest = float(grad.abs().max())
        assert largest > 0
        # Norms compute in float32, also in a model of float64.
        t.testing.assert_close(total[name], grad, rtol=0, atol=1e-6 * largest)

"""`copy.deepcopy` of models, tasks, loaders and batches, at any time: the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch as t
from torch import Tensor

from auto_circuit.errors import GraphError
from auto_circuit.tasks import Task
from auto_circuit.types import AblationType
from auto_circuit.utils.ablation_activations import src_ablations
from auto_circuit.utils.graph_utils import (
    patch_mode,
    patchable_model,
    set_all_masks,
    set_mask_batch_size,
    train_mask_mode,
)
from auto_circuit.utils.patchable_model import PatchableModel
from tests.models import folded, gpt2, tokens
from tests.texts import name_prompts, text_model, word_tokenizer, write_prompts

CLEAN, CORRUPT = tokens(2, 5), tokens(2, 5, seed=1)
EDGE = "A0.1->MLP 1"
CLOSE: Any = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture
def model() -> PatchableModel:
    """With dropout that would act in train mode, and folded as a loaded model is."""
    return patchable_model(folded(gpt2()), True, "last_seq", separate_qkv=True)


def patched(model: PatchableModel) -> Tensor:
    acts = src_ablations(model, CORRUPT)
    with t.no_grad(), patch_mode(model, acts, [EDGE]):
        return model(CLEAN)


def nothing(model: PatchableModel) -> None:
    pass


def forward(model: PatchableModel) -> None:
    with t.no_grad():
        model(CLEAN)


def forward_with_gradients(model: PatchableModel) -> None:
    model(CLEAN)


def backward_into_masks(model: PatchableModel) -> None:
    acts = src_ablations(model, CORRUPT)
    with train_mask_mode(model), patch_mode(model, acts):
        model(CLEAN).sum().backward()


def cached(model: PatchableModel) -> None:
    model.run_with_cache(CLEAN)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "before",
    [
        pytest.param(nothing, marks=SLOW),
        pytest.param(forward, marks=SLOW),
        pytest.param(forward_with_gradients, marks=SLOW),
        backward_into_masks,
        pytest.param(cached, marks=SLOW),
        pytest.param(patched, marks=SLOW),
    ],
)
def test_a_model_is_copied_at_any_time(
    model: PatchableModel, before: Callable[[PatchableModel], Any]
) -> None:
    expected = model(CLEAN).detach(), patched(model)
    before(model)
    copied = deepcopy(model)
    again = deepcopy(copied)
    for one in (copied, again, model):
        t.testing.assert_close((one(CLEAN).detach(), patched(one)), expected, **CLOSE)
        assert not any(module.training for module in one.wrapped_model.modules())
    for weight in copied.wrapped_model.parameters():
        weight.data.mul_(1.5)
    t.testing.assert_close((model(CLEAN), patched(model)), expected, **CLOSE)


def test_masks_are_copied_and_then_apart(model: PatchableModel) -> None:
    set_all_masks(model, 0.5)
    copied = deepcopy(model)
    set_all_masks(copied, 1.0)
    acts = src_ablations(model, CORRUPT)
    with t.no_grad(), patch_mode(copied, acts):
        corrupt = copied(CLEAN)
    t.testing.assert_close(corrupt, model(CORRUPT), **CLOSE)
    assert {float(mask.max()) for mask in model.patch_masks.values()} == {0.5}


def test_inside_of_a_context_it_is_refused(model: PatchableModel) -> None:
    acts = src_ablations(model, CORRUPT)
    for context in (
        lambda: patch_mode(model, acts, [EDGE]),
        lambda: train_mask_mode(model),
        lambda: set_mask_batch_size(model, 2),
    ):
        with context(), pytest.raises(GraphError, match="cannot be copied"):
            deepcopy(model)
    forward(deepcopy(model))


def test_options_of_the_graph_are_copied() -> None:
    kept = patchable_model(gpt2(), True, separate_qkv=True, keep_positions=True)
    zeros = [src_ablations(m, CLEAN, AblationType.ZERO) for m in (kept, deepcopy(kept))]
    assert zeros[0][0].abs().max() > 0  # the position embeddings
    t.testing.assert_close(*zeros)


def test_a_task_and_its_parts(tmp_path: Path) -> None:
    path = write_prompts(tmp_path, name_prompts(6, "at the store {} met {}"))
    bridge = text_model(word_tokenizer())
    task = Task("copy", "copy", 3, 1, True, bridge, path)
    batch = next(iter(task.test_loader))
    assert task.test_loader.kv_cache is not None
    expected = task.model(batch.clean)
    for copied in (deepcopy(task), replace(task, _model_def=deepcopy(bridge))):
        copied_batch = next(iter(copied.test_loader))
        assert copied_batch.key == batch.key
        assert t.equal(copied_batch.clean, batch.clean)
        assert copied.model is not task.model
        t.testing.assert_close(copied.model(copied_batch.clean), expected, **CLOSE)
    loader, model = deepcopy(task.test_loader), deepcopy(task.model)
    (of_copy,) = loader
    assert of_copy.key == batch.key and loader.kv_cache is task.test_loader.kv_cache
    t.testing.assert_close(model(deepcopy(of_copy).clean), expected, **CLOSE)
    acts = src_ablations(model, of_copy.corrupt)
    with t.no_grad(), patch_mode(model, acts):
        set_all_masks(model, 1.0)
        t.testing.assert_close(
            model(of_copy.clean)[model.out_slice],
            task.model(batch.corrupt)[model.out_slice],
            **CLOSE,
        )

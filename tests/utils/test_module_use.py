"""Two PatchableModels over one module, and two threads: right numbers, or an error."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch as t

from auto_circuit.errors import GraphError, ModelError
from auto_circuit.prune_algos.edge_attribution_patching import (
    edge_attribution_patching_prune_scores,
)
from auto_circuit.utils.ablation_activations import src_ablations
from auto_circuit.utils.graph_utils import patch_mode, patchable_model, train_mask_mode
from auto_circuit.utils.module_use import being_read, in_use, is_in_use
from auto_circuit.utils.patchable_model import PatchableModel
from tests.models import gpt2, llama, state_snapshot, tokens
from tests.test_prune import token_loader

CLEAN, CORRUPT = tokens(3, 5, seed=1), tokens(3, 5, seed=2)
EDGE = ["Resid Start->MLP 0"]


def make(bridge: Any = None) -> PatchableModel:
    bridge = bridge or gpt2(n_layers=1)
    return patchable_model(bridge, True, "last_seq", separate_qkv=True)


@pytest.fixture(scope="module")
def one() -> PatchableModel:
    return make()


@pytest.fixture(scope="module")
def two(one: PatchableModel) -> PatchableModel:
    return make(one.wrapped_model)


def patched(model: PatchableModel) -> t.Tensor:
    patch = src_ablations(model, CORRUPT)
    with t.no_grad(), patch_mode(model, patch, EDGE):
        return model(CLEAN)


def test_one_after_the_other(one: PatchableModel, two: PatchableModel) -> None:
    assert t.equal(patched(one), patched(two))


def test_another_model_inside_of_patch_mode(
    one: PatchableModel, two: PatchableModel
) -> None:
    patch = src_ablations(one, CORRUPT)
    before = state_snapshot(one)
    with patch_mode(one, patch, EDGE):
        inside = one(CLEAN)
        for attempt in (
            lambda: two(CLEAN),
            lambda: two.sliced(CLEAN),
            lambda: two.run_with_cache(CLEAN),
            lambda: src_ablations(two, CORRUPT),
            lambda: patched(two),
            lambda: patch_mode(two, patch).__enter__(),
            lambda: train_mask_mode(two).__enter__(),
            lambda: make(one.wrapped_model),
            lambda: edge_attribution_patching_prune_scores(two, token_loader(), None),
        ):
            with pytest.raises(GraphError, match="Another PatchableModel"):
                attempt()
        assert t.equal(one(CLEAN), inside)
    assert state_snapshot(one) == before
    assert not t.equal(inside, two(CLEAN))


def test_another_thread(one: PatchableModel, two: PatchableModel) -> None:
    patch, plain = src_ablations(one, CORRUPT), one(CLEAN)
    with ThreadPoolExecutor(1) as other, patch_mode(one, patch, EDGE):
        for model in (one, two):
            for task in (model, model.sliced):
                with pytest.raises(GraphError, match="Another thread runs this model"):
                    other.submit(task, CLEAN).result()
            with pytest.raises(GraphError, match="Another thread runs this model"):
                other.submit(patched, model).result()
    with ThreadPoolExecutor(1) as other:
        assert t.equal(other.submit(one, CLEAN).result(), plain)


def test_plain_passes_of_two_threads_go_together(one: PatchableModel) -> None:
    plain = one(CLEAN)

    def from_inside(module: Any, args: Any, out: Any) -> None:
        handle.remove()
        with ThreadPoolExecutor(1) as other:
            found.append(other.submit(one, CLEAN).result())
            with pytest.raises(GraphError, match="Another thread runs this model"):
                other.submit(src_ablations, one, CLEAN).result()

    found: list[t.Tensor] = []
    bridge: Any = one.wrapped_model
    handle = bridge.blocks[0].mlp.register_forward_hook(from_inside)
    assert t.equal(one(CLEAN), plain)
    assert t.equal(found[0], plain)


def test_racing_threads_get_right_numbers_or_an_error(
    one: PatchableModel, two: PatchableModel
) -> None:
    right = patched(one)

    def attempt(model: PatchableModel) -> bool:
        try:
            return t.equal(patched(model), right)
        except GraphError as error:
            return "Another thread" in str(error)

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(attempt, [one, two] * 10))
    assert t.equal(patched(one), right)


# --------------------------------------------------------------------- what has been left


def test_a_patch_mode_that_was_left_patches_no_more(
    one: PatchableModel, two: PatchableModel
) -> None:
    """Also if another context of that model is still open."""
    patch, plain = src_ablations(one, CORRUPT), two(CLEAN)
    with train_mask_mode(one):
        with patch_mode(one, patch, EDGE), pytest.raises(GraphError, match="Another"):
            two(CLEAN)
        assert t.equal(two(CLEAN), plain)


def reads(module: t.nn.Module) -> bool:
    with being_read(module, module):
        return is_in_use(module)


def test_a_thread_that_has_left_a_module_does_not_keep_it() -> None:
    """Its hooks are gone; it only runs the module, which others may do too."""
    module = t.nn.Linear(1, 1)
    with ThreadPoolExecutor(1) as other, being_read(module, module):
        with in_use(module, module), pytest.raises(GraphError, match="Another thread"):
            other.submit(reads, module).result()
        assert other.submit(reads, module).result()
    assert not is_in_use(module)


def test_a_bridge_and_the_model_in_it_are_one() -> None:
    bridge: Any = gpt2(n_layers=1)
    graph = make(bridge)
    with ThreadPoolExecutor(1) as other, in_use(bridge, bridge):
        for module in (bridge, bridge.original_model, graph):
            assert is_in_use(module)
            with pytest.raises(GraphError, match="Another thread"):
                other.submit(reads, module).result()
    assert not is_in_use(bridge.original_model)


# ------------------------------------------------------------------------------- copies


def test_a_module_that_is_copied_amid_its_use_is_in_nobodys() -> None:
    module = t.nn.Linear(1, 1)
    with ThreadPoolExecutor(1) as other, in_use(module, module, patches=True):
        copied = copy.deepcopy(module)
        assert is_in_use(module) and not is_in_use(copied)
        assert other.submit(reads, copied).result()
        with in_use(copied, copied, patches=True):
            pass
    assert not is_in_use(module) and not is_in_use(copied)


@pytest.mark.parametrize("architecture", [lambda: gpt2(n_layers=1), llama])
def test_a_copy_is_independent(architecture: Any) -> None:
    model = make(architecture())
    right = patched(model)
    model(CLEAN)  # a pass may leave tensors of its graph behind
    edge = model.find_edges(EDGE[0])[0]
    edge.patch_mask(model).data[(..., *edge.patch_idx)] = 0.5
    copied = copy.deepcopy(model)
    assert float(edge.patch_mask(copied)[edge.patch_idx]) == 0.5
    assert list(copied.edges) == list(model.edges)
    assert t.equal(patched(copied), right)
    for parameter in copied.wrapped_model.parameters():
        parameter.data.mul_(1.5)
    assert t.equal(patched(model), right)
    assert not t.equal(patched(copied), right)


@pytest.mark.parametrize("architecture", [lambda: gpt2(n_layers=1), llama])
def test_a_copied_bridge_can_be_patched(architecture: Any) -> None:
    model = make(architecture())
    right = patched(model)
    copied = make(copy.deepcopy(model.wrapped_model))
    assert t.equal(patched(copied), right)
    for parameter in copied.wrapped_model.parameters():
        parameter.data.mul_(1.5)
    assert t.equal(patched(model), right)
    assert not t.equal(patched(copied), right)


def test_a_copy_amid_a_patch_mode(one: PatchableModel) -> None:
    with (
        patch_mode(one, src_ablations(one, CORRUPT)),
        pytest.raises(GraphError, match="Leave"),
    ):
        copy.deepcopy(one)


@pytest.mark.slow  # PyTorch's compiler takes seconds to import
def test_compiled_models_give_the_same_numbers(one: PatchableModel) -> None:
    compiled = t.compile(one, backend="eager")
    patch = src_ablations(one, CORRUPT)
    assert t.equal(compiled(CLEAN), one(CLEAN))
    with t.no_grad(), patch_mode(one, patch, EDGE):
        assert t.equal(compiled(CLEAN), one(CLEAN))


@pytest.mark.parametrize("write", [pickle.dumps, copy.copy])
def test_pickles(one: PatchableModel, write: Any) -> None:
    with pytest.raises(ModelError, match="state_dict.*save_circuit.*deepcopy"):
        write(one)


def test_the_wrapped_model_is_not_patched_behind_ones_back(one: PatchableModel) -> None:
    patch = src_ablations(one, CORRUPT)
    with t.no_grad(), patch_mode(one, patch, EDGE):
        for run in (one.wrapped_model, one.wrapped_model.run_with_cache):  # type: ignore[union-attr]
            with pytest.raises(GraphError, match="wrapped model was called by itself"):
                run(CLEAN)  # type: ignore[operator]
        with_patch = one(CLEAN)
        t.testing.assert_close(one.run_with_cache(CLEAN)[0], with_patch)
    assert (one.wrapped_model(CLEAN) - with_patch).abs().max() > 1e-5  # type: ignore[operator]

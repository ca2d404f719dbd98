"""The caller's torch state changes no number, and is what it was afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import pytest
import torch as t
from torch import Tensor

from auto_circuit.errors import GraphError, ModelError
from auto_circuit.metrics.circuit_outs import circuit_prompt_vals
from auto_circuit.metrics.prune_metrics.prune_metrics import (
    LOGIT_DIFF_METRIC,
    PRUNE_METRICS,
)
from auto_circuit.prune import run_circuits
from auto_circuit.prune_algos.prune_algos import PRUNE_ALGOS
from auto_circuit.types import AblationType, CircuitOutputs
from auto_circuit.utils.ablation_activations import (
    batch_src_ablations,
    record_src_outs,
    src_ablations,
)
from auto_circuit.utils.graph_utils import (
    mask_fn_mode,
    patch_mode,
    patchable_model,
    preserved_masks,
    set_all_masks,
    set_mask_batch_size,
    train_mask_mode,
)
from auto_circuit.utils.patchable_model import PatchableModel
from auto_circuit.utils.torch_state import in_own_state
from tests.models import gpt2, state_snapshot, tokens
from tests.plain_patching import default_dtype
from tests.prune_algos.test_conformance import score
from tests.test_prune import random_scores, token_loader

CLEAN, CORRUPT = tokens(3, 5, seed=1), tokens(3, 5, seed=2)
LOADER = token_loader(3, 2)
FAST_STATES = ("train mode", "everything")
TOLERANCE = 1e-6
"""Relative to the largest number."""

Numbers = Mapping[str, Tensor]


def make_model() -> PatchableModel:
    """Dropout everywhere, which would double or delete half of all numbers."""
    bridge = gpt2(n_layers=1, dropout=0.5)
    return patchable_model(bridge, True, "last_seq", separate_qkv=True)


SCORES = random_scores(make_model())


@pytest.fixture(scope="module")
def model() -> PatchableModel:
    return make_model()


@pytest.mark.parametrize("who", ["graph", "bridge", "original"])
def test_train_inside_of_patch_mode(model: PatchableModel, who: str) -> None:
    """Somebody calls `train()` there, and does not take it back."""
    bridge: Any = model.wrapped_model
    called = {"graph": model, "bridge": bridge, "original": bridge.original_model}[who]
    patch = src_ablations(model, CORRUPT)
    before = state_snapshot(model)
    with t.no_grad(), patch_mode(model, patch, ["A0.0->MLP 0"]):
        expected = model(CLEAN)
        called.train()
        assert t.equal(model(CLEAN), expected)
    assert state_snapshot(model) == before


# -------------------------------------------------------------------------- the states


@contextmanager
def train_mode(model: PatchableModel) -> Iterator[None]:
    """As a Trainer leaves it, but for one module, which a user has frozen."""
    bridge: Any = model.wrapped_model
    frozen = bridge.original_model.transformer.h[0].mlp.dropout
    try:
        model.train()
        bridge.original_model.train()
        frozen.eval()
        yield
    finally:
        bridge.original_model.eval()
        model.eval()


@contextmanager
def trained_weights(model: PatchableModel) -> Iterator[None]:
    """As before a fine-tuning: the weights ask for gradients."""
    model.wrapped_model.requires_grad_(True)
    try:
        yield
    finally:
        model.wrapped_model.requires_grad_(False)


@contextmanager
def everything(model: PatchableModel) -> Iterator[None]:
    with ExitStack() as stack:
        for name, state in STATES.items():
            if name != "everything":
                stack.enter_context(state(model))
        yield


STATES: dict[str, Callable[[PatchableModel], AbstractContextManager[Any]]] = {
    "train mode": train_mode,
    "no_grad": lambda model: t.no_grad(),
    "inference_mode": lambda model: t.inference_mode(),
    "autocast": lambda model: t.autocast("cpu", t.bfloat16),
    "default dtype": lambda model: default_dtype(t.float64),
    "default device": lambda model: t.device("meta"),
    "weights with gradients": trained_weights,
    "everything": everything,
}
on_all_states = pytest.mark.parametrize(
    "state",
    [
        pytest.param(name, marks=[] if name in FAST_STATES else [pytest.mark.slow])
        for name in STATES
    ],
)


def difference(found: Numbers, expected: Numbers) -> float:
    """The largest one, in units of the largest number that was expected."""
    assert list(found) == list(expected)
    largest = max(float(values.abs().max()) for values in expected.values()) or 1.0
    return max(
        float((found[name].double() - values.double()).abs().max()) / largest
        for name, values in expected.items()
    )


# ---------------------------------------------------------------- what has to be equal


def algorithm(key: str) -> Callable[[PatchableModel], Numbers]:
    (algo,) = [algo for algo in PRUNE_ALGOS if algo.key == key]
    return lambda model: score(algo, model, LOADER)


def ablation(kind: AblationType) -> Callable[[PatchableModel], Numbers]:
    per_batch = kind in (
        AblationType.RESAMPLE,
        AblationType.BATCH_ALL_TOK_MEAN,
        AblationType.BATCH_TOKENWISE_MEAN,
    )

    def outs(model: PatchableModel) -> Numbers:
        side = "corrupt" if per_batch else None
        found = batch_src_ablations(model, LOADER, kind, side)
        return {str(key): values for key, values in found.items()}

    return outs


def circuit_outputs(model: PatchableModel) -> CircuitOutputs:
    return run_circuits(model, LOADER, [0, 5, 20], SCORES)


def circuits(model: PatchableModel) -> Numbers:
    return {
        f"{size} {key}": values
        for size, outs in circuit_outputs(model).items()
        for key, values in outs.items()
    }


def metrics(model: PatchableModel) -> Numbers:
    outs = circuit_outputs(model)
    found = {m.key: m.metric_func(model, LOADER, outs) for m in PRUNE_METRICS}
    with t.inference_mode(False):
        return {
            key: t.tensor([value for _, value in rows], dtype=t.float64, device="cpu")
            for key, rows in found.items()
        }


def single_circuits(model: PatchableModel) -> Numbers:
    circuit = model.circuit_prune_scores(["Resid Start->MLP 0"], bool=True)
    vals = circuit_prompt_vals(model, LOADER, [circuit], LOGIT_DIFF_METRIC)
    return {"": vals}


def own_loop(model: PatchableModel) -> Numbers:
    """A user's gradients, written with the contexts alone."""
    patch = src_ablations(model, CORRUPT)
    with train_mask_mode(model) as masks, patch_mode(model, patch):
        set_all_masks(model, 0.3)
        model(CLEAN)[:, -1].square().mean().backward()
        return {n: m.grad.clone() for n, m in masks.items() if m.grad is not None}


def single_patches(model: PatchableModel) -> Numbers:
    patch = src_ablations(model, CORRUPT)
    with patch_mode(model, patch, edges=["A0.1->MLP 0"]):
        return {"": model(CLEAN).detach()}


def masks_of_examples(model: PatchableModel) -> Numbers:
    patch = src_ablations(model, CORRUPT)
    with set_mask_batch_size(model, 3), patch_mode(model, patch):
        set_all_masks(model, 0.5)
        return {"": model(CLEAN).detach()}


CHEAP_ALGOS = (
    "Official Circuit",
    "Random",
    "Act Mag",
    "Edge Answer Logit Diff Gradient At Clean",
    "Head Importance Score for Pruning",
    "Subnetwork Tree Probing",
)
FUNCTIONS: dict[str, Callable[[PatchableModel], Numbers]] = {
    **{algo.key: algorithm(algo.key) for algo in PRUNE_ALGOS},
    **{f"ablation {kind.name}": ablation(kind) for kind in AblationType},
    "circuits": circuits,
    "metrics": metrics,
    "single circuits": single_circuits,
    "train_mask_mode": own_loop,
    "patch_mode": single_patches,
    "set_mask_batch_size": masks_of_examples,
}
CHEAP = [
    name
    for name in FUNCTIONS
    if name in CHEAP_ALGOS or name not in {algo.key for algo in PRUNE_ALGOS}
]


def check(model: PatchableModel, function: str, state: str, expected: Numbers) -> None:
    with STATES[state](model):
        before = state_snapshot(model)
        found = FUNCTIONS[function](model)
        assert state_snapshot(model) == before
    assert difference(found, expected) <= TOLERANCE
    assert not any(values.is_inference() for values in found.values())
    assert not any(mask.is_inference() for mask in model.patch_masks.values())


@pytest.fixture(scope="module")
def expected(model: PatchableModel) -> dict[str, Numbers]:
    """The numbers in torch's ordinary state."""
    return {name: FUNCTIONS[name](model) for name in CHEAP}


@on_all_states
def test_numbers_do_not_depend_on_the_state(
    model: PatchableModel, expected: dict[str, Numbers], state: str
) -> None:
    for name, numbers in expected.items():
        check(model, name, state, numbers)


@pytest.mark.slow
@pytest.mark.parametrize("function", [name for name in FUNCTIONS if name not in CHEAP])
def test_no_algorithm_depends_on_the_state(model: PatchableModel, function: str) -> None:
    expected = FUNCTIONS[function](model)
    for state in STATES:
        check(model, function, state, expected)


def test_the_states_would_change_numbers(model: PatchableModel) -> None:
    """Else the tests above could not fail."""
    with t.no_grad():
        before = model(CLEAN)
        for state in ("train mode", "autocast"):
            with STATES[state](model):
                assert float((model(CLEAN) - before).abs().max()) > 1e-3


# ---------------------------------------------------------------- made in a bad state


def test_a_graph_and_a_loader_made_in_inference_mode(
    model: PatchableModel, expected: dict[str, Numbers]
) -> None:
    with t.inference_mode():
        mine = patchable_model(model.wrapped_model, True, "last_seq", separate_qkv=True)
        loader = token_loader(3, 2)
        set_all_masks(mine, 0.0)
        for mask in mine.patch_masks.values():
            mask.data = t.zeros(mask.shape)
    key = "Edge Answer Logit Diff Gradient At Clean"
    (algo,) = [algo for algo in PRUNE_ALGOS if algo.key == key]
    found = algo.func(mine, loader, None)
    assert difference(found, expected[key]) <= TOLERANCE


@pytest.mark.parametrize("overwrite", [False, True])
def test_activations_and_inputs_made_in_inference_mode(
    model: PatchableModel, overwrite: bool
) -> None:
    expected = own_loop(model)
    with t.inference_mode():
        clean, corrupt = CLEAN.clone(), CORRUPT.clone()
        patch = record_src_outs(model, corrupt, {})
        assert not patch.is_inference()
        patch = patch.clone()
        received = t.empty_like(patch)
    with (
        train_mask_mode(model) as masks,
        patch_mode(model, patch, None, received, overwrite_patch=overwrite),
    ):
        set_all_masks(model, 0.3)
        model(clean)[:, -1].square().mean().backward()
        found = {n: m.grad.clone() for n, m in masks.items() if m.grad is not None}
    assert difference(found, expected) <= TOLERANCE
    assert float(received.abs().max()) > 0


def test_weights_made_in_inference_mode() -> None:
    with t.inference_mode():
        bridge = gpt2(n_layers=1)
    with pytest.raises(ModelError, match="weights were made in `torch.inference_mode"):
        patchable_model(bridge, True, "last_seq", separate_qkv=True)


def test_autocast_inside_of_patch_mode(model: PatchableModel) -> None:
    expected = own_loop(model)
    patch = src_ablations(model, CORRUPT)
    with train_mask_mode(model) as masks, patch_mode(model, patch):
        set_all_masks(model, 0.3)
        with t.autocast("cpu", t.bfloat16):
            out = model(CLEAN)
        out[:, -1].square().mean().backward()
        found = {n: m.grad.clone() for n, m in masks.items() if m.grad is not None}
    assert difference(found, expected) <= TOLERANCE


# ------------------------------------------------------------------------ what is left


CONTEXTS: dict[str, Callable[[PatchableModel], AbstractContextManager[Any]]] = {
    "patch_mode": lambda model: patch_mode(
        model, src_ablations(model, CORRUPT), ["A0.1->MLP 0"]
    ),
    "train_mask_mode": train_mask_mode,
    "preserved_masks": preserved_masks,
    "set_mask_batch_size": lambda model: set_mask_batch_size(model, 3),
}


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
@pytest.mark.parametrize("state", ["no_grad", "everything"])
def test_an_interruption_leaves_nothing_behind(
    model: PatchableModel, state: str, error: type[BaseException]
) -> None:
    for context in CONTEXTS.values():
        with STATES[state](model):
            before = state_snapshot(model)
            with (
                pytest.raises(error),
                mask_fn_mode(model, "sigmoid", 0.3),
                context(model),
            ):
                set_all_masks(model, 0.7)
                raise error
            assert state_snapshot(model) == before


@pytest.mark.parametrize("state", ["train mode", "everything"])
def test_an_interruption_amid_a_pass(model: PatchableModel, state: str) -> None:
    def interrupt(module: t.nn.Module, args: Any, out: Any) -> None:
        raise KeyboardInterrupt

    bridge: Any = model.wrapped_model
    handle = bridge.blocks[0].mlp.register_forward_hook(interrupt)
    try:
        for name in CHEAP:
            if name not in ("Official Circuit", "Random"):
                with STATES[state](model):
                    before = state_snapshot(model)
                    with pytest.raises(KeyboardInterrupt):
                        FUNCTIONS[name](model)
                    assert state_snapshot(model) == before, name
    finally:
        handle.remove()


def test_views_of_the_masks_stay_true(model: PatchableModel) -> None:
    set_all_masks(
        model, 0.0
    )  # else it would be said that tests before have put them back
    masks = model.current_patch_masks_as_prune_scores()
    circuit_outputs(model)
    own_loop(model)
    with preserved_masks(model):
        set_all_masks(model, 0.25)
        assert all(bool((view == 0.25).all()) for view in masks.values())
    assert all(bool((view == 0.0).all()) for view in masks.values())


def test_a_pass_inside_of_patch_mode_is_no_plain_pass(model: PatchableModel) -> None:
    """It would record, or measure, the patched model."""
    outs, patch = circuit_outputs(model), src_ablations(model, CORRUPT)
    with patch_mode(model, patch):
        for attempt in (
            lambda: src_ablations(model, CLEAN),
            lambda: PRUNE_METRICS[0].metric_func(model, LOADER, outs),
            lambda: algorithm("Act Mag")(model),
        ):
            with pytest.raises(GraphError, match="it is in `patch_mode`"):
                attempt()


def test_a_model_that_is_given_by_name() -> None:
    @in_own_state(grad=False)
    def is_training(model: Any) -> tuple[bool, bool]:
        return model.training, t.is_grad_enabled()

    module = t.nn.Dropout().train()
    assert is_training(module) == is_training(model=module) == (False, False)
    assert module.training and t.is_grad_enabled()

"""A model over two devices gives the numbers of one device.

There is one device here. So the second one is made up: tensors are marked as being on
`cpu:0` or `cpu:1`, and an operation on tensors of both fails, as it would on GPUs. Only a copy
from one to the other may meet both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch as t
from accelerate.hooks import (
    ModelHook,
    add_hook_to_module,
    remove_hook_from_module,
)
from torch import Tensor
from torch.autograd import Function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from auto_circuit import devices
from auto_circuit.data import PromptDataLoader, PromptDataset
from auto_circuit.errors import MemoryLimitError, ModelError
from auto_circuit.prune_algos.mask_gradient import mask_gradient_prune_scores
from auto_circuit.types import PruneScores
from auto_circuit.utils.ablation_activations import src_ablations
from auto_circuit.utils.graph_utils import (
    patch_mode,
    patchable_model,
    set_all_masks,
    starting_at,
    train_mask_mode,
)
from auto_circuit.utils.patchable_model import PatchableModel
from tests.models import gpt2, llama, tokens

FIRST, SECOND = t.device("cpu:0"), t.device("cpu:1")
CLEAN, CORRUPT = tokens(2, 5, seed=1), tokens(2, 5, seed=2)
COPIES = (t.ops.aten.copy_.default, t.ops.aten._to_copy.default)


class Marked(TorchDispatchMode):
    """Inside, every tensor is on the device that it was made on. Unmarked ones are on any."""

    def __init__(self) -> None:
        super().__init__()
        self.places: dict[int, t.device] = {}

    def device_of(self, tensor: Tensor) -> t.device:
        return self.places.get(self._key(tensor), FIRST)

    def _key(self, tensor: Tensor) -> int:
        return tensor.untyped_storage()._cdata  # not its address: empty ones have none

    def mark(self, tensors: Any, device: t.device) -> None:
        for tensor in tensors:
            self.places[self._key(tensor)] = device

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        # Not indices, flags and `tensor([])`: `torch.tensor` makes these where this does not
        # see it.
        leaves = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        given = [x for x in leaves if x.is_floating_point()]
        found = {
            self.places.get(self._key(x)) for x in given if x.shape not in ((), (0,))
        } - {None}
        out = func(*args, **(kwargs or {}))
        if func in COPIES:
            found = {self.places.get(self._key(x)) for x in given[:1]} - {None}
        if len(found) > 1:
            raise RuntimeError(f"{func} on tensors of {found}")
        asked = (kwargs or {}).get("device")
        device = asked if asked in (FIRST, SECOND) else next(iter(found), None)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and not any(tensor is x for x in given):
                if device is None:
                    self.places.pop(self._key(tensor), None)
                else:
                    self.places[self._key(tensor)] = device
        return out


@contextmanager
def two_devices(bridge: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Marked]:
    """Inside, the first block is on one device, and all that follows on another."""
    mode = Marked()
    monkeypatch.setattr(devices, "device_of", mode.device_of)
    monkeypatch.setattr(devices, "moved", moved)
    second = [block for block in bridge.blocks][1:]
    late = {id(p) for part in (*second, bridge.ln_final) for p in part.parameters()}
    mode.mark((p for p in bridge.parameters() if id(p) not in late), FIRST)
    mode.mark(
        (p for part in (*second, bridge.ln_final) for p in part.parameters()), SECOND
    )
    handle = second[0].register_forward_pre_hook(
        _move(SECOND), with_kwargs=True, prepend=True
    )
    last = bridge.unembed.original_component
    add_hook_to_module(last, _ToFirst())
    try:
        with mode:
            yield mode
    finally:
        handle.remove()
        remove_hook_from_module(last)


class _ToFirst(ModelHook):
    """As accelerate moves inputs: inside of a module's forward, not in a hook of torch's."""

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        return tree_map(lambda x: moved(x, FIRST), (args, kwargs))


class _MoveTo(Function):
    """`tensor.to(device)`, whose way back torch would take to the real device."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, device: t.device) -> Tensor:
        ctx.back = devices.device_of(x)
        return x.to(device)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return grad.to(ctx.back), None


def moved(x: Any, device: t.device) -> Any:
    if not isinstance(x, Tensor) or devices.device_of(x) == device:
        return x
    return _MoveTo.apply(x, device)


def _move(device: t.device) -> Any:
    def hook(module: Any, args: Any, kwargs: Any) -> Any:
        return tree_map(lambda x: moved(x, device), (args, kwargs))

    return hook


def outputs(model: PatchableModel) -> list[Tensor]:
    """Of dense, sparse and nearly full circuits, and from the middle."""
    patch, found = src_ablations(model, CORRUPT), []
    late = model.find_edges("A0.1->MLP 1")
    names = [edge.name for edge in list(model.edges)[::7]]
    for edges in (names, [late[0].name], list(model.edges)[3:]):
        with t.no_grad(), patch_mode(model, patch, edges):
            found.append(model(CLEAN))
    set_all_masks(model, 0.0)
    with t.no_grad(), patch_mode(model, patch, keeps_layers=True):
        model(CLEAN)
        late[0].patch_mask(model).data[late[0].patch_idx] = 1.0
        with starting_at(model, late[0].dest):
            found.append(model(CLEAN))
    return found


def gradients(model: PatchableModel, value: float, overwrite: bool) -> PruneScores:
    patch = src_ablations(model, CORRUPT)
    with train_mask_mode(model) as masks:
        set_all_masks(model, value)
        with patch_mode(model, patch, overwrite_patch=overwrite):
            model(CLEAN)[:, -1].log_softmax(-1)[:, 3].sum().backward()
        return {name: mask.grad.clone() for name, mask in masks.items()}  # type: ignore[union-attr]


@pytest.mark.parametrize("make", [gpt2, llama])
def test_two_devices_give_the_numbers_of_one(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = patchable_model(make(), True, separate_qkv=True)
    assert one.plan.devices == {}
    expected = outputs(one)
    wanted = [gradients(one, value, value > 0) for value in (0.0, 0.4)]
    assert min(float((x - one(CLEAN)).abs().max()) for x in expected) > 1e-4
    bridge = make()
    with two_devices(bridge, monkeypatch):
        two = patchable_model(bridge, True, separate_qkv=True)
        assert {*two.plan.devices.values()} == {FIRST, SECOND}
        for found, value in zip(outputs(two), expected, strict=True):
            t.testing.assert_close(found, value, atol=1e-6, rtol=0)
        for value, of_one in zip((0.0, 0.4), wanted, strict=True):
            of_two = gradients(two, value, value > 0)
            for name, grad in of_one.items():
                assert float(grad.abs().max()) > 1e-5
                t.testing.assert_close(of_two[name], grad, atol=1e-6, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("value", [0.0, 0.4])
def test_a_memory_limit_on_two_devices(
    monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    """In the least: a prompt and a source at a time."""
    answers = [t.tensor([1])] * 2, [t.tensor([2])] * 2
    prompts = PromptDataLoader(
        PromptDataset(CLEAN, CORRUPT, *answers), None, 0, batch_size=2
    )
    options: Any = {"grad_function": "logit", "answer_function": "avg_diff"}
    scores = partial(mask_gradient_prune_scores, **options, mask_val=value)
    expected = scores(
        patchable_model(llama(), True, "last_seq", separate_qkv=True), prompts, None
    )
    bridge = llama()
    with two_devices(bridge, monkeypatch):
        two = patchable_model(bridge, True, "last_seq", separate_qkv=True)
        with pytest.raises(MemoryLimitError) as raised:
            scores(two, prompts, None, memory_limit=100)
        least = int(str(raised.value).split("takes ")[1].split(" ")[0].replace(",", ""))
        found = scores(two, prompts, None, memory_limit=least)
    for name, of_one in expected.items():
        assert float(of_one.abs().max()) > 1e-5
        t.testing.assert_close(found[name], of_one, atol=1e-6, rtol=1e-4)


def test_the_made_up_devices_are_kept_apart() -> None:
    with Marked() as mode:
        here, there = t.ones(3), t.ones(3)
        mode.mark([here], FIRST)
        mode.mark([there], SECOND)
        with pytest.raises(RuntimeError, match="on tensors of"):
            here + there
        assert (here + there.to(FIRST)).sum() == 6


def test_a_block_that_is_split(monkeypatch: pytest.MonkeyPatch) -> None:
    bridge: Any = gpt2()
    mode = Marked()
    mode.mark(bridge.blocks[1].mlp.parameters(), SECOND)
    monkeypatch.setattr(devices, "device_of", mode.device_of)
    with pytest.raises(ModelError, match="block 1 .* split over cpu:0 and cpu:1"):
        patchable_model(bridge, True, separate_qkv=True)

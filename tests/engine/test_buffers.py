"""The memory that is kept between contexts: nobody reads another pass's values in it.

What is kept is filled with NaN between passes, which would show wherever it is read.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from typing import Any

import pytest
import torch as t
from torch import Tensor

from auto_circuit.engine import buffers
from auto_circuit.engine.buffers import PassBuffers
from auto_circuit.engine.forward_pass import ForwardPass
from auto_circuit.errors import GraphError
from auto_circuit.model_utils.transformer_lens_sites import HEAD_INPUTS
from auto_circuit.modules import replaced_forward
from auto_circuit.utils.ablation_activations import src_ablations
from auto_circuit.utils.graph_utils import (
    patch_mode,
    patchable_model,
    train_mask_mode,
    unpatch,
)
from auto_circuit.utils.patchable_model import PatchableModel
from tests.models import gpt2, tokens

CLEAN, CORRUPT = tokens(3, 5, seed=1), tokens(3, 5, seed=2)


@pytest.fixture(scope="module")
def shared() -> PatchableModel:
    return new_model()


@pytest.fixture
def model(shared: PatchableModel) -> PatchableModel:
    shared.free_buffers()
    return shared


def new_model() -> PatchableModel:
    graph = patchable_model(gpt2(), True, separate_qkv=True)
    set_masks(graph)
    return graph


def set_masks(model: PatchableModel, share: float | None = None) -> None:
    """Random values, or zeros with a share of ones."""
    generator = t.Generator().manual_seed(0)
    for mask in model.patch_masks.values():
        noise = t.rand(mask.shape, generator=generator)
        mask.data.copy_(noise if share is None else (noise < share).float())


def kept(model: PatchableModel) -> list[Tensor]:
    return list(model.pass_buffers._kept.values())


def poison(model: PatchableModel) -> None:
    for flat in kept(model):
        flat.fill_(t.nan)


def addresses(tensors: list[Tensor]) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def output(model: PatchableModel, **kwargs: Any) -> Tensor:
    """That of a pass in a context of its own."""
    with t.no_grad(), patch_mode(model, src_ablations(model, CORRUPT), **kwargs):
        return model(CLEAN)  # type: ignore[no-any-return]


@contextmanager
def training(model: PatchableModel) -> Iterator[None]:
    with train_mask_mode(model), patch_mode(model, src_ablations(model, CORRUPT)):
        set_masks(model)
        yield


def loss_of(model: PatchableModel) -> Tensor:
    return model(CLEAN)[..., 0].square().sum()  # type: ignore[no-any-return]


def gradients(model: PatchableModel, loss: Tensor, **kwargs: Any) -> Tensor:
    found = t.autograd.grad(loss, list(model.patch_masks.values()), **kwargs)
    return t.cat([grad.flatten() for grad in found])


def trained(model: PatchableModel) -> Tensor:
    with training(model):
        return gradients(model, loss_of(model))


# ------------------------------------------------------------------------- it is kept


def test_a_context_takes_the_memory_of_the_one_before(model: PatchableModel) -> None:
    first = trained(model)
    assert set(model.pass_buffers._kept) == {"diff", "grad_buffer", "scratch"}
    before = addresses(kept(model))
    poison(model)
    assert t.equal(trained(model), first) and (first != 0).any()
    assert addresses(kept(model)) == before


@pytest.mark.parametrize("share", [None, 0.05, 0.95])
def test_what_is_kept_changes_no_number(
    model: PatchableModel, share: float | None
) -> None:
    """Also if the memory is another kind of pass's, and larger."""
    set_masks(model, share)
    fresh = output(model)
    for other in (output, trained):
        other(model)
        poison(model)
        set_masks(model, share)
        assert t.equal(output(model), fresh)
    set_masks(model)


def test_what_a_pass_gave_out_is_not_in_kept_memory(model: PatchableModel) -> None:
    """Outputs, activations seen by hooks, and what `curr_src_outs` received."""
    patch = src_ablations(model, CORRUPT)
    given, seen = t.zeros_like(patch), []
    handles = [
        module.register_forward_hook(lambda m, a, out: seen.append(out))
        for name, module in model.wrapped_model.named_modules()
        if name.rpartition(".")[2] not in (*HEAD_INPUTS, "hook_result")
    ]
    try:
        with t.no_grad(), patch_mode(model, patch, curr_src_outs=given):
            seen.append(model(CLEAN))
    finally:
        for handle in handles:
            handle.remove()
    assert kept(model)
    theirs = [x for x in (*seen, given, patch) if isinstance(x, Tensor)]
    assert len(theirs) > 20
    assert not addresses(theirs) & addresses(kept(model))


def test_as_much_is_kept_as_the_largest_pass_needed(model: PatchableModel) -> None:
    trained(model)
    n_bytes = model.pass_buffers.n_bytes
    floats = 4 * len(model.srcs) * CLEAN.numel() * 32  # d_model
    assert 2 * floats <= n_bytes < 4 * floats
    small = src_ablations(model, CORRUPT[:1])
    with t.no_grad(), patch_mode(model, small):
        model(CLEAN[:1])
    assert model.pass_buffers.n_bytes == n_bytes  # no second set beside it
    large, clean = src_ablations(model, CORRUPT.repeat(4, 1)), CLEAN.repeat(4, 1)
    with train_mask_mode(model), patch_mode(model, large):
        model(clean).sum().backward()
    assert 4 * n_bytes >= model.pass_buffers.n_bytes > 3 * n_bytes
    set_masks(model)


# ------------------------------------------------------------ it belongs to one pass only


def test_a_backward_pass_after_the_context_reads_its_own(model: PatchableModel) -> None:
    expected = trained(model)
    with training(model):
        loss = loss_of(model)
    with train_mask_mode(model):
        assert not kept(model)
        output(model)
        poison(model)
        assert t.equal(gradients(model, loss), expected)


def test_two_passes_that_wait_for_backward_have_memory_each(
    model: PatchableModel,
) -> None:
    expected = trained(model)
    with training(model):
        losses = [loss_of(model) for _ in range(2)]
    with train_mask_mode(model):
        assert all(t.equal(gradients(model, loss), expected) for loss in losses)


def test_a_second_backward_pass_after_the_context_is_refused(
    model: PatchableModel,
) -> None:
    with training(model):
        loss = loss_of(model)
        once = gradients(model, loss, retain_graph=True)
        assert t.equal(gradients(model, loss, retain_graph=True), once)
    with train_mask_mode(model), pytest.raises(GraphError, match="overwrote what it"):
        gradients(model, loss)


def test_memory_is_not_taken_while_a_second_backward_pass_runs(
    model: PatchableModel,
) -> None:
    """As by another thread, which leaves the context meanwhile."""
    expected = trained(model)
    with training(model):
        assert model.patch_session is not None
        inside: list[Tensor] = []
        block = model.wrapped_model.blocks[0]  # type: ignore[index]
        handle = block.register_forward_hook(
            lambda m, a, out: inside.append(out[0] if isinstance(out, tuple) else out)
        )
        loss = loss_of(model)
        handle.remove()
        gradients(model, loss, retain_graph=True)
        forward_pass = model.patch_session.forward_pass
        assert forward_pass is not None

        def leave(grad: Tensor) -> None:
            model.pass_buffers.take_back(forward_pass)
            poison(model)

        inside[0].register_hook(leave)
        assert t.equal(gradients(model, loss), expected)


def test_the_callers_memory_is_not_kept(model: PatchableModel) -> None:
    patch = src_ablations(model, CORRUPT)
    with train_mask_mode(model), patch_mode(model, patch, overwrite_patch=True):
        loss_of(model).backward()
    assert kept(model)
    assert not addresses([patch]) & addresses(kept(model))
    set_masks(model)


def test_two_graphs_over_one_module_have_memory_each() -> None:
    bridge = gpt2()
    graphs = [patchable_model(bridge, True, separate_qkv=qkv) for qkv in (True, False)]
    for graph in graphs:
        set_masks(graph)
    fresh = [trained(graph) for graph in graphs]
    assert not addresses(kept(graphs[0])) & addresses(kept(graphs[1]))
    with training(graphs[0]):
        loss = loss_of(graphs[0])
    for graph in graphs:
        poison(graph)
    assert t.equal(trained(graphs[1]), fresh[1])
    with train_mask_mode(graphs[0]):
        assert t.equal(gradients(graphs[0], loss), fresh[0])


def test_a_nested_context_that_is_refused_takes_nothing(model: PatchableModel) -> None:
    expected, patch = trained(model), src_ablations(model, CORRUPT)
    with training(model):
        loss = loss_of(model)
        with pytest.raises(GraphError, match="inside of `patch_mode`"):
            with patch_mode(model, patch):
                pass
        poison(model)
        assert t.equal(gradients(model, loss), expected)


@pytest.mark.parametrize("grad", [False, True])
def test_a_pass_that_is_stopped_leaves_nothing_behind(
    model: PatchableModel, grad: bool
) -> None:
    expected = trained(model)
    set_masks(model)
    plain = output(model)

    def fail(*args: Any) -> None:
        raise KeyboardInterrupt

    handle = model.wrapped_model.blocks[-1].register_forward_hook(fail)  # type: ignore
    with suppress(KeyboardInterrupt):
        trained(model) if grad else output(model)
    handle.remove()
    poison(model)
    set_masks(model)
    assert t.equal(output(model), plain) and t.equal(trained(model), expected)
    set_masks(model)


# ------------------------------------------------------------------------ it fits or goes


def test_inference_mode_changes_nothing(model: PatchableModel) -> None:
    expected, plain = trained(model), output(model)
    for _ in range(2):
        with t.inference_mode():
            assert t.equal(output(model), plain)
        poison(model)
        assert t.equal(trained(model), expected)
    set_masks(model)


def test_another_dtype_gets_memory_of_its_own() -> None:
    model, fresh = new_model(), new_model().to(t.float64)
    output(model)
    assert kept(model)
    model.to(t.float64)
    assert not kept(model)
    model.wrapped_model.to(t.float32)
    output(model)
    model.wrapped_model.to(t.float64)  # which the PatchableModel is not told
    assert kept(model)[0].dtype == t.float32
    assert t.equal(output(model), output(fresh))
    assert {flat.dtype for flat in kept(model)} == {t.float64}


def test_another_device_or_stream_gets_memory_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store, shape = PassBuffers(), (2, 3, 4, 5)
    first = ForwardPass(t.ones(shape))
    for like, stream, is_reused in (
        (t.ones(1), None, True),
        (t.ones(1), "another", False),
        (t.ones(1, device="meta"), "another", False),
    ):
        assert first.diff is not None
        diff = first.diff
        store.take_back(first)
        monkeypatch.setattr(buffers, "_stream", lambda tensor, found=stream: found)
        store.give(first, like, shape)
        assert first.diff is not None and first.diff.device == like.device
        assert (addresses([first.diff]) == addresses([diff])) is is_reused


def test_when_there_is_no_memory_what_is_kept_is_let_go_of(
    model: PatchableModel,
) -> None:
    class Full(Tensor):
        """No memory, unless something was freed."""

        def new_empty(self, *size: Any, **kwargs: Any) -> Tensor:
            if kept(model):
                raise t.OutOfMemoryError("CUDA out of memory")
            return t.empty(*size)

    output(model)
    assert kept(model)
    new = model.pass_buffers.new(t.ones(1).as_subclass(Full), (2, 3))
    assert new.shape == (2, 3) and not kept(model)
    output(model)
    with pytest.raises(RuntimeError, match="memory|storage"):
        model.pass_buffers.new(t.ones(1), (2**59,))
    assert not kept(model)
    output(model)

    def full(*args: Any, **kwargs: Any) -> Tensor:
        raise t.OutOfMemoryError("CUDA out of memory")

    with (
        replaced_forward(model.wrapped_model, full),
        pytest.raises(t.OutOfMemoryError),
    ):
        model(CLEAN)
    assert not kept(model)


def test_memory_is_let_go_of_on_request(model: PatchableModel) -> None:
    expected = trained(model)
    assert model.pass_buffers.n_bytes > 0
    model.free_buffers()
    assert model.pass_buffers.n_bytes == 0
    with training(model):
        loss = loss_of(model)
        model.free_buffers()  # not what the pass has
        assert t.equal(gradients(model, loss), expected)
    unpatch(model)
    assert not kept(model)


def test_a_copy_keeps_nothing_of_the_model(model: PatchableModel) -> None:
    plain = output(model)
    copied = deepcopy(model)
    assert not kept(copied)
    assert t.equal(output(copied), plain)
    assert not addresses(kept(copied)) & addresses(kept(model))


def test_memory_goes_with_the_model() -> None:
    model = new_model()
    output(model)
    buffer = weakref.ref(kept(model)[0])
    del model
    gc.collect()
    assert buffer() is None

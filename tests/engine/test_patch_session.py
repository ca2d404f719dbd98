"""What a pass remembers, and whose memory it takes: nothing that is still needed is lost.

Each test does something twice, or later, or in the middle, that is safe only if no buffer
was overwritten and nothing remembered is out of date.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch as t
from torch import Tensor

from auto_circuit.data import PromptDataLoader, PromptDataset
from auto_circuit.errors import GraphError
from auto_circuit.modules import replaced_forward
from auto_circuit.prune_algos.mask_gradient import mask_gradient_prune_scores
from auto_circuit.types import AblationType
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

CLEAN, CORRUPT = tokens(3, 5, seed=1), tokens(3, 5, seed=2)
EXACT: dict[str, Any] = {"atol": 1e-6, "rtol": 0.0}


@pytest.fixture(scope="module")
def model() -> PatchableModel:
    return patchable_model(gpt2(), True, separate_qkv=True)


@pytest.fixture(scope="module")
def grouped() -> PatchableModel:
    """Its MLP has modules inside that take hooks, and its keys are grouped."""
    return patchable_model(llama(), True, separate_qkv=True)


def random_masks(model: PatchableModel, share: float | None = None) -> None:
    """Random values, or zeros with a share of ones."""
    generator = t.Generator().manual_seed(0)
    for mask in model.patch_masks.values():
        noise = t.rand(mask.shape, generator=generator)
        mask.data.copy_(noise if share is None else (noise < share).float())


def gradients(model: PatchableModel, output: Tensor, **kwargs: Any) -> Tensor:
    masks = list(model.patch_masks.values())
    found = t.autograd.grad(output[..., 0].square().sum(), masks, **kwargs)
    return t.cat([grad.flatten() for grad in found])


# ------------------------------------------------------------------ the patches' memory


def test_overwritten_patches_give_the_same_gradients(model: PatchableModel) -> None:
    found = []
    for overwrite in (False, True):
        patch = src_ablations(model, CORRUPT)
        with train_mask_mode(model), patch_mode(model, patch, overwrite_patch=overwrite):
            set_all_masks(model, 0.3)
            found.append(gradients(model, model(CLEAN)))
    assert not t.equal(patch, src_ablations(model, CORRUPT))  # it was overwritten
    assert (found[0].abs() > 1e-6).float().mean() > 0.9
    t.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("is_end_patched", [False, True])
def test_overwritten_patches_give_the_same_outputs_without_gradients(
    model: PatchableModel, is_end_patched: bool
) -> None:
    """Where nearly all is patched, the sum of the patches is read at the end."""
    outputs = []
    for overwrite in (False, True):
        random_masks(model)
        if is_end_patched:
            of_end = model.patch_masks["blocks.1.hook_resid_post"].data
            of_end.fill_(1.0)[0] = 0.0
        patch = src_ablations(model, CORRUPT)
        with t.no_grad(), patch_mode(model, patch, overwrite_patch=overwrite):
            outputs.append(model(CLEAN))
    set_all_masks(model, 0.0)
    t.testing.assert_close(outputs[1], outputs[0], **EXACT)


@pytest.mark.parametrize("with_grad", [True, False])
def test_overwritten_patches_are_not_used_again(
    model: PatchableModel, with_grad: bool
) -> None:
    patch = src_ablations(model, CORRUPT)
    with (
        t.set_grad_enabled(with_grad),
        train_mask_mode(model, with_grad),
        patch_mode(model, patch, overwrite_patch=True),
    ):
        set_all_masks(model, 0.5)
        output = model(CLEAN)
        if with_grad:
            gradients(model, output)
        with pytest.raises(GraphError, match="A second forward pass"):
            model(CLEAN)


def test_overwritten_patches_cannot_start_late(model: PatchableModel) -> None:
    patch = src_ablations(model, CORRUPT)
    with pytest.raises(GraphError, match="`keeps_layers` and `overwrite_patch`"):
        with patch_mode(model, patch, overwrite_patch=True, keeps_layers=True):
            pass


def test_a_mean_over_prompts_of_one_word_serves_every_batch(
    model: PatchableModel,
) -> None:
    """One prompt of one word: the mean then lies in memory as the engine's buffer does."""
    clean, corrupt = CLEAN[:, :1], CORRUPT[:, :1]
    answers = [t.tensor([i]) for i in range(3)]
    dataset = PromptDataset(clean, corrupt, answers, answers[::-1])
    last = patchable_model(model.wrapped_model, True, "last_seq", separate_qkv=True)
    scores = [
        mask_gradient_prune_scores(
            last,
            PromptDataLoader(dataset, None, 0, batch_size=batch_size),
            None,
            "logit",
            "avg_diff",
            mask_val=0.5,
            ablation_type=AblationType.TOKENWISE_MEAN_CORRUPT,
            clean_corrupt=None,
        )
        for batch_size in (1, 3)
    ]
    for name, values in scores[0].items():
        t.testing.assert_close(values, scores[1][name], atol=1e-6, rtol=1e-4)


def test_the_activations_of_a_pass_go_to_memory_of_their_own(
    model: PatchableModel,
) -> None:
    patch = src_ablations(model, CORRUPT)
    with t.no_grad(), patch_mode(model, patch, curr_src_outs=patch):
        with pytest.raises(GraphError, match="`curr_src_outs` shares memory"):
            model(CLEAN)
    with t.no_grad(), patch_mode(model, patch):
        assert model.patch_session is not None
        # Not as an argument: under pytest its shape is looked at before we do.
        model.patch_session.curr_src_outs = t.zeros(1, *patch.shape[1:])
        with pytest.raises(GraphError, match="`curr_src_outs` has shape"):
            model(CLEAN)


# ------------------------------------------------------------------------ later, twice


@pytest.mark.parametrize("then", ["masks", "context", "pass"])
def test_a_backward_pass_sees_the_masks_of_its_forward_pass(
    model: PatchableModel, then: str
) -> None:
    patch = src_ablations(model, CORRUPT)
    with train_mask_mode(model):
        random_masks(model)
        with patch_mode(model, patch):
            expected = gradients(model, model(CLEAN))
            output = model(CLEAN)
            if then == "masks":
                set_all_masks(model, 0.0)
            if then == "pass":
                set_all_masks(model, 1.0)
                with t.no_grad():
                    model(CORRUPT)
                model(CORRUPT)
        if then == "context":
            set_all_masks(model, 0.2)
            src_ablations(model, CLEAN)
        found = gradients(model, output)
    t.testing.assert_close(found, expected)


def test_a_backward_pass_that_failed_leaves_nothing_behind(
    model: PatchableModel,
) -> None:
    patch = src_ablations(model, CORRUPT)
    with train_mask_mode(model), patch_mode(model, patch):
        random_masks(model)
        start: list[Tensor] = []
        hook = model.wrapped_model.blocks[0].mlp.register_forward_hook(  # type: ignore[union-attr, index, operator]
            lambda module, args, out: start.append(out)
        )
        output = model(CLEAN)
        hook.remove()
        expected = gradients(model, output, retain_graph=True)

        def fail(grad: Tensor) -> None:
            raise KeyboardInterrupt

        handle = start[0].register_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            gradients(model, output, retain_graph=True)
        handle.remove()
        t.testing.assert_close(gradients(model, output), expected)


def test_changed_patches_are_noticed(model: PatchableModel) -> None:
    """The sums of patches, and what they lead to, are remembered between passes."""
    random_masks(model, 0.95)
    patch, other = src_ablations(model, CORRUPT), src_ablations(model, CLEAN.flip(0))
    outputs = []
    with t.no_grad():
        with patch_mode(model, patch):
            outputs.append(model(CLEAN))
            patch.copy_(other)
            outputs.append(model(CLEAN))
        with patch_mode(model, other):
            expected = model(CLEAN)
    set_all_masks(model, 0.0)
    assert (outputs[0] - expected).abs().max() > 1e-3
    t.testing.assert_close(outputs[1], expected, **EXACT)


def test_gradients_that_begin_in_the_middle_are_refused(model: PatchableModel) -> None:
    """The pass has been planned for none: it may not record what they need."""
    patch = src_ablations(model, CORRUPT)
    start: Any = model.wrapped_model.blocks[1].hook_in  # type: ignore[union-attr, index]

    def watch(module: Any, args: Any, out: Tensor) -> Tensor:
        return out.detach().requires_grad_()

    for edges in (["A0.1->A1.0.Q"], None):
        set_all_masks(model, 1.0)
        handle = start.register_forward_hook(watch)
        try:
            with patch_mode(model, patch, edges):
                with pytest.raises(GraphError, match="`train_mask_mode`"):
                    model(CLEAN)
        finally:
            handle.remove()
            set_all_masks(model, 0.0)


# ---------------------------------------------------------------------- users' hooks


def in_place(module: Any, args: Any, out: Tensor) -> None:
    out.add_(0.5 * out.roll(1, -1))


# What is remembered: an MLP's output, what heads' linear maps give, a block's output.
SITES = ("blocks.1.hook_mlp_out", "blocks.1.attn.hook_q", "blocks.1.hook_in")


@pytest.mark.parametrize("site", SITES)
def test_hooks_that_change_what_is_remembered(grouped: PatchableModel, site: str) -> None:
    """Every pass gives what the first one gave."""
    handle = grouped.wrapped_model.hook_dict[site].register_forward_hook(in_place)  # type: ignore[union-attr, index]
    try:
        patch = src_ablations(grouped, CORRUPT)
        set_all_masks(grouped, 1.0)
        grouped.patch_masks["blocks.1.hook_resid_post"].data.fill_(0.0)
        with t.no_grad(), patch_mode(grouped, patch):
            first, *others = [model_output(grouped) for _ in range(3)]
        for other in others:
            t.testing.assert_close(other, first, **EXACT)
        set_all_masks(grouped, 0.0)
        (end,) = [dest for dest in grouped.dests if dest.name == "MLP 1"]
        with t.no_grad(), patch_mode(grouped, patch, keeps_layers=True):
            first = model_output(grouped)
            for _ in range(2):
                with starting_at(grouped, end):
                    t.testing.assert_close(model_output(grouped), first, **EXACT)
    finally:
        handle.remove()
        set_all_masks(grouped, 0.0)


@pytest.mark.parametrize("site", SITES)
def test_modules_that_change_in_place_what_is_remembered(
    grouped: PatchableModel, site: str
) -> None:
    """As a model's own code may; under a hook nothing is remembered."""

    def forward(x: Tensor) -> Tensor:
        in_place(None, None, x)
        return x

    module: Any = grouped.wrapped_model.hook_dict[site]  # type: ignore[union-attr, index]
    with replaced_forward(module, forward):
        patch = src_ablations(grouped, CORRUPT)
        set_all_masks(grouped, 1.0)
        grouped.patch_masks["blocks.1.hook_resid_post"].data.fill_(0.0)
        with t.no_grad(), patch_mode(grouped, patch):
            first, *others = [model_output(grouped) for _ in range(3)]
        set_all_masks(grouped, 0.0)
    for other in others:
        t.testing.assert_close(other, first, **EXACT)


def model_output(model: PatchableModel) -> Tensor:
    return model(CLEAN).clone()


def test_a_pass_from_the_middle_goes_on_from_the_last_whole_one(
    model: PatchableModel,
) -> None:
    patch = src_ablations(model, CORRUPT)
    (end,) = [dest for dest in model.dests if dest.name == "MLP 1"]
    with t.no_grad(), patch_mode(model, patch, keeps_layers=True):
        first = model_output(model)
        random_masks(model)
        second = model_output(model)
        assert (second - first).abs().max() > 0.01
        with starting_at(model, end):
            t.testing.assert_close(model_output(model), second, **EXACT)
        set_all_masks(model, 0.5)
        third = model_output(model)
        assert (third - second).abs().max() > 0.01
        with starting_at(model, end):
            t.testing.assert_close(model_output(model), third, **EXACT)


@pytest.mark.parametrize("when", ["before", "inside", "pre"])
def test_a_hook_inside_of_a_component_is_called_in_every_pass(
    grouped: PatchableModel, when: str
) -> None:
    """A component whose edges are all patched gives the same in each pass: if it does."""
    hidden: Any = grouped.wrapped_model.hook_dict["blocks.1.mlp.hook_post"]  # type: ignore[union-attr, index]
    scale = 1.0

    def hook(module: Any, args: Any, out: Tensor) -> Tensor:
        return scale * out

    def pre_hook(module: Any, args: Any) -> Any:
        return (scale * args[0],)

    def register() -> Any:
        if when == "pre":
            return hidden.register_forward_pre_hook(pre_hook)
        return hidden.register_forward_hook(hook)

    patch = src_ablations(grouped, CORRUPT)
    set_all_masks(grouped, 1.0)
    grouped.patch_masks["blocks.1.hook_resid_post"].data.fill_(0.0)
    outputs: dict[str | float, Tensor] = {}
    handle = register() if when != "inside" else None
    try:
        with t.no_grad(), patch_mode(grouped, patch):
            outputs["before"] = model_output(grouped)
            handle = handle or register()
            for scale in (1.0, 3.0):
                outputs[scale] = model_output(grouped)
    finally:
        if handle is not None:
            handle.remove()
        set_all_masks(grouped, 0.0)
    t.testing.assert_close(outputs[1.0], outputs["before"], **EXACT)
    assert (outputs[3.0] - outputs[1.0]).abs().max() > 1e-2


# ------------------------------------------------------------------------ precision


def test_sums_of_patches_keep_what_half_precision_would_lose() -> None:
    """256 and ten times 0.19 in bfloat16, whose next number after 256 is 258."""
    model = patchable_model(gpt2().bfloat16(), True, separate_qkv=True)
    patch = t.full((11, 3, 5, 32), 0.19, dtype=t.bfloat16)
    patch[0] = 256.0
    norm: Any = model.wrapped_model.ln_final
    reads: list[Tensor] = []

    def spy(x: Tensor) -> Tensor:  # no hook: under one nothing is summed up beforehand
        reads.append(x)
        return x

    set_all_masks(model, 1.0)
    constant = model.constants["blocks.1.hook_resid_post"]
    with t.no_grad(), replaced_forward(norm, spy), patch_mode(model, patch):
        model(CLEAN)
    expected = (256 + 10 * patch[1, 0, 0].float() + constant).bfloat16()
    t.testing.assert_close(reads[0], expected.expand(3, 5, 32), rtol=0.0, atol=0.0)
    assert (expected > 257).float().mean() > 0.5

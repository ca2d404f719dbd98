"""Models in half precision: masks and scores are float32, and so is all that is added up."""

from __future__ import annotations

from typing import Any

import pytest
import torch as t
from torch import Tensor

from auto_circuit.data import PromptDataLoader, PromptDataset
from auto_circuit.errors import GraphError
from auto_circuit.prune_algos.activation_magnitude import (
    activation_magnitude_prune_scores,
)
from auto_circuit.prune_algos.edge_attribution_patching import (
    edge_attribution_patching_prune_scores,
)
from auto_circuit.prune_algos.head_importance import head_importance_prune_scores
from auto_circuit.prune_algos.integrated_gradients import (
    input_integrated_gradients_prune_scores,
)
from auto_circuit.prune_algos.mask_gradient import mask_gradient_prune_scores
from auto_circuit.types import AblationType, PruneScores
from auto_circuit.utils.ablation_activations import batch_src_ablations, src_ablations
from auto_circuit.utils.graph_utils import patch_mode, patchable_model
from auto_circuit.utils.patchable_model import PatchableModel
from tests.models import gpt2, llama, tokens

N_TIMES = 12
"""Added up in bfloat16, so many equal numbers are off by a percent or so."""


def make(dtype: t.dtype, make_bridge: Any = llama) -> PatchableModel:
    bridge = make_bridge().to(dtype)
    return patchable_model(bridge, True, "last_seq", separate_qkv=True)


def loader(n_times: int, batch_size: int = 1) -> PromptDataLoader:
    """One prompt, again and again."""
    clean, corrupt = (tokens(1, 5, seed=seed).repeat(n_times, 1) for seed in (1, 2))
    answers, wrong = [t.tensor([1])] * n_times, [t.tensor([2])] * n_times
    dataset = PromptDataset(clean, corrupt, answers, wrong)
    return PromptDataLoader(dataset, None, 0, batch_size=batch_size)


def flat(scores: PruneScores) -> Tensor:
    return t.cat([values.flatten() for values in scores.values()])


def mask_gradient(model: PatchableModel, loader: PromptDataLoader) -> PruneScores:
    return mask_gradient_prune_scores(model, loader, None, "logprob", "avg_val", 0.5)


ALGOS = {
    "EAP": lambda m, x: edge_attribution_patching_prune_scores(m, x, None),
    "mask gradient": mask_gradient,
    "EAP-IG": lambda m, x: input_integrated_gradients_prune_scores(
        m, x, None, integrated_grad_samples=2
    ),
    "HISP": lambda m, x: head_importance_prune_scores(m, x, None, normalize=False),
    "Act Mag": lambda m, x: activation_magnitude_prune_scores(m, x, None),
}


@pytest.fixture(scope="module")
def half() -> PatchableModel:
    return make(t.bfloat16)


@pytest.fixture(scope="module")
def single() -> PatchableModel:
    return make(t.float32)


SLOW = ("mask gradient", "EAP-IG", "HISP")


@pytest.mark.parametrize(
    "algo",
    [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in ALGOS],
)
def test_one_prompt_again_and_again(half: PatchableModel, algo: str) -> None:
    once = flat(ALGOS[algo](half, loader(1)))
    often = flat(ALGOS[algo](half, loader(N_TIMES)))
    assert once.dtype == often.dtype == t.float32
    t.testing.assert_close(often, once, rtol=1e-5, atol=1e-5 * float(once.abs().max()))


def test_positions_and_batches_are_added_up_in_float32(half: PatchableModel) -> None:
    once = flat(ALGOS["EAP"](half, loader(1)))
    at_once = flat(ALGOS["EAP"](half, loader(400, 400)))
    # The products are the model's, and round otherwise in a larger batch.
    assert float((at_once - once).norm() / once.norm()) < 0.02


def test_sums_over_positions_are_not_rounded(half: PatchableModel) -> None:
    """Of one prompt: batches are added up in the masks' own type."""
    scores = flat(ALGOS["EAP"](half, loader(1)))
    scores = scores[scores != 0]
    is_rounded = scores.bfloat16().float() == scores
    assert len(scores) > 50 and float(is_rounded.double().mean()) < 0.8


def test_scores_are_near_those_of_float32(
    half: PatchableModel, single: PatchableModel
) -> None:
    rough, exact = (flat(ALGOS["EAP"](m, loader(3))) for m in (half, single))
    assert float((rough - exact).norm() / exact.norm()) < 0.05
    n_rough, n_exact = len(rough.unique()), len(exact.unique())
    assert n_rough >= 0.95 * n_exact


@pytest.mark.parametrize("dtype", [t.bfloat16, t.float16, t.float32, t.float64])
def test_masks_are_float32_or_wider(dtype: t.dtype) -> None:
    model = make(dtype, lambda: gpt2(n_layers=1))
    wide = t.promote_types(dtype, t.float32)
    converted = make(t.float32, lambda: gpt2(n_layers=1)).to(dtype)
    for found in (model, converted):
        assert {mask.dtype for mask in found.patch_masks.values()} == {wide}
        assert {score.dtype for score in found.new_prune_scores().values()} == {wide}
    # Masks that were converted work: constants and buffers are those of the new dtype.
    scores = flat(ALGOS["EAP"](converted, loader(1)))
    assert scores.dtype == wide and float(scores.abs().max()) > 0


MEANS = [kind for kind in AblationType if kind.name not in ("RESAMPLE", "ZERO")]


@pytest.mark.parametrize("kind", MEANS, ids=lambda kind: kind.name)
def test_means(kind: AblationType) -> None:
    """float16 ends at 65,504: a sum of larger activations would be infinite."""
    dtype = t.float16
    model = make(dtype, lambda: gpt2(n_layers=1))
    embedding: Any = model.wrapped_model
    embedding.original_model.transformer.wte.weight.data.mul_(1e4)
    side = "clean" if "BATCH" in kind.name else None
    outs = batch_src_ablations(model, loader(N_TIMES, 20), kind, side)
    of_prompts = [
        src_ablations(model, tokens(1, 5, seed=seed), AblationType.RESAMPLE).double()
        for seed in (1, 2)
    ]
    used = {"CLEAN": of_prompts[:1], "CORRUPT": of_prompts[1:]}
    used["CLEAN_AND_CORRUPT"] = of_prompts
    name = next((n for n in sorted(used, key=len)[::-1] if n in kind.name), "CLEAN")
    expected = t.stack(used[name]).mean(0)
    if kind == AblationType.BATCH_ALL_TOK_MEAN:
        expected = expected.mean(2, keepdim=True)
    for found in outs.values():
        assert found.dtype == dtype
        off = (found.double() - expected).abs().max() / expected.abs().max()
        assert float(off) < 0.01


# -------------------------------------------------------------- activations of other types

CLEAN, CORRUPT = tokens(2, 5, seed=1), tokens(2, 5, seed=2)


def run(model: PatchableModel, patch: Tensor, received: Tensor | None = None) -> Tensor:
    with t.no_grad(), patch_mode(model, patch, ["Resid Start->MLP 0"], received):
        return model(CLEAN)


def test_activations_are_converted_if_that_is_exact(single: PatchableModel) -> None:
    patch = src_ablations(single, CORRUPT).bfloat16()
    assert t.equal(run(single, patch), run(single, patch.float()))
    received, wide = t.empty_like(patch.float()), t.empty_like(patch.double())
    run(single, patch, received)
    run(single, patch, wide)
    assert t.equal(wide.float(), received)


def test_activations_that_cannot_be_converted(single: PatchableModel) -> None:
    patch = src_ablations(single, CORRUPT)
    cases = {
        "cannot be converted exactly": patch.double(),
        "hold no numbers": patch.to("meta"),
        "torch.sparse_coo.*hold no": patch.to_sparse(),
        "require gradients": patch.clone().requires_grad_(),
        "have shape": patch[1:],
        "have shape .* d_model": patch[..., 1:],
    }
    for message, wrong in cases.items():
        with pytest.raises(GraphError, match=message), patch_mode(single, wrong):
            pass
    for wrong in (patch.bfloat16(), patch.clone().requires_grad_(), patch.to("meta")):
        with pytest.raises(GraphError, match="`curr_src_outs` receives"):
            run(single, patch, wrong)

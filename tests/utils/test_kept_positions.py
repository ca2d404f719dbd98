"""Zero and mean ablations that leave position embeddings where they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch as t
from torch import Tensor

from auto_circuit.data import PromptDataLoader, PromptDataset
from auto_circuit.errors import ConfigError
from auto_circuit.metrics.faithfulness import faithfulness_curve
from auto_circuit.types import AblationType
from auto_circuit.utils.ablation_activations import (
    batch_src_ablations,
    iter_src_ablations,
    src_ablations,
)
from auto_circuit.utils.graph_utils import patch_mode, patchable_model, set_all_masks
from auto_circuit.utils.patchable_model import PatchableModel
from tests.micro import micro_model
from tests.models import attn_only, gpt2, llama, tokens
from tests.test_prune import random_scores, token_loader

TOKENS = tokens(3, 5, seed=1)
MASK = t.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 1, 1, 1, 1]])
EXACT: dict[str, Any] = {"atol": 1e-6, "rtol": 0.0}


def make(bridge: Any, keep: bool = True) -> PatchableModel:
    return patchable_model(
        bridge, True, "last_seq", separate_qkv=True, keep_positions=keep
    )


def embeddings(bridge: Any, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What the hooks at the embeddings of tokens and of positions see."""
    kwargs = {} if mask is None else {"attention_mask": mask}
    _, cache = bridge.run_with_cache(TOKENS, **kwargs)
    positions = cache["hook_pos_embed"].expand(len(TOKENS), -1, -1)
    return cache["hook_embed"], positions


@pytest.mark.parametrize("bridge", [gpt2, attn_only])
def test_zero_leaves_the_position_embeddings(bridge: Any) -> None:
    model = make(bridge())
    _, positions = embeddings(model.wrapped_model)
    zeros = src_ablations(model, TOKENS, AblationType.ZERO)
    assert positions.abs().max() > 0.1
    t.testing.assert_close(zeros[0], positions, **EXACT)
    assert (zeros[1:] == 0).all()


def test_with_everything_ablated_by_plain_hooks() -> None:
    """The empty circuit: no token embedding, no head and no MLP, but the positions."""
    model = make(gpt2())
    bridge: Any = model.wrapped_model

    def nothing(value: Tensor, hook: Any) -> Tensor:
        return t.zeros_like(value)

    # A head writes nothing if its values are zero; biases belong to no source.
    names = ["hook_embed"]
    names += [f"blocks.{i}.{n}" for i in (0, 1) for n in ("attn.hook_z", "hook_mlp_out")]
    patch = src_ablations(model, TOKENS, AblationType.ZERO)
    with t.no_grad():
        expected = bridge.run_with_hooks(TOKENS, fwd_hooks=[(n, nothing) for n in names])
        with patch_mode(model, patch):
            set_all_masks(model, 1.0)
            found = model(TOKENS)
        everything = bridge.run_with_hooks(
            TOKENS, fwd_hooks=[(n, nothing) for n in [*names, "hook_pos_embed"]]
        )
    t.testing.assert_close(found, expected, atol=1e-5, rtol=0.0)
    assert not t.allclose(expected, everything, atol=0.01)
    set_all_masks(model, 0.0)


@pytest.mark.parametrize("mask", [None, MASK], ids=["unpadded", "padded"])
def test_a_mean_over_positions_is_that_of_token_embeddings(mask: Tensor | None) -> None:
    model = make(gpt2())
    of_tokens, positions = embeddings(model.wrapped_model, mask)
    mean = src_ablations(model, TOKENS, AblationType.BATCH_ALL_TOK_MEAN, mask)
    is_text = (t.ones_like(TOKENS) if mask is None else mask).bool()
    expected = of_tokens[is_text].mean(0) + positions
    t.testing.assert_close(mean[0], expected, **EXACT)
    plain = src_ablations(
        make(model.wrapped_model, False), TOKENS, AblationType.BATCH_ALL_TOK_MEAN, mask
    )
    t.testing.assert_close(mean[1:], plain[1:], **EXACT)
    assert not t.allclose(mean[0], plain[0], atol=0.01)


@pytest.mark.parametrize(
    "ablation",
    [
        AblationType.RESAMPLE,
        AblationType.BATCH_TOKENWISE_MEAN,
        AblationType.TOKENWISE_MEAN_CORRUPT,
    ],
    ids=lambda ablation: ablation.name,
)
def test_at_each_position_means_keep_them_anyway(ablation: AblationType) -> None:
    bridge, loader = gpt2(), token_loader(5, 2)
    side = None if ablation.mean_over_dataset else "corrupt"
    kept, plain = (
        [outs.clone() for _, outs in iter_src_ablations(model, loader, ablation, side)]
        for model in (make(bridge), make(bridge, False))
    )
    for one, other in zip(kept, plain, strict=True):
        t.testing.assert_close(one, other, **EXACT)


def test_models_without_position_embeddings() -> None:
    zeros = src_ablations(make(llama()), TOKENS, AblationType.ZERO)
    assert (zeros == 0).all()
    model = patchable_model(micro_model().wrapped_model, True, keep_positions=True)
    outs = src_ablations(model, t.ones(1, 3, 2), AblationType.ZERO)
    assert (outs == 0).all()


def test_circuits_are_measured_so() -> None:
    bridge, loader = gpt2(), token_loader(4, 2)
    curves = []
    for keep in (True, False):
        model = make(bridge, keep)
        scores = random_scores(model)
        curve = faithfulness_curve(
            model, loader, scores, ablation_type=AblationType.ZERO, budgets=[0.1, 1.0]
        )
        curves.append([point.value for point in curve])
    assert curves[0][0] != pytest.approx(curves[1][0], rel=1e-3)
    assert curves[0][1] == pytest.approx(curves[1][1])


def padded_loader() -> PromptDataLoader:
    answers = [t.tensor([1])] * 3
    dataset = PromptDataset(TOKENS, TOKENS.flip(0), answers, answers, MASK, MASK)
    return PromptDataLoader(dataset, None, 0, batch_size=3)


def test_padding_shifts_the_positions_of_a_data_set() -> None:
    mean = AblationType.TOKENWISE_MEAN_CLEAN
    with pytest.raises(ConfigError, match="padded prompts mixes the embeddings"):
        batch_src_ablations(make(gpt2()), padded_loader(), mean)
    batch_src_ablations(make(gpt2(), False), padded_loader(), mean)
    batch_src_ablations(make(llama()), padded_loader(), mean)

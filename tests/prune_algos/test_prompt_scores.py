"""Scores of single prompts: by hand, one prompt at a time, and their mean."""

from __future__ import annotations

from typing import Any

import pytest
import torch as t

from auto_circuit.data import PromptDataLoader, PromptDataset
from auto_circuit.errors import ConfigError, DataError
from auto_circuit.prune_algos.mask_gradient import mask_gradient_prune_scores
from auto_circuit.prune_algos.prompt_scores import mask_gradient_prompt_scores
from auto_circuit.types import AblationType
from auto_circuit.utils.graph_utils import patchable_model
from auto_circuit.utils.patchable_model import PatchableModel
from tests.micro import micro_loader, micro_model
from tests.models import ARCHITECTURES, state_snapshot
from tests.test_prune import token_loader


def make(name: str = "gpt2", seq_len: int | None = None) -> PatchableModel:
    return patchable_model(
        ARCHITECTURES[name](), True, "last_seq", seq_len, separate_qkv=True
    )


def one_prompt_loaders(loader: PromptDataLoader) -> list[PromptDataLoader]:
    dataset: Any = loader.dataset
    return [
        PromptDataLoader(
            PromptDataset([p.clean], [p.corrupt], [p.answers], [p.wrong_answers]),
            None,
            0,
            batch_size=1,
        )
        for p in (dataset[idx] for idx in range(len(dataset)))
    ]


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_micro_model_is_linear_in_the_prompt(batch_size: int) -> None:
    """Prompts of scale 1, -2 and 0.5: the scores are those of scale 1, times that."""
    model = micro_model()
    scales = [1.0, -2.0, 0.5]
    scores = mask_gradient_prompt_scores(
        model, micro_loader(scales, batch_size), "logit", "avg_diff"
    )
    unit = mask_gradient_prune_scores(
        model, micro_loader(), None, "logit", "avg_diff", mask_val=0.0
    )
    assert list(scores) == list(unit)
    for name, rows in scores.items():
        expected = t.stack([scale * unit[name] for scale in scales])
        t.testing.assert_close(rows, expected)
    assert any((rows != 0).any() for rows in unit.values())


@pytest.mark.parametrize("seq_len", [None, 5], ids=["all", "positions"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_each_row_is_the_score_of_its_prompt(name: str, seq_len: int | None) -> None:
    """Five prompts in batches of 2, 2 and 1."""
    model, loader = make(name, seq_len), token_loader()
    scores = mask_gradient_prompt_scores(model, loader, "logprob", "avg_diff")
    for idx, single in enumerate(one_prompt_loaders(loader)):
        expected = mask_gradient_prune_scores(
            model, single, None, "logprob", "avg_diff", mask_val=0.0
        )
        for module_name, rows in scores.items():
            t.testing.assert_close(rows[idx], expected[module_name], atol=1e-6, rtol=1e-3)
    assert any((rows[0] - rows[1]).abs().max() > 1e-3 for rows in scores.values())


@pytest.mark.parametrize("seq_len", [None, 5], ids=["all", "positions"])
@pytest.mark.parametrize(
    "options",
    [
        {"mask_val": 0.0},
        {"mask_val": 0.5, "answer_function": "max_diff"},
        {
            "mask_val": 0.0,
            "answer_function": "avg_val",
            "ablation_type": AblationType.TOKENWISE_MEAN_CORRUPT,
        },
        {"mask_val": 1.0, "ablation_type": AblationType.ZERO},
        {"mask_val": 0.0, "ablation_type": AblationType.BATCH_TOKENWISE_MEAN},
    ],
    ids=["eap", "half", "mean", "zero", "batch"],
)
def test_mean_is_the_mask_gradient(options: dict[str, Any], seq_len: int | None) -> None:
    """In batches of 2, 2 and 1."""
    model, loader = make(seq_len=seq_len), token_loader()
    options = {"grad_function": "logit", "answer_function": "avg_diff", **options}
    scores = mask_gradient_prompt_scores(model, loader, **options)
    expected = mask_gradient_prune_scores(model, loader, None, **options)
    assert {n: s.shape for n, s in scores.items()} == {
        n: (5, *mask.shape) for n, mask in model.patch_masks.items()
    }
    for name, rows in scores.items():
        t.testing.assert_close(rows.mean(0), expected[name], atol=1e-6, rtol=1e-3)
    assert any((rows.abs() > 1e-4).any() for rows in scores.values())


def test_answers_of_different_numbers() -> None:
    """A ragged list of answers: each prompt still has a weight of 1."""
    whole: Any = token_loader(3, 3).dataset
    answers = [t.tensor([1]), t.tensor([1, 3]), t.tensor([4, 5, 6])]
    dataset = PromptDataset(
        whole.clean_prompts, whole.corrupt_prompts, answers, [t.tensor([2])] * 3
    )
    loader = PromptDataLoader(dataset, None, 0, batch_size=3)
    model = make()
    scores = mask_gradient_prompt_scores(model, loader, "logit", "avg_diff")
    for idx, single in enumerate(one_prompt_loaders(loader)):
        expected = mask_gradient_prune_scores(
            model, single, None, "logit", "avg_diff", mask_val=0.0
        )
        for name, rows in scores.items():
            t.testing.assert_close(rows[idx], expected[name], atol=1e-6, rtol=1e-3)


def test_model_is_as_it_was() -> None:
    model = make()
    before = state_snapshot(model)
    mask_gradient_prompt_scores(model, token_loader(), "logit", "avg_diff", mask_val=1)
    assert state_snapshot(model) == before


def test_a_side_is_missing() -> None:
    with pytest.raises(ConfigError, match="needs `clean_corrupt`"):
        mask_gradient_prompt_scores(
            micro_model(), micro_loader(), "logit", "avg_diff", clean_corrupt=None
        )


def test_no_prompts() -> None:
    empty = PromptDataLoader(PromptDataset([], [], [], []), None, 0, batch_size=1)
    with pytest.raises(DataError, match="no prompts"):
        mask_gradient_prompt_scores(micro_model(), empty, "logit", "avg_diff")

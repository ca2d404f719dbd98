"""Ensembles and the bootstrap, against numbers worked out by hand or another way."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError
from itertools import product
from typing import Any

import pytest
import torch as t

from auto_circuit.errors import ConfigError, DataError, GraphError
from auto_circuit.prune_algos import score_ensembles
from auto_circuit.prune_algos.prompt_scores import mask_gradient_prompt_scores
from auto_circuit.prune_algos.score_ensembles import (
    bootstrap_prompt_scores,
    confident_prune_scores,
    mean_normalised_prune_scores,
    mean_rank_prune_scores,
)
from auto_circuit.ranking import circuit_mask
from auto_circuit.types import PruneScores
from tests.micro import micro_loader, micro_model

FIRST = {"a": t.tensor([[3.0, -1.0]]), "b": t.tensor([0.0, 1.0, -5.0])}
SECOND = {"b": t.tensor([20.0, 10.0, 40.0]), "a": t.tensor([[-30.0, 0.0]])}


def flat(scores: PruneScores) -> list[float]:
    return [value for name in ("a", "b") for value in scores[name].flatten().tolist()]


def test_ranks_by_hand() -> None:
    assert flat(mean_rank_prune_scores([FIRST])) == [4, 2.5, 1, 2.5, 5]
    assert flat(mean_rank_prune_scores([SECOND])) == [4, 1, 3, 2, 5]
    both = mean_rank_prune_scores([FIRST, SECOND])
    assert flat(both) == [4, 1.75, 2, 2.25, 5]
    assert both["a"].shape == (1, 2)


def test_ranks_ignore_units_and_signs() -> None:
    other = {name: 1e6 * -scores for name, scores in FIRST.items()}
    assert flat(mean_rank_prune_scores([FIRST, other])) == [4, 2.5, 1, 2.5, 5]


def test_ranks_of_infinite_scores() -> None:
    scores = {"a": t.tensor([[-t.inf, 1.0]]), "b": t.tensor([t.inf, 2.0, 0.0])}
    assert flat(mean_rank_prune_scores([scores])) == [4.5, 2, 4.5, 3, 1]


def test_ranks_of_half_precision_keep_apart() -> None:
    """In bfloat16 the ranks above 256 would run together."""
    scores = {"a": t.arange(1000).bfloat16()}
    ranks = mean_rank_prune_scores([scores])["a"]
    assert ranks.unique().numel() == scores["a"].unique().numel() > 256
    assert ranks.sum() == 1000 * 1001 / 2


def test_normalised_by_hand() -> None:
    """The mean magnitudes are 2 and 20."""
    expected = [(1.5 - 1.5) / 2, (-0.5 + 0) / 2, 0.5, (0.5 + 0.5) / 2, (-2.5 + 2) / 2]
    assert flat(mean_normalised_prune_scores([FIRST, SECOND])) == pytest.approx(expected)
    by_magnitude = mean_normalised_prune_scores([FIRST, SECOND], by_magnitude=True)
    assert flat(by_magnitude) == pytest.approx([1.5, 0.25, 0.5, 0.5, 2.25])
    assert math.fsum(flat(by_magnitude)) == pytest.approx(5)


@pytest.mark.parametrize("func", [mean_rank_prune_scores, mean_normalised_prune_scores])
def test_bad_ensembles(func: Any) -> None:
    with pytest.raises(ConfigError, match="ensemble is empty"):
        func([])
    with pytest.raises(GraphError, match="members 0 and 1"):
        func([FIRST, {"a": FIRST["a"]}])
    with pytest.raises(GraphError, match="members 0 and 2"):
        func([FIRST, SECOND, {**FIRST, "b": t.zeros(4)}])
    with pytest.raises(GraphError, match="NaN"):
        func([FIRST, {**FIRST, "b": t.tensor([0.0, t.nan, 1.0])}])


@pytest.mark.parametrize("value", [0.0, t.inf])
def test_what_cannot_be_normalised(value: float) -> None:
    member = {name: t.full_like(scores, value) for name, scores in FIRST.items()}
    with pytest.raises(GraphError, match="member 1 .* mean magnitude of"):
        mean_normalised_prune_scores([FIRST, member])


# -------------------------------------------------------------------------- bootstrap


def test_two_prompts_have_three_means() -> None:
    """Prompts of 0 and 1: means 0, 1/2, 1 with probabilities 1/4, 1/2, 1/4."""
    scores = {"a": t.tensor([[0.0, -1.0], [1.0, 2.0]])}
    result = bootstrap_prompt_scores(scores, n_samples=4000, confidence=0.4)
    assert result.mean["a"].tolist() == [0.5, 0.5]
    assert result.lower["a"].tolist() == result.upper["a"].tolist() == [0.5, 0.5]
    wide = bootstrap_prompt_scores(scores, n_samples=4000, confidence=0.6)
    assert wide.lower["a"].tolist() == [0.0, -1.0]
    assert wide.upper["a"].tolist() == [1.0, 2.0]
    assert wide.sign_consistency["a"].tolist() == pytest.approx([0.75, 0.75], abs=0.03)
    assert (wide.n_samples, wide.n_prompts, wide.confidence) == (4000, 2, 0.6)
    with pytest.raises(FrozenInstanceError):
        wide.n_prompts = 3  # type: ignore[misc]


def test_all_samples_of_four_prompts() -> None:
    """Against the exact distribution over the 4^4 samples that there are."""
    values = t.tensor([-1.0, 0.5, 2.0, 4.0])
    exact = t.stack([values[list(idxs)].mean() for idxs in product(range(4), repeat=4)])
    result = bootstrap_prompt_scores({"a": values[:, None]}, 20_000, 0.8, seed=1)
    for end, quantile in ((result.lower, 0.1), (result.upper, 0.9)):
        expected = exact.quantile(quantile).item()
        # The distribution has steps of 1/8.
        assert end["a"].item() == pytest.approx(expected, abs=0.13)
    share = (exact > 0).float().mean().item()
    assert 0.9 < share < 1
    assert result.sign_consistency["a"].item() == pytest.approx(share, abs=0.01)


def test_interval_covers_the_true_mean() -> None:
    """400 edges, 60 prompts: noise of standard deviation 1 around 0.2."""
    generator = t.Generator().manual_seed(0)
    scores = {"a": 0.2 + t.randn(60, 4, 100, generator=generator)}
    result = bootstrap_prompt_scores(scores, confidence=0.9)
    lower, upper = result.lower["a"], result.upper["a"]
    covered = ((lower < 0.2) & (upper > 0.2)).float().mean().item()
    assert 0.85 < covered < 0.94
    width = (upper - lower).mean().item()
    assert width == pytest.approx(2 * 1.645 / math.sqrt(60), rel=0.05)
    assert lower.shape == (4, 100)


def test_signs() -> None:
    columns = t.tensor(
        [[1.0, -1.0, 0.0, 1.0], [2.0, -3.0, 0.0, -1.0], [1.5, -2.0, 0.0, 0.0]]
    )
    result = bootstrap_prompt_scores({"a": columns})
    assert result.sign_consistency["a"].tolist() == [1, 1, 0, 0]
    assert result.excludes_zero["a"].tolist() == [True, True, False, False]
    assert confident_prune_scores(result)["a"].tolist() == [1.5, -2, 0, 0]


def test_chunks_and_modules_see_the_same_samples(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = t.Generator().manual_seed(3)
    scores = t.randn(7, 2, 5, generator=generator)
    whole = bootstrap_prompt_scores({"a": scores, "b": scores}, n_samples=100)
    monkeypatch.setattr(score_ensembles, "MAX_BOOTSTRAP_VALUES", 300)
    parts = bootstrap_prompt_scores({"a": scores}, n_samples=100)
    for field in ("mean", "lower", "upper", "sign_consistency"):
        expected = getattr(whole, field)
        t.testing.assert_close(getattr(parts, field)["a"], expected["a"])
        assert t.equal(expected["a"], expected["b"])


def test_seed() -> None:
    scores = {"a": t.arange(20.0).view(10, 2)}
    before = t.get_rng_state()
    lowers = [
        bootstrap_prompt_scores(scores, 50, seed=seed).lower["a"].tolist()
        for seed in (0, 0, 1)
    ]
    assert lowers[0] == lowers[1] != lowers[2]
    assert t.equal(t.get_rng_state(), before)


def test_micro_model_edges_that_cancel() -> None:
    """Scores scale with the prompt: those of 3, 2, 1 are sure, those of 1, -1 are not."""
    model = micro_model()

    def sure(scales: list[float]) -> PruneScores:
        scores = mask_gradient_prompt_scores(
            model, micro_loader(scales, 2), "logit", "avg_diff"
        )
        return confident_prune_scores(bootstrap_prompt_scores(scores))

    unit = mask_gradient_prompt_scores(model, micro_loader(), "logit", "avg_diff")
    for name, scores in sure([3.0, 2.0, 1.0]).items():
        t.testing.assert_close(scores, 2 * unit[name][0])
    cancelled = sure([1.0, -1.0])
    assert all(not scores.any() for scores in cancelled.values())
    # Edges at 0 tie, so a circuit of them is the whole graph.
    assert circuit_mask(cancelled, 1)[1] == len(model.edges)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_samples": 1}, "`n_samples` is 1"),
        ({"confidence": 0}, "`confidence` is 0"),
        ({"confidence": 1.0}, "`confidence` is 1.0"),
        ({"confidence": 95}, "`confidence` is 95"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        bootstrap_prompt_scores({"a": t.ones(3, 2)}, **options)


@pytest.mark.parametrize(
    ("scores", "error", "message"),
    [
        ({}, GraphError, "empty"),
        ({"a": t.ones(1, 2)}, DataError, r"1 prompt\(s\)"),
        ({"a": t.ones(3, 2), "b": t.ones(4, 2)}, GraphError, "same first dimension"),
        ({"a": t.ones(3)}, GraphError, "same first dimension"),
        ({"a": t.tensor([[1.0], [t.nan]])}, GraphError, "not finite"),
    ],
)
def test_bad_prompt_scores(
    scores: PruneScores, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        bootstrap_prompt_scores(scores)

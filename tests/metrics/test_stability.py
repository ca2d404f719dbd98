"""Jaccard indices by hand, and what bootstrap samples are."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch as t

from auto_circuit.circuits import circuit_jaccard
from auto_circuit.data import PromptDataLoader, PromptDataset
from auto_circuit.errors import ConfigError, DataError, GraphError
from auto_circuit.metrics.stability import (
    bootstrap_loader,
    bootstrap_stability,
    circuits_stability,
    seed_stability,
)
from auto_circuit.prune_algos.mask_gradient import mask_gradient_prune_scores
from auto_circuit.prune_algos.random_edges import random_prune_scores
from auto_circuit.types import PruneScores
from tests.micro import micro_loader, micro_model
from tests.models import tokens


def circuit(*edges: int) -> dict[str, t.Tensor]:
    """A circuit of a graph with two modules of three edges."""
    flat = t.zeros(6, dtype=t.bool)
    flat[list(edges)] = True
    return {"a": flat[:3], "b": flat[3:].view(1, 3)}


def test_jaccard_by_hand() -> None:
    assert circuit_jaccard(circuit(0, 1, 3), circuit(1, 3, 4, 5)) == 2 / 5
    assert circuit_jaccard(circuit(0), circuit(1)) == 0.0
    assert circuit_jaccard(circuit(0, 5), circuit(0, 5)) == 1.0
    assert circuit_jaccard(circuit(), circuit()) == 1.0


def test_stability_by_hand() -> None:
    stability = circuits_stability([circuit(0, 1), circuit(0, 1), circuit(1, 2, 3)])
    assert stability.jaccards == (1.0, 0.25, 0.25)
    assert stability.circuit_sizes == (2, 2, 3)
    assert stability.mean == 0.5
    assert stability.std == pytest.approx(math.sqrt((0.25 + 2 * 0.0625) / 2))
    assert stability.coefficient_of_variation == pytest.approx(2 * stability.std)
    assert math.isnan(circuits_stability([circuit(0), circuit(0)]).std)
    unlike = circuits_stability([circuit(0), circuit(1), circuit(2)])
    assert unlike.mean == 0.0 and math.isnan(unlike.coefficient_of_variation)


def test_bootstrap_loader_draws_prompts_with_replacement() -> None:
    n = 7
    dataset = PromptDataset(
        tokens(n, 3, seed=1),
        tokens(n, 3, seed=2),
        [t.tensor([i]) for i in range(n)],
        [t.tensor([i, i + 1][: 1 + i % 2]) for i in range(n)],
        t.eye(n, 3),
        None,
    )
    loader = PromptDataLoader(
        dataset, 3, 0, None, ["a", "b", "c"], {"w": 1}, batch_size=4
    )
    drawn = bootstrap_loader(loader, t.Generator().manual_seed(0))
    assert (drawn.seq_len, drawn.seq_labels, drawn.word_idxs, drawn.batch_size) == (
        3,
        ["a", "b", "c"],
        {"w": 1},
        4,
    )
    pairs: list[Any] = [drawn.dataset[i] for i in range(drawn.n_prompts)]
    idxs = [int(pair.answers) for pair in pairs]
    assert len(idxs) == n and 1 < len(set(idxs)) < n
    for idx, pair in zip(idxs, pairs, strict=True):
        assert t.equal(pair.clean, dataset[idx].clean)
        assert t.equal(pair.corrupt, dataset[idx].corrupt)
        assert t.equal(pair.wrong_answers, dataset[idx].wrong_answers)
        assert pair.clean_attention_mask is not None
        assert pair.clean_attention_mask.tolist() == t.eye(n, 3)[idx].tolist()
        assert pair.corrupt_attention_mask is None
    assert [len(batch.clean) for batch in drawn] == [4, 3]
    assert len({batch.key for batch in drawn}) == 2


def test_every_sample_is_another_and_the_seed_says_which() -> None:
    def samples(seed: int) -> list[list[float]]:
        seen = []

        def score(loader: PromptDataLoader) -> PruneScores:
            seen.append([float(batch.clean[0, 2, 0]) for batch in loader])
            return {"a": t.arange(3.0)}

        bootstrap_stability(micro_loader([1.0, 2.0, 3.0, 4.0]), score, 1, 5, seed)
        return seen

    state = t.get_rng_state()
    first = samples(0)
    assert samples(0) == first and samples(1) != first
    assert t.equal(t.get_rng_state(), state)
    assert len({tuple(sample) for sample in first}) == 5
    assert all(set(sample) <= {1.0, 2.0, 3.0, 4.0} for sample in first)


def test_bootstrap_stability_of_a_linear_model() -> None:
    # The effect of every edge is in proportion to the prompt, so the order is fixed.
    model = micro_model()
    stability = bootstrap_stability(
        micro_loader([1.0, 2.0, 3.0]),
        lambda loader: mask_gradient_prune_scores(
            model, loader, None, "logit", "avg_diff", mask_val=0.0
        ),
        edge_count=4,
        n_samples=4,
    )
    assert stability.jaccards == (1.0,) * 6


def test_circuit_that_depends_on_the_prompts() -> None:
    def score(loader: PromptDataLoader) -> PruneScores:
        mean = sum(float(batch.clean[0, 2, 0]) for batch in loader) / 2
        return {"a": t.tensor([1.5, mean])}

    stability = bootstrap_stability(micro_loader([1.0, 2.0]), score, 1, 20)
    assert set(stability.jaccards) == {0.0, 1.0, 0.5}  # 0.5: a tie, both edges


def test_seed_stability() -> None:
    model = micro_model()
    stability = seed_stability(
        lambda seed: random_prune_scores(model, None, None, seed), 6, range(8)
    )
    assert len(stability.jaccards) == 28 and stability.circuit_sizes == (6,) * 8
    assert 0.15 < stability.mean < 0.5
    same = seed_stability(
        lambda seed: random_prune_scores(model, None, None, 0), 6, [0, 1]
    )
    assert same.mean == 1.0


def test_errors() -> None:
    with pytest.raises(ConfigError, match="at least 2"):
        circuits_stability([circuit(0)])
    with pytest.raises(GraphError, match="different graphs"):
        circuit_jaccard(circuit(0), {"a": t.ones(3, dtype=t.bool)})
    with pytest.raises(ConfigError, match="all of them different"):
        seed_stability(lambda seed: {"a": t.ones(2)}, 1, [3, 3])
    with pytest.raises(ConfigError, match="`n_samples` is 1"):
        bootstrap_stability(micro_loader(), lambda loader: {}, 1, 1)
    empty = PromptDataLoader(PromptDataset([], [], [], []), None, 0)
    with pytest.raises(DataError, match="no prompts"):
        bootstrap_loader(empty, t.Generator())

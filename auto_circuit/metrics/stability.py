"""Is it always the same circuit that is found? Over prompts, and over seeds.

Two circuits are compared by their Jaccard index: the edges that both have, as a share
of the edges that either has; 0 (no edge in common) to 1 (the same). A method is stable
if circuits that it finds on resampled prompts, or with other seeds, have high ones.
Source: Méloux et al. 2025 (arXiv 2510.00845), who call a mean above 0.8 stable.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch as t

from auto_circuit.checks import check_count, checked, seeded_generator
from auto_circuit.circuits import CircuitMasks, circuit_jaccard, n_circuit_edges
from auto_circuit.data import PromptDataLoader, PromptDataset
from auto_circuit.errors import ConfigError, DataError
from auto_circuit.ranking import circuit_mask
from auto_circuit.types import PruneScores


@dataclass(frozen=True)
class Stability:
    """How much the circuits that a method finds agree.

    jaccards: the Jaccard index of every pair: (0, 1), (0, 2), ..., (1, 2), ...
    circuit_sizes: the number of edges of every circuit.
    """

    jaccards: tuple[float, ...]
    circuit_sizes: tuple[int, ...]

    @property
    def mean(self) -> float:
        """The mean Jaccard index of two circuits, in [0, 1]; higher is more stable."""
        return statistics.fmean(self.jaccards)

    @property
    def std(self) -> float:
        """The unbiased standard deviation of the indices; NaN if there is only one."""
        return statistics.stdev(self.jaccards) if len(self.jaccards) > 1 else math.nan

    @property
    def coefficient_of_variation(self) -> float:
        """std / mean, 0 or more; NaN if the mean is 0 or there is only one pair."""
        return self.std / self.mean if self.mean else math.nan


@checked
def circuits_stability(circuits: Sequence[CircuitMasks]) -> Stability:
    """How much some circuits agree.

    Raises ConfigError for fewer than two, GraphError for circuits of different graphs.
    """
    if len(circuits) < 2:
        raise ConfigError(
            f"Stability compares circuits with each other; got {len(circuits)}, expected "
            "at least 2."
        )
    return Stability(
        jaccards=tuple(circuit_jaccard(a, b) for a, b in combinations(circuits, 2)),
        circuit_sizes=tuple(n_circuit_edges(circuit) for circuit in circuits),
    )


@checked
def bootstrap_stability(
    dataloader: PromptDataLoader,
    score_func: Callable[[PromptDataLoader], PruneScores],
    edge_count: int,
    n_samples: int = 100,
    seed: int = 0,
) -> Stability:
    """How much the circuit depends on the sample of prompts.

    score_func: prompts -> scores, e.g. `lambda loader: algo.func(model, loader, None)`.
        It is called once per sample.
    edge_count: each circuit has the `edge_count` edges of largest |score| (and ties).
    n_samples: how many bootstrap samples (as many prompts, drawn with replacement).

    Raises ConfigError for fewer than two samples, DataError for a loader without
    prompts, GraphError for more edges than the graph has.
    """
    check_count("n_samples", n_samples, at_least=2)
    generator = seeded_generator(seed)
    loaders = (bootstrap_loader(dataloader, generator) for _ in range(n_samples))
    return circuits_stability(
        [circuit_mask(score_func(loader), edge_count)[0] for loader in loaders]
    )


@checked
def seed_stability(
    score_func: Callable[[int], PruneScores], edge_count: int, seeds: Sequence[int]
) -> Stability:
    """How much the circuit depends on the algorithm's seed.

    score_func: seed -> scores. edge_count: see `bootstrap_stability`. Raises ConfigError
    for fewer than two seeds or for one that is there twice.
    """
    if len(set(seeds)) < max(2, len(seeds)):
        raise ConfigError(
            f"`seeds` is {list(seeds)}; expected at least 2, all of them different."
        )
    return circuits_stability(
        [circuit_mask(score_func(seed), edge_count)[0] for seed in seeds]
    )


@checked
def bootstrap_loader(
    dataloader: PromptDataLoader, generator: t.Generator
) -> PromptDataLoader:
    """A loader of as many prompts, drawn from this one's with replacement.

    Everything else (batch size, prefix, labels) is the loader's. Raises DataError if it
    has no prompts.
    """
    places = dataloader.places
    if not places:
        raise DataError("The dataloader has no prompts, so none can be drawn from it.")
    drawn = t.randint(len(places), (len(places),), generator=generator).tolist()
    idxs = [places[i] for i in drawn]
    return PromptDataLoader(
        _selected(dataloader.prompt_dataset, idxs),
        seq_len=dataloader.seq_len,
        diverge_idx=dataloader.diverge_idx,
        kv_cache=dataloader.kv_cache,
        seq_labels=dataloader.seq_labels,
        word_idxs=dataloader.word_idxs,
        spans=dataloader.spans,
        batch_size=dataloader.batch_size,
    )


def _selected(dataset: PromptDataset, idxs: list[int]) -> PromptDataset:
    clean_masks = dataset.clean_attention_masks
    corrupt_masks = dataset.corrupt_attention_masks
    return PromptDataset(
        [dataset.clean_prompts[idx] for idx in idxs],
        [dataset.corrupt_prompts[idx] for idx in idxs],
        [dataset.answers[idx] for idx in idxs],
        [dataset.wrong_answers[idx] for idx in idxs],
        None if clean_masks is None else clean_masks[idxs],
        None if corrupt_masks is None else corrupt_masks[idxs],
    )

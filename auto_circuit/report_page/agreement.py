"""Whether algorithms find the same circuit, and whether one finds it again with other prompts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from auto_circuit.circuits import CircuitMasks, circuit_jaccard
from auto_circuit.metrics.mean_interval import MeanInterval, mean_interval
from auto_circuit.ranking import circuit_mask, flat_prune_scores
from auto_circuit.report_page.tables import Cell, Table, name_cell, number_cell
from auto_circuit.types import PruneScores

Scores = Mapping[str, Mapping[int, PruneScores]]
"""Algorithm -> seed -> scores, of one task."""


@dataclass(frozen=True)
class Stable:
    """How much an algorithm's circuits and rankings of several seeds agree, pair by pair.

    jaccard: edges in both circuits, of those in either. rank: Spearman's correlation of the
    edges' |scores|; NaN if all of a seed's are equal.
    """

    algorithm: str
    n_seeds: int
    jaccard: MeanInterval
    rank: MeanInterval


def agreement_table(task: str, scores: Scores, size: int) -> Table:
    """The Jaccard index of every two algorithms' circuits, of the first seed of each."""
    circuits = {name: _circuit(_first(of), size) for name, of in scores.items()}
    rows = [
        (
            name_cell(name),
            *(_shaded(circuit_jaccard(one, two)) for two in circuits.values()),
        )
        for name, one in circuits.items()
    ]
    return Table(
        label=f"Agreement of algorithms on {task}: Jaccard index of circuits of {size:,} edges",
        columns=(("Algorithm", False), *((name, True) for name in circuits)),
        rows=tuple(rows),
    )


def _first(of_seeds: Mapping[int, PruneScores]) -> PruneScores:
    return of_seeds[min(of_seeds)]


def _circuit(scores: PruneScores, size: int) -> CircuitMasks:
    return circuit_mask(scores, size)[0]


def _shaded(jaccard: int | float) -> Cell:
    return Cell(f"{jaccard:.2f}", jaccard, shade=jaccard)


def stability(scores: Scores, size: int) -> list[Stable]:
    """Of each algorithm that has several seeds."""
    return [
        _stable(name, list(of_seeds.values()), size)
        for name, of_seeds in scores.items()
        if len(of_seeds) > 1
    ]


def _stable(name: str, of_seeds: Sequence[PruneScores], size: int) -> Stable:
    circuits = [_circuit(scores, size) for scores in of_seeds]
    jaccards = [circuit_jaccard(one, two) for one, two in combinations(circuits, 2)]
    return Stable(
        name, len(of_seeds), _mean(jaccards), _mean(_rank_correlations(of_seeds))
    )


def _mean(values: Sequence[int | float]) -> MeanInterval:
    """Pairs of seeds are no independent draws: no interval is known of their mean."""
    return MeanInterval(mean_interval(values).mean, math.nan)


def _rank_correlations(of_seeds: Sequence[PruneScores]) -> list[float]:
    import pandas

    ranks = [
        pandas.Series(flat_prune_scores(scores).abs().double().cpu().numpy()).rank()
        for scores in of_seeds
    ]
    return [float(one.corr(two)) for one, two in combinations(ranks, 2)]


def stability_table(task: str, found: Sequence[Stable], size: int) -> Table:
    """A row for each algorithm."""
    return Table(
        label=f"Stability over prompts and seeds on {task}, circuits of {size:,} edges",
        columns=(
            ("Algorithm", False),
            ("Seeds", True),
            ("Jaccard index of two seeds' circuits", True),
            ("Rank correlation of two seeds' scores", True),
        ),
        rows=tuple(
            (
                name_cell(one.algorithm),
                number_cell(one.n_seeds, 0),
                number_cell(one.jaccard.mean, 2),
                number_cell(one.rank.mean, 2),
            )
            for one in found
        ),
        is_sortable=True,
    )

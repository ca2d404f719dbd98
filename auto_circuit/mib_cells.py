"""A run of the MIB benchmark as cells: scores, measurements and a file to submit.

A cell's key is made from all that changes its result: the model's weights and tokenizer, the
rows by what is in them, how many of them count, the batch size, the type of the weights, the
seed and the algorithm's options.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch as t

from auto_circuit.cells import Outcome, Work
from auto_circuit.circuit_files import save_mib_circuit
from auto_circuit.errors import about
from auto_circuit.fingerprints import described, digest
from auto_circuit.metrics.faithfulness import FaithfulnessPoint
from auto_circuit.mib import (
    LoadedMib,
    MibFailure,
    MibResult,
    MibSplit,
    check_mib_config,
    find_mib_scores,
    load_mib,
    mib_curves,
    mib_splits,
    unloaded_mib_task,
)
from auto_circuit.mib_config import MibConfig
from auto_circuit.prune_algos.prune_algos import PruneAlgo
from auto_circuit.store import Cell, CellResult
from auto_circuit.sweep_cells import found_scores, weights_description
from auto_circuit.types import PruneScores


@dataclass(frozen=True)
class MibCells:
    """The cells of one algorithm. uses: opens the loaded task, the same for all algorithms."""

    algo: PruneAlgo
    scores: Work
    measurements: Work
    submission: Work
    uses: MibInUse

    @property
    def works(self) -> tuple[Work, Work, Work]:
        """All of them, each after what it needs."""
        return self.scores, self.measurements, self.submission


def mib_cells(config: MibConfig) -> list[MibCells]:
    """The cells of each algorithm. No model is needed, if its files are on this machine.

    Raises ConfigError as `check_mib_config` does, and DataError for prompts that cannot be
    had, or are not as they must be.
    """
    algos = check_mib_config(config)
    train, test = mib_splits(config)
    task = unloaded_mib_task(config)
    found_on = {
        "weights": weights_description(task),
        "dtype": described(task.dtype),
        "batch_size": config.batch_size,
        "seed": config.seed,
        "prompts": _description(train),
    }
    measured_on = {"prompts": _description(test)}
    uses = MibInUse(config)
    return [_cells(algo, found_on, measured_on, uses) for algo in algos]


def _description(split: MibSplit) -> dict[str, Any]:
    """What counts of the rows, wherever their files are."""
    rows = [
        (pair.clean, pair.corrupt, *(word.text for word in pair.words), pair.one_token)
        for pair in split.pairs
    ]
    return {"rows": digest(json.dumps(rows).encode()), "n_prompts": split.n_prompts}


def _cells(
    algo: PruneAlgo,
    found_on: Mapping[str, Any],
    measured_on: Mapping[str, Any],
    uses: MibInUse,
) -> MibCells:
    config = uses.config
    with about(f"Algorithm {algo.short_name!r}"):
        of_algo = described(algo.with_seed(config.seed).func)
    label = f"{config.cell}, {algo.short_name}"
    scores = Cell("mib-scores", {**found_on, "algorithm": of_algo}, f"{label}: scores")
    of_scores = {"scores": scores.key}
    measured = Cell(
        "mib-measurements", {**of_scores, **measured_on}, f"{label}: measurements"
    )
    submission = Cell(
        "mib-submission",
        {**of_scores, "format": config.file_format},
        f"{label}: submission",
    )
    return MibCells(
        algo=algo,
        scores=Work(scores, _Find(algo), uses=uses),
        measurements=Work(measured, _Measure(algo), (scores,), uses),
        submission=Work(submission, _Submit(config.file_format), (scores,), uses),
        uses=uses,
    )


# ---------------------------------------------------------------------------- computation


@dataclass(frozen=True)
class MibInUse:
    """Opens a run's task: its model loads when it is first asked for, and goes at the end."""

    config: MibConfig

    @cached_property
    def loaded(self) -> LoadedMib:
        """Raises as `load_mib` does."""
        return load_mib(self.config)

    @contextmanager
    def __call__(self) -> Iterator[LoadedMib]:
        try:
            yield self.loaded
        finally:
            self.free()

    def free(self) -> None:
        """Drop what was loaded."""
        self.__dict__.pop("loaded", None)

    def __getstate__(self) -> dict[str, Any]:
        """What is sent to another process: it loads there."""
        return {"config": self.config}


@dataclass(frozen=True)
class _Find:
    algo: PruneAlgo

    def __call__(self, loaded: LoadedMib) -> CellResult:
        found = find_mib_scores(loaded, self.algo)
        return CellResult(found.scores, cost={"scoring_seconds": found.seconds})


@dataclass(frozen=True)
class _Measure:
    algo: PruneAlgo

    def __call__(self, loaded: LoadedMib, scores: CellResult) -> CellResult:
        import pandas

        found = found_scores(loaded.task, self.algo, scores)
        rows = measurement_rows(mib_curves(loaded, found))
        numbers = {
            "n_edges": loaded.task.model.n_edges,
            "n_train": len(loaded.train.prompts),
            "n_test": len(loaded.test.prompts),
        }
        return CellResult(rows=pandas.DataFrame(rows), numbers=numbers)


@dataclass(frozen=True)
class _Submit:
    """The whole file, as bytes: it needs the model's graph, which the scores have not."""

    file_format: str

    def __call__(self, loaded: LoadedMib, scores: CellResult) -> CellResult:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"importances.{self.file_format}"
            finite = finite_scores(dict(scores.tensors))
            save_mib_circuit(path, loaded.task.model, finite)
            content = bytearray(path.read_bytes())
        return CellResult({"file": t.frombuffer(content, dtype=t.uint8)})


# ------------------------------------------------------------------------ results <-> data


def measurement_rows(result: MibResult) -> list[dict[str, Any]]:
    """A row for each ranking and size of circuits."""
    curves = {"signed": result.signed, "absolute": result.absolute}
    return [
        {"ranking": ranking, **asdict(point)}
        for ranking, curve in curves.items()
        for point in curve
    ]


def finite_scores(prune_scores: PruneScores) -> PruneScores:
    """The same order, without infinite scores (ACDC's), which the format has no place for."""
    sizes = [
        float(scores[scores.isfinite()].abs().max())
        for scores in prune_scores.values()
        if scores.isfinite().any()
    ]
    largest = 2 * max(sizes, default=0.0) + 1
    return {
        name: scores.nan_to_num(math.nan, largest, -largest)
        for name, scores in prune_scores.items()
    }


def mib_outcomes(
    cells: Sequence[MibCells], outcomes: Mapping[str, Outcome]
) -> list[MibResult | MibFailure]:
    """What is known so far of the algorithms that are finished, or failed."""
    found = [_outcome(of_algo, outcomes) for of_algo in cells]
    return [outcome for outcome in found if outcome is not None]


def _outcome(
    of_algo: MibCells, outcomes: Mapping[str, Outcome]
) -> MibResult | MibFailure | None:
    found = [outcomes.get(work.cell.key) for work in of_algo.works]
    for outcome in found:
        if outcome is not None and outcome.error:
            return MibFailure(of_algo.algo.short_name, outcome.error)
    results = [None if outcome is None else outcome.result for outcome in found]
    scores, measured, submission = results
    if scores is None or measured is None or submission is None:
        return None
    assert measured.rows is not None
    curves: dict[str, list[FaithfulnessPoint]] = {"signed": [], "absolute": []}
    for row in measured.rows.to_dict("records"):
        ranking = row.pop("ranking")
        curves[ranking].append(FaithfulnessPoint(**row))  # type: ignore[misc]
    task = unloaded_mib_task(of_algo.uses.config)
    found_on_task = found_scores(task, of_algo.algo, scores)
    return MibResult(found_on_task, tuple(curves["signed"]), tuple(curves["absolute"]))

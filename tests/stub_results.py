"""Results of a sweep that nobody ran, for tests of what is written of results."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch as t

from auto_circuit.metrics.prune_metrics.prune_metrics import find_metric
from auto_circuit.origins import CellOrigin, Origin, TaskOrigin
from auto_circuit.prune_algos.prune_algos import PruneAlgo, find_prune_algo
from auto_circuit.reports import write_results
from auto_circuit.robustness import RobustnessRow, variations
from auto_circuit.store import Cell, CellResult, open_store
from auto_circuit.summary import ExperimentResults, summarize
from auto_circuit.sweep import FoundScores, ScoreMeasurements, TaskRun
from auto_circuit.sweep_cells import MEASUREMENTS, SCORES
from auto_circuit.sweep_config import ExperimentConfig
from auto_circuit.types import MeasurementRow, PruneScores

SIZES = (0, 1, 10, 100)
N_EDGES = SIZES[-1]
MODULES = {"blocks.0.mlp": (2, 20), "blocks.1.attn": (3, 20)}
PERCENT = "Logit Diff Percent"


def stub_config(
    out: Path, tasks: Sequence[str], algos: Sequence[str]
) -> ExperimentConfig:
    return ExperimentConfig(
        name="stub",
        tasks=tuple(tasks),
        algos=tuple(algos),
        metrics=(PERCENT,),
        circuit_sizes=SIZES,
        n_seeds=2,
        once=tuple(algos[-1:]),
        out=out,
    )


def stub_results(
    config: ExperimentConfig, algos: Sequence[PruneAlgo] | None = None
) -> ExperimentResults:
    """Curves and scores drawn at random, of two seeds but for the last algorithm."""
    rng = random.Random(0)
    algos = algos or [find_prune_algo(name) for name in config.algos]
    runs = [
        _run(rng, task, seed, algos if seed == config.seed else algos[:-1])
        for task in config.tasks
        for seed in config.seeds
    ]
    return ExperimentResults(
        config,
        runs,
        summarize(runs, algos),
        cells=tuple(sorted(cell.key for cell in _cells(runs))),
        examples={task: _examples(task) for task in config.tasks},
        origin=Origin({task: _task_origin(task) for task in config.tasks}, _cells(runs)),
    )


def _run(rng: random.Random, task: str, seed: int, algos: Sequence[PruneAlgo]) -> TaskRun:
    found, measured = [], []
    for algo in algos:
        scores = _scores(rng)
        found.append(FoundScores(task, seed, algo.key, algo.short_name, scores, 1.5))
        middle = rng.uniform(20, 95)
        curve = zip(SIZES, (0.0, middle / 2, middle, 100.0), strict=True)
        rows = [
            MeasurementRow(
                *(task, algo.key, PERCENT, "RESAMPLE", "TREE_PATCH"),
                n_edges=n_edges,
                value=value,
                n_prompts=10,
                seed=seed,
            )
            for n_edges, value in curve
        ]
        roc = [(0.0, 0.0), (rng.random() / 2, 0.8), (1.0, 1.0)]
        one = ScoreMeasurements(algo.key, tuple(rows), None, roc, 0.9)
        measured.append(one)
    return TaskRun(task, seed, tuple(found), tuple(measured))


def _scores(rng: random.Random) -> PruneScores:
    draw = t.Generator().manual_seed(rng.randrange(1000))
    return {name: t.randn(shape, generator=draw) for name, shape in MODULES.items()}


def stub_cell(kind: str, task: str, seed: int, algo: str) -> Cell:
    label = f"{task}, seed {seed}, {algo}: {kind}"
    return Cell(kind, {"task": task, "seed": seed, "algorithm": algo}, label)


def _cells(runs: Sequence[TaskRun]) -> tuple[CellOrigin, ...]:
    cost = {
        "seconds": 2.0,
        "scoring_seconds": 1.5,
        "memory": {"peak_bytes": 2**30},
        "machine": {"host": "here", "cores": 2},
        "versions": {"python": "3.11", "torch": "2.9"},
    }
    return tuple(
        CellOrigin(kind, cell.key, cell.label, run.task, run.seed, found.algo, cost)
        for run in runs
        for found in run.found
        for kind in (SCORES, MEASUREMENTS)
        for cell in [stub_cell(kind, run.task, run.seed, found.name)]
    )


def _task_origin(task: str) -> TaskOrigin:
    what = {"weights": "ab" * 32, "prompts": "cd" * 32}
    return TaskOrigin(f"The behaviour of {task}", "a-model", "some/prompts", what)


def _examples(task: str) -> dict[str, object]:
    clean, corrupt = ["The", " cat", " sat"], ["The", " dog", " sat"]
    prompt = {
        "clean": {"tokens": clean, "differs": [1]},
        "corrupt": {"tokens": corrupt, "differs": [1]},
        "answers": [" on"],
        "wrong_answers": [" off"],
    }
    return {"prompts": [prompt] * 4}


def stub_folder(results: ExperimentResults) -> Path:
    """The results' folder, with the store beside it."""
    import pandas

    config = results.config
    algos = [find_prune_algo(name) for name in config.algos]
    Path(config.out).mkdir(parents=True, exist_ok=True)
    store = open_store(config.store)
    for run in results.runs:
        for found, measured in zip(run.found, run.measured, strict=True):
            of = (run.task, run.seed, found.name)
            store.write(stub_cell(SCORES, *of), CellResult(found.scores))
            rows = pandas.DataFrame([vars(row) for row in measured.rows])
            numbers = {"roc": measured.roc, "auroc": measured.auroc}
            result = CellResult(rows=rows, numbers=numbers)
            store.write(stub_cell(MEASUREMENTS, *of), result)
    write_results(results, [find_metric(key) for key in config.metrics], algos)
    return config.folder


def robustness_stub(tasks: Sequence[str]) -> list[RobustnessRow]:
    """Verdicts of every value of every choice."""
    from auto_circuit.robustness import Choices

    return [
        RobustnessRow(
            *(task, find_prune_algo("EAP").key, one.choice, one.value, one.is_base),
            share=share,
            n_edges=int(100 * share),
            percent=80.0,
            verdict=80.0,
        )
        for task in tasks
        for one in variations(Choices(token_positions=False))
        for share in (0.01, 0.1)
    ]

"""Results of a sweep that nobody ran, for tests of what is written of results."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from auto_circuit.explorer.data import GraphView
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
from auto_circuit.types import MeasurementRow
from tests.explorer.views import made_graph, made_scores, made_view

GRAPH = made_graph(n_blocks=2, n_heads=3)
N_EDGES = GRAPH.n_edges
SIZES = (0, 1, 10, N_EDGES)
PERCENT = "Logit Diff Percent"
TOKENS = ("The", " cat", " sat", " on", " the", " mat")


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
    config: ExperimentConfig,
    graph: GraphView = GRAPH,
    tokens: Sequence[str] = TOKENS,
) -> ExperimentResults:
    """Curves and scores drawn at random; those of `once` have one seed."""
    rng = random.Random(0)
    algos = [find_prune_algo(name) for name in config.algos]
    often = [algo for algo in algos if algo.short_name not in config.once]
    runs = [
        _run(rng, (task, seed), algos if seed == config.seed else often, graph)
        for task in config.tasks
        for seed in config.seeds
    ]
    return ExperimentResults(
        config,
        runs,
        summarize(runs, algos),
        cells=tuple(sorted(cell.key for cell in _cells(runs))),
        examples={
            task: made_view(graph, [], task, tokens).as_data() for task in config.tasks
        },
        origin=Origin({task: _task_origin(task) for task in config.tasks}, _cells(runs)),
    )


def _run(
    rng: random.Random,
    place: tuple[str, int],
    algos: Sequence[PruneAlgo],
    graph: GraphView,
) -> TaskRun:
    found, measured = [], []
    for algo in algos:
        scores = made_scores(graph, rng.randrange(1000))
        found.append(FoundScores(*place, algo.key, algo.short_name, scores, 1.5))
        rows = [
            MeasurementRow(
                *(place[0], algo.key, PERCENT, "RESAMPLE", "TREE_PATCH"),
                n_edges=n_edges,
                value=value,
                n_prompts=10,
                seed=place[1],
            )
            for n_edges, value in _curve(rng, graph.n_edges)
        ]
        roc = [(0.0, 0.0), (rng.random() / 2, 0.8), (1.0, 1.0)]
        measured.append(ScoreMeasurements(algo.key, tuple(rows), None, roc, 0.9))
    return TaskRun(*place, tuple(found), tuple(measured))


def _curve(rng: random.Random, n_edges: int) -> list[tuple[int, float]]:
    if n_edges == N_EDGES:
        middle = rng.uniform(20, 95)
        return list(zip(SIZES, (0.0, middle / 2, middle, 100.0), strict=True))
    power = rng.uniform(0.1, 0.6)
    sizes = sorted({round(n_edges ** (step / 30)) for step in range(31)})
    return [(0, 0.0), *((size, 100 * (size / n_edges) ** power) for size in sizes)]


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

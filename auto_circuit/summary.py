"""What a sweep's runs say: a table with a row for each task and algorithm, and mean curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from auto_circuit.metrics.area_under_curve import accuracy_area, mean_curve, task_areas
from auto_circuit.metrics.mean_interval import MeanInterval, mean_interval
from auto_circuit.metrics.prune_metrics.prune_metrics import (
    CORRECT_ANSWER_GREATER_THAN_INCORRECT_PERCENT_METRIC,
    LOGIT_DIFF_PERCENT_METRIC,
    PruneMetric,
)
from auto_circuit.metrics.prune_metrics.task_measurements import nest_rows
from auto_circuit.origins import Origin
from auto_circuit.prune_algos.prune_algos import PruneAlgo
from auto_circuit.result_names import slug as slug
from auto_circuit.sweep import TaskRun, edges_that_do_it, percents
from auto_circuit.sweep_config import ExperimentConfig
from auto_circuit.types import (
    AblationMeasurements,
    AlgoKey,
    MeasurementRow,
    Measurements,
    TaskKey,
)

if TYPE_CHECKING:
    import pandas  # takes a fifth of the time in which `--help` answers

Numbers = dict[str, int | float | None]
"""What one run says of one algorithm: a column of the summary -> a number, if it is known."""


@dataclass(frozen=True)
class ExperimentResults:
    """What an experiment found: each task's and seed's run, and a summary of them all.

    failed: what could not be computed -> the error. cells: the keys of what could.
    examples: task -> its example prompts, as plain data. origin: where the numbers come from.
    """

    config: ExperimentConfig
    runs: list[TaskRun]
    summary: pandas.DataFrame
    failed: Mapping[str, str] = field(default_factory=dict)
    cells: tuple[str, ...] = ()
    examples: Mapping[TaskKey, Mapping[str, Any]] = field(default_factory=dict)
    origin: Origin = Origin()

    @property
    def rows(self) -> list[MeasurementRow]:
        """The measurements of all runs."""
        return [row for run in self.runs for row in run.rows]


def experiment_results(
    config: ExperimentConfig, runs: Sequence[TaskRun], algos: Sequence[PruneAlgo]
) -> ExperimentResults:
    """The runs of a sweep, and their summary."""
    summary = summarize(runs, algos, config.reverse_clean_corrupt)
    return ExperimentResults(config, list(runs), summary)


def summarize(
    runs: Sequence[TaskRun], algos: Sequence[PruneAlgo], is_reversed: bool = False
) -> pandas.DataFrame:
    """A row per task and algorithm: how small a circuit does the task, and how well.

    Each number is the mean over seeds; `<number>_plus_minus` is half the width of its 95 %
    interval (`mean_interval`; empty for one seed), n_seeds says of how many.

    edges_for_80_percent: the smallest tested circuit from which on *all* larger ones have 80 %
    of the model's logit difference (empty: for some seed there is none). area: how much of
    it circuits have, from 1 edge to all on a logarithmic axis (`Areas.kept`: higher is
    better, overshoot counts in favour). off: how far they are from the model, both ways
    (`Areas.off`, 0 is best). accuracy_area: the mean share of prompts, in %, whose correct
    answer is above the wrong ones (`accuracy_area`; empty without the metric 'Correct Answer
    Greater Than Incorrect Percent', and with fewer than two sizes above 0 edges). auroc: how
    well the scores tell the true edges from all others (1 is perfect, 0.5 chance;
    empty: no circuit is known). seconds: the time that the algorithm took to score the edges.
    circuit: where its circuit's file is in the results' folder, without a suffix (empty: it has
    none; see `circuit_stem`).

    is_reversed: tests that take the circuit out of the model (`reverse_clean_corrupt`).
        What counts is then what is lost of the model's logit difference, and the share of
        prompts that are not answered correctly.
    """
    import pandas

    values: dict[tuple[TaskKey, AlgoKey], list[Numbers]] = {}
    for run in runs:
        for algo, numbers in run_numbers(run, is_reversed).items():
            values.setdefault((run.task, algo), []).append(numbers)
    names = {algo.key: algo.short_name for algo in algos}
    stems = {
        (run.task, algo): circuit_stem(run.task, names[algo])
        for run in first_runs(runs)
        for algo in run.circuits
    }
    return pandas.DataFrame(
        {"task": task, "algorithm": names[algo], "n_seeds": len(of_seeds)}
        | _mean_numbers(of_seeds)
        | {"circuit": stems.get((task, algo))}
        for (task, algo), of_seeds in values.items()
    )


def summary_columns(results: ExperimentResults) -> dict[str, tuple[str, int]]:
    """Column of the summary -> its title and digits; without those that nothing is in."""
    is_reversed = results.config.reverse_clean_corrupt
    of_what = "of logit diff lost" if is_reversed else "of logit diff"
    answered = "not answered" if is_reversed else "answered"
    columns = {
        "edges_for_80_percent": (f"Edges from which\n80 % {of_what}", 0),
        "area": ("Area\n(high is good)", 3),
        "off": ("Off the model\n(0 is best)", 3),
        "accuracy_area": (f"Prompts\n{answered} (%)", 1),
        "auroc": ("AUROC", 3),
        "seconds": ("Seconds", 1),
    }
    summary = results.summary
    return {name: shown for name, shown in columns.items() if summary[name].notna().any()}


def run_numbers(run: TaskRun, is_reversed: bool) -> dict[AlgoKey, Numbers]:
    """The numbers of each algorithm of one run."""
    curves = _curves(run, LOGIT_DIFF_PERCENT_METRIC, is_reversed)
    areas = task_areas(curves, log_x=True)
    metric = CORRECT_ANSWER_GREATER_THAN_INCORRECT_PERCENT_METRIC
    accuracies = _curves(run, metric, is_reversed)
    return {
        algo: {
            "edges_for_80_percent": edges_that_do_it(curve),
            "area": areas[algo].kept,
            "off": areas[algo].off,
            "accuracy_area": _accuracy_area(accuracies[algo]),
            "auroc": run.aurocs.get(algo),
            "seconds": run.seconds[algo],
        }
        for algo, curve in curves.items()
    }


def _curves(
    run: TaskRun, metric: PruneMetric, is_reversed: bool
) -> dict[AlgoKey, Measurements]:
    """Each algorithm's curve of a metric in percent; empty if it was not measured."""
    return {m.algo: percents(m.rows, metric, is_reversed) for m in run.measured}


def _accuracy_area(curve: Measurements) -> float | None:
    has_area = sum(n_edges > 0 for n_edges, _ in curve) > 1
    return accuracy_area(curve) if has_area else None


def _mean_numbers(of_seeds: Sequence[Numbers]) -> dict[str, float]:
    means = {
        name: mean_interval([numbers[name] for numbers in of_seeds])
        for name in of_seeds[0]
    }
    return {name: mean.mean for name, mean in means.items()} | {
        f"{name}_plus_minus": mean.plus_minus for name, mean in means.items()
    }


def seed_measurements(rows: Sequence[MeasurementRow]) -> list[AblationMeasurements]:
    """Each seed's measurements: ablation -> metric -> task -> algorithm -> [(edges, value)]."""
    by_seed: dict[int | None, list[MeasurementRow]] = {}
    for row in rows:
        by_seed.setdefault(row.seed, []).append(row)
    return [nest_rows(of_seed) for of_seed in by_seed.values()]


def mean_measurements(rows: Sequence[MeasurementRow]) -> AblationMeasurements:
    """Ablation -> metric -> task -> algorithm -> [(edges, mean over seeds of the value)]."""
    by_seed: dict[int | None, list[MeasurementRow]] = {}
    curves: dict[MeasurementRow, list[Measurements]] = {}
    for row in rows:
        by_seed.setdefault(row.seed, []).append(row)
    for of_seed in by_seed.values():
        points: dict[MeasurementRow, Measurements] = {}
        for row in of_seed:
            curve = replace(
                row, n_edges=0, value=0.0, std=None, n_prompts=None, seed=None
            )
            points.setdefault(curve, []).append((row.n_edges, row.value))
        for curve, of_curve in points.items():
            curves.setdefault(curve, []).append(of_curve)
    return nest_rows(
        replace(curve, n_edges=int(n_edges), value=float(value))
        for curve, of_curve in curves.items()
        for n_edges, value in mean_curve(of_curve)
    )


def mean_aurocs(runs: Sequence[TaskRun]) -> dict[tuple[TaskKey, AlgoKey], MeanInterval]:
    """Task and algorithm -> the mean over seeds of its AUROC; of tasks with true edges."""
    aurocs: dict[tuple[TaskKey, AlgoKey], list[float]] = {}
    for run in runs:
        for algo, auroc in run.aurocs.items():
            aurocs.setdefault((run.task, algo), []).append(auroc)
    return {key: mean_interval(values) for key, values in aurocs.items()}


def first_runs(runs: Sequence[TaskRun]) -> list[TaskRun]:
    """Each task's run with its first seed, the only one that every algorithm has."""
    firsts: dict[TaskKey, TaskRun] = {}
    for run in runs:
        firsts.setdefault(run.task, run)
    return list(firsts.values())


def circuit_stem(task: TaskKey, algo_name: str) -> str:
    """Where a circuit's files are in the results' folder, without their suffix."""
    return f"circuits/{slug(task)}/{slug(algo_name)}"

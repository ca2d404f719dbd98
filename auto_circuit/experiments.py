"""Find and test circuits: sweep tasks x algorithms x metrics against circuit size.

An experiment is a frozen ExperimentConfig. For each task, every algorithm scores every
edge; the best edges make circuits of growing size; every metric measures each circuit.
All of it is written to `results/<name>-<hash>/`, and a table is printed.

    python -m auto_circuit.experiments --help
    python -m auto_circuit.experiments --tasks "Pocket IOI" --algos EAP IEG

`robustness` as the first word tests the same circuits in other ways: each of the six
choices of Miller et al. 2024 is changed, and a figure shows how the verdict changes.

    python -m auto_circuit.experiments robustness
    python -m auto_circuit.experiments robustness --algos EAP IEG --circuit-shares 0.01 0.1

`tracr-reverse` and `tracr-xproportion` are sweeps on compiled models, whose circuits are
known exactly: their tables say how well each algorithm finds these (AUROC). The published
circuit of reverse leaves out the two edges of the middle token, which stays where it is but
is carried all the same: a right ranking is at 0.998, not at 1.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

import pandas as pd
import tyro
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from auto_circuit.checks import checked
from auto_circuit.errors import AutoCircuitError, ConfigError
from auto_circuit.metrics.area_under_curve import area_share, edges_for_share, has_area
from auto_circuit.metrics.official_circuits.measure_roc import measure_task_roc, roc_auc
from auto_circuit.metrics.official_circuits.roc_plot import roc_plot
from auto_circuit.metrics.prune_metrics.prune_metrics import (
    LOGIT_DIFF_PERCENT_METRIC,
    PruneMetric,
    find_metric,
    with_mean_of_ratios,
)
from auto_circuit.metrics.prune_metrics.prune_metrics_plot import measurement_figs
from auto_circuit.metrics.prune_metrics.task_measurements import (
    nest_rows,
    task_measurement_rows,
)
from auto_circuit.prune_algos.ACDC import ACDC_PRUNE_ALGO
from auto_circuit.prune_algos.prune_algos import (
    PRUNE_ALGOS,
    PruneAlgo,
    find_prune_algo,
    run_prune_algo,
)
from auto_circuit.robustness import (
    Choices,
    RobustnessRow,
    chosen_task,
    robustness_rows,
    values_by_choice,
)
from auto_circuit.robustness_plot import robustness_fig
from auto_circuit.tasks import (
    POCKET_DOCSTRING_TASK,
    POCKET_GREATERTHAN_TASK,
    POCKET_IOI_TOKEN_TASK,
    POCKET_TASKS,
    TRACR_REVERSE_TOKEN_CIRCUIT_TASK,
    TRACR_XPROPORTION_TOKEN_CIRCUIT_TASK,
    Task,
    find_task,
)
from auto_circuit.types import (
    AlgoKey,
    AlgoMeasurements,
    AlgoPruneScores,
    EdgeCounts,
    MeasurementRow,
    Measurements,
    TaskKey,
    TaskMeasurements,
    TaskPruneScores,
    TestEdges,
)
from auto_circuit.utils.custom_tqdm import tqdm

SHARE = 0.8
Numbers = dict[tuple[TaskKey, AlgoKey], float]


@checked
@dataclass(frozen=True)
class ExperimentConfig(Choices):
    """One experiment. Without arguments: the pocket tasks, which need no download."""

    name: str = "pocket"
    """The first part of the result folder's name."""
    tasks: tuple[str, ...] = tuple(task.key for task in POCKET_TASKS)
    """Keys of tasks (see auto_circuit/tasks.py)."""
    algos: tuple[str, ...] = (
        *("GT", "Random", "Act Mag", "EAP", "EAP-IG inputs"),
        *("ACDC quick", "STP quick", "EP quick", "MAttr quick"),
    )
    """Names of prune algorithms (see auto_circuit/prune_algos/prune_algos.py). Those that
    need a known circuit are left out on tasks without one."""
    metrics: tuple[str, ...] = ("Clean KL Div", "Logit Diff", "Logit Diff Percent")
    """Keys of metrics (see auto_circuit/metrics/prune_metrics/prune_metrics.py)."""
    edge_counts: EdgeCounts = EdgeCounts.LOGARITHMIC
    """Which circuit sizes are tested: LOGARITHMIC (1..9, 10, 20, ...), ALL or GROUPS."""
    circuit_sizes: tuple[int, ...] = ()
    """Exactly these numbers of edges, instead of `edge_counts`."""
    circuit_shares: tuple[float, ...] = ()
    """Exactly these shares of all edges (0.05 is 5 %), instead of `edge_counts`."""
    ungroup: bool = False
    """With grouped-query attention, a key and a value for every query head (EAP-IG, MIB)?"""
    seed: int = 42
    """Which prompts are picked from each task's file, and in which order."""
    device: str | None = None
    """Where models run, for example "cuda"; None: a GPU if there is one."""
    out: Path = Path("results")
    """The folder that holds the result folders."""

    @property
    def json(self) -> str:
        """All that determines the results, as text (the place of `out` does not)."""
        fields = {key: value for key, value in asdict(self).items() if key != "out"}
        return json.dumps(fields, indent=2, default=_plain) + "\n"

    @property
    def folder(self) -> Path:
        """Where the results are: the same folder for the same configuration."""
        return (
            self.out / f"{self.name}-{hashlib.sha256(self.json.encode()).hexdigest()[:8]}"
        )

    @property
    def test_edges(self) -> TestEdges:
        """The circuit sizes, as the metrics take them."""
        return [*self.circuit_sizes, *self.circuit_shares] or self.edge_counts


def _plain(value: object) -> object:
    return value.name if isinstance(value, Enum) else str(value)


@dataclass(frozen=True)
class ExperimentResults:
    """What an experiment found: scores, measurements, a summary and where they lie.

    rocs: of the tasks whose circuit is known; see `measure_task_roc`.
    """

    config: ExperimentConfig
    scores: TaskPruneScores
    rows: list[MeasurementRow]
    summary: pd.DataFrame
    rocs: TaskMeasurements


def run_experiment(config: ExperimentConfig) -> ExperimentResults:
    """Run a sweep and write its results to `config.folder`.

    Raises ConfigError, before anything is computed, for unknown names, for circuit sizes
    that a task's graph does not have, and for a folder that cannot be written.
    """
    tasks, algos, metrics = _named(config)
    _check_sizes(tasks, config)
    _make_out_folder(config)
    if config.mean_of_ratios:
        metrics = [with_mean_of_ratios(metric) for metric in metrics]
    scores: TaskPruneScores = {}
    rows: list[MeasurementRow] = []
    rocs: TaskMeasurements = {}
    seconds: Numbers = {}
    aurocs: Numbers = {}
    for task in tqdm(tasks, desc="Tasks"):
        for metric in metrics:
            metric.check_prompts(task.test_loader)
        scores[task.key] = _timed_scores(task, algos, seconds)
        rows += _measure(task, scores[task.key], metrics, config)
        if task.true_edges is not None:
            rocs[task.key] = _rocs(task, scores[task.key], aurocs)
        task.free()
    summary = summarize(rows, seconds, algos, aurocs, config.reverse_clean_corrupt)
    results = ExperimentResults(config, scores, rows, summary, rocs)
    write_results(results, metrics, algos)
    return results


def _named(
    config: ExperimentConfig,
) -> tuple[list[Task], list[PruneAlgo], list[PruneMetric]]:
    """What the configuration names."""
    tasks = [_task(key, config) for key in config.tasks]
    algos = [find_prune_algo(name) for name in config.algos]
    metrics = [find_metric(key) for key in config.metrics]
    _check_not_empty(config)
    _check_circuits_are_known(tasks, algos)
    return tasks, algos, metrics


def _check_circuits_are_known(tasks: Sequence[Task], algos: Sequence[PruneAlgo]) -> None:
    """Algorithms that need a known circuit are left out of tasks without one."""
    if not all(algo.needs_true_edges for algo in algos):
        return
    for task in tasks:
        if task._true_edge_func is None:
            raise ConfigError(
                f"{algos[0].short_name!r} needs a known circuit, and task {task.key!r} has "
                "none. Add another algorithm, such as 'EAP', or leave the task out."
            )


def _check_sizes(tasks: Sequence[Task], config: ExperimentConfig) -> None:
    for task in tasks if config.circuit_sizes else ():
        n_edges = task.model.n_edges
        task.free()
        for size in config.circuit_sizes:
            if not 0 <= size <= n_edges:
                raise ConfigError(
                    f"`circuit_sizes` asks for {size} edges, but the graph of task "
                    f"{task.key!r} has {n_edges}. Leave this size out, or give "
                    "`circuit_shares`, which fit every graph."
                )


def _make_out_folder(config: ExperimentConfig) -> None:
    try:
        config.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=config.out).close()
    except OSError as error:
        raise ConfigError(
            f"Results cannot be written to the folder {config.out} ({error}). Choose "
            "another one with `out`."
        ) from error


def _task(key: TaskKey, config: ExperimentConfig) -> Task:
    task = find_task(key)
    ungroup = task.ungroup or config.ungroup
    task = replace(task, seed=config.seed, device=config.device, ungroup=ungroup)
    return chosen_task(task, config)


def _check_not_empty(config: ExperimentConfig) -> None:
    for field in ("tasks", "algos", "metrics"):
        names: tuple[str, ...] = getattr(config, field)
        if not names:
            raise ConfigError(f"`{field}` is empty; name at least one.")
        if len(set(names)) < len(names):
            raise ConfigError(f"`{field}` names one of {list(names)} twice.")


def _timed_scores(
    task: Task, algos: Sequence[PruneAlgo], seconds: Numbers
) -> AlgoPruneScores:
    scores: AlgoPruneScores = {}
    task.model  # loads now, so that no algorithm's time includes it  # noqa: B018
    for algo in algos:
        algo.check_prompts(task.train_loader)
    for algo in tqdm(algos, desc=task.key, leave=False):
        if algo.needs_true_edges and task.true_edges is None:
            continue
        start = time.perf_counter()
        scores[algo.key] = run_prune_algo(task, algo)
        seconds[task.key, algo.key] = time.perf_counter() - start
    return scores


def _measure(
    task: Task,
    scores: AlgoPruneScores,
    metrics: Sequence[PruneMetric],
    config: ExperimentConfig,
) -> list[MeasurementRow]:
    rows = task_measurement_rows(
        task,
        scores,
        [config.ablation],
        metrics,
        config.patch_type,
        config.reverse_clean_corrupt,
        config.test_edges,
    )
    return [replace(row, seed=config.seed) for row in rows]


def _rocs(task: Task, scores: AlgoPruneScores, aurocs: Numbers) -> AlgoMeasurements:
    """Points enough for a figure, and, into `aurocs`, the exact area."""
    edges = task.true_edges or ()
    for algo, of_algo in scores.items():
        exact = measure_task_roc(task.model, edges, of_algo, all_edges=True)
        aurocs[task.key, algo] = roc_auc(exact)
    return {algo: measure_task_roc(task.model, edges, s) for algo, s in scores.items()}


# --------------------------------------------------------------------------- the summary


def summarize(
    rows: Sequence[MeasurementRow],
    seconds: Numbers,
    algos: Sequence[PruneAlgo],
    aurocs: Numbers,
    is_reversed: bool = False,
) -> pd.DataFrame:
    """A row per task and algorithm: how small a circuit does the task, and how well.

    edges_for_80_percent: the smallest tested circuit with 80 % of the model's logit
    difference (empty: none). area: that of the percentage against the logarithm of the
    circuit's size, as a share of always having the largest circuit's. auroc: how well the
    scores tell the known circuit's edges from all others (1 is perfect, 0.5 chance; empty:
    no circuit is known). seconds: the time that the algorithm took to score the edges.

    is_reversed: tests that take the circuit out of the model (`reverse_clean_corrupt`).
        What counts is then what is lost of the model's logit difference.
    """
    names = {algo.key: algo.short_name for algo in algos}
    curves: dict[tuple[TaskKey, AlgoKey], Measurements] = {key: [] for key in seconds}
    for row in rows:
        if row.metric == LOGIT_DIFF_PERCENT_METRIC.key:
            percent = 100 - row.value if is_reversed else row.value
            curves[row.task, row.algo].append((row.n_edges, percent))
    return pd.DataFrame(
        {
            "task": task,
            "algorithm": names[algo],
            "edges_for_80_percent": (
                edges_for_share(curve, SHARE, target=100) if curve else None
            ),
            "area": (
                area_share(curve, log_x=True) if has_area(curve, log_x=True) else None
            ),
            "auroc": aurocs.get((task, algo)),
            "seconds": seconds[task, algo],
        }
        for (task, algo), curve in curves.items()
    )


def print_summary(results: ExperimentResults, console: Console) -> None:
    """The summary as a table, and where the figures are."""
    table = Table(title=f"Circuits of {results.config.name}")
    table.add_column("Task")
    table.add_column("Algorithm")
    lost = results.config.reverse_clean_corrupt
    of_what = "of logit diff lost" if lost else "of logit diff"
    columns = {
        "edges_for_80_percent": (f"Edges for 80 %\n{of_what}", "{:.0f}"),
        "area": ("Area under\ncurve", "{:.3f}"),
        "auroc": ("AUROC", "{:.3f}"),
        "seconds": ("Seconds", "{:.1f}"),
    }
    for column in list(columns):  # no known circuit, or no logit differences
        if results.summary[column].isna().all():
            del columns[column]
    for title, _ in columns.values():
        table.add_column(title, justify="right")
    last_task = None
    for row in results.summary.to_dict("records"):
        numbers = [
            "-" if pd.isna(row[column]) else text.format(row[column])
            for column, (_, text) in columns.items()
        ]
        if row["task"] != last_task:
            table.add_section()
        shown = row["task"] if row["task"] != last_task else ""
        table.add_row(shown, row["algorithm"], *numbers)
        last_task = row["task"]
    console.print(table)
    _print_folder(results.config.folder, console)


def _print_folder(folder: Path, console: Console) -> None:
    console.print(f"Results: {folder}", soft_wrap=True)
    for path in sorted(folder.glob("*.html")):
        console.print(f"  figure: {path}", soft_wrap=True)


# ------------------------------------------------------------------------------- results


def write_results(
    results: ExperimentResults, metrics: Sequence[PruneMetric], algos: Sequence[PruneAlgo]
) -> None:
    """Write configuration, scores, measurements and figures; all of them or nothing."""
    with _new_folder(results.config) as folder:
        _write_scores(results.scores, folder / "scores")
        _as_table(results.rows).to_parquet(folder / "measurements.parquet")
        results.summary.to_csv(folder / "summary.csv", index=False)
        _write_figures(results, metrics, algos, folder)


@contextmanager
def _new_folder(config: ExperimentConfig) -> Iterator[Path]:
    """A folder that becomes `config.folder` when all has been written."""
    partial = config.folder.with_name(f".{config.folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    (partial / "config.json").write_text(config.json)
    yield partial
    shutil.rmtree(config.folder, ignore_errors=True)
    partial.rename(config.folder)


def _write_scores(task_scores: TaskPruneScores, folder: Path) -> None:
    folder.mkdir()
    for task_key, algo_scores in task_scores.items():
        flat = {
            f"{algo_key}/{module_name}": scores.contiguous().cpu()
            for algo_key, prune_scores in algo_scores.items()
            for module_name, scores in prune_scores.items()
        }
        save_file(flat, folder / f"{_slug(task_key)}.safetensors")


def _write_figures(
    results: ExperimentResults,
    metrics: Sequence[PruneMetric],
    algos: Sequence[PruneAlgo],
    folder: Path,
) -> None:
    """A curve and its areas for each metric, and the ROCs."""
    names = {algo.key: algo.short_name for algo in algos}
    nested = nest_rows(results.rows)
    figs = measurement_figs(nested, True, metrics=metrics, algo_names=names)
    stems = [_slug(metric.key) + kind for metric in metrics for kind in ("", "-area")]
    named = dict(zip(stems, figs, strict=True))
    if results.rocs:
        keys = {name: key for key, name in names.items()}
        areas = {
            (row["task"], keys[row["algorithm"]]): row["auroc"]
            for row in results.summary.to_dict("records")
            if row["task"] in results.rocs
        }
        named["roc"] = roc_plot(results.rocs, algo_names=names, areas=areas)
    for name, fig in named.items():
        fig.write_html(folder / f"{name}.html", include_plotlyjs="directory")


def _as_table(rows: Sequence[Any]) -> pd.DataFrame:
    return pd.DataFrame([asdict(row) for row in rows])


def _slug(text: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in text.lower())


# ---------------------------------------------------------------------------- robustness


def run_robustness(config: ExperimentConfig) -> list[RobustnessRow]:
    """Test the same circuits in other ways, and write how the verdicts change.

    Raises, before anything is computed, ConfigError for unknown names and for other
    metrics than the logit difference's percentage, in which verdicts are stated.
    """
    tasks, algos, metrics = _named(config)
    if metrics != [LOGIT_DIFF_PERCENT_METRIC] or config.circuit_sizes:
        raise ConfigError(
            "Robustness states verdicts in 'Logit Diff Percent', of circuits whose size is "
            "a share of the graph: leave `metrics` and `circuit_sizes` out."
        )
    _make_out_folder(config)

    def find_scores(task: Task) -> AlgoPruneScores:
        return _timed_scores(task, algos, {})

    rows = []
    for task in tqdm(tasks, desc="Tasks"):
        rows += robustness_rows(task, config, config.circuit_shares, find_scores)
        task.free()
    names = {algo.key: algo.short_name for algo in algos}
    with _new_folder(config) as folder:
        _as_table(rows).to_parquet(folder / "robustness.parquet")
        fig = robustness_fig(rows, names)
        fig.write_html(folder / "robustness.html", include_plotlyjs="directory")
    return rows


def print_robustness(
    config: ExperimentConfig, rows: Sequence[RobustnessRow], console: Console
) -> None:
    """The verdicts as a table, and where the figure is."""
    shares = " / ".join(f"{100 * share:g}" for share in sorted(config.circuit_shares))
    table = Table(
        title="Verdicts: % of the task that the same circuit does in other tests",
        caption=f"Circuits of {shares} % of the edges. * The experiment's own choices.",
    )
    table.add_column("Choice")
    table.add_column("Value")
    columns = list(dict.fromkeys((row.task, row.algo) for row in rows))
    for task_key, algo_key in columns:
        algo = find_prune_algo(algo_key).short_name
        table.add_column(f"{task_key}\n{algo}", justify="right")
    last_choice = None
    for choice, value, is_base in values_by_choice(rows):
        if choice != last_choice:
            table.add_section()
        cells = [
            " / ".join(
                f"{row.verdict:.0f}"
                for row in rows
                if (row.task, row.algo, row.choice, row.value) == (*column, choice, value)
            )
            or "no: prompts differ in length"
            for column in columns
        ]
        shown = choice if choice != last_choice else ""
        table.add_row(shown, value + ("*" if is_base else ""), *cells)
        last_choice = choice
    console.print(table)
    _print_folder(config.folder, console)


# -------------------------------------------------------------------- named experiments


NUMBERS = tuple(
    algo.short_name for algo in PRUNE_ALGOS if algo.short_name.endswith("(MSE)")
)
"""The algorithms that compare numbers, for models whose output is no word."""


ROBUSTNESS = ExperimentConfig(
    name="robustness",
    tasks=(
        POCKET_IOI_TOKEN_TASK.key,
        POCKET_GREATERTHAN_TASK.key,
        POCKET_DOCSTRING_TASK.key,
    ),
    algos=("EAP",),
    metrics=(LOGIT_DIFF_PERCENT_METRIC.key,),
    token_positions=True,
    circuit_shares=(0.001, 0.003, 0.01),
)
"""The pocket tasks whose prompts have one length, so that positions can be told apart."""

TRACR_REVERSE = ExperimentConfig(
    name="tracr-reverse",
    tasks=(TRACR_REVERSE_TOKEN_CIRCUIT_TASK.key,),
    algos=tuple(
        algo.short_name
        for algo in PRUNE_ALGOS
        if algo.short_name not in (*NUMBERS, ACDC_PRUNE_ALGO.short_name)
    ),
    metrics=("Clean KL Div", LOGIT_DIFF_PERCENT_METRIC.key),
)
"""Every algorithm that compares words, against a circuit that is known exactly (of the ACDCs
the quick one, which here is ACDC with half of the thresholds)."""

TRACR_XPROPORTION = ExperimentConfig(
    name="tracr-xproportion",
    tasks=(TRACR_XPROPORTION_TOKEN_CIRCUIT_TASK.key,),
    algos=("GT", "Act Mag", "Random", *NUMBERS),
    metrics=("Clean MSE",),
)
"""Every algorithm that compares numbers."""

EXPERIMENTS: dict[str, ExperimentConfig] = {
    "sweep": ExperimentConfig(),
    "robustness": ROBUSTNESS,
    "tracr-reverse": TRACR_REVERSE,
    "tracr-xproportion": TRACR_XPROPORTION,
}
"""The first word of the command line -> what its options change."""


def main(args: Sequence[str] | None = None) -> None:
    """Run the experiment that the command line describes."""
    words = list(sys.argv[1:] if args is None else args)
    name = words.pop(0) if words and words[0] in EXPERIMENTS else "sweep"
    config = tyro.cli(
        ExperimentConfig,
        args=words,
        default=EXPERIMENTS[name],
        description=__doc__,
    )
    try:
        if name == "robustness":
            print_robustness(config, run_robustness(config), Console())
        else:
            print_summary(run_experiment(config), Console())
    except AutoCircuitError as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()

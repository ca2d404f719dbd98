"""Find and test circuits: sweep tasks x algorithms x metrics against circuit size.

An experiment is a frozen ExperimentConfig. For each task, every algorithm scores every
edge; the best edges make circuits of growing size; every metric measures each circuit.
All of it is written to `results/<name>-<hash>/`, and a table is printed.

    python experiments.py --help
    python experiments.py --tasks "Pocket IOI" --algos EAP IEG
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from enum import Enum
from pathlib import Path

import pandas as pd
import tyro
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from auto_circuit.errors import AutoCircuitError, ConfigError
from auto_circuit.metrics.area_under_curve import area_share, edges_for_share, has_area
from auto_circuit.metrics.prune_metrics.prune_metrics import (
    LOGIT_DIFF_PERCENT_METRIC,
    PruneMetric,
    find_metric,
)
from auto_circuit.metrics.prune_metrics.prune_metrics_plot import measurement_figs
from auto_circuit.metrics.prune_metrics.task_measurements import (
    nest_rows,
    task_measurement_rows,
)
from auto_circuit.prune_algos.prune_algos import (
    PruneAlgo,
    find_prune_algo,
    run_prune_algo,
)
from auto_circuit.tasks import POCKET_TASKS, Task, find_task
from auto_circuit.types import (
    AblationType,
    AlgoKey,
    AlgoPruneScores,
    EdgeCounts,
    MeasurementRow,
    Measurements,
    PatchType,
    TaskKey,
    TaskPruneScores,
    TestEdges,
)
from auto_circuit.utils.custom_tqdm import tqdm

SHARE = 0.8
Seconds = dict[tuple[TaskKey, AlgoKey], float]


@dataclass(frozen=True)
class ExperimentConfig:
    """One sweep. Without arguments: the pocket tasks, which need no download."""

    name: str = "pocket"
    """The first part of the result folder's name."""
    tasks: tuple[str, ...] = tuple(task.key for task in POCKET_TASKS)
    """Keys of tasks (see auto_circuit/tasks.py)."""
    algos: tuple[str, ...] = (
        *("GT", "Random", "Act Mag", "EAP", "EAP-IG inputs"),
        *("ACDC after EAP", "STP quick", "EP quick", "MAttr quick"),
    )
    """Names of prune algorithms (see auto_circuit/prune_algos/prune_algos.py). Those that
    need a known circuit are left out on tasks without one."""
    metrics: tuple[str, ...] = ("Clean KL Div", "Logit Diff", "Logit Diff Percent")
    """Keys of metrics (see auto_circuit/metrics/prune_metrics/prune_metrics.py)."""
    ablation: AblationType = AblationType.RESAMPLE
    """What is patched in when circuits are tested."""
    patch_type: PatchType = PatchType.TREE_PATCH
    """TREE_PATCH: patch all edges but the circuit's. EDGE_PATCH: patch the circuit's."""
    reverse_clean_corrupt: bool = False
    """Swap the roles of clean and corrupt prompts."""
    edge_counts: EdgeCounts = EdgeCounts.LOGARITHMIC
    """Which circuit sizes are tested: LOGARITHMIC (1..9, 10, 20, ...), ALL or GROUPS."""
    circuit_sizes: tuple[int, ...] = ()
    """Exactly these numbers of edges, instead of `edge_counts`."""
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
        return list(self.circuit_sizes) or self.edge_counts


def _plain(value: object) -> object:
    return value.name if isinstance(value, Enum) else str(value)


@dataclass(frozen=True)
class ExperimentResults:
    """What an experiment found: scores, measurements, a summary and where they lie."""

    config: ExperimentConfig
    scores: TaskPruneScores
    rows: list[MeasurementRow]
    summary: pd.DataFrame


def run_experiment(config: ExperimentConfig) -> ExperimentResults:
    """Run a sweep and write its results to `config.folder`.

    Raises ConfigError, before anything is computed, for unknown names.
    """
    tasks = [_task(key, config) for key in config.tasks]
    algos = [find_prune_algo(name) for name in config.algos]
    metrics = [find_metric(key) for key in config.metrics]
    _check_not_empty(config)
    scores: TaskPruneScores = {}
    rows: list[MeasurementRow] = []
    seconds: Seconds = {}
    for task in tqdm(tasks, desc="Tasks"):
        scores[task.key] = _timed_scores(task, algos, seconds)
        rows += _measure(task, scores[task.key], metrics, config)
        task.free()
    summary = summarize(rows, seconds, algos)
    results = ExperimentResults(config, scores, rows, summary)
    write_results(results, metrics, algos)
    return results


def _task(key: TaskKey, config: ExperimentConfig) -> Task:
    return replace(find_task(key), seed=config.seed, device=config.device)


def _check_not_empty(config: ExperimentConfig) -> None:
    for field in ("tasks", "algos", "metrics"):
        names: tuple[str, ...] = getattr(config, field)
        if not names:
            raise ConfigError(f"`{field}` is empty; name at least one.")
        if len(set(names)) < len(names):
            raise ConfigError(f"`{field}` names one of {list(names)} twice.")


def _timed_scores(
    task: Task, algos: Sequence[PruneAlgo], seconds: Seconds
) -> AlgoPruneScores:
    scores: AlgoPruneScores = {}
    task.model  # loads now, so that no algorithm's time includes it  # noqa: B018
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


# --------------------------------------------------------------------------- the summary


def summarize(
    rows: Sequence[MeasurementRow], seconds: Seconds, algos: Sequence[PruneAlgo]
) -> pd.DataFrame:
    """A row per task and algorithm: how small a circuit does the task, and how well.

    edges_for_80_percent: the smallest tested circuit with 80 % of the model's logit
    difference (empty: none). area: that of the percentage against the logarithm of the
    circuit's size, as a share of always having the largest circuit's. seconds: the time
    that the algorithm took to score the edges.
    """
    names = {algo.key: algo.short_name for algo in algos}
    curves: dict[tuple[TaskKey, AlgoKey], Measurements] = {key: [] for key in seconds}
    for row in rows:
        if row.metric == LOGIT_DIFF_PERCENT_METRIC.key:
            curves[row.task, row.algo].append((row.n_edges, row.value))
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
            "seconds": seconds[task, algo],
        }
        for (task, algo), curve in curves.items()
    )


def print_summary(results: ExperimentResults, console: Console) -> None:
    """The summary as a table, and where the figures are."""
    table = Table(title=f"Circuits of {results.config.name}")
    table.add_column("Task")
    table.add_column("Algorithm")
    for title in ("Edges for 80 %\nof logit diff", "Area under\ncurve", "Seconds"):
        table.add_column(title, justify="right")
    last_task = None
    formats = {"edges_for_80_percent": "{:.0f}", "area": "{:.3f}", "seconds": "{:.1f}"}
    for row in results.summary.to_dict("records"):
        numbers = [
            "-" if pd.isna(row[column]) else text.format(row[column])
            for column, text in formats.items()
        ]
        if row["task"] != last_task:
            table.add_section()
        shown = row["task"] if row["task"] != last_task else ""
        table.add_row(shown, row["algorithm"], *numbers)
        last_task = row["task"]
    console.print(table)
    folder = results.config.folder
    console.print(f"Results: {folder}", soft_wrap=True)
    for path in sorted(folder.glob("*.html")):
        console.print(f"  figure: {path}", soft_wrap=True)


# ------------------------------------------------------------------------------- results


def write_results(
    results: ExperimentResults, metrics: Sequence[PruneMetric], algos: Sequence[PruneAlgo]
) -> None:
    """Write configuration, scores, measurements and figures; all of them or nothing."""
    folder = results.config.folder
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "scores").mkdir(parents=True)
    (partial / "config.json").write_text(results.config.json)
    for task_key, algo_scores in results.scores.items():
        flat = {
            f"{algo_key}/{module_name}": scores.contiguous().cpu()
            for algo_key, prune_scores in algo_scores.items()
            for module_name, scores in prune_scores.items()
        }
        save_file(flat, partial / "scores" / f"{_slug(task_key)}.safetensors")
    pd.DataFrame([asdict(row) for row in results.rows]).to_parquet(
        partial / "measurements.parquet"
    )
    results.summary.to_csv(partial / "summary.csv", index=False)
    names = {algo.key: algo.short_name for algo in algos}
    figs = measurement_figs(
        nest_rows(results.rows), True, metrics=metrics, algo_names=names
    )
    for idx, fig in enumerate(figs):
        # A curve and its areas for each metric, in turn.
        kind = "-area" if idx % 2 else ""
        path = partial / f"{_slug(metrics[idx // 2].key)}{kind}.html"
        fig.write_html(path, include_plotlyjs="directory")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def _slug(text: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in text.lower())


def main(args: Sequence[str] | None = None) -> None:
    """Run the experiment that the command line describes."""
    config = tyro.cli(ExperimentConfig, args=args, description=__doc__)
    try:
        results = run_experiment(config)
    except AutoCircuitError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    print_summary(results, Console())


if __name__ == "__main__":
    main()

"""What becomes of an experiment's data: files, tables on the screen, figures."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from warnings import warn

from safetensors.torch import save

from auto_circuit.circuit_files import write_document
from auto_circuit.comparisons import (
    comparison_lines,
    comparison_table,
    comparisons,
)
from auto_circuit.files import checksum, folder_written_whole
from auto_circuit.fingerprints import digest
from auto_circuit.metrics.mean_interval import MeanInterval
from auto_circuit.metrics.prune_metrics.prune_metrics import (
    LOGIT_DIFF_PERCENT_METRIC,
    PruneMetric,
)
from auto_circuit.prune_algos.prune_algos import PruneAlgo, find_prune_algo
from auto_circuit.robustness import (
    LEFT_OUT,
    RobustnessRow,
    values_by_choice,
)
from auto_circuit.store import put_folder
from auto_circuit.summary import (
    ExperimentResults,
    circuit_stem,
    first_runs,
    mean_aurocs,
    mean_measurements,
    seed_measurements,
    slug,
)
from auto_circuit.sweep import MAX_DRAWN, TaskRun
from auto_circuit.sweep_config import ExperimentConfig
from auto_circuit.types import AlgoKey, TaskMeasurements

if TYPE_CHECKING:  # rich, pandas and plotly take long to import
    import pandas
    from rich.console import Console
    from rich.table import Table

REPORT_FILE = "report.json"
"""What a results' folder is made of: the keys of its cells, and its files' checksums."""

REPORT_VERSION = 2
"""Raised when what is written of the same cells changes."""

SCORES_ORDER = "order"
"""Of a file of scores, the metadata that list its tensors in the order of the scores."""


class ChangedReportWarning(UserWarning):
    """A file of a results' folder is not as it was written; it is written again."""


# ------------------------------------------------------------------------------- sweeps


def write_results(
    results: ExperimentResults,
    metrics: Sequence[PruneMetric],
    algos: Sequence[PruneAlgo],
    is_forced: bool = False,
) -> None:
    """Write configuration, scores, measurements, circuits and figures; all or nothing.

    To `results.config.address`. What was there stays until all has been written, and files
    that are not ours stay then. Nothing is written if the same cells' results are there
    already and undamaged, unless `is_forced`. Raises FileError.
    """
    of = {
        "cells": list(results.cells),
        "failed": dict(results.failed),
        "algorithms": {algo.key: algo.short_name for algo in algos},
    }

    def fill(new: Path) -> None:
        _write_files(results, metrics, algos, new)

    _write_folder(results.config, of, fill, is_forced)


def _write_files(
    results: ExperimentResults,
    metrics: Sequence[PruneMetric],
    algos: Sequence[PruneAlgo],
    new: Path,
) -> None:
    names = {algo.key: algo.short_name for algo in algos}
    (new / "config.json").write_text(results.config.json)
    _write_scores(results.runs, new / "scores")
    _as_table(results.rows).to_parquet(new / "measurements.parquet")
    results.summary.to_csv(new / "summary.csv", index=False)
    comparison_table(comparisons(results)).to_csv(new / "comparisons.csv", index=False)
    if results.failed:
        (new / "failed.json").write_text(json.dumps(dict(results.failed), indent=2))
    _write_figures(results, metrics, names, new)
    for run in first_runs(results.runs):
        _write_circuits(run, names, new)


# ---------------------------------------------------------- what is in a results' folder


def _write_folder(
    config: ExperimentConfig,
    of: Mapping[str, Any],
    fill: Callable[[Path], None],
    is_forced: bool = False,
) -> None:
    """Fill the folder of an experiment, and say what its results are `of`."""
    of = {"report": REPORT_VERSION, **of}
    if config.is_remote:
        with tempfile.TemporaryDirectory() as folder:
            fill(Path(folder))
            _write_report_file(Path(folder), of)
            put_folder(Path(folder), config.address)
    else:
        write_folder(config.folder, of, fill, is_forced)


def write_folder(
    folder: Path,
    of: Mapping[str, Any],
    fill: Callable[[Path], None],
    is_forced: bool = False,
) -> None:
    """Fill a folder, and say what its results are `of`; all or nothing.

    Files that are not ours stay. Nothing is written if the results of the same are there
    already and undamaged, unless `is_forced`. Raises FileError.
    """
    if is_forced or not _is_written(folder, of):
        with folder_written_whole(folder) as new:
            fill(new)
            _write_report_file(new, of)
            _keep_own_files(folder, new)


def _write_report_file(folder: Path, of: Mapping[str, Any]) -> None:
    files = {
        str(path.relative_to(folder)): digest(path.read_bytes())
        for path in _files_in(folder)
    }
    report = {**of, "files": files}
    report = {"checksum": checksum(report), **report}
    (folder / REPORT_FILE).write_text(json.dumps(report, indent=1))


def _files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _read_report_file(folder: Path) -> dict[str, Any]:
    """{} if there is none, or it is not as it was written."""
    try:
        report = json.loads((folder / REPORT_FILE).read_text())
    except (OSError, ValueError):
        return {}
    return report if is_sound_report(report) else {}


def is_sound_report(report: Any) -> bool:
    """Is the content of a REPORT_FILE as it was written?"""
    if not isinstance(report, dict):
        return False
    rest = {name: value for name, value in report.items() if name != "checksum"}
    return report.get("checksum") == checksum(rest)


def _is_written(folder: Path, of: Mapping[str, Any]) -> bool:
    """Are the results of these cells there, as they were written?"""
    report = _read_report_file(folder)
    if {name: report.get(name) for name in of} != dict(of):
        return False
    for name, expected in report["files"].items():
        path = folder / name
        if not path.is_file() or digest(path.read_bytes()) != expected:
            warn(
                f"{path} is not as it was written; the folder is written again.",
                ChangedReportWarning,
                stacklevel=3,
            )
            return False
    return True


def _keep_own_files(old: Path, new: Path) -> None:
    """The user's own files go into the new folder too."""
    ours = {*_read_report_file(old).get("files", {}), REPORT_FILE}
    for path in _files_in(old) if old.is_dir() else []:
        name = str(path.relative_to(old))
        if name not in ours and not (new / name).exists():
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, new / name)


def _write_scores(runs: Sequence[TaskRun], folder: Path) -> None:
    folder.mkdir()
    for run in runs:
        flat = {
            f"{algo_key}/{module_name}": scores.contiguous().cpu()
            for algo_key, prune_scores in run.scores.items()
            for module_name, scores in prune_scores.items()
        }
        path = folder / f"{slug(run.task)}-seed-{run.seed}.safetensors"
        # Safetensors sorts its tensors: this is the order in which they were.
        path.write_bytes(save(flat, {SCORES_ORDER: json.dumps(list(flat))}))


def _write_figures(
    results: ExperimentResults,
    metrics: Sequence[PruneMetric],
    names: dict[AlgoKey, str],
    folder: Path,
) -> None:
    """For each metric the mean curve with its interval, and its areas; the mean ROCs."""
    from auto_circuit.metrics.official_circuits.roc_plot import roc_plot
    from auto_circuit.metrics.prune_metrics.prune_metrics_plot import measurement_figs

    figs = measurement_figs(
        mean_measurements(results.rows),
        True,
        metrics=metrics,
        algo_names=names,
        of_seeds=seed_measurements(results.rows),
    )
    stems = [slug(metric.key) + kind for metric in metrics for kind in ("", "-area")]
    named = dict(zip(stems, figs, strict=True))
    rocs: TaskMeasurements = {}
    for run in results.runs:
        for algo, points in run.rocs.items():
            rocs.setdefault(run.task, {}).setdefault(algo, points)
    if rocs:
        named["roc"] = roc_plot(
            rocs,
            algo_names=names,
            areas=mean_aurocs(results.runs),
            of_seeds=[{run.task: run.rocs} for run in results.runs],
        )
    for name, fig in named.items():
        fig.write_html(folder / f"{name}.html", include_plotlyjs="directory")


def _write_circuits(run: TaskRun, names: dict[AlgoKey, str], folder: Path) -> None:
    """Each circuit as JSON and as a picture."""
    from auto_circuit.visualize import draw

    for algo, circuit in run.circuits.items():
        path = folder / circuit_stem(run.task, names[algo])
        path.parent.mkdir(parents=True, exist_ok=True)
        write_document(path.with_suffix(".json"), circuit.document)
        fig = draw(circuit.drawing)
        title = f"{run.task}, {names[algo]}: {fig.layout.title.text}"  # type: ignore[attr-defined]
        fig.update_layout(title={"text": title})
        # The same file as that of the figures above: it has 4 MB.
        fig.write_html(path.with_suffix(".html"), include_plotlyjs="../../plotly.min.js")


def _as_table(rows: Sequence[Any]) -> pandas.DataFrame:
    import pandas

    return pandas.DataFrame([asdict(row) for row in rows])


# ----------------------------------------------------------------- sweeps: on the screen


def print_summary(results: ExperimentResults, console: Console) -> None:
    """The summary as a table, where the figures and circuits are, and what failed."""
    if results.runs:
        console.print(summary_table(results))
        for line in comparison_lines(comparisons(results)):
            _say(console, line)
        _print_folder(results.config, console)
        _print_circuits(results, console)
    for label, error in results.failed.items():
        _say(console, f"Failed: {label}: {error}")
    if results.failed:
        n = len(results.failed) + len(results.cells)
        _say(
            console,
            f"{len(results.failed)} of {n} cells failed; the same command computes these "
            f"again, and nothing else: what is finished is in {results.config.store}",
        )


def _say(console: Console, line: str) -> None:
    console.print(line, soft_wrap=True, highlight=False, markup=False)


def summary_table(results: ExperimentResults) -> Table:
    """The summary, for the screen."""
    from rich.table import Table

    one_seed = "Numbers without ± are those of one seed: other prompts give others."
    table = Table(
        title=f"Circuits of {results.config.name}",
        caption=f"Means over seeds ± half of their 95 % interval. {one_seed}",
    )
    columns = _summary_columns(results)
    table.add_column("Task")
    table.add_column("Algorithm")
    for title, _ in columns.values():
        table.add_column(title, justify="right")
    last_task = None
    for row in results.summary.to_dict("records"):
        numbers = [
            _shown_mean(
                MeanInterval(row[column], row[f"{column}_plus_minus"]),
                digits,
                column != "seconds",
            )
            for column, (_, digits) in columns.items()
        ]
        if row["task"] != last_task:
            table.add_section()
        shown = row["task"] if row["task"] != last_task else ""
        table.add_row(shown, row["algorithm"], *numbers)
        last_task = row["task"]
    return table


def _summary_columns(results: ExperimentResults) -> dict[str, tuple[str, int]]:
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


def _shown_mean(mean: MeanInterval, digits: int, with_interval: bool) -> str:
    if math.isnan(mean.mean):
        return "-"
    shown = f"{round(mean.mean, digits) + 0.0:.{digits}f}"  # no minus before a zero
    if with_interval and not math.isnan(mean.plus_minus):
        shown += f" ± {mean.plus_minus:.{digits}f}"
    return shown


def _print_folder(config: ExperimentConfig, console: Console) -> None:
    console.print(f"Results: {config.address}", soft_wrap=True)
    for path in [] if config.is_remote else sorted(config.folder.glob("*.html")):
        console.print(f"  figure: {path}", soft_wrap=True)


def _print_circuits(results: ExperimentResults, console: Console) -> None:
    """A line for each task and algorithm: its circuit's files, or why there are none."""
    say = partial(_say, console)
    config = results.config
    if LOGIT_DIFF_PERCENT_METRIC.key not in config.metrics:
        say(f"No circuits: {LOGIT_DIFF_PERCENT_METRIC.key!r}, which picks them, is not in "
            "`metrics`.")  # fmt: skip
        return
    say(
        f"Circuits: the smallest tested ones, of seed {config.seed}, from which on all do "
        f"80 % of the task; as JSON and as a picture, of at most {MAX_DRAWN} edges"
    )
    circuits = {
        (run.task, found.name): run.circuits.get(found.algo)
        for run in first_runs(results.runs)
        for found in run.found
    }
    for row in results.summary.to_dict("records"):
        circuit = circuits[row["task"], row["algorithm"]]
        if circuit is None:
            say(f"  {row['task']}, {row['algorithm']}: none but the whole graph, if that")
            continue
        stem = f"{config.address}/{row['circuit']}"
        say(
            f"  {stem}.json, .html: {circuit.n_edges:,} of {circuit.n_graph_edges:,} "
            f"edges do {circuit.percent:.0f} %"
        )


# ---------------------------------------------------------------------------- robustness


def write_robustness(
    config: ExperimentConfig, rows: Sequence[RobustnessRow], algos: Sequence[PruneAlgo]
) -> None:
    """Write configuration, rows and figure; all or nothing. Raises FileError."""

    def fill(new: Path) -> None:
        from auto_circuit.robustness_plot import robustness_fig

        (new / "config.json").write_text(config.json)
        _as_table(rows).to_parquet(new / "robustness.parquet")
        fig = robustness_fig(rows, {algo.key: algo.short_name for algo in algos})
        fig.write_html(new / "robustness.html", include_plotlyjs="directory")

    _write_folder(config, {"rows": digest(repr(rows).encode())}, fill)


def print_robustness(
    config: ExperimentConfig, rows: Sequence[RobustnessRow], console: Console
) -> None:
    """The verdicts as a table, and where the figure is."""
    shares = " / ".join(f"{100 * share:g}" for share in sorted(config.circuit_shares))
    caption = f"Circuits of {shares} % of the edges. * The experiment's own choices."
    console.print(verdict_table(rows, caption))
    _print_folder(config, console)


def verdict_table(rows: Sequence[RobustnessRow], caption: str) -> Table:
    """The verdicts: a row for each value of a choice, a column for each circuit."""
    from rich.table import Table

    table = Table(
        title="Verdicts: % of the task that the same circuit does in other tests",
        caption=caption,
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
                f"{round(row.verdict, 0) + 0.0:.0f}"  # no minus before a zero
                for row in rows
                if (row.task, row.algo, row.choice, row.value) == (*column, choice, value)
            )
            or LEFT_OUT[choice]
            for column in columns
        ]
        shown = choice if choice != last_choice else ""
        table.add_row(shown, value + ("*" if is_base else ""), *cells)
        last_choice = choice
    return table

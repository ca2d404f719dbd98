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
from auto_circuit.files import folder_written_whole
from auto_circuit.fingerprints import digest
from auto_circuit.metrics.mean_interval import MeanInterval
from auto_circuit.metrics.prune_metrics.prune_metrics import (
    LOGIT_DIFF_PERCENT_METRIC,
    PruneMetric,
)
from auto_circuit.prune_algos.prune_algos import PruneAlgo, find_prune_algo
from auto_circuit.report_page.page import PageData
from auto_circuit.report_page.writing import (
    has_sound_page,
    page_data,
    robustness_page_data,
    write_page,
)
from auto_circuit.results_folder import (
    CONFIG_FILE,
    FAILED_FILE,
    ORIGIN_FILE,
    PAGE_FILE,
    REPORT_FILE,
    REPORT_VERSION,
    ROBUSTNESS_FILE,
    ROCS_FILE,
    ROWS_FILE,
    SCORES_ORDER,
    SUMMARY_FILE,
    examples_file,
    files_in,
    read_report_file,
    scores_file,
    write_report_file,
)
from auto_circuit.robustness import (
    RobustnessRow,
    values_by_choice,
    verdict_text,
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
    summary_columns,
)
from auto_circuit.sweep import MAX_DRAWN, TaskRun
from auto_circuit.sweep_config import ExperimentConfig
from auto_circuit.types import AlgoKey, TaskMeasurements

if TYPE_CHECKING:  # rich, pandas and plotly take long to import
    import pandas
    from rich.console import Console
    from rich.table import Table


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

    To `results.config.address`, with a page to be read (`report_page`). What was there stays
    until all has been written, and files that are not ours stay then. Nothing is written if
    the same cells' results are there already and undamaged, unless `is_forced`. Raises
    FileError.
    """
    of = {
        "cells": list(results.cells),
        "failed": dict(results.failed),
        "algorithms": {algo.key: algo.short_name for algo in algos},
    }

    def fill(new: Path) -> None:
        _write_files(results, metrics, algos, new)

    _write_results_folder(page_data(results, algos), of, fill, is_forced)


def _write_files(
    results: ExperimentResults,
    metrics: Sequence[PruneMetric],
    algos: Sequence[PruneAlgo],
    new: Path,
) -> None:
    names = {algo.key: algo.short_name for algo in algos}
    (new / CONFIG_FILE).write_text(results.config.json)
    _write_scores(results.runs, new)
    _as_table(results.rows).to_parquet(new / ROWS_FILE)
    results.summary.to_csv(new / SUMMARY_FILE, index=False)
    comparison_table(comparisons(results)).to_csv(new / "comparisons.csv", index=False)
    if results.failed:
        (new / FAILED_FILE).write_text(json.dumps(dict(results.failed), indent=2))
    (new / ORIGIN_FILE).write_text(json.dumps(results.origin.as_data(), indent=1))
    (new / ROCS_FILE).write_text(json.dumps(_rocs_as_data(results.runs)))
    for task, shown in results.examples.items():
        path = new / examples_file(task)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(shown))
    _write_figures(results, metrics, names, new)
    for run in first_runs(results.runs):
        _write_circuits(run, names, new)


def _rocs_as_data(runs: Sequence[TaskRun]) -> list[dict[str, Any]]:
    """The ROC of each task, seed and algorithm, and the exact area under it."""
    return [
        {"task": run.task, "seed": run.seed, "algo": one.algo}
        | {"points": one.roc, "auroc": one.auroc}
        for run in runs
        for one in run.measured
        if one.roc is not None
    ]


# ---------------------------------------------------------- what is in a results' folder


def _write_results_folder(
    page: PageData,
    of: Mapping[str, Any],
    fill: Callable[[Path], None],
    is_forced: bool = False,
) -> None:
    """Fill the folder of an experiment, also of another place than this machine."""
    config = page.config
    if config.is_remote:
        with tempfile.TemporaryDirectory() as folder:
            _fill(Path(folder), of, fill, page)
            put_folder(Path(folder), config.address)
    else:
        write_folder(config.folder, of, fill, is_forced, page)


def write_folder(
    folder: Path,
    of: Mapping[str, Any],
    fill: Callable[[Path], None],
    is_forced: bool = False,
    page: PageData | None = None,
) -> None:
    """Fill a folder, say what its results are `of`, and write their page; all or nothing.

    Files that are not ours stay. Nothing is written if the results of the same are there
    already and undamaged, unless `is_forced`. Raises FileError.
    """
    if is_forced or not _is_written(folder, {"report": REPORT_VERSION, **of}):
        with folder_written_whole(folder) as new:
            _fill(new, of, fill, page)
            _keep_own_files(folder, new)
    elif page is not None and not has_sound_page(page.config):
        write_page(folder, page)


def _fill(
    new: Path,
    of: Mapping[str, Any],
    fill: Callable[[Path], None],
    page: PageData | None,
) -> None:
    fill(new)
    write_report_file(new, {"report": REPORT_VERSION, **of})
    if page is not None:
        write_page(new, page)


def _is_written(folder: Path, of: Mapping[str, Any]) -> bool:
    """Are the results of these cells there, as they were written?"""
    report = read_report_file(folder)
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
    ours = {*read_report_file(old).get("files", {}), REPORT_FILE, PAGE_FILE}
    for path in files_in(old) if old.is_dir() else []:
        name = str(path.relative_to(old))
        if name not in ours and not (new / name).exists():
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, new / name)


def _write_scores(runs: Sequence[TaskRun], new: Path) -> None:
    (new / "scores").mkdir()
    for run in runs:
        flat = {
            f"{algo_key}/{module_name}": scores.contiguous().cpu()
            for algo_key, prune_scores in run.scores.items()
            for module_name, scores in prune_scores.items()
        }
        path = new / scores_file(run.task, run.seed)
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
            say(console, line)
        _print_folder(results.config, console)
        _print_circuits(results, console)
    for label, error in results.failed.items():
        say(console, f"Failed: {label}: {error}")
    if results.failed:
        n = len(results.failed) + len(results.cells)
        say(
            console,
            f"{len(results.failed)} of {n} cells failed; the same command computes these "
            f"again, and nothing else: what is finished is in {results.config.store}",
        )


def say(console: Console, line: str) -> None:
    """Print a line as it is: not broken, and nothing in it is markup."""
    console.print(line, soft_wrap=True, highlight=False, markup=False)


def summary_table(results: ExperimentResults) -> Table:
    """The summary, for the screen."""
    from rich.table import Table

    one_seed = "Numbers without ± are those of one seed: other prompts give others."
    table = Table(
        title=f"Circuits of {results.config.name}",
        caption=f"Means over seeds ± half of their 95 % interval. {one_seed}",
    )
    columns = summary_columns(results)
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


def _shown_mean(mean: MeanInterval, digits: int, with_interval: bool) -> str:
    if math.isnan(mean.mean):
        return "-"
    shown = f"{round(mean.mean, digits) + 0.0:.{digits}f}"  # no minus before a zero
    if with_interval and not math.isnan(mean.plus_minus):
        shown += f" ± {mean.plus_minus:.{digits}f}"
    return shown


def _print_folder(config: ExperimentConfig, console: Console) -> None:
    say(console, f"Report: {config.address}/{PAGE_FILE}")
    console.print(f"Results: {config.address}", soft_wrap=True)
    for path in [] if config.is_remote else sorted(config.folder.glob("*.html")):
        if path.name != PAGE_FILE:
            console.print(f"  figure: {path}", soft_wrap=True)


def _print_circuits(results: ExperimentResults, console: Console) -> None:
    """A line for each task and algorithm: its circuit's files, or why there are none."""
    tell = partial(say, console)
    config = results.config
    if LOGIT_DIFF_PERCENT_METRIC.key not in config.metrics:
        tell(f"No circuits: {LOGIT_DIFF_PERCENT_METRIC.key!r}, which picks them, is not in "
            "`metrics`.")  # fmt: skip
        return
    tell(
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
            tell(
                f"  {row['task']}, {row['algorithm']}: none but the whole graph, if that"
            )
            continue
        stem = f"{config.address}/{row['circuit']}"
        tell(
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

        (new / CONFIG_FILE).write_text(config.json)
        _as_table(rows).to_parquet(new / ROBUSTNESS_FILE)
        fig = robustness_fig(rows, {algo.key: algo.short_name for algo in algos})
        fig.write_html(new / "robustness.html", include_plotlyjs="directory")

    of = {"rows": digest(repr(rows).encode())}
    _write_results_folder(robustness_page_data(config, rows, algos), of, fill)


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
        cells = [verdict_text(rows, column, choice, value) for column in columns]
        shown = choice if choice != last_choice else ""
        table.add_row(shown, value + ("*" if is_base else ""), *cells)
        last_choice = choice
    return table

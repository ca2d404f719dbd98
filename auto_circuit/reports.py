"""What becomes of an experiment's data: files, tables on the screen, figures.

`run_experiment` and `run_robustness` run an experiment and write its results.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save

from auto_circuit.circuit_files import write_document
from auto_circuit.comparisons import (
    comparison_lines,
    comparison_table,
    comparisons,
)
from auto_circuit.errors import ConfigError, about
from auto_circuit.files import folder_written_whole
from auto_circuit.metrics.mean_interval import MeanInterval
from auto_circuit.metrics.prune_metrics.prune_metrics import (
    LOGIT_DIFF_PERCENT_METRIC,
    PruneMetric,
)
from auto_circuit.prune_algos.prune_algos import PruneAlgo, find_prune_algo
from auto_circuit.robustness import (
    LEFT_OUT,
    RobustnessRow,
    checked_choices,
    robustness_rows,
    values_by_choice,
)
from auto_circuit.summary import (
    ExperimentResults,
    circuit_stem,
    experiment_results,
    first_runs,
    mean_aurocs,
    mean_measurements,
    seed_measurements,
    slug,
)
from auto_circuit.sweep import TaskRun, algos_of_seed, find_all_scores, iter_runs
from auto_circuit.sweep_config import (
    ExperimentConfig,
    Plan,
    check_config,
    check_tasks,
    interrupted_folder,
)
from auto_circuit.tasks import Task
from auto_circuit.types import AlgoKey, AlgoPruneScores, TaskMeasurements
from auto_circuit.utils.custom_tqdm import tqdm

if TYPE_CHECKING:  # rich, pandas and plotly take long to import
    import pandas
    from rich.console import Console
    from rich.table import Table

MAX_DRAWN = 500
"""The most edges in the picture of a circuit: of a larger one, the strongest."""


# ------------------------------------------------------------------------------- sweeps


def run_experiment(config: ExperimentConfig) -> ExperimentResults:
    """Run a sweep and write its results to `config.folder`.

    Raises, before anything is computed, ConfigError for unknown names, numbers and devices that
    make no sense, circuit sizes that a task's graph does not have, and a folder that cannot
    be written; DataError for a prompt file that is not there, and for prompts and metrics that
    do not fit a task's model. An error of an algorithm or a metric begins with the task, the
    seed and the algorithm. If it is interrupted (KeyboardInterrupt), what is finished is
    written beside that folder; the text says where.
    """
    plan = check_config(config)
    check_tasks(plan, config)
    runs: list[TaskRun] = []
    try:
        for run in iter_runs(plan, config):
            runs.append(run)
    except KeyboardInterrupt:
        if not runs:
            raise
        folder = interrupted_folder(config)
        _write(config, runs, plan, folder)
        n_runs = len(plan.tasks) * config.n_seeds
        raise KeyboardInterrupt(
            f"{len(runs)} of {n_runs} runs were finished: {folder}"
        ) from None
    return _write(config, runs, plan, config.folder)


def _write(
    config: ExperimentConfig, runs: Sequence[TaskRun], plan: Plan, folder: Path
) -> ExperimentResults:
    results = experiment_results(config, runs, plan.algos)
    write_results(results, plan.metrics, plan.algos, folder)
    return results


def write_results(
    results: ExperimentResults,
    metrics: Sequence[PruneMetric],
    algos: Sequence[PruneAlgo],
    folder: Path,
) -> None:
    """Write configuration, scores, measurements, circuits and figures; all or nothing.

    What was in the folder stays until all has been written. Raises FileError.
    """
    names = {algo.key: algo.short_name for algo in algos}
    with folder_written_whole(folder) as new:
        (new / "config.json").write_text(results.config.json)
        _write_scores(results.runs, new / "scores")
        _as_table(results.rows).to_parquet(new / "measurements.parquet")
        results.summary.to_csv(new / "summary.csv", index=False)
        comparison_table(comparisons(results)).to_csv(
            new / "comparisons.csv", index=False
        )
        _write_figures(results, metrics, names, new)
        for run in first_runs(results.runs):
            _write_circuits(run, names, new)


def _write_scores(runs: Sequence[TaskRun], folder: Path) -> None:
    folder.mkdir()
    for run in runs:
        flat = {
            f"{algo_key}/{module_name}": scores.contiguous().cpu()
            for algo_key, prune_scores in run.scores.items()
            for module_name, scores in prune_scores.items()
        }
        path = folder / f"{slug(run.task)}-seed-{run.seed}.safetensors"
        path.write_bytes(save(flat))


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
        fig = draw(circuit.drawing.strongest(MAX_DRAWN))
        title = f"{run.task}, {names[algo]}: {fig.layout.title.text}"  # type: ignore[attr-defined]
        fig.update_layout(title={"text": title})
        # The same file as that of the figures above: it has 4 MB.
        fig.write_html(path.with_suffix(".html"), include_plotlyjs="../../plotly.min.js")


def _as_table(rows: Sequence[Any]) -> pandas.DataFrame:
    import pandas

    return pandas.DataFrame([asdict(row) for row in rows])


# ----------------------------------------------------------------- sweeps: on the screen


def print_summary(results: ExperimentResults, console: Console) -> None:
    """The summary as a table, and where the figures and circuits are."""
    console.print(_summary_table(results))
    _print_comparisons(results, console)
    _print_folder(results.config.folder, console)
    _print_circuits(results, console)


def _print_comparisons(results: ExperimentResults, console: Console) -> None:
    for line in comparison_lines(comparisons(results)):
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def _summary_table(results: ExperimentResults) -> Table:
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


def _print_folder(folder: Path, console: Console) -> None:
    console.print(f"Results: {folder}", soft_wrap=True)
    for path in sorted(folder.glob("*.html")):
        console.print(f"  figure: {path}", soft_wrap=True)


def _print_circuits(results: ExperimentResults, console: Console) -> None:
    """A line for each task and algorithm: its circuit's files, or why there are none."""

    def say(line: str) -> None:
        console.print(line, soft_wrap=True, highlight=False, markup=False)

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
        stem = config.folder / row["circuit"]
        say(
            f"  {stem}.json, .html: {circuit.n_edges:,} of {circuit.n_graph_edges:,} "
            f"edges do {circuit.percent:.0f} %"
        )


# ---------------------------------------------------------------------------- robustness


def run_robustness(config: ExperimentConfig) -> list[RobustnessRow]:
    """Test the same circuits in other ways, and write how the verdicts change.

    Raises, before anything is computed, as `run_experiment` does, and ConfigError for other
    metrics than the logit difference's percentage, in which verdicts are stated, for sizes
    that are no shares, and for several seeds. Interrupted, it writes as `run_experiment`.
    """
    plan = check_config(config)
    if config.metrics != (LOGIT_DIFF_PERCENT_METRIC.key,) or config.circuit_sizes:
        raise ConfigError(
            "Robustness states verdicts in 'Logit Diff Percent', of circuits whose size is "
            "a share of the graph: leave `metrics` and `circuit_sizes` out."
        )
    if config.n_seeds != 1:
        raise ConfigError(f"Robustness has one seed; `n_seeds` is {config.n_seeds}.")
    for task in plan.tasks:
        with about(f"Task {task.key!r}"):
            checked_choices(task, config, config.circuit_shares)
    algos = algos_of_seed(plan, config, config.seed)

    def find_scores(task: Task) -> AlgoPruneScores:
        return {found.algo: found.scores for found in find_all_scores(task, algos)}

    rows: list[RobustnessRow] = []
    try:
        for task in tqdm(
            [replace(t, seed=config.seed) for t in plan.tasks], desc="Tasks"
        ):
            rows += robustness_rows(task, config, config.circuit_shares, find_scores)
            task.free()
    except KeyboardInterrupt:
        if not rows:
            raise
        folder = interrupted_folder(config)
        _write_robustness(config, rows, plan.algos, folder)
        raise KeyboardInterrupt(f"What was finished: {folder}") from None
    _write_robustness(config, rows, plan.algos, config.folder)
    return rows


def _write_robustness(
    config: ExperimentConfig,
    rows: Sequence[RobustnessRow],
    algos: Sequence[PruneAlgo],
    folder: Path,
) -> None:
    from auto_circuit.robustness_plot import robustness_fig

    with folder_written_whole(folder) as new:
        (new / "config.json").write_text(config.json)
        _as_table(rows).to_parquet(new / "robustness.parquet")
        fig = robustness_fig(rows, {algo.key: algo.short_name for algo in algos})
        fig.write_html(new / "robustness.html", include_plotlyjs="directory")


def print_robustness(
    config: ExperimentConfig, rows: Sequence[RobustnessRow], console: Console
) -> None:
    """The verdicts as a table, and where the figure is."""
    shares = " / ".join(f"{100 * share:g}" for share in sorted(config.circuit_shares))
    from rich.table import Table

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
            or LEFT_OUT[choice]
            for column in columns
        ]
        shown = choice if choice != last_choice else ""
        table.add_row(shown, value + ("*" if is_base else ""), *cells)
        last_choice = choice
    console.print(table)
    _print_folder(config.folder, console)

"""The tables and figures of Miller et al. 2024: files, and what stands on the screen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from auto_circuit.cell_runs import at_work, choice_of, watched
from auto_circuit.cells import is_missing, run_cells
from auto_circuit.errors import AutoCircuitError
from auto_circuit.fingerprints import digest
from auto_circuit.paper import (
    GridRow,
    PaperResults,
    RocRow,
    check_paper_config,
    grid_values,
    loaded_task,
)
from auto_circuit.paper_cells import paper_cells, paper_results
from auto_circuit.paper_config import PaperConfig
from auto_circuit.prune_algos.prune_algos import find_prune_algo
from auto_circuit.reports import REPORT_VERSION, verdict_table, write_folder
from auto_circuit.store import open_store
from auto_circuit.sweep_config import Plan, RunOptions, check_options

if TYPE_CHECKING:  # it takes long to import
    from rich.console import Console

    from auto_circuit.progress import Watch


def run_and_print(
    config: PaperConfig,
    options: RunOptions,
    console: Console,
    watch: Watch,
) -> None:
    """Compute the rows that are not stored, write all with their figures, print their tables.

    Raises as `run_paper` does before anything is computed, and FileError if the folder cannot
    be written; when all others are finished and written, AutoCircuitError if cells failed.
    """
    plan = check_paper_config(config)
    all_tasks = list(dict.fromkeys((*plan.tasks, *plan.tracr_tasks)))
    check_options(options, Plan(all_tasks, list(plan.algos), []))
    store = open_store(config.store)
    with at_work(options, config.device) as workers:
        cells = paper_cells(plan, config)
        choice = choice_of(options, cells.names)
        for one in cells.circuits:
            if any(is_missing(work.cell, store, choice) for work in one.works):
                loaded_task(one.task, config)
                if len(all_tasks) > 1:
                    one.task.free()
        running = run_cells(cells.works, store, choice, workers)
        outcomes = watched(running, cells.works, watch, store, config.store)
    results = paper_results(config, cells, outcomes)
    if results.verdicts or results.grid or results.rocs:
        write_paper(results, is_forced=options.force)
        print_paper(results, console)
    failed = [outcome for outcome in outcomes.values() if outcome.error]
    if failed:
        raise AutoCircuitError(
            f"{len(failed)} of {len(outcomes)} cells failed: "
            + "; ".join(f"{one.cell.label}: {one.error}" for one in failed)
            + ". The same command computes them again, and no other."
        )


def write_paper(results: PaperResults, is_forced: bool = False) -> None:
    """Write configuration, rows and figures; all or nothing. Raises FileError.

    Nothing is written if the same rows are there already and undamaged, unless `is_forced`.
    """

    def fill(new: Path) -> None:
        (new / "config.json").write_text(results.config.json)
        for name, rows in (
            ("verdicts", results.verdicts),
            ("grid", results.grid),
            ("aurocs", results.rocs),
        ):
            if rows:
                _write_rows(rows, new / f"{name}.csv")
        _write_figures(results, new)

    rows = (results.config.json, results.verdicts, results.grid, results.rocs)
    of = {"report": REPORT_VERSION, "rows": digest(repr(rows).encode())}
    write_folder(results.config.folder, of, fill, is_forced)


def _write_rows(rows: Sequence[Any], path: Path) -> None:
    import pandas

    table = pandas.DataFrame([asdict(row) for row in rows])
    table.drop(columns="points", errors="ignore").to_csv(path, index=False)


def _write_figures(results: PaperResults, folder: Path) -> None:
    from auto_circuit.metrics.official_circuits.roc_plot import roc_plot
    from auto_circuit.paper_plot import grid_fig
    from auto_circuit.robustness_plot import robustness_fig

    figs = {}
    if results.verdicts:
        keys = {row.algo for row in results.verdicts}
        names = {key: find_prune_algo(key).short_name for key in keys}
        figs["verdicts"] = robustness_fig(results.verdicts, names)
    if results.grid:
        figs["grid"] = grid_fig(results.grid)
    if results.rocs:
        curves: dict[str, Any] = {}
        for row in results.rocs:
            curves.setdefault(row.task, {})[row.algo] = list(row.points)
        figs["roc"] = roc_plot(
            curves,
            algo_names={row.algo: row.algorithm for row in results.rocs},
            areas={(row.task, row.algo): row.auroc for row in results.rocs},
        )
    for name, fig in figs.items():
        fig.write_html(folder / f"{name}.html", include_plotlyjs="directory")


# --------------------------------------------------------------------------- the screen


def print_paper(results: PaperResults, console: Console) -> None:
    """The tables, and where the files are."""
    if results.verdicts:
        console.print(
            verdict_table(
                results.verdicts,
                "The circuits are the published ones (GT), or what an algorithm found. "
                "* The task's own choices.",
            )
        )
    if results.grid:
        console.print(_grid_table(results.grid))
    if results.rocs:
        console.print(_roc_table(results.rocs))
    folder = results.config.folder
    console.print(f"Results: {folder}", soft_wrap=True)
    for path in sorted(folder.glob("*.html")):
        console.print(f"  figure: {path}", soft_wrap=True)


def _grid_table(rows: Sequence[GridRow]) -> Any:
    from rich.table import Table

    table = Table(
        title="% of the logit difference that the same circuit has in other graphs",
        caption="The ratio of means; in brackets the mean of ratios ± their standard "
        "deviation over prompts, which the paper shows as a spread of points.",
    )
    for title in ("Unit", "Positions", "Ablation"):
        table.add_column(title)
    tasks = list(dict.fromkeys(row.task for row in rows))
    for task in tasks:
        circuit = next(row.circuit for row in rows if row.task == task)
        table.add_column(f"{task}\n{circuit}", justify="right")
    by_place = {(row.task, row.unit, row.positions, row.ablation): row for row in rows}
    last_graph = None
    for value in grid_values(rows):
        if value[:2] != last_graph:
            table.add_section()
        last_graph = value[:2]
        found = [by_place.get((task, *value)) for task in tasks]
        table.add_row(*value, *("-" if row is None else _cell(row) for row in found))
    return table


def _cell(row: GridRow) -> str:
    return f"{row.ratio_of_means:.0f} ({row.mean_of_ratios:.0f} ± {row.std:.0f})"


def _roc_table(rows: Sequence[RocRow]) -> Any:
    from rich.table import Table

    table = Table(title="How well the circuit of a compiled model is found")
    table.add_column("Task")
    table.add_column("Algorithm")
    table.add_column("AUROC", justify="right")
    table.add_column("Seconds", justify="right")
    for row in rows:
        table.add_row(row.task, row.algorithm, f"{row.auroc:.3f}", f"{row.seconds:.1f}")
    return table

"""A run of the benchmark: its files, and its tables on the screen.

What is computed is kept as cells (`mib_cells`), beside those of sweeps. The results' folder
has, after each algorithm, all that is known then; each file is whole:

- `summary.csv`: a row for each algorithm: CPR, CMD, accuracy area, seconds.
- `measurements.parquet`: a row for each algorithm, ranking and size of circuits.
- `submission/<method>/<task>_<model>/importances.json`: what the benchmark's leaderboard
  takes: a folder for each method, in it one for each task and model, in it the scores of all
  edges. <method> is "EAP_patching_edge": the algorithm, what is patched in, the level.
- `config.json`.

Source of the submission's layout: README.md and run_attribution.py of
hannamw/MIB-circuit-track.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import UInt8
from torch import Tensor

from auto_circuit.cell_runs import at_work, choice_of, watched
from auto_circuit.cells import InThisProcess, Outcome, is_missing, run_cells
from auto_circuit.errors import AutoCircuitError
from auto_circuit.files import write_bytes, write_text, written_whole
from auto_circuit.mib import LoadedMib, MibFailure, MibResult
from auto_circuit.mib_cells import (
    MibCells,
    measurement_rows,
    mib_cells,
    mib_outcomes,
)
from auto_circuit.mib_cells import finite_scores as finite_scores
from auto_circuit.mib_config import MibConfig
from auto_circuit.store import open_store
from auto_circuit.sweep_config import Plan, RunOptions, check_options

if TYPE_CHECKING:  # it takes long to import
    from rich.console import Console

    from auto_circuit.progress import Watch

Outcomes = Sequence[MibResult | MibFailure]
COLUMNS = ("task", "model", "algorithm", "cpr", "cmd", "accuracy_area", "seconds")


def run_and_print(
    config: MibConfig,
    options: RunOptions,
    console: Console,
    watch: Watch,
) -> None:
    """Run the benchmark, write results as they come, and print its tables.

    What is stored in `config.store` is not computed again. Raises as `load_mib` does before
    anything is computed; after all algorithms have run, AutoCircuitError if some of them failed.
    """
    cells = mib_cells(config)
    check_options(options, Plan([], [of_algo.algo for of_algo in cells], []))
    store = open_store(config.store)
    names = {work.cell: ("", {o.algo.short_name}) for o in cells for work in o.works}
    choice = choice_of(options, names)
    with at_work(options, config.device) as workers:
        if any(is_missing(cell, store, choice) for cell in names):
            uses = cells[0].uses
            _print_prompts(config, uses.loaded, console)
            if not isinstance(workers, InThisProcess):
                uses.free()
        write_text(made(config.folder) / "config.json", config.json)
        works = [work for of_algo in cells for work in of_algo.works]
        running = run_cells(works, store, choice, workers)
        writing = _Writing(watch, config, cells)
        watched(running, works, writing, store, config.store)
    outcomes = mib_outcomes(cells, writing.outcomes)
    print_results(config, outcomes, console)
    failed = [outcome for outcome in outcomes if isinstance(outcome, MibFailure)]
    if failed:
        raise AutoCircuitError(
            f"{len(failed)} of {len(cells)} algorithms failed: "
            + "; ".join(f"{one.name}: {one.error}" for one in failed)
            + ". The same command computes them again, and no other."
        )


class _Writing:
    """Writes the files of an algorithm when its last cell has come; tells another watch."""

    def __init__(
        self, watch: Watch, config: MibConfig, cells: Sequence[MibCells]
    ) -> None:
        self._watch, self._config = watch, config
        self._of_cell = {work.cell: one for one in cells for work in one.works}
        self._cells = cells
        self.outcomes: dict[str, Outcome] = {}

    def watching(self, n_cells: int) -> AbstractContextManager[None]:
        """As `Watch.watching`."""
        return self._watch.watching(n_cells)

    def ended(self, outcome: Outcome, results: Any) -> None:
        """As `Watch.ended`."""
        self.outcomes[outcome.cell.key] = outcome
        self._watch.ended(outcome, results)
        of_algo = self._of_cell[outcome.cell]
        (finished,) = mib_outcomes([of_algo], self.outcomes) or (None,)
        if isinstance(finished, MibResult):
            submission = self.outcomes[of_algo.submission.cell.key].result
            assert submission is not None
            write_submission(self._config, finished, submission.tensors["file"])
            write_tables(self._config, mib_outcomes(self._cells, self.outcomes))


# -------------------------------------------------------------------------------- files


def write_submission(
    config: MibConfig, result: MibResult, file: UInt8[Tensor, " n_bytes"]
) -> Path:
    """Write an algorithm's scores as the leaderboard takes them; the file's path."""
    method = f"{_file_part(result.found.name)}_patching_edge"
    folder = made(config.folder / "submission" / method / config.cell)
    path = folder / f"importances.{config.file_format}"
    write_bytes(path, file.numpy().tobytes())
    return path


def write_tables(config: MibConfig, outcomes: Outcomes) -> None:
    """Write the summary and the measurements of all that is finished."""
    results = [outcome for outcome in outcomes if isinstance(outcome, MibResult)]
    text = io.StringIO(newline="")
    table = csv.writer(text, lineterminator="\n")
    table.writerow(COLUMNS)
    for result in results:
        row = summary_row(config, result)
        table.writerow(row[column] for column in COLUMNS)
    write_text(config.folder / "summary.csv", text.getvalue())
    import pandas

    rows = [
        {"algorithm": result.found.name, **row}
        for result in results
        for row in measurement_rows(result)
    ]
    with written_whole(config.folder / "measurements.parquet") as path:
        pandas.DataFrame(rows).to_parquet(path)


def summary_row(config: MibConfig, result: MibResult) -> dict[str, Any]:
    """The row of an algorithm in `summary.csv`."""
    task, _, model = config.cell.partition("_")
    return {
        "task": task,
        "model": model,
        "algorithm": result.found.name,
        "cpr": result.cpr,
        "cmd": result.cmd,
        "accuracy_area": result.accuracy_area,
        "seconds": result.found.seconds,
    }


def made(folder: Path) -> Path:
    """The folder, which is there now."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _file_part(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-+." else "-" for c in name)


# --------------------------------------------------------------------------- the screen


def _print_prompts(config: MibConfig, loaded: LoadedMib, console: Console) -> None:
    model = loaded.task.model
    console.print(
        f"{config.cell}: {model.n_edges:,} edges, found on {len(loaded.train.prompts):,} "
        f"prompts of train, measured on {len(loaded.test.prompts):,} of {config.split}.",
        soft_wrap=True,
        highlight=False,
    )
    for split, prompts in (("train", loaded.train), (config.split, loaded.test)):
        if prompts.why is not None:
            console.print(
                f"Rows of {split} left out, as the benchmark does: {prompts.n_left_out:,}. "
                f"The first: {prompts.why}",
                soft_wrap=True,
                highlight=False,
                markup=False,
            )


def print_results(config: MibConfig, outcomes: Outcomes, console: Console) -> None:
    """The tables of all that is finished, and where the files are."""
    from rich.table import Table

    results = [outcome for outcome in outcomes if isinstance(outcome, MibResult)]
    if not results:
        return
    table = Table(title=f"MIB, {config.cell}, split {config.split}")
    for title in ("Algorithm", "CPR\n(high is good)", "CMD\n(0 is best)"):
        table.add_column(title, justify="left" if title == "Algorithm" else "right")
    table.add_column("Accuracy area\n(%)", justify="right")
    table.add_column("Seconds", justify="right")
    for result in results:
        numbers = (result.cpr, result.cmd)
        table.add_row(
            result.found.name,
            *(f"{number:.3f}" for number in numbers),
            f"{result.accuracy_area:.1f}",
            f"{result.found.seconds:.1f}",
        )
    console.print(table)
    console.print(_counts_table(results))
    console.print(f"Results: {config.folder}", soft_wrap=True)
    console.print(
        f"Submission: {config.folder / 'submission'} has a folder for each method, to be "
        "uploaded to a Hugging Face repository.",
        soft_wrap=True,
    )


def _counts_table(results: Sequence[MibResult]) -> Any:
    from rich.table import Table

    table = Table(
        title="Weighted edge counts: circuits by signed score (CPR) and by |score| (CMD)"
    )
    table.add_column("Share of edges", justify="right")
    table.add_column("Edges", justify="right")
    for result in results:
        table.add_column(f"{result.found.name}\nCPR", justify="right")
        table.add_column(f"{result.found.name}\nCMD", justify="right")
    for idx, point in enumerate(results[0].signed):
        counts = [
            curve[idx].weighted_edge_count
            for result in results
            for curve in (result.signed, result.absolute)
        ]
        table.add_row(
            f"{100 * point.share:g} %",
            f"{point.n_edges:,}",
            *(f"{count:,.0f}" for count in counts),
        )
    return table

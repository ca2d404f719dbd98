"""A run of the benchmark: its files, and its tables on the screen.

The results' folder has, after each algorithm, all that is known then; each file is whole:

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
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from auto_circuit.circuit_files import save_mib_circuit
from auto_circuit.errors import AutoCircuitError
from auto_circuit.files import write_text, written_whole
from auto_circuit.metrics.edge_ranks import Ranking
from auto_circuit.metrics.faithfulness import FaithfulnessPoint
from auto_circuit.mib import (
    LoadedMib,
    MibFailure,
    MibResult,
    iter_mib,
    load_mib,
)
from auto_circuit.mib_config import MibConfig
from auto_circuit.types import PruneScores

if TYPE_CHECKING:  # it takes long to import
    from rich.console import Console

Outcomes = Sequence[MibResult | MibFailure]
COLUMNS = ("task", "model", "algorithm", "cpr", "cmd", "accuracy_area", "seconds")


def run_and_print(config: MibConfig, console: Console) -> None:
    """Run the benchmark, write results as they come, and print its tables.

    Raises as `load_mib` does before anything is computed; after all algorithms have run,
    AutoCircuitError if some of them failed.
    """
    loaded = load_mib(config)
    write_text(made(config.folder) / "config.json", config.json)
    _print_prompts(config, loaded, console)
    outcomes: list[MibResult | MibFailure] = []
    try:
        for outcome in iter_mib(loaded):
            outcomes.append(outcome)
            if isinstance(outcome, MibResult):
                write_result(config, loaded, outcome)
                write_tables(config, outcomes)
    except KeyboardInterrupt:
        n_done = len(outcomes)
        raise KeyboardInterrupt(
            f"{n_done} of {len(loaded.algos)} algorithms were finished: {config.folder}"
        ) from None
    print_results(config, outcomes, console)
    failed = [outcome for outcome in outcomes if isinstance(outcome, MibFailure)]
    if failed:
        raise AutoCircuitError(
            f"{len(failed)} of {len(outcomes)} algorithms failed: "
            + "; ".join(f"{one.name}: {one.error}" for one in failed)
        )


# -------------------------------------------------------------------------------- files


def write_result(config: MibConfig, loaded: LoadedMib, result: MibResult) -> Path:
    """Write an algorithm's scores as the leaderboard takes them; the file's path."""
    method = f"{_file_part(result.found.name)}_patching_edge"
    folder = made(config.folder / "submission" / method / config.cell)
    path = folder / f"importances.{config.file_format}"
    save_mib_circuit(path, loaded.task.model, finite_scores(result.found.scores))
    return path


def finite_scores(prune_scores: PruneScores) -> PruneScores:
    """The same order, without infinite scores (ACDC's), which the format has no place for."""
    sizes = [
        float(scores[scores.isfinite()].abs().max())
        for scores in prune_scores.values()
        if scores.isfinite().any()
    ]
    largest = 2 * max(sizes, default=0.0) + 1
    return {
        name: scores.nan_to_num(math.nan, largest, -largest)
        for name, scores in prune_scores.items()
    }


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

    rows = [row for result in results for row in measurement_rows(result)]
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


def measurement_rows(result: MibResult) -> list[dict[str, Any]]:
    """The rows of an algorithm in `measurements.parquet`."""
    curves: dict[Ranking, tuple[FaithfulnessPoint, ...]] = {
        "signed": result.signed,
        "absolute": result.absolute,
    }
    return [
        {"algorithm": result.found.name, "ranking": ranking, **asdict(point)}
        for ranking, curve in curves.items()
        for point in curve
    ]


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

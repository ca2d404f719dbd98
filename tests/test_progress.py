"""What is seen of an experiment while it runs."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import torch as t
from nbclient import NotebookClient
from rich.console import Console

from auto_circuit.cells import Outcome
from auto_circuit.progress import Bar, Lines, Live, Watch
from auto_circuit.prune_algos.prune_algos import find_prune_algo
from auto_circuit.store import Cell, CellResult
from auto_circuit.summary import ExperimentResults, experiment_results
from auto_circuit.sweep import FoundScores, ScoreMeasurements, TaskRun
from auto_circuit.sweep_config import ExperimentConfig
from auto_circuit.types import MeasurementRow
from auto_circuit.utils.custom_tqdm import reported_to, tqdm

EAP = find_prune_algo("EAP")
ROWS = [
    MeasurementRow(
        *("IOI", EAP.key, "Logit Diff Percent", "Resample", "Edge Patch"),
        n_edges=n_edges,
        value=value,
        seed=42,
    )
    for n_edges, value in [(0, 0.0), (1200, 85.0), (2000, 100.0)]
]
SCORES = Outcome(
    Cell("scores", {}, "IOI, seed 42, EAP: scores"),
    CellResult({"a": t.ones(1)}, cost={"scoring_seconds": 1.25}),
    is_new=True,
)
MEASURED = Outcome(
    Cell("measurements", {}, "IOI, seed 42, EAP: measurements"),
    CellResult(rows=pd.DataFrame([asdict(row) for row in ROWS])),
    is_new=True,
)
FAILED = Outcome(Cell("scores", {}, "IOI, seed 42, [b]Mine: scores"), error="no luck")
STORED = Outcome(Cell("scores", {}, "IOI, seed 41, EAP: scores"), SCORES.result)


def results() -> ExperimentResults:
    found = FoundScores("IOI", 42, EAP.key, "EAP", {}, 1.25)
    run = TaskRun("IOI", 42, (found,), (ScoreMeasurements(EAP.key, tuple(ROWS)),))
    return experiment_results(ExperimentConfig(), [run], [EAP])


def shown(make: Callable[[Console], Watch], *outcomes: Outcome, terminal: bool) -> str:
    file = io.StringIO()
    console = Console(file=file, width=120, force_terminal=terminal, color_system=None)
    watch = make(console)
    with watch.watching(len(outcomes)):
        for outcome in outcomes:
            watch.ended(outcome, results)
    return file.getvalue()


def test_a_line_for_each_cell() -> None:
    outcomes = (STORED, SCORES, STORED, MEASURED, FAILED, STORED)
    text = shown(Lines, *outcomes, terminal=False)
    lines = [line.split("] ", 1)[-1] for line in text.splitlines()]
    assert lines == [
        "1 of 6 cells were stored",
        "IOI, seed 42, EAP: scores (1.2 s)",
        "IOI, seed 42, EAP: measurements: 80 % of the task from 1,200 edges on",
        "IOI, seed 42, [b]Mine: scores: failed: no luck",
        "3 of 6 cells were stored",
    ]
    assert text.splitlines()[1].startswith("[2/6, 0 s] ")


def test_lines_of_reversed_tests_count_what_is_lost() -> None:
    text = shown(lambda console: Lines(console, True), MEASURED, terminal=False)
    assert "80 %" not in text and "measurements" in text


def test_a_terminal_shows_the_table_and_two_bars() -> None:
    def make(console: Console) -> Live:
        return WithALoop(console)

    text = shown(make, SCORES, FAILED, MEASURED, terminal=True)
    assert "Circuits of pocket" in text and "1200" in text
    assert "Done: IOI, seed 42, EAP: scores" in text and "1/3" in text
    assert "inside" in text and "2/4" in text
    assert "[b]Mine: scores: failed: no luck" in text


class WithALoop(Live):
    """A loop of the library runs before each cell ends."""

    def ended(self, outcome: Outcome, results: object) -> None:
        bar = tqdm(total=4, desc="inside", disable=False, mininterval=0)
        bar.update(2)
        self._live.refresh()
        bar.close()
        super().ended(outcome, results)  # type: ignore[arg-type]


def test_bars_draw_themselves_again_after_an_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    told: list[int] = []
    bar = tqdm(total=3, disable=False, mininterval=0)
    with pytest.raises(ZeroDivisionError), reported_to(lambda bar: told.append(bar.n)):
        bar.update(2)
        raise ZeroDivisionError
    assert told == [2] and "2/3" not in capsys.readouterr().err
    bar.update(1)
    bar.close()
    assert "3/3" in capsys.readouterr().err


def test_a_library_call_is_silent_without_a_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert not sys.stderr.isatty()
    bar = Bar()
    with bar.watching(1):
        bar.ended(SCORES, results)
    assert capsys.readouterr() == ("", "")


SWEEP_IN_A_NOTEBOOK = """
from auto_circuit.runner import run_experiment
from auto_circuit.sweep_config import ExperimentConfig
run_experiment(ExperimentConfig(
    tasks=("Pocket Llama IOI",), algos=("EAP", "ACDC quick"),
    metrics=("Logit Diff Percent",), circuit_sizes=(0, 100), n_seeds=1, out=OUT))
print("done")
"""


@pytest.mark.slow
def test_a_notebook_shows_two_bars(tmp_path: Path) -> None:
    """One for cells and one for what is inside, however many loops there are."""
    notebook = nbformat.v4.new_notebook()
    notebook.cells = [
        nbformat.v4.new_code_cell(f"OUT = {str(tmp_path)!r}{SWEEP_IN_A_NOTEBOOK}")
    ]
    resources = {"metadata": {"path": str(Path(__file__).parents[1])}}
    NotebookClient(notebook, timeout=300, resources=resources).execute()
    outputs = notebook.cells[0].outputs
    bars = [
        output["data"]["text/plain"]
        for output in outputs
        if output.output_type == "display_data" and "%|" in str(output["data"])
    ]
    ours = [bar for bar in bars if not bar.startswith("Loading weights")]
    assert len(ours) == 2 and ours[0].startswith("Cells:")
    printed = [
        o.text for o in outputs if o.output_type == "stream" and o.name == "stdout"
    ]
    assert printed == ["done\n"]

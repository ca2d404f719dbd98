"""What the text under the summary says of differences."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from auto_circuit.comparisons import (
    comparison_lines,
    comparison_table,
    comparisons,
    prompts_of,
)
from auto_circuit.metrics.paired_comparisons import Comparison, Values, compare_all
from auto_circuit.metrics.prune_metrics.prune_metrics import LOGIT_DIFF_PERCENT_METRIC
from auto_circuit.prune_algos.prune_algos import find_prune_algo
from auto_circuit.reports import print_summary, write_results
from auto_circuit.summary import ExperimentResults, experiment_results
from auto_circuit.sweep import FoundScores, ScoreMeasurements, TaskRun
from auto_circuit.sweep_config import ExperimentConfig
from auto_circuit.types import MeasurementRow, Measurements

TASKS = ("Pocket IOI", "Pocket IOI Tokens", "Pocket Greaterthan", "Pocket Docstring")


def run_of(task: str, seed: int, levels: dict[str, float]) -> TaskRun:
    """Algorithms' runs whose circuits of 1 to 9 of 10 edges have these percentages."""
    found, measured = [], []
    for name, level in levels.items():
        key = find_prune_algo(name).key
        curve: Measurements = [(0, 0.0), (1, level), (10, 100.0)]
        rows = tuple(
            MeasurementRow(
                *(task, key, "Logit Diff Percent", "RESAMPLE", "TREE_PATCH"),
                n_edges=int(n_edges),
                value=value,
                seed=seed,
            )
            for n_edges, value in curve
        )
        found.append(FoundScores(task, seed, key, name, {}, 1.0))
        measured.append(ScoreMeasurements(key, rows))
    return TaskRun(task, seed, tuple(found), tuple(measured))


def results_of(runs: list[TaskRun], **options: object) -> ExperimentResults:
    names = dict.fromkeys(found.name for run in runs for found in run.found)
    config = ExperimentConfig(metrics=("Logit Diff Percent",), **options)  # type: ignore[arg-type]
    return experiment_results(config, runs, [find_prune_algo(name) for name in names])


@pytest.fixture
def four_tasks() -> list[TaskRun]:
    """EAP 20 % above Act Mag and 0 or 2 % below EAP-IG; ACDC once. All vary by draw."""
    runs = []
    for place, task in enumerate(TASKS):
        for seed in (42, 43, 44):
            of_draw = 3.0 * place + (seed - 42)
            levels = {"Act Mag": 40 + of_draw, "EAP": 60 + of_draw + 0.1 * (seed - 42)}
            levels["EAP-IG inputs"] = 60 + of_draw + (1 if (seed + place) % 2 else -1)
            levels |= {"ACDC quick": 90 + of_draw} if seed == 42 else {}
            runs.append(run_of(task, seed, levels))
    return runs


def by_pair(found: list[Comparison], number: str) -> dict[tuple[str, str], Comparison]:
    return {(one.first, one.second): one for one in found if one.number == number}


def test_every_pair_is_compared_by_every_known_number(four_tasks: list[TaskRun]) -> None:
    found = comparisons(results_of(four_tasks))
    # 80 % are reached with 10 edges, or by ACDC with 1; no circuit and no accuracy is known.
    assert {one.number for one in found} == {"edges_for_80_percent", "area", "off"}
    areas = by_pair(found, "area")
    assert len(areas) == 6 and {one.n_compared for one in areas.values()} == {6}
    eap = areas["Act Mag", "EAP"]
    assert eap.difference == pytest.approx(-0.201) and eap.n_draws == 12
    assert eap.p_value == 2 / 2**12 and eap.p_holm == 6 * 2 / 2**12
    assert (eap.n_tasks_above, eap.n_tasks_below) == (0, 4)
    once = areas["EAP", "ACDC quick"]
    assert (once.n_draws, once.n_left_out, once.p_value) == (4, 8, 2 / 2**4)
    assert by_pair(found, "off")["Act Mag", "EAP"].difference == pytest.approx(0.201)
    fewer = by_pair(found, "edges_for_80_percent")["EAP", "ACDC quick"]
    assert (fewer.difference, fewer.plus_minus) == (9, 0)


def test_what_the_lines_say(four_tasks: list[TaskRun]) -> None:
    lines = comparison_lines(comparisons(results_of(four_tasks)))
    clear = "p = 0.0029 after Holm over 6 pairs"
    assert f"  Area: EAP is above Act Mag (+0.201 ± 0.001, {clear})" in lines
    assert f"  Off the model: EAP is below Act Mag (-0.201 ± 0.001, {clear})" in lines
    (ig,) = (line for line in lines if line.startswith("  Area: EAP-IG inputs is"))
    assert "above Act Mag (+0.200 ± 0.00" in ig and "EAP (" not in ig
    (open_line,) = (line for line in lines if line.startswith("  Area: not told apart"))
    assert "equal or not: EAP and EAP-IG inputs (+0.001 ± 0.00" in open_line
    assert "p = " in open_line and "ACDC" not in open_line
    assert lines[-1] == (
        "  Edges for 80 %, Area, Off the model: 3 of 6 pairs (all of ACDC quick) have too few "
        "draws in common (4) for any difference to mean something; 8 would do (tasks x "
        "seeds: see `n_seeds` and `once`)"
    )
    assert not any("ACDC" in line for line in lines[:-1])


def test_too_few_draws_are_no_evidence_of_no_difference() -> None:
    """However large the differences are."""
    runs = [run_of(task, 42, {"Act Mag": 1.0, "EAP": 99.0}) for task in TASKS]
    lines = comparison_lines(comparisons(results_of(runs)))
    assert len(lines) == 2
    assert "1 of 1 pairs have too few draws in common (4) for any difference" in lines[1]
    assert "; 6 would do" in lines[1]


def test_tasks_that_disagree_are_said_to() -> None:
    found = compare_all(
        "area",
        {
            name: {
                (task, seed): level * (-0.1 if task == "c" else 1)
                for task in "abc"
                for seed in range(5)
            }
            for name, level in (("EAP", 0.5), ("Act Mag", 0.25))
        },
    )
    (line,) = comparison_lines(found)[1:]
    assert "EAP is above Act Mag" in line and line.endswith("; above on 2 of 3 tasks)")


def test_draws_that_only_one_has_are_said_to_be_left_out() -> None:
    """In lines of what is told apart and of what is not."""
    levels = {"EAP": 0.5, "Act Mag": 0.25, "Random": 0.251}
    values: dict[str, Values] = {
        name: {
            (task, seed): None if (name, seed) == ("EAP", 0) else level + 0.01 * noise
            for task in "ab"
            for seed in range(8)
            for noise in ((seed % 3) * (name == "Random") - 0.5,)
        }
        for name, level in levels.items()
    }
    lines = comparison_lines(compare_all("area", values))
    (clear,) = (line for line in lines if "Area: EAP is above" in line)
    assert clear.count("; 2 unpaired left out)") == 2
    (other,) = (line for line in lines if "Random" in line and "EAP" not in line)
    assert "unpaired" not in other


def test_small_differences_are_not_shown_as_none() -> None:
    values = {
        name: {("a", seed): level + seed for seed in range(12)}
        for name, level in (("EAP", 1.0002), ("Act Mag", 1.0))
    }
    (line,) = comparison_lines(compare_all("area", values))[1:]
    assert "EAP is above Act Mag (+0.0002 ± " in line and ", p < 0.001 after" in line


def test_one_algorithm_is_compared_with_nothing(four_tasks: list[TaskRun]) -> None:
    alone = results_of([run_of("Pocket IOI", 42, {"EAP": 10.0})])
    assert comparisons(alone) == comparison_lines([]) == []
    assert list(comparison_table([]).columns)[:3] == ["number", "first", "second"]


def test_tasks_on_the_same_prompts_share_their_draws() -> None:
    """Two registered graphs of one model and prompt file; what is not registered has its own."""
    names = [
        "Docstring Token Circuit",
        "Docstring Component Circuit",
        "Pocket IOI",
        "Mine",
    ]
    runs = [
        run_of(task, seed, {"Act Mag": 20.0, "EAP": 50.0 + seed})
        for task in names
        for seed in (1, 2, 3)
    ]
    prompts = prompts_of(runs)
    assert set(prompts) == set(names[:3]) and len(set(prompts.values())) == 2
    one = by_pair(comparisons(results_of(runs)), "area")["Act Mag", "EAP"]
    assert (one.n_tasks, one.n_draws, one.p_value) == (4, 9, 2 / 2**9)


def test_they_are_in_the_report(four_tasks: list[TaskRun], tmp_path: Path) -> None:
    results = results_of(four_tasks, out=tmp_path)
    console = Console(record=True, width=60)
    print_summary(results, console)
    text = console.export_text()
    assert "  Area: EAP is above Act Mag (+0.201 ± 0.001, p = 0.0029" in text
    algos = [find_prune_algo(name) for name in ("Act Mag", "EAP")]
    alone = results_of(
        [run_of("Pocket IOI", 42, {"Act Mag": 1.0, "EAP": 2.0})], out=tmp_path
    )
    write_results(alone, [LOGIT_DIFF_PERCENT_METRIC], algos)
    read = pd.read_csv(alone.config.folder / "comparisons.csv")
    assert list(read.columns) == [field.name for field in fields(Comparison)]
    table = comparison_table(comparisons(alone))
    assert read["difference"].tolist() == table["difference"].tolist()
    assert read["number"].tolist() == ["edges_for_80_percent", "area", "off"]

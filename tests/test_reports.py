"""Reports of experiments: the summary, its table, figures and circuits."""

from __future__ import annotations

import math
import re
import statistics
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch as t
from rich.console import Console

from auto_circuit.circuit_files import load_circuit
from auto_circuit.circuits import circuit_of_scores
from auto_circuit.metrics.prune_metrics.prune_metrics import PRUNE_METRICS
from auto_circuit.named_experiments import TRACR_REVERSE, TRACR_XPROPORTION
from auto_circuit.prune_algos.mask_gradient import (
    LOGPROB_DIFF_GRAD_PRUNE_ALGO,
    LOGPROB_GRAD_PRUNE_ALGO,
)
from auto_circuit.prune_algos.prune_algos import PRUNE_ALGOS, find_prune_algo
from auto_circuit.reports import print_summary
from auto_circuit.runner import run_experiment
from auto_circuit.summary import mean_measurements, slug, summarize
from auto_circuit.sweep import FoundScores, ScoreMeasurements, TaskRun
from auto_circuit.sweep_config import ExperimentConfig
from auto_circuit.tasks import POCKET_IOI_TASK, TASK_DICT, TASKS, TRACR_TASKS
from auto_circuit.types import AblationType, MeasurementRow, Measurements
from tests.prune_algos.test_known_circuits import TRAININGS_OF_NUMBERS

ACCURACY = "Correct Answer Greater Than Incorrect Percent"


QUICK_GRADIENT_ALGOS = ("EAP", "Clean-Corrupt", "HISP")


LONG_GRADIENT_ALGOS = (
    *("IEG", "EAP-IG inputs", "EAP-IG activations", "EAP-IG sources"),
    LOGPROB_GRAD_PRUNE_ALGO.short_name,
    LOGPROB_DIFF_GRAD_PRUNE_ALGO.short_name,
)


@pytest.fixture
def in_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sweeps find the compiled programs' prompts, the same ones, in one batch, not in 8 or 11.

    Of models this small a pass costs nearly the same for 121 prompts as for 11.
    """
    for task in TRACR_TASKS:
        n_prompts = task.batch_size * task.batch_count  # type: ignore[operator]
        whole = replace(task, batch_size=n_prompts, batch_count=1)
        monkeypatch.setitem(TASK_DICT, task.key, whole)


@pytest.mark.usefixtures("in_one_batch")
@pytest.mark.parametrize(
    "algos",
    [QUICK_GRADIENT_ALGOS, pytest.param(LONG_GRADIENT_ALGOS, marks=pytest.mark.slow)],
    ids=["quick", "long"],
)
def test_the_report_says_how_well_gradients_find_a_known_circuit(
    algos: tuple[str, ...], tmp_path: Path
) -> None:
    config = replace(
        TRACR_REVERSE,
        algos=("GT", "Random", *algos),
        metrics=(*TRACR_REVERSE.metrics, ACCURACY),
        circuit_sizes=(0, 8, 462),
        out=tmp_path,
    )
    results = run_experiment(config)
    accuracies = results.summary.set_index("algorithm")["accuracy_area"]
    assert 100.0 > accuracies["GT"] > accuracies["Random"] > 0.0
    aurocs = dict(
        zip(results.summary["algorithm"], results.summary["auroc"], strict=True)
    )
    assert aurocs["GT"] == 1.0
    assert 0.2 < aurocs["Random"] < 0.8
    found = [aurocs[find_prune_algo(name).short_name] for name in algos]
    assert min(found) > 0.97
    assert pd.read_csv(config.folder / "summary.csv")["auroc"].notna().all()
    assert (config.folder / "roc.html").exists()
    console = Console(record=True, width=120)
    print_summary(results, console)
    assert "AUROC" in (text := console.export_text()) and "1.000" in text
    assert "answered (%)" in text and f" {accuracies['GT']:.1f} " in text


@pytest.mark.slow
@pytest.mark.usefixtures("in_one_batch")
def test_the_report_on_numbers(tmp_path: Path) -> None:
    """All that do not train find the circuit, but for two.

    EAP's gradient is that of an error of nearly 0; HISP ranks nodes.
    """
    of_numbers = TRACR_XPROPORTION
    algos = tuple(name for name in of_numbers.algos if name not in TRAININGS_OF_NUMBERS)
    assert len(algos) + len(TRAININGS_OF_NUMBERS) == len(of_numbers.algos)
    config = replace(of_numbers, algos=algos, circuit_sizes=(0, 100), out=tmp_path)
    results = run_experiment(config)
    aurocs = results.summary.set_index("algorithm")["auroc"]
    finders = set(algos) - {"Act Mag", "Random", "EAP (MSE)", "HISP (MSE)"}
    assert len(finders) == 8 and (aurocs[list(finders)] == 1.0).all()
    assert aurocs["EAP (MSE)"] > 0.9
    console = Console(record=True, width=120)
    print_summary(results, console)
    text = console.export_text()
    assert "AUROC" in text and "logit diff" not in text


def run_of(
    curve: Measurements,
    seed: int = 42,
    algo: str = "EAP",
    metric: str = "Logit Diff Percent",
) -> TaskRun:
    """One algorithm's run with this curve of percentages."""
    key = find_prune_algo(algo).key
    rows = [
        MeasurementRow(
            *("Task", key, metric, "Resample", "Edge Patch"),
            n_edges=int(n_edges),
            value=percent,
            seed=seed,
        )
        for n_edges, percent in curve
    ]
    found = FoundScores("Task", seed, key, algo, {}, 1.0)
    return TaskRun("Task", seed, (found,), (ScoreMeasurements(key, tuple(rows)),))


ALGOS = [find_prune_algo("EAP"), find_prune_algo("ACDC quick")]


def test_the_summary_of_no_logit_differences() -> None:
    summary = summarize([run_of([])], ALGOS)
    assert summary["edges_for_80_percent"].isna().all()
    assert summary["area"].isna().all() and summary["auroc"].isna().all()
    assert t.tensor(summary["seconds"][0]) == 1.0


def test_the_summary_of_several_seeds() -> None:
    """A curve that falls below 80 % again has not arrived."""
    curves: list[Measurements] = [
        [(0, 0.0), (10, 85.0), (20, 70.0), (40, 85.0), (100, 100.0)],
        [(0, 0.0), (10, 50.0), (20, 80.0), (40, 90.0), (100, 100.0)],
        [(0, 0.0), (10, 50.0), (20, 60.0), (40, 79.0), (100, 100.0)],
    ]
    runs = [run_of(curve, seed) for seed, curve in enumerate(curves)]
    (row,) = summarize(runs, ALGOS).to_dict("records")
    assert row["n_seeds"] == 3
    edges = [40, 20, 100]
    assert row["edges_for_80_percent"] == pytest.approx(statistics.mean(edges))
    half_width = 4.303 * statistics.stdev(edges) / 3**0.5
    assert row["edges_for_80_percent_plus_minus"] == pytest.approx(half_width)
    # A decade at 0, and steps from 10, 20 and 40 edges on.
    steps = [math.log10(x) for x in (20 / 10, 40 / 20, 100 / 40)]
    areas = [
        sum(w * p for w, (_, p) in zip(steps, curve[1:4], strict=True)) / 2 / 100
        for curve in curves
    ]
    assert row["area"] == pytest.approx(statistics.mean(areas))
    assert row["off"] == pytest.approx(1 - row["area"])  # no overshoot
    half_width = 4.303 * statistics.stdev(areas) / 3**0.5
    assert row["area_plus_minus"] == pytest.approx(half_width)


def test_the_summary_of_correct_answers() -> None:
    curves: list[Measurements] = [
        [(0, 5.0), (1, 20.0), (10, 40.0), (1000, 90.0)],  # a decade, and two
        [(0, 5.0), (1, 50.0), (10, 50.0), (1000, 50.0)],
    ]
    runs = [run_of(curve, seed, metric=ACCURACY) for seed, curve in enumerate(curves)]
    (kept,) = summarize(runs, ALGOS).to_dict("records")
    one = (30 + 2 * 65) / 3
    assert kept["accuracy_area"] == pytest.approx((one + 50) / 2)
    assert kept["accuracy_area_plus_minus"] > 0 and math.isnan(kept["area"])
    (lost,) = summarize(runs, ALGOS, is_reversed=True).to_dict("records")
    assert lost["accuracy_area"] == pytest.approx(100 - kept["accuracy_area"])
    without: list[Measurements] = [[], [(0, 5.0), (1000, 90.0)]]
    for curve in without:
        (row,) = summarize([run_of(curve, metric=ACCURACY)], ALGOS).to_dict("records")
        assert math.isnan(row["accuracy_area"])


def test_80_percent_are_of_the_model_not_of_the_largest_circuit() -> None:
    """Else a curve that ends early would seem to find the circuit."""
    curve: Measurements = [(0, 0.0), (10, 60.0), (20, 70.0)]
    (row,) = summarize([run_of(curve)], ALGOS).to_dict("records")
    assert math.isnan(row["edges_for_80_percent"])


def test_one_seed_has_no_interval() -> None:
    (row,) = summarize([run_of([(0, 0.0), (5, 100.0)])], ALGOS).to_dict("records")
    assert row["edges_for_80_percent"] == 5
    assert math.isnan(row["edges_for_80_percent_plus_minus"])


def test_the_figures_show_the_mean_over_seeds() -> None:
    runs = [
        run_of([(0, 0.0), (10, 60.0), (20, 100.0)], 1),
        run_of([(0, 10.0), (20, 90.0)], 2),
        run_of([(0, 0.0), (5, 7.0)], 1, "ACDC quick"),
    ]
    rows = [row for run in runs for row in run.rows]
    rows = [replace(row, ablation="RESAMPLE") for row in rows]
    measured = mean_measurements(rows)[AblationType.RESAMPLE]["Logit Diff Percent"]
    assert measured["Task"] == {
        ALGOS[0].key: [(0, 5.0), (10, 35.0), (20, 95.0)],
        ALGOS[1].key: [(0, 0.0), (5, 7.0)],
    }


def test_a_reversed_test_counts_what_is_lost() -> None:
    """Without edges nothing is lost, with all edges everything."""
    runs = [run_of([(0, 100.0), (1, 90.0), (2, 15.0), (3, 0.0)])]
    kept = summarize(runs, ALGOS)
    lost = summarize(runs, ALGOS, is_reversed=True)
    assert kept["edges_for_80_percent"].isna().all()  # not from anywhere on
    assert lost["edges_for_80_percent"].tolist() == [2]


def test_a_sweep_writes_the_smallest_circuits_that_do_the_task(tmp_path: Path) -> None:
    """As a file that can be loaded and as a picture; random edges have none."""
    config = ExperimentConfig(
        tasks=("Pocket IOI",),
        algos=("Random", "EAP"),
        metrics=("Logit Diff Percent",),
        circuit_sizes=(0, 20, 100, 1519),
        n_seeds=1,
        out=tmp_path,
    )
    results = run_experiment(config)
    folder = config.folder / "circuits"
    files = {str(path.relative_to(folder)) for path in folder.rglob("*.*")}
    assert files == {"pocket-ioi/eap.html", "pocket-ioi/eap.json"}
    (run,) = results.runs
    key = find_prune_algo("EAP").key
    model = POCKET_IOI_TASK.model
    loaded = load_circuit(folder / "pocket-ioi" / "eap.json", model)
    circuit = circuit_of_scores(model, run.scores[key], 100)
    for name, mask in circuit.items():
        assert t.equal(loaded[name], run.scores[key][name] * mask)
    html = (folder / "pocket-ioi" / "eap.html").read_text()
    assert "Pocket IOI, EAP: 100 of 1,519 edges" in html and len(html) < 100_000
    script = re.search(r'src="([^"]*plotly[^"]*)"', html)
    assert script and (folder / "pocket-ioi" / script[1]).is_file()
    table = pd.read_csv(config.folder / "summary.csv", keep_default_na=False)
    assert table["circuit"].tolist() == ["", "circuits/pocket-ioi/eap"]
    console = Console(record=True, width=80)
    print_summary(results, console)
    printed = console.export_text()
    assert f"{folder}/pocket-ioi/eap.json, .html: 100 of 1,519 edges do " in printed
    assert "Pocket IOI, Random: none but the whole graph" in printed


def test_without_percentages_there_are_no_circuits(tmp_path: Path) -> None:
    config = ExperimentConfig(
        tasks=("Pocket IOI",),
        algos=("Random",),
        metrics=("Clean KL Div",),
        circuit_sizes=(0, 100, 1519),
        n_seeds=1,
        out=tmp_path,
    )
    results = run_experiment(config)
    assert not (config.folder / "circuits").exists()
    console = Console(record=True, width=80)
    print_summary(results, console)
    assert "No circuits: 'Logit Diff Percent'" in console.export_text()


def test_no_two_results_have_the_same_file() -> None:
    for names in (
        [task.key for task in TASKS],
        [algo.short_name for algo in PRUNE_ALGOS],
        [metric.key for metric in PRUNE_METRICS],
    ):
        assert len({slug(name) for name in names}) == len(names)

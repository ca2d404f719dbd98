"""The command line."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch as t
from rich.console import Console
from safetensors.torch import load_file

from auto_circuit import experiments
from auto_circuit.errors import ConfigError
from auto_circuit.experiments import ExperimentConfig, run_experiment
from auto_circuit.metrics.prune_metrics.answer_diff_percent import (
    measure_answer_diff_percent,
)
from auto_circuit.prune import run_circuits
from auto_circuit.prune_algos.edge_attribution_patching import (
    edge_attribution_patching_prune_scores,
)
from auto_circuit.prune_algos.mask_gradient import (
    LOGPROB_DIFF_GRAD_PRUNE_ALGO,
    LOGPROB_GRAD_PRUNE_ALGO,
)
from auto_circuit.prune_algos.prune_algos import PRUNE_ALGOS, find_prune_algo
from auto_circuit.prune_algos.random_edges import random_prune_scores
from auto_circuit.tasks import POCKET_IOI_TASK
from auto_circuit.types import MeasurementRow, PatchType
from tests.browser import check_shown
from tests.prune_algos.test_known_circuits import TRAININGS_OF_NUMBERS

REPO = Path(__file__).parents[1]
SMALL = [
    *("--tasks", "Pocket IOI"),
    *("--algos", "Random", "EAP"),
    *("--metrics", "Logit Diff Percent"),
    *("--circuit-sizes", "0", "10", "100", "1519"),
]


SCRIPT, MODULE = ["experiments.py"], ["-m", "auto_circuit.experiments"]


def run_process(
    folder: Path, hash_seed: int, *args: str, command: Sequence[str] = SCRIPT
) -> str:
    environment = {**os.environ, "PYTHONHASHSEED": str(hash_seed), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *command, *args, "--out", folder],
        cwd=REPO,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_ungroup_reaches_the_tasks() -> None:
    config = ExperimentConfig(ungroup=True)
    assert experiments._task("Pocket IOI", config).ungroup
    assert not experiments._task("Pocket IOI", ExperimentConfig()).ungroup
    assert config.folder != ExperimentConfig().folder


def score_files(folder: Path) -> dict[str, bytes]:
    (results,) = folder.iterdir()
    return {path.name: path.read_bytes() for path in (results / "scores").iterdir()}


def test_a_small_sweep_in_two_processes(tmp_path: Path) -> None:
    printed = [
        run_process(tmp_path / str(i), i, *SMALL, command=command)
        for i, command in ((1, SCRIPT), (2, MODULE))
    ]
    one, two = (score_files(tmp_path / str(i)) for i in (1, 2))
    assert list(one) == ["pocket-ioi.safetensors"]
    assert one == two
    assert "Pocket IOI" in printed[0] and "EAP" in printed[0]
    (folder,) = (tmp_path / "1").iterdir()
    assert re.fullmatch(r"pocket-[0-9a-f]{8}", folder.name)
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "logit-diff-percent-area.html",
        "logit-diff-percent.html",
        "measurements.parquet",
        "plotly.min.js",
        "scores",
        "summary.csv",
    }
    config = json.loads((folder / "config.json").read_text())
    assert config["tasks"] == ["Pocket IOI"] and config["patch_type"] == "TREE_PATCH"
    rows = pd.read_parquet(folder / "measurements.parquet")
    assert list(rows["n_edges"]) == [0, 10, 100, 1519] * 2
    assert set(rows["seed"]) == {42} and set(rows["n_prompts"]) == {64}
    scores = load_file(folder / "scores" / "pocket-ioi.safetensors")
    assert any((values != 0).any() for values in scores.values())
    summary = pd.read_csv(folder / "summary.csv")
    assert list(summary["algorithm"]) == ["Random", "EAP"]
    assert list(summary["edges_for_80_percent"]) == [1519, 100]


@pytest.mark.slow
def test_the_default_sweep_in_two_processes(tmp_path: Path) -> None:
    """Its scores are the same to the last bit, and a browser shows its figures."""
    folders = [tmp_path / "1", tmp_path / "2"]
    for hash_seed, folder in enumerate(folders):
        run_process(folder, hash_seed)
    one, two = map(score_files, folders)
    assert len(one) == 4
    assert one == two
    figures = sorted(folders[0].glob("*/*.html"))
    assert len(figures) == 2 * len(ExperimentConfig().metrics)
    for path in figures:
        check_shown(path)


QUICK_GRADIENT_ALGOS = ("EAP", "Clean-Corrupt", "HISP")
LONG_GRADIENT_ALGOS = (
    *("IEG", "EAP-IG inputs", "EAP-IG activations", "EAP-IG sources"),
    LOGPROB_GRAD_PRUNE_ALGO.short_name,
    LOGPROB_DIFF_GRAD_PRUNE_ALGO.short_name,
)


@pytest.mark.parametrize(
    "algos",
    [QUICK_GRADIENT_ALGOS, pytest.param(LONG_GRADIENT_ALGOS, marks=pytest.mark.slow)],
    ids=["quick", "long"],
)
def test_the_report_says_how_well_gradients_find_a_known_circuit(
    algos: tuple[str, ...], tmp_path: Path
) -> None:
    config = replace(
        experiments.TRACR_REVERSE,
        algos=("GT", "Random", *algos),
        circuit_sizes=(0, 8, 462),
        out=tmp_path,
    )
    results = run_experiment(config)
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
    experiments.print_summary(results, console)
    assert "AUROC" in (text := console.export_text()) and "1.000" in text


def test_named_experiments_name_what_exists() -> None:
    for config in experiments.EXPERIMENTS.values():
        tasks, algos, metrics = experiments._named(config)
        assert tasks and algos and metrics
    reverse = experiments.TRACR_REVERSE.algos
    found = {"SEP", "STP", "CP", "TP", "EP", "MAttr", "ACDC quick", "Exact"}
    found |= {*QUICK_GRADIENT_ALGOS, *LONG_GRADIENT_ALGOS}
    assert found <= set(reverse)
    # Every algorithm is in one of the two reports.
    proportion = experiments.TRACR_XPROPORTION.algos
    left_out = {a.short_name for a in PRUNE_ALGOS} - {*reverse, *proportion}
    assert left_out == {"ACDC"}


@pytest.mark.slow
def test_the_report_on_numbers(tmp_path: Path) -> None:
    """All that do not train find the circuit, but for two.

    EAP's gradient is that of an error of nearly 0; HISP ranks nodes.
    """
    of_numbers = experiments.TRACR_XPROPORTION
    algos = tuple(name for name in of_numbers.algos if name not in TRAININGS_OF_NUMBERS)
    assert len(algos) + len(TRAININGS_OF_NUMBERS) == len(of_numbers.algos)
    results = run_experiment(replace(of_numbers, algos=algos, out=tmp_path))
    aurocs = results.summary.set_index("algorithm")["auroc"]
    finders = set(algos) - {"Act Mag", "Random", "EAP (MSE)", "HISP (MSE)"}
    assert len(finders) == 8 and (aurocs[list(finders)] == 1.0).all()
    assert aurocs["EAP (MSE)"] > 0.9
    console = Console(record=True, width=120)
    experiments.print_summary(results, console)
    text = console.export_text()
    assert "AUROC" in text and "logit diff" not in text


def test_eap_finds_the_ioi_circuit_and_chance_does_not() -> None:
    """At most a tenth of the edges recover 80 % of the logit difference."""
    task = POCKET_IOI_TASK
    model = task.model
    size = model.n_edges // 10
    percents = {}
    for name, find in (
        ("EAP", edge_attribution_patching_prune_scores),
        ("random", random_prune_scores),
    ):
        scores = find(model, task.train_loader, None)
        outs = run_circuits(model, task.test_loader, [size], scores, PatchType.TREE_PATCH)
        ((n_edges, percent),) = measure_answer_diff_percent(model, task.test_loader, outs)
        assert n_edges <= model.n_edges / 10
        percents[name] = percent
    assert percents["EAP"] >= 80
    assert percents["random"] < 20


def test_the_folder_is_named_after_all_that_matters() -> None:
    config = ExperimentConfig()
    assert config.folder == ExperimentConfig().folder
    assert config.folder != ExperimentConfig(seed=1).folder
    assert config.folder.name == ExperimentConfig(out=Path("elsewhere")).folder.name


@pytest.mark.parametrize(
    "config,message",
    [
        (ExperimentConfig(tasks=("Pocket IO",)), "no task 'Pocket IO'.*Did you mean"),
        (ExperimentConfig(algos=("ACDCC",)), "no prune algorithm 'ACDCC'.*Known: .*EAP"),
        (ExperimentConfig(metrics=("Logit",)), "no metric 'Logit'.*Known: .*Logit Diff"),
        (ExperimentConfig(metrics=()), "`metrics` is empty"),
        (ExperimentConfig(algos=("EAP", "EAP")), "`algos` names one of .* twice"),
    ],
)
def test_unknown_names(config: ExperimentConfig, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        run_experiment(config)


def test_an_error_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="ConfigError: There is no task 'Nothing'"):
        experiments.main(["--tasks", "Nothing"])


def test_help_explains_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        experiments.main(["--help"])
    text = capsys.readouterr().out
    for field in ExperimentConfig.__dataclass_fields__:
        assert f"--{field.replace('_', '-')}" in text, field
    for words in ("Keys of tasks", "what is patched in", "The folder that holds"):
        assert words in re.sub(r"[\s│]+", " ", text)


def test_the_summary_of_no_logit_differences() -> None:
    algo = experiments.find_prune_algo("EAP")
    summary = experiments.summarize([], {("Task", algo.key): 1.0}, [algo], {})
    assert summary["edges_for_80_percent"].isna().all()
    assert summary["auroc"].isna().all()
    assert t.tensor(summary["seconds"][0]) == 1.0


def test_a_reversed_test_counts_what_is_lost() -> None:
    """Without edges nothing is lost, with all edges everything."""
    algo = experiments.find_prune_algo("EAP")
    rows = [
        MeasurementRow(
            *("Task", algo.key, "Logit Diff Percent", "Resample", "Edge Patch"),
            n_edges=n_edges,
            value=percent,
        )
        for n_edges, percent in [(0, 100.0), (1, 90.0), (2, 15.0), (3, 0.0)]
    ]
    seconds = {("Task", algo.key): 1.0}
    kept = experiments.summarize(rows, seconds, [algo], {})
    lost = experiments.summarize(rows, seconds, [algo], {}, is_reversed=True)
    assert kept["edges_for_80_percent"].tolist() == [0]
    assert lost["edges_for_80_percent"].tolist() == [2]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--algos", "GT"], "'GT' needs a known circuit, and task 'Pocket IOI' has none"),
        (["--circuit-sizes", "5000"], "asks for 5000 edges, .* has 1519"),
        (["--out", "/dev/null/here"], "cannot be written to the folder /dev/null/here"),
    ],
)
@pytest.mark.parametrize("first", [[], ["robustness"]], ids=["sweep", "robustness"])
def test_errors_come_before_long_work(
    first: list[str], args: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*args: object) -> None:
        raise AssertionError("an algorithm runs")

    monkeypatch.setattr(experiments, "run_prune_algo", run)
    if first and "--circuit-sizes" in args:
        message = "leave `metrics` and `circuit_sizes` out"
    with pytest.raises(SystemExit, match=message):
        experiments.main([*first, "--tasks", "Pocket IOI", *args])

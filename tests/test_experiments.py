"""The command line."""

from __future__ import annotations

import inspect
import json
import math
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch as t
from rich.console import Console
from safetensors.torch import load, load_file

from auto_circuit import experiments
from auto_circuit.errors import ConfigError, DataError
from auto_circuit.experiments import (
    ExperimentConfig,
    TaskRun,
    mean_measurements,
    run_experiment,
    summarize,
)
from auto_circuit.metrics.prune_metrics.answer_diff_percent import (
    measure_answer_diff_percent,
)
from auto_circuit.prune import run_circuits
from auto_circuit.prune_algos.edge_attribution_patching import (
    edge_attribution_patching_prune_scores,
)
from auto_circuit.prune_algos.mask_gradient import (
    LOGIT_DIFF_GRAD_PRUNE_ALGO,
    LOGPROB_DIFF_GRAD_PRUNE_ALGO,
    LOGPROB_GRAD_PRUNE_ALGO,
)
from auto_circuit.prune_algos.prune_algos import (
    PRUNE_ALGOS,
    PruneAlgo,
    find_prune_algo,
)
from auto_circuit.prune_algos.random_edges import random_prune_scores
from auto_circuit.tasks import POCKET_IOI_TASK
from auto_circuit.types import AblationType, MeasurementRow, Measurements, PatchType
from tests.browser import check_shown
from tests.prune_algos.test_known_circuits import TRAININGS_OF_NUMBERS

REPO = Path(__file__).parents[1]
SMALL = [
    *("--tasks", "Pocket IOI"),
    *("--algos", "Random", "EAP"),
    *("--metrics", "Logit Diff Percent"),
    *("--circuit-sizes", "0", "10", "100", "1519"),
    *("--n-seeds", "2"),
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


def test_kept_positions_reach_the_tasks() -> None:
    config = ExperimentConfig(keep_positions=True)
    assert experiments._task("Pocket IOI", config).keep_positions
    assert not experiments._task("Pocket IOI", ExperimentConfig()).keep_positions


def test_prompts_are_looked_at_before_the_first_task_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second task's have no wrong answers; no model is loaded to find that out."""
    prompt = {"clean": "a", "corrupt": "b", "answers": ["c"], "wrong_answers": []}
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps({"prompts": [prompt] * 4}))
    first = experiments.find_task("Pocket IOI")
    second = replace(
        first, key="none wrong", batch_size=2, batch_count=1, _dataset_name=path
    )
    tasks = {task.key: task for task in (first, second)}
    monkeypatch.setattr(experiments, "find_task", tasks.__getitem__)
    monkeypatch.setattr(experiments, "_run_task", lambda *_: pytest.fail("it ran"))
    config = ExperimentConfig(tasks=tuple(tasks), algos=("EAP",), out=tmp_path / "out")
    with pytest.raises(DataError, match="2 of 2 prompts have no `wrong_answers`.*'EAP'"):
        experiments.run_experiment(config)
    config = replace(config, algos=("Random",))
    with pytest.raises(DataError, match="2 of 2 prompts have no .*'Logit Diff'"):
        experiments.run_experiment(config)
    kl = replace(config, metrics=("Clean KL Div",))
    assert len(experiments.check_config(kl)[0]) == 2


def score_files(folder: Path) -> dict[str, bytes]:
    (results,) = folder.iterdir()
    return {path.name: path.read_bytes() for path in (results / "scores").iterdir()}


def test_a_small_sweep_in_two_processes(tmp_path: Path) -> None:
    printed = [
        run_process(tmp_path / str(i), i, *SMALL, command=command)
        for i, command in ((1, SCRIPT), (2, MODULE))
    ]
    one, two = (score_files(tmp_path / str(i)) for i in (1, 2))
    assert sorted(one) == [f"pocket-ioi-seed-{seed}.safetensors" for seed in (42, 43)]
    assert one == two
    random = [load(one[file])["Random/blocks.0.hook_mlp_in"] for file in sorted(one)]
    assert random[0].shape == random[1].shape and not t.equal(*random)
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
    assert list(rows["n_edges"]) == [0, 10, 100, 1519] * 4
    assert list(rows["seed"]) == [42] * 8 + [43] * 8 and set(rows["n_prompts"]) == {96}
    score_file = folder / "scores" / "pocket-ioi-seed-42.safetensors"
    assert any((values != 0).any() for values in load_file(score_file).values())
    umask = os.umask(0)
    os.umask(umask)
    assert score_file.stat().st_mode & 0o777 == 0o666 & ~umask
    summary = pd.read_csv(folder / "summary.csv")
    assert list(summary["algorithm"]) == ["Random", "EAP"]
    assert list(summary["n_seeds"]) == [2, 2]
    assert list(summary["edges_for_80_percent"]) == [1519, 100]
    assert list(summary["edges_for_80_percent_plus_minus"]) == [0, 0]
    assert (summary["area_plus_minus"] > 0).all()
    assert "it/s" not in printed[0] and "%|" not in printed[0]  # no terminal, no bars


@pytest.mark.slow
def test_the_default_sweep_in_two_processes(tmp_path: Path) -> None:
    """Its scores are the same to the last bit, and a browser shows its figures."""
    folders = [tmp_path / "1", tmp_path / "2"]
    for hash_seed, folder in enumerate(folders):
        run_process(folder, hash_seed)
    one, two = map(score_files, folders)
    assert len(one) == 4 * ExperimentConfig().n_seeds
    assert one == two
    figures = sorted(folders[0].glob("*/*.html"))
    assert len(figures) == 2 * len(ExperimentConfig().metrics)
    for path in figures:
        check_shown(path)


ACCURACY = "Correct Answer Greater Than Incorrect Percent"
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
        metrics=(*experiments.TRACR_REVERSE.metrics, ACCURACY),
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
    experiments.print_summary(results, console)
    assert "AUROC" in (text := console.export_text()) and "1.000" in text
    assert "answered (%)" in text and f" {accuracies['GT']:.1f} " in text


def _plain_function(algo: PruneAlgo) -> tuple[object, dict[str, object]]:
    """What runs, and every option it runs with: equal for one algorithm by two names."""
    func = algo.func
    while isinstance(func, partial):
        func = func.func
    parameters = inspect.signature(algo.func).parameters.values()
    options = {p.name: p.default for p in parameters}
    if func is edge_attribution_patching_prune_scores:
        return _plain_function(LOGIT_DIFF_GRAD_PRUNE_ALGO)
    return func, options


def test_named_experiments_name_what_exists_and_nothing_twice(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for config in experiments.EXPERIMENTS.values():
        tasks, algos, metrics = experiments.check_config(config)
        assert tasks and algos and metrics
        functions = [(_plain_function(algo)) for algo in algos]
        assert all(functions.count(function) == 1 for function in functions)
    reverse = experiments.TRACR_REVERSE.algos
    found = {"SEP", "STP", "CP", "TP", "EP", "MAttr", "ACDC quick", "Exact"}
    found |= {*QUICK_GRADIENT_ALGOS, *LONG_GRADIENT_ALGOS}
    assert found <= set(reverse)
    # Every algorithm is in one of the two reports.
    proportion = experiments.TRACR_XPROPORTION.algos
    left_out = {a.short_name for a in PRUNE_ALGOS} - {*reverse, *proportion}
    assert left_out == {"ACDC", "EAP (alias)"}


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
        ("random", partial(random_prune_scores, seed=0)),
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
    return TaskRun("Task", seed, {}, {key: 1.0}, rows, {}, {})


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


def test_the_seed_reaches_what_is_drawn(tmp_path: Path) -> None:
    config = ExperimentConfig(
        tasks=("Pocket IOI",),
        algos=("Random", "EAP", "MAttr quick"),
        metrics=("Logit Diff Percent",),
        circuit_sizes=(0, 1519),
        n_seeds=2,
        once=("MAttr quick",),
        out=tmp_path,
    )
    algos = [find_prune_algo(name) for name in config.algos]
    assert list(config.seeds) == [42, 43]
    for seed, names in ((42, ["Random", "EAP", "MAttr quick"]), (43, ["Random", "EAP"])):
        of_seed = experiments._algos_of(algos, seed, config)
        assert [algo.short_name for algo in of_seed] == names
        seeds = [
            parameters["seed"].default
            for algo in of_seed
            for parameters in (inspect.signature(algo.func).parameters,)
            if "seed" in parameters
        ]
        assert seeds == [seed] * (len(names) - 1)


def test_a_reversed_test_counts_what_is_lost() -> None:
    """Without edges nothing is lost, with all edges everything."""
    runs = [run_of([(0, 100.0), (1, 90.0), (2, 15.0), (3, 0.0)])]
    kept = summarize(runs, ALGOS)
    lost = summarize(runs, ALGOS, is_reversed=True)
    assert kept["edges_for_80_percent"].isna().all()  # not from anywhere on
    assert lost["edges_for_80_percent"].tolist() == [2]


def test_interrupted_work_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second run is interrupted: the first one's results are written."""
    scores, n_runs = experiments._timed_scores, []

    def interrupted(*args: Any) -> Any:
        n_runs.append(1)
        if len(n_runs) > 1:
            raise KeyboardInterrupt
        return scores(*args)

    monkeypatch.setattr(experiments, "_timed_scores", interrupted)
    with pytest.raises(SystemExit) as stop:
        args = ["--algos", "Random", "--circuit-sizes", "0", "--out", str(tmp_path)]
        experiments.main([*SMALL, *args])
    assert stop.value.code == 130
    error = capsys.readouterr().err
    (folder,) = tmp_path.iterdir()
    assert f"Interrupted. 1 of 2 runs were finished: {folder}" in error
    assert folder.name.endswith("-interrupted")
    assert set(pd.read_parquet(folder / "measurements.parquet")["seed"]) == {42}


@pytest.mark.parametrize("first", [[], ["robustness"]], ids=["sweep", "robustness"])
def test_an_early_interrupt_is_one_line(
    first: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(experiments, "check_config", interrupted)
    with pytest.raises(SystemExit) as stop:
        experiments.main(first)
    assert stop.value.code == 130
    assert capsys.readouterr().err == "Interrupted.\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--seed", "x"], "Value error Error parsing --seed: .*'x'"),
        (["--sed", "3"], "Unrecognized options: --sed, 3 .*--seed"),
        (["--edge-counts", "SOME"], "SOME"),
    ],
)
def test_a_command_line_that_cannot_be_read(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        experiments.main(args)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(message, error)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--algos", "GT"], "'GT' needs a known circuit, and task 'Pocket IOI' has none"),
        (["--circuit-sizes", "5000"], "asks for 5000 edges, .* has 1519"),
        (["--out", "/dev/null/here"], "cannot be written to the folder '/dev/null/here'"),
        (["--out", "a\0b"], r"cannot be written to the folder 'a\\x00b' \(embedded null"),
        (["--name", "../x"], "`name` is '../x'"),
        (["--name", "x" * 300], "`name` is 'xxx.*1 to 200 bytes"),
        (["--name", "a\0b"], "`name` is "),
        (["--name", ""], "`name` is ''"),
        (["--seed", "-1"], "`seed` is -1; expected at least 0"),
        (["--seed", "1" + "0" * 30], "`seed` is 10{30}; expected at least 0 and at most"),
        (["--n-seeds", "0"], "`n_seeds` is 0; expected at least 1 and at most 31"),
        (
            ["--circuit-shares", "1.5"],
            "`circuit_shares` is 1.5; expected a finite number",
        ),
        (["--circuit-shares", "nan"], "`circuit_shares` is nan"),
        (["--circuit-shares", "-0.1"], "`circuit_shares` is -0.1"),
        (["--circuit-sizes", "-1"], "`circuit_sizes` is -1"),
        (["--device", "x"], "`device` is 'x', which cannot be used"),
        (["--device", "meta"], "`device` is 'meta', which cannot be used"),
        (["--algos", "EAP", "Edge Answer Logit Diff Gradient At Clean"], "in two ways"),
        (["--once", "EAQ"], "no prune algorithm 'EAQ'.*Did you mean"),
    ],
)
@pytest.mark.parametrize("first", [[], ["robustness"]], ids=["sweep", "robustness"])
def test_errors_come_before_long_work(
    first: list[str],
    args: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    def run(*args: object) -> None:
        raise AssertionError("an algorithm runs")

    monkeypatch.setattr(experiments, "run_prune_algo", run)
    if "--out" not in args:
        args = [*args, "--out", str(tmp_path)]
    if first and "5000" in args:
        message = "leave `metrics` and `circuit_sizes` out"
    with pytest.raises(SystemExit, match=message):
        experiments.main([*first, "--tasks", "Pocket IOI", *args])


def test_a_file_where_the_results_go(tmp_path: Path) -> None:
    config = ExperimentConfig(out=tmp_path)
    config.folder.write_text("mine")
    with pytest.raises(ConfigError, match="there is a file of that name"):
        experiments.check_config(config)
    assert config.folder.read_text() == "mine"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a full device")
def test_a_full_disk_is_noticed_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        experiments.tempfile, "TemporaryFile", lambda dir: open("/dev/full", "wb")
    )
    with pytest.raises(ConfigError, match="cannot be written.*No space left"):
        experiments.check_config(ExperimentConfig(out=tmp_path))


def test_a_missing_prompt_file_is_noticed_before_the_first_task_runs(
    tmp_path: Path,
) -> None:
    config = ExperimentConfig(
        tasks=("Pocket IOI", "Docstring Token Circuit"), out=tmp_path
    )
    with pytest.raises(DataError, match="needs the prompt file"):
        run_experiment(config)

"""The command line."""

from __future__ import annotations

import inspect
import json
import os
import re
import signal
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
from safetensors.torch import load, load_file

from auto_circuit import experiments, runner, sweep, sweep_cells
from auto_circuit.metrics.prune_metrics.prune_metrics import PRUNE_METRICS
from auto_circuit.named_experiments import DESCRIPTIONS, EXPERIMENTS, ROBUSTNESS
from auto_circuit.prune_algos.edge_attribution_patching import (
    edge_attribution_patching_prune_scores,
)
from auto_circuit.prune_algos.mask_gradient import (
    LOGIT_DIFF_GRAD_PRUNE_ALGO,
)
from auto_circuit.prune_algos.prune_algos import (
    PRUNE_ALGOS,
    PruneAlgo,
)
from auto_circuit.sweep_config import ExperimentConfig, RunOptions, check_config
from auto_circuit.tasks import (
    POCKET_GEMMA_TASKS,
    POCKET_LLAMA_TASKS,
    POCKET_TASKS,
    TASKS,
)
from tests.browser import check_shown
from tests.report_in_browser import drive
from tests.test_pocket_model import OF_SIZES, SIZES
from tests.test_reports import LONG_GRADIENT_ALGOS, QUICK_GRADIENT_ALGOS

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


def score_files(folder: Path) -> dict[str, bytes]:
    (results,) = folder.glob("pocket-*")
    return {path.name: path.read_bytes() for path in (results / "scores").iterdir()}


@pytest.mark.slow
def test_a_small_sweep_in_two_processes(tmp_path: Path) -> None:
    printed = run_process(tmp_path / "1", 1, *SMALL)
    run_process(tmp_path / "2", 2, *SMALL, "--n-seeds", "1", command=MODULE)
    one, two = (score_files(tmp_path / str(i)) for i in (1, 2))
    files = [f"pocket-ioi-seed-{seed}.safetensors" for seed in (42, 43)]
    assert sorted(one) == files and list(two) == files[:1]
    assert one[files[0]] == two[files[0]]
    random = [load(one[file])["Random/blocks.0.hook_mlp_in"] for file in sorted(one)]
    assert random[0].shape == random[1].shape and not t.equal(*random)
    assert "Pocket IOI" in printed and "EAP" in printed
    cells, folder = sorted((tmp_path / "1").iterdir())
    assert re.fullmatch(r"pocket-[0-9a-f]{8}", folder.name)
    assert sorted(path.name for path in cells.iterdir()) == [
        *("examples", "measurements", "scores", "store.json")
    ]
    assert {path.name for path in folder.iterdir()} == {
        "circuits",
        "comparisons.csv",
        "config.json",
        "examples",
        "logit-diff-percent-area.html",
        "logit-diff-percent.html",
        "measurements.parquet",
        "origin.json",
        "plotly.min.js",
        "report.html",
        "report.json",
        "rocs.json",
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
    assert "it/s" not in printed and "%|" not in printed  # no terminal, no bars


OTHER_MODELS = {"Llama": POCKET_LLAMA_TASKS, "Gemma": POCKET_GEMMA_TASKS}
"""Of the pocket models those that are not the default sweep's own."""
WIDTHS = {"": (1400, 390), "Llama": (1400,), "Gemma": (390,)}
"""In which windows the report is driven."""

TABLE = ("EAP", "EAP-IG inputs", "STP quick", "MAttr quick")
DOCUMENTED_SIZES = {
    key: [int(size) for size in sizes.split("|")[:-1]]
    for key, _, _, sizes in SIZES.findall(OF_SIZES)
}
"""{task: of the algorithms of `TABLE`, from how many edges on circuits do 80 %}."""
NODES = {
    "Pocket IOI": "A1.2",
    "Pocket Greaterthan": "MLP 0",
    "Pocket Llama Induction": "A1.0",
    "Pocket Gemma Greaterthan": "MLP 0",
}
"""{task: a node} to be looked at in the report."""


@pytest.mark.slow
@pytest.mark.parametrize("model", ["", *OTHER_MODELS])
def test_the_default_sweep_in_two_processes(
    model: str, tmp_path: Path, browser: Any, explorer_packages: Path
) -> None:
    """Another process finds the same scores to the last bit, and a browser shows its figures.

    The other one repeats one task's scores alone, of one seed. Gradients beat chance, and
    training beats gradients, everywhere. All that the report lets its reader do is done, in a
    wide window and in a narrow one. The tasks of the other models have to be named, and one
    seed is enough.
    """
    keys = [task.key for task in OTHER_MODELS.get(model, POCKET_TASKS)]
    named = ["--n-seeds", "1", "--tasks", *keys] if model else []
    n_seeds = 1 if model else ExperimentConfig().n_seeds
    whole, repeated = tmp_path / "1", tmp_path / "2"
    run_process(whole, 0, *named)
    one_task = ["--tasks", keys[0], "--n-seeds", "1", "--circuit-sizes", "0"]
    run_process(repeated, 1, *one_task)
    one, two = map(score_files, (whole, repeated))
    assert len(one) == len(keys) * n_seeds
    assert len(two) == 1 and two.items() <= one.items()
    (summary,) = whole.glob("*/summary.csv")
    rows = pd.read_csv(summary)
    assert set(rows["algorithm"]) == {*ExperimentConfig().algos} - {"GT"}
    areas = rows.pivot(index="task", columns="algorithm", values="area")
    assert set(areas.index) == {*keys}
    sizes = rows.pivot(index="task", columns="algorithm", values="edges_for_80_percent")
    for key, documented in DOCUMENTED_SIZES.items():
        if key in keys:  # sizes are tested in steps of 1.4 to 2
            found = sizes.loc[key, [*TABLE]].tolist()
            assert found == pytest.approx(documented, rel=0.5), key
    assert (areas["MAttr quick"] > areas[["EAP", "EAP-IG inputs"]].max(axis=1)).all()
    assert (areas["EAP-IG inputs"] > areas["EAP"]).all()
    for name in TABLE:
        assert (areas[name] > areas[["Random", "Act Mag"]].max(axis=1)).all()
    figures = sorted({*whole.glob("*/*.html")} - {*whole.glob("*/report.html")})
    assert len(figures) == 2 * len(ExperimentConfig().metrics)
    for path in figures:
        check_shown(path)
    (report,) = whole.glob("*/report.html")
    text = report.read_text()
    assert all(f"On {key}, " in text for key in keys)  # a verdict on each
    nodes = {key: node for key, node in NODES.items() if key in keys}
    for width in WIDTHS[model]:
        drive(browser, report, width, explorer_packages, nodes)


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
    for config in EXPERIMENTS.values():
        tasks, algos, metrics = check_config(config)
        assert tasks and algos and metrics
        functions = [(_plain_function(algo)) for algo in algos]
        assert all(functions.count(function) == 1 for function in functions)
    reverse = EXPERIMENTS["tracr-reverse"].algos
    found = {"SEP", "STP", "CP", "TP", "EP", "MAttr", "ACDC quick", "Exact"}
    found |= {*QUICK_GRADIENT_ALGOS, *LONG_GRADIENT_ALGOS}
    assert found <= set(reverse)
    # Every algorithm is in one of the two reports.
    proportion = EXPERIMENTS["tracr-xproportion"].algos
    left_out = {a.short_name for a in PRUNE_ALGOS} - {*reverse, *proportion}
    assert left_out == {"ACDC", "EAP (alias)"}


def test_an_error_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="ConfigError: There is no task 'Nothing'"):
        experiments.main(["--tasks", "Nothing"])


def test_help_explains_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        experiments.main(["--help"])
    text = capsys.readouterr().out
    for field in ExperimentConfig.__dataclass_fields__:
        assert f"--{field.replace('_', '-')}" in text, field
    for name in (
        *EXPERIMENTS,
        *(task.key for task in TASKS),
        *(algo.short_name for algo in PRUNE_ALGOS),
        *(metric.key for metric in PRUNE_METRICS),
    ):
        assert name in text, name
    for words in ("Keys of tasks", "what is patched in", "The folder that holds"):
        assert words in re.sub(r"[\s│]+", " ", text)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(
    ("sent", "code", "word"),
    [
        (signal.SIGINT, 130, "Interrupted"),
        pytest.param(signal.SIGTERM, 143, "Terminated", marks=pytest.mark.slow),
    ],
)
def test_interrupted_work_is_not_lost(
    sent: signal.Signals,
    code: int,
    word: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In the fourth cell; the same command computes what is left, and nothing else."""
    find_scores = sweep_cells.find_scores
    n_runs: list[int] = []

    def interrupted(*args: Any) -> Any:
        n_runs.append(1)
        if len(n_runs) == 2:
            os.kill(os.getpid(), sent)
        return find_scores(*args)

    monkeypatch.setattr(sweep_cells, "find_scores", interrupted)
    args = [*SMALL, "--algos", "Random", "--circuit-sizes", "0", "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as stop:
        experiments.main(args)
    assert stop.value.code == code
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert last_line == (
        f"{word}. 3 of 5 cells are finished, and kept in {tmp_path}/cells: the same command "
        "goes on from there."
    )
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    experiments.main(args)
    assert len(n_runs) == 3
    assert "3 of 5 cells were stored" in capsys.readouterr().out
    (folder,) = tmp_path.glob("pocket-*")
    assert set(pd.read_parquet(folder / "measurements.parquet")["seed"]) == {42, 43}


@pytest.mark.parametrize("first", [[], ["robustness"]], ids=["sweep", "robustness"])
def test_an_early_interrupt_is_one_line(
    first: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "check_config", interrupted)
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
        (["robust"], "no experiment 'robust'. Did you mean 'robustness'"),
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
        (["--algos", "GT"], "'GT' needs true edges, and task 'Pocket IOI' has none"),
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

    monkeypatch.setattr(sweep, "run_prune_algo", run)
    if "--out" not in args:
        args = [*args, "--out", str(tmp_path)]
    if first and "5000" in args:
        message = "leave `metrics` and `circuit_sizes` out"
    with pytest.raises(SystemExit, match=message):
        experiments.main([*first, "--tasks", "Pocket IOI", *args])


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_each_experiment_has_a_help_of_its_own(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        experiments.main([name, "--help"])
    assert not stop.value.code
    text = " ".join(capsys.readouterr().out.split())
    first, *_ = DESCRIPTIONS[name].split(":")
    assert f"experiments.py {name}" in text or "[-h]" in text
    assert text.index(" ".join(first.split())) < text.index("--ablation")
    assert EXPERIMENTS[name].name in text and "'EAP-IG inputs'" in text


def test_options_change_the_named_experiment() -> None:
    name, config, _ = experiments.parse(["robustness", "--algos", "IEG"])
    assert (name, config) == ("robustness", replace(ROBUSTNESS, algos=("IEG",)))
    assert experiments.parse([]) == ("sweep", ExperimentConfig(), RunOptions())
    assert experiments.parse(["--seed", "3"])[1] == ExperimentConfig(seed=3)


def test_names_that_experiments_had_are_still_there() -> None:
    for name in (
        *("ExperimentConfig", "ExperimentResults", "TaskRun", "run_experiment"),
        *("check_config", "summarize", "print_summary", "write_results"),
        *("mean_measurements", "run_robustness", "print_robustness", "EXPERIMENTS"),
        *("ROBUSTNESS", "TRACR_REVERSE", "TRACR_XPROPORTION", "main", "parse"),
    ):
        assert getattr(experiments, name) is not None
    with pytest.raises(AttributeError, match="nothing_like_it"):
        experiments.nothing_like_it  # noqa: B018

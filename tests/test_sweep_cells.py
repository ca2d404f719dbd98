"""Sweeps that survive: which cells there are, what is computed again, and what is not."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pandas as pd
import pytest
import torch as t
from safetensors.torch import load_file, save_file

from auto_circuit import experiments, files, sweep_cells, sweep_config
from auto_circuit.cells import Worker
from auto_circuit.errors import ConfigError, ModelError
from auto_circuit.prune_algos.prune_algos import PruneAlgo, find_prune_algo
from auto_circuit.reports import ChangedReportWarning
from auto_circuit.runner import run_experiment
from auto_circuit.store import DamagedCellWarning
from auto_circuit.summary import ExperimentResults
from auto_circuit.sweep import run_sweep
from auto_circuit.sweep_config import ExperimentConfig, Plan, RunOptions, check_config
from auto_circuit.tasks import POCKET_IOI_TASK, POCKET_MODEL, Task, find_task
from auto_circuit.types import AblationType, PatchType
from tests.stored_cells import FORKED
from tests.stored_cells import computed as computed

SMALL = ExperimentConfig(
    tasks=("Pocket IOI",),
    algos=("Random", "EAP"),
    metrics=("Logit Diff Percent",),
    circuit_sizes=(0, 100, 1519),
    n_seeds=1,
)


EXAMPLES = "Pocket IOI, seed 42: examples"


def label(algo: str, kind: str, seed: int = 42, task: str = "Pocket IOI") -> str:
    return f"{task}, seed {seed}, {algo}: {kind}"


# ------------------------------------------------------------------------------------ keys


def keys(config: ExperimentConfig, task: Task | None = None) -> list[str]:
    """The keys of all cells of a sweep."""
    plan = check_config(config)
    if task is not None:
        plan = plan._replace(tasks=[task])
    cells = sweep_cells.sweep_cells(plan, config)
    return [work.cell.key for cell in cells for work in cell.works]


def in_folder(task: Task, folder: Path) -> Task:
    """The task with a copy of its model."""
    shutil.copytree(POCKET_MODEL, folder)
    return replace(task, _model_def=folder)


def with_another_weight(task: Task, folder: Path) -> Task:
    path = folder / "model.safetensors"
    weights = load_file(path)
    next(iter(weights.values())).view(-1)[0] += 1e-3
    save_file(weights, path, {"format": "pt"})
    return task


def test_a_key_is_made_of_weights_and_prompts_by_what_is_in_them(tmp_path: Path) -> None:
    config = replace(SMALL, out=tmp_path / "results")
    (task,) = check_config(config).tasks
    copied = in_folder(task, tmp_path / "model")
    assert keys(config, copied) == keys(config, task)
    prompts = tmp_path / "prompts.json"
    prompts.write_bytes(task.prompt_path.read_bytes())
    same = replace(task, key="another name", device="cpu", _dataset_name=prompts)
    assert keys(config, same) == keys(config, task)
    prompts.write_text(prompts.read_text() + " ")
    assert not {*keys(config, same)} & {*keys(config, task)}
    changed = with_another_weight(copied, tmp_path / "model")
    assert not {*keys(config, changed)} & {*keys(config, task)}


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": t.float64},
        {"ungroup": True},
        {"keep_positions": True},
        {"batch_size": 8},
        {"slice_output": "not_first_seq"},
        {"factorized": False},
        {"prepend_bos": True},
    ],
    ids=str,
)
def test_a_tasks_fields_change_all_keys(change: dict[str, Any], tmp_path: Path) -> None:
    config = replace(SMALL, out=tmp_path)
    task = replace(find_task("Pocket IOI"), **change)
    assert not {*keys(config, task)} & {*keys(config)}


@pytest.mark.parametrize(
    ("change", "n_same"),
    [
        ({"seed": 43}, 0),
        ({"metrics": ("Logit Diff Percent", "Logit Diff")}, 2),
        ({"ablation": AblationType.ZERO}, 2),
        ({"patch_type": PatchType.EDGE_PATCH}, 2),
        ({"reverse_clean_corrupt": True}, 2),
        ({"circuit_sizes": (0, 100)}, 2),
        ({"mean_of_ratios": True}, 2),
        ({"ungroup": True}, 0),
        ({"algos": ("EAP", "Act Mag")}, 2),
        ({"n_seeds": 2}, 4),
        ({"name": "another", "device": "cpu"}, 4),
    ],
    ids=str,
)
def test_cells_of_two_sweeps_are_the_same_if_nothing_changes_their_numbers(
    change: dict[str, Any], n_same: int, tmp_path: Path
) -> None:
    config = replace(SMALL, out=tmp_path)
    assert len({*keys(config)} & {*keys(replace(config, **change))}) == n_same


def test_an_algorithms_options_change_its_keys(tmp_path: Path) -> None:
    config = replace(SMALL, out=tmp_path)
    plan = check_config(config)
    eap = find_prune_algo("EAP")
    own = [
        PruneAlgo("EAP", "EAP", lambda model, loader, edges, n=n: {"a": t.zeros(n)})
        for n in (1, 2)
    ]
    found = [
        sweep_cells.sweep_cells(Plan(plan.tasks, [algo], plan.metrics), config)[0]
        for algo in (eap, replace(eap, key="mine", name="Mine"), *own)
    ]
    of = [one.scores.cell.key for one in found]
    assert of[0] == of[1] and len({*of}) == 3


class Callable_:
    """Nobody knows what it holds."""

    def __call__(self, *args: object) -> dict[str, t.Tensor]:
        return {}


def test_an_algorithm_that_cannot_be_told_apart_is_refused(tmp_path: Path) -> None:
    plan = check_config(replace(SMALL, out=tmp_path))
    plan = plan._replace(algos=[PruneAlgo("Mine", "Mine", Callable_())])
    with pytest.raises(ConfigError, match="'Mine': .*cannot be told apart"):
        sweep_cells.sweep_cells(plan, SMALL)


# ------------------------------------------------------------------- what is computed again


def of_run(results: ExperimentResults) -> dict[str, Any]:
    (run,) = results.runs
    return {"measured": run.measured, "seconds": run.seconds}


def test_nothing_is_computed_twice(computed: list[str], tmp_path: Path) -> None:
    config = replace(SMALL, out=tmp_path)
    first = run_experiment(config)
    assert len(computed) == 5
    before = {path: path.stat() for path in tmp_path.rglob("*") if path.is_file()}
    second = run_experiment(config)
    assert len(computed) == 5
    after = {path: path.stat() for path in tmp_path.rglob("*") if path.is_file()}
    assert {k: v.st_mtime_ns for k, v in after.items()} == {
        k: v.st_mtime_ns for k, v in before.items()
    }
    assert of_run(second) == of_run(first)
    for algo, scores in first.runs[0].scores.items():
        again = second.runs[0].scores[algo]
        assert list(again) == list(scores)
        assert all(t.equal(again[name], scores[name]) for name in scores)
    (without_store,) = run_sweep(config)
    assert without_store.measured == first.runs[0].measured
    larger = replace(config, algos=("EAP", "Act Mag"))
    run_experiment(larger)
    assert computed[5:] == [label("Act Mag", "scores"), label("Act Mag", "measurements")]


def test_force_and_only(computed: list[str], tmp_path: Path) -> None:
    config = replace(SMALL, out=tmp_path)
    results = run_experiment(config, RunOptions(only=("EAP",)))
    of_eap = [label("EAP", "scores"), label("EAP", "measurements")]
    assert computed == [EXAMPLES, *of_eap] and list(results.summary["algorithm"]) == [
        "EAP"
    ]
    run_experiment(config, RunOptions(only=("Pocket IOI", "Random")))
    assert len(computed) == 5 and not results.failed
    forced = run_experiment(config, RunOptions(only=("EAP",), force=True))
    assert computed[5:] == [EXAMPLES, *of_eap]
    assert list(forced.summary["algorithm"]) == ["Random", "EAP"]
    run_experiment(config, RunOptions(force=True))
    assert len(computed) == 13
    with pytest.raises(ConfigError, match="`only` names 'EAPP'.*Did you mean 'EAP'"):
        run_experiment(config, RunOptions(only=("EAPP",)))


def test_the_others_go_on(
    computed: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A training diverges; the exit status and the last line say so."""
    find_scores = sweep_cells.find_scores

    def diverging(task: Task, algo: PruneAlgo) -> Any:
        if algo.short_name == "EAP":
            raise ArithmeticError("the loss is infinite")
        return find_scores(task, algo)

    args = ["--tasks", "Pocket IOI", "--algos", "EAP", "Random", "--n-seeds", "1"]
    args += ["--metrics", "Logit Diff Percent", "--circuit-sizes", "0", "1519"]
    args += ["--out", str(tmp_path)]
    with monkeypatch.context() as patched:
        patched.setattr(sweep_cells, "find_scores", diverging)
        with pytest.raises(SystemExit) as stop:
            experiments.main(args)
    assert stop.value.code == 1
    *_, of_scores, of_measurements, last = capsys.readouterr().out.splitlines()
    assert (
        of_scores
        == f"Failed: {label('EAP', 'scores')}: ArithmeticError: the loss is infinite"
    )
    assert "it needs 'Pocket IOI, seed 42, EAP: scores'" in of_measurements
    assert last.startswith("2 of 5 cells failed; the same command computes these again")
    (folder,) = tmp_path.glob("pocket-*")
    assert len(json.loads((folder / "failed.json").read_text())) == 2
    assert list(pd.read_csv(folder / "summary.csv")["algorithm"]) == ["Random"]
    experiments.main(args)
    assert len(computed) == 6 and computed[4:] == [
        label("EAP", "scores"),
        label("EAP", "measurements"),
    ]
    assert not (folder / "failed.json").exists()


def test_a_model_that_cannot_be_had(
    computed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its cells fail, after one try; the other task's do not. Alone, it is an error at once."""
    broken = tmp_path / "model"
    broken.mkdir()
    first = find_task("Pocket IOI")
    tasks = {"Gone": replace(first, key="Gone", _model_def=broken), "Pocket IOI": first}
    monkeypatch.setattr(sweep_config, "find_task", tasks.__getitem__)
    loads: list[int] = []
    of_seed = sweep_cells.OpenTask.of_seed

    def counted(self: Any, seed: int) -> Task:
        loads.append(self._task.key == "Gone")
        return of_seed(self, seed)

    monkeypatch.setattr(sweep_cells.OpenTask, "of_seed", counted)
    config = replace(SMALL, tasks=("Gone", "Pocket IOI"), out=tmp_path / "out")
    results = run_experiment(config)
    assert [run.task for run in results.runs] == ["Pocket IOI"]
    assert len(results.failed) == 5 and sum(loads) == 1
    assert str(broken) in results.failed[label("Random", "scores", task="Gone")]
    with pytest.raises(ModelError, match=str(broken)):
        run_experiment(replace(config, tasks=("Gone",)))


# --------------------------------------------------------------------- damage, and no room


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of a small sweep."""
    folder = tmp_path_factory.mktemp("whole")
    run_experiment(replace(SMALL, out=folder))
    return folder


def flip_a_bit(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda content: content[: len(content) // 2],
    "emptied": lambda content: b"",
    "bit": flip_a_bit,
    "foreign": lambda content: b'{"not": "ours"}',
}


def each_kind_and_damage(*kinds: str) -> list[Any]:
    """All pairs; the fast ones have each kind, and each damage, at least once."""
    return [
        pytest.param(
            *(kind, damage), marks=[] if (i - j) % len(DAMAGES) == 0 else pytest.mark.slow
        )
        for i, kind in enumerate(kinds)
        for j, damage in enumerate(DAMAGES)
    ]


def damaged(kind: str, damage: str, folder: Path) -> tuple[Path, bytes]:
    """Damage a file of a kind: where it is, and what was in it."""
    path = sorted(folder.glob(kind))[0]
    before = path.read_bytes()
    path.write_bytes(DAMAGES[damage](before))
    return path, before


@pytest.mark.parametrize(
    ("kind", "damage"),
    each_kind_and_damage(
        *("scores/*.json", "scores/*.safetensors"),
        *("measurements/*.json", "measurements/*.parquet", "examples/*.json"),
    ),
)
def test_damaged_cells_are_named_and_computed_again(
    kind: str, damage: str, whole: Path, computed: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    path, before = damaged(kind, damage, out / "cells")
    own = out / "cells" / "scores" / "mine.txt"
    own.write_text("mine")
    with pytest.warns(DamagedCellWarning, match=path.name[:40]):
        results = run_experiment(replace(SMALL, out=out))
    assert len(computed) == 1 and not results.failed
    assert path.suffix == ".json" or path.read_bytes() == before
    assert own.read_text() == "mine"
    run_experiment(replace(SMALL, out=out))
    assert len(computed) == 1


@pytest.mark.parametrize(
    ("kind", "damage"),
    each_kind_and_damage(
        *("config.json", "scores/*.safetensors", "*.parquet", "summary.csv"),
        *("logit-diff-percent.html", "circuits/*/*.json", "examples/*.json"),
    ),
)
def test_damaged_reports_are_named_and_written_again(
    kind: str, damage: str, whole: Path, computed: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    folder = replace(SMALL, out=out).folder
    path, before = damaged(kind, damage, folder)
    (folder / "circuits" / "notes.txt").write_text("mine")
    with pytest.warns(ChangedReportWarning, match=path.name):
        run_experiment(replace(SMALL, out=out))
    assert not computed and (folder / "circuits" / "notes.txt").read_text() == "mine"
    if path.suffix != ".html":  # figures have ids of their own
        assert path.read_bytes() == before


def test_a_full_disk_keeps_what_is_finished(
    tmp_path: Path,
    computed: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """After the first cell, nothing fits any more."""
    out = tmp_path / "out"
    replaced = os.replace

    def full(old: Path, new: Path) -> None:
        if "measurements" in str(new):
            raise OSError(28, "No space left on device")
        replaced(old, new)

    args = ["--tasks", "Pocket IOI", "--algos", "Random", "--n-seeds", "1"]
    args += ["--circuit-sizes", "0", "--out", str(out)]
    with monkeypatch.context() as patched:
        patched.setattr(files.os, "replace", full)
        with pytest.raises(SystemExit, match="^FileError: Cannot write .*No space left"):
            experiments.main(args)
    assert not list(out.rglob(".partial*"))
    (left,) = out.glob("pocket-*/*")
    assert "still growing" in left.read_text()
    experiments.main(args)
    kinds = ["examples", "scores", "measurements", "measurements"]
    assert [one.split(": ")[1] for one in computed] == kinds


def test_too_little_room_is_an_error_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=2**20)
    monkeypatch.setattr(sweep_config.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(ConfigError, match="Only 1.0 MiB are free.*Make room"):
        run_experiment(replace(SMALL, out=tmp_path))


def test_results_of_another_version(tmp_path: Path) -> None:
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / "store.json").write_text('{"auto_circuit_store": 99}')
    with pytest.raises(
        ConfigError, match="results of version 99.*Write to another folder"
    ):
        run_experiment(replace(SMALL, out=tmp_path))


# ------------------------------------------------------------------------ many processes


@pytest.fixture(scope="module")
def loaded() -> Iterator[Task]:
    yield POCKET_IOI_TASK
    POCKET_IOI_TASK.free()


TWELVE = replace(SMALL, algos=("Random", "EAP"), circuit_sizes=(0, 1519), n_seeds=3)


def run_and_count(config: ExperimentConfig, counts: Path) -> None:
    """Run a sweep; a line in a file for each cell that was written."""
    result = Worker.result

    def counted(self: Worker, work: Any, needed: Any) -> Any:
        found = result(self, work, needed)
        with counts.open("a") as file:
            file.write(f"{work.cell.label}\n")
        return found

    Worker.result = counted  # type: ignore[method-assign]
    run_experiment(config)


def data_files(out: Path) -> dict[str, bytes]:
    found = [*out.glob("cells/*/*.safetensors"), *out.glob("cells/*/*.parquet")]
    found += [*out.glob("pocket-*/scores/*"), *out.glob("pocket-*/*.parquet")]
    return {str(path.relative_to(out)): path.read_bytes() for path in found}


@pytest.mark.slow
def test_a_sweep_that_is_killed_again_and_again_loses_nothing(tmp_path: Path) -> None:
    """At 20 random moments; it ends with the same files as one that is left alone."""
    whole, out, counts = tmp_path / "whole", tmp_path / "out", tmp_path / "counts"
    t.set_num_threads(1)
    run_experiment(replace(TWELVE, out=whole))
    rng, n_kills = random.Random(0), 0
    finished: set[str] = set()
    while n_kills < 20:
        process = FORKED.Process(
            target=run_and_count, args=(replace(TWELVE, out=out), counts)
        )
        process.start()
        process.join(rng.uniform(0.05, 2.0))
        if process.exitcode == 0:  # it came to its end too early: begin again
            assert data_files(out) == data_files(whole)
            shutil.rmtree(out)
            counts.unlink()
            finished = set()
            continue
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        n_kills += 1
        now = {path.name for path in out.glob("cells/*/*.json")}
        assert finished <= now
        finished = now
    run_and_count(replace(TWELVE, out=out), counts)
    assert data_files(out) == data_files(whole)
    assert not list(out.rglob(".partial*"))


@pytest.mark.slow
def test_three_processes_share_a_sweep(tmp_path: Path, loaded: Task) -> None:
    loaded.model  # loaded once, before the processes are forked  # noqa: B018
    config, counts = replace(TWELVE, out=tmp_path / "out"), tmp_path / "counts"
    processes = [
        FORKED.Process(target=run_and_count, args=(config, counts)) for _ in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        assert process.exitcode == 0
    assert len(counts.read_text().splitlines()) == 13  # one is the examples
    assert len(pd.read_parquet(config.folder / "measurements.parquet")) == 12


# ---------------------------------------------------------------------- other addresses


@pytest.mark.parametrize("protocol", ["memory", "file"])
def test_results_go_to_any_address(
    protocol: str, whole: Path, computed: list[str], tmp_path: Path
) -> None:
    address = f"{protocol}://{tmp_path}/out"
    config = replace(SMALL, out=address)
    run_experiment(config)
    run_experiment(config)
    assert len(computed) == 5
    files, root = fsspec.core.url_to_fs(address)
    found = {path.removeprefix(root): files.cat_file(path) for path in files.find(root)}
    expected = {f"/{name}": content for name, content in data_files(whole).items()}
    assert len(expected) == 6 and expected.items() <= found.items()
    names = {path.relative_to(whole).as_posix() for path in whole.rglob("*.*")}
    assert {name.strip("/") for name in found} >= {
        n for n in names if "/" in n and "html" in n
    }


def test_an_address_of_no_kind() -> None:
    with pytest.raises(ConfigError, match="can be no results at 'nothing://x"):
        run_experiment(replace(SMALL, out="nothing://x"))

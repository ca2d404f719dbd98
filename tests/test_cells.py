"""No finished cell is lost or computed twice: killed, failing and rival processes."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pandas
import pytest
import torch as t

from auto_circuit.cells import Choice, Outcome, Work, run_cells
from auto_circuit.store import Cell, CellResult, Store, open_store

FORKED = multiprocessing.get_context("fork")


def counted(folder: Path, name: str, seconds: float = 0.0) -> Callable[..., CellResult]:
    """Computes something from what it needs, and leaves a line each time that it ends."""

    def compute(*needed: CellResult) -> CellResult:
        time.sleep(seconds)
        total = sum(result.tensors["x"].sum() for result in needed)
        rows = pandas.DataFrame([{"name": name, "total": float(total)}])
        with (folder / "computed.txt").open("a") as file:
            file.write(f"{name}\n")
        return CellResult({"x": t.arange(4.0) + len(name)}, rows, {"total": float(total)})

    return compute


def sweep(folder: Path, n: int = 6, seconds: float = 0.0) -> list[Work]:
    """n cells of scores, and one of measurements for each."""
    scores = [Cell("scores", {"seed": i}, f"scores {i}") for i in range(n)]
    found = [Cell("rows", {"of": cell.key}, f"rows {i}") for i, cell in enumerate(scores)]
    return [
        *(Work(cell, counted(folder, cell.label, seconds)) for cell in scores),
        *(
            Work(cell, counted(folder, cell.label, seconds), (needed,))
            for cell, needed in zip(found, scores, strict=True)
        ),
    ]


def computed(folder: Path) -> list[str]:
    path = folder / "computed.txt"
    return path.read_text().splitlines() if path.exists() else []


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def run(folder: Path, works: list[Work], choice: Choice | None = None) -> list[Outcome]:
    return list(run_cells(works, open_store(folder / "store"), choice))


def test_the_second_run_computes_nothing(tmp_path: Path) -> None:
    works = sweep(tmp_path)
    first = run(tmp_path, works)
    assert [outcome.cell for outcome in first] == [work.cell for work in works]
    assert all(outcome.is_new for outcome in first)
    before = files(tmp_path / "store")
    second = run(tmp_path, works)
    assert not any(outcome.is_new for outcome in second)
    assert [o.result.numbers for o in second if o.result] == [
        o.result.numbers for o in first if o.result
    ]
    assert files(tmp_path / "store") == before and len(computed(tmp_path)) == 12
    choice = Choice(only=lambda cell: cell == works[3].cell, force=True)
    forced = run(tmp_path, works, choice)
    assert [o.cell for o in forced if o.is_new] == [works[3].cell]
    assert all(outcome.result is not None for outcome in forced)


def test_a_cell_of_two_sweeps_is_computed_once(tmp_path: Path) -> None:
    run(tmp_path, sweep(tmp_path, n=3))
    run(tmp_path, sweep(tmp_path, n=5))
    assert sorted(computed(tmp_path)) == sorted(
        f"{kind} {i}" for kind in ("scores", "rows") for i in range(5)
    )


def test_the_others_go_on_when_a_cell_fails(tmp_path: Path) -> None:
    works = sweep(tmp_path, n=3)

    def diverge() -> CellResult:
        raise ZeroDivisionError("the loss is\n infinite")

    works[1] = Work(works[1].cell, diverge)
    outcomes = {outcome.cell.label: outcome for outcome in run(tmp_path, works)}
    assert outcomes["scores 1"].error == "ZeroDivisionError: the loss is infinite"
    assert "'scores 1'" in outcomes["rows 1"].error
    assert sum(outcome.result is not None for outcome in outcomes.values()) == 4
    again = run(tmp_path, sweep(tmp_path, n=3))
    assert {o.cell.label for o in again if o.is_new} == {"scores 1", "rows 1"}


def test_a_sweep_that_is_killed_goes_on(tmp_path: Path) -> None:
    """At random moments, until it has come to its end."""
    untouched = tmp_path / "untouched"
    untouched.mkdir()
    run(untouched, sweep(untouched))
    rng = random.Random(0)
    n_kills = 0
    while True:
        works = sweep(tmp_path, seconds=0.01)
        process = FORKED.Process(target=run, args=(tmp_path, works))
        process.start()
        process.join(rng.uniform(0.02, 0.2) * (1 + n_kills / 4))
        if process.exitcode == 0:
            break
        assert process.exitcode is None and process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        n_kills += 1
    assert n_kills > 0
    found, expected = files(tmp_path / "store"), files(untouched / "store")
    assert found.keys() == expected.keys()
    data = [name for name in found if not name.endswith(".json")]
    assert len(data) == 24 and all(found[name] == expected[name] for name in data)
    # One may have been computed and not yet written when its process was killed.
    assert len(computed(tmp_path)) <= 12 + n_kills


def test_three_processes_share_the_work(tmp_path: Path) -> None:
    works = sweep(tmp_path, seconds=0.03)
    processes = [FORKED.Process(target=run, args=(tmp_path, works)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert len(open_store(tmp_path / "store").cells("scores")) == 6
    assert sorted(computed(tmp_path)) == sorted(work.cell.label for work in works)


def test_what_is_finished_between_the_look_and_the_claim_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process ends the cell just before this one claims it."""
    work, *_ = sweep(tmp_path, n=1)
    claimed = Store.claimed

    def finished_by_another(store: Store, cell: Cell) -> AbstractContextManager[bool]:
        store.write(cell, work.compute())
        return claimed(store, cell)

    monkeypatch.setattr(Store, "claimed", finished_by_another)
    (outcome,) = run(tmp_path, [work])
    assert outcome.result is not None and not outcome.is_new
    assert computed(tmp_path) == ["scores 0"]

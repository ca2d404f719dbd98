"""A cell is there whole or not at all, whatever happens to its files and to its writers."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas
import pytest
import torch as t

from auto_circuit.errors import ConfigError, FileError
from auto_circuit.store import (
    Cell,
    CellResult,
    DamagedCellWarning,
    LocalFolder,
    Store,
    open_store,
)

CELL = Cell("scores", {"task": "IOI", "seed": 42}, label="EAP on IOI, seed 42")
RESULT = CellResult(
    tensors={"blocks.0.mlp": t.tensor([[0.5, -2.0]]), "out": t.arange(3.0)},
    rows=pandas.DataFrame([{"n_edges": 1, "value": 0.25}, {"n_edges": 2, "value": 0.5}]),
    numbers={"auroc": 0.75, "missing": None},
    cost={"seconds": 1.5},
)
ADDRESSES = ("folder", "file", "memory")


@pytest.fixture(params=ADDRESSES)
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return {
        "folder": str(tmp_path / "results"),
        "file": f"file://{tmp_path}/results",
        "memory": f"memory://{tmp_path.name}",
    }[request.param]


def equal(result: CellResult | None, expected: CellResult) -> bool:
    assert result is not None and result.rows is not None and expected.rows is not None
    return (
        list(result.tensors) == list(expected.tensors)
        and all(t.equal(result.tensors[k], v) for k, v in expected.tensors.items())
        and result.rows.equals(expected.rows)
        and (result.numbers, result.cost) == (expected.numbers, expected.cost)
    )


def test_what_was_written_is_read(address: str) -> None:
    store = open_store(address)
    assert store.read(CELL) is None and store.cells("scores") == []
    store.write(CELL, RESULT)
    assert equal(open_store(address).read(CELL), RESULT)
    assert store.cells("scores") == [CELL.key]
    other = Cell("scores", {"task": "IOI", "seed": 43})
    assert store.read(other) is None
    store.write(other, CellResult(numbers={"x": 1}))
    found = store.read(other)
    assert found is not None and (found.numbers, found.rows) == ({"x": 1}, None)


def test_a_key_is_that_of_the_work_alone() -> None:
    same = Cell("scores", {"seed": 42, "task": "IOI"}, label="another text")
    assert same.key == CELL.key and same == CELL and len(CELL.key) == 40
    others = [
        Cell("measurements", CELL.what),
        Cell("scores", {"task": "IOI", "seed": 43}),
        Cell("scores", {"task": "IOI", "seed": "42"}),
        Cell("scores", {"task": "IOI"}),
    ]
    assert len({CELL.key, *(cell.key for cell in others)}) == 5
    code = (
        f"from auto_circuit.store import Cell; print(Cell('scores', {CELL.what!r}).key)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == CELL.key


def flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize("suffix", (".json", ".safetensors", ".parquet"))
@pytest.mark.parametrize(
    "damage",
    (
        lambda content: content[:-7],
        lambda content: b"",
        flip,
        lambda content: b"a letter to my grandmother\n",
        lambda content: b'{"checksum": "", "files": {}}',
        None,
    ),
    ids=("truncated", "emptied", "flipped", "foreign", "foreign-json", "taken-away"),
)
def test_damage_is_found_and_named(
    tmp_path: Path, suffix: str, damage: Callable[[bytes], bytes] | None
) -> None:
    store = open_store(tmp_path)
    store.write(CELL, RESULT)
    (path,) = (tmp_path / "scores").glob(f"*{suffix}")
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()))
    if damage is None and suffix == ".json":
        assert store.read(CELL) is None
    else:
        with pytest.warns(DamagedCellWarning, match=path.name) as warnings:
            assert store.read(CELL) is None
        assert CELL.label in str(warnings[0].message)
    store.write(CELL, RESULT)
    assert equal(store.read(CELL), RESULT)


def test_another_cells_files_are_not_taken_for_it(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    other = Cell("scores", {"seed": 1})
    store.write(other, RESULT)
    folder = tmp_path / "scores"
    (folder / f"{other.key}.json").rename(folder / f"{CELL.key}.json")
    with pytest.warns(DamagedCellWarning, match="another cell"):
        assert store.read(CELL) is None


def test_files_of_others_stay(tmp_path: Path) -> None:
    notes = tmp_path / "scores" / "notes.txt"
    notes.parent.mkdir(parents=True)
    notes.write_text("mine")
    store = open_store(tmp_path)
    store.write(CELL, RESULT)
    store.write(CELL, RESULT)
    assert notes.read_text() == "mine" and store.cells("scores") == [CELL.key]
    assert len(list(notes.parent.iterdir())) == 4


def test_what_cannot_be_a_store(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FileError, match="file"):
        open_store(tmp_path / "file")
    (tmp_path / "store.json").write_text('{"auto_circuit_store": 77}')
    with pytest.raises(ConfigError, match=r"version 77.*version 1.*another folder"):
        open_store(tmp_path)
    (tmp_path / "store.json").write_text("hello")
    with pytest.raises(ConfigError, match="unreadable"):
        open_store(tmp_path)
    with pytest.raises(ConfigError, match="no-such-protocol"):
        open_store("no-such-protocol://bucket")


def test_a_claim_keeps_others_out(tmp_path: Path) -> None:
    first, second = open_store(tmp_path), open_store(tmp_path)
    with first.claimed(CELL) as mine:
        assert mine
        with second.claimed(CELL) as also_mine:
            assert not also_mine
        with second.claimed(Cell("scores", {})) as another:
            assert another
    with second.claimed(CELL) as now_mine:
        assert now_mine
    assert not list((tmp_path / ".claims").iterdir())


def test_who_is_alone_takes_away_what_killed_processes_left(tmp_path: Path) -> None:
    first, second = open_store(tmp_path), open_store(tmp_path)
    litter = tmp_path / "scores" / ".partial-0123"
    litter.parent.mkdir(parents=True)
    with first.at_work():
        litter.touch()
        with second.at_work():
            assert litter.exists()
        assert litter.exists()
    assert not litter.exists()


def _hold(folder: Path) -> None:
    with open_store(folder).claimed(CELL) as mine:
        (folder / "held").write_text(str(mine))
        time.sleep(60)


def test_the_claim_of_a_process_that_died_is_free(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_hold, args=(tmp_path,))
    process.start()
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    store = open_store(tmp_path)
    with store.claimed(CELL) as mine:
        assert not mine
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with store.claimed(CELL) as mine:
        assert mine


class _BreaksOff(Exception):
    pass


@pytest.mark.parametrize("n_objects", (0, 1, 2))
def test_a_writer_that_dies_leaves_no_half_cell(tmp_path: Path, n_objects: int) -> None:
    """After each of its objects: data, data, manifest."""

    class Dying(LocalFolder):
        def write(self, name: str, content: bytes) -> None:
            if len(list((tmp_path / "scores").rglob("*.*"))) == n_objects:
                raise _BreaksOff
            super().write(name, content)

    store = open_store(tmp_path)
    with pytest.raises(_BreaksOff):
        Store(Dying(tmp_path)).write(CELL, RESULT)
    assert store.read(CELL) is None and store.cells("scores") == []
    store.write(CELL, RESULT)
    assert equal(store.read(CELL), RESULT)


def test_a_number_that_was_changed_in_a_manifest_is_found(tmp_path: Path) -> None:
    """It is still JSON, and says what cell it is of."""
    store = open_store(tmp_path)
    store.write(CELL, RESULT)
    manifest = tmp_path / f"{CELL.name}.json"
    text = manifest.read_text()
    assert text.count("0.75") == 1
    manifest.write_text(text.replace("0.75", "0.85"))
    with pytest.warns(DamagedCellWarning, match="its checksum is another"):
        assert store.read(CELL) is None

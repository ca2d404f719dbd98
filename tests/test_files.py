"""Files are written whole or not at all, with normal permissions, in their folder."""

from __future__ import annotations

import os
import signal
import stat
import time
from pathlib import Path
from threading import Thread

import pytest

from auto_circuit.errors import ConfigError, FileError
from auto_circuit.files import (
    _locked,
    checked_file_name,
    checksum,
    folder_written_whole,
    write_text,
    written_whole,
)


def test_a_body_that_raises_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("old")
    with pytest.raises(RuntimeError), written_whole(path) as partial:
        partial.write_text("half of the new")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_an_error_of_ours_and_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("old")
    with pytest.raises(FileError, match=f"Cannot write {path}: No space"):
        with written_whole(path), open("/dev/full", "w") as full:
            full.write("x")
    assert path.read_text() == "old"


def test_permissions_are_those_of_any_new_file(tmp_path: Path) -> None:
    old_mask = os.umask(0o027)
    try:
        with written_whole(tmp_path / "x") as partial:
            partial.unlink()
            os.close(os.open(partial, os.O_CREAT | os.O_WRONLY, 0o600))
    finally:
        os.umask(old_mask)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "file").write_text("old")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "new"


def test_no_folder_and_a_folder_in_the_way(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no folder"):
        write_text(tmp_path / "no" / "x", "")
    with pytest.raises(FileError, match="something that is no file"):
        write_text(tmp_path, "")


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "a/b", "a\\b", "a\0b", "a\nb", " a", "x" * 201, "é" * 101],
)
def test_names_that_leave_the_folder(name: str) -> None:
    with pytest.raises(ConfigError, match="`name` is"):
        checked_file_name("name", name)


@pytest.mark.parametrize("name", ["a", "my run 3", "été", "x" * 200, "a.b-c_d"])
def test_names_that_stay_in_the_folder(name: str) -> None:
    assert checked_file_name("name", name) == name


def write_folder(folder: Path, text: str) -> None:
    with folder_written_whole(folder) as new:
        (new / "inner").mkdir()
        (new / "inner" / "file.txt").write_text(text)


def test_a_folder_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    for text in ("one", "two"):
        write_folder(tmp_path / "results", text)
        assert (tmp_path / "results/inner/file.txt").read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["results"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_the_folder_before_stays_if_the_new_one_is_not_complete(
    tmp_path: Path, error: type[BaseException]
) -> None:
    write_folder(tmp_path / "results", "good")
    with pytest.raises(error), folder_written_whole(tmp_path / "results") as new:
        (new / "half").write_text("half")
        assert (tmp_path / "results/inner/file.txt").read_text() == "good"
        raise error
    assert (tmp_path / "results/inner/file.txt").read_text() == "good"
    assert [path.name for path in tmp_path.iterdir()] == ["results"]


def test_the_folder_before_stays_if_it_cannot_be_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system moves the old one away, and then refuses to move the new one."""
    write_folder(tmp_path / "results", "good")
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if target.name == "results" and not target.exists() and not refused:
            refused.append(path)
            raise OSError(5, "Input/output error")
        return rename(path, target)

    refused: list[Path] = []
    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(FileError, match="Cannot write .*results: Input/output error"):
        write_folder(tmp_path / "results", "new")
    assert refused
    assert (tmp_path / "results/inner/file.txt").read_text() == "good"
    assert [path.name for path in tmp_path.iterdir()] == ["results"]


def test_the_folder_before_is_kept_if_it_cannot_be_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system moves it away, and then refuses to move anything to its place."""
    write_folder(tmp_path / "results", "good")
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if target.name == "results":
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(FileError, match="could not be put back") as raised:
        write_folder(tmp_path / "results", "new")
    monkeypatch.undo()
    (kept,) = tmp_path.iterdir()
    assert str(kept) in str(raised.value)
    assert (kept / "inner/file.txt").read_text() == "good"
    kept.rename(tmp_path / "results")
    write_folder(tmp_path / "results", "new")  # the lock was given back
    assert (tmp_path / "results/inner/file.txt").read_text() == "new"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_process_that_is_forked_meanwhile_does_not_keep_the_lock(
    tmp_path: Path,
) -> None:
    with _locked(tmp_path):
        child = os.fork()
        if child == 0:  # holds whatever was open
            time.sleep(60)
            os._exit(0)
    try:
        writer = Thread(
            target=write_folder, args=(tmp_path / "results", "new"), daemon=True
        )
        writer.start()
        writer.join(5)
        assert not writer.is_alive()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_two_writers_of_one_folder(tmp_path: Path) -> None:
    """One ends while the other one writes, and a third comes between its two renames."""
    folder = tmp_path / "results"
    with folder_written_whole(folder) as new:
        write_folder(folder, "other")
        (new / "mine").write_text("mine")
    assert [path.name for path in folder.iterdir()] == ["mine"]

    threads = [Thread(target=write_folder, args=(folder, str(i))) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (folder / "inner/file.txt").read_text() in list("01234567")
    assert [path.name for path in tmp_path.iterdir()] == ["results"]


def test_what_is_no_folder_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "results").write_text("mine")
    with pytest.raises(FileError, match="something that is no folder"):
        write_folder(tmp_path / "results", "new")
    assert (tmp_path / "results").read_text() == "mine"
    with pytest.raises(ConfigError, match="there is no folder"):
        write_folder(tmp_path / "nowhere" / "results", "new")


def test_a_checksum_is_of_the_values_in_any_order() -> None:
    content = {"a": [1, {"b": 2.5, "c": None}], "d": "é"}
    reordered = {"d": "é", "a": [1, {"c": None, "b": 2.5}]}
    assert checksum(reordered) == checksum(content)
    for other in ({**content, "d": "e"}, {**content, "e": 1}, {"a": [{}, 1], "d": "é"}):
        assert checksum(other) != checksum(content)

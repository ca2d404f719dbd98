"""Files are written whole or not at all, with normal permissions, in their folder."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from auto_circuit.errors import ConfigError, FileError
from auto_circuit.files import checked_file_name, write_text, written_whole


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

"""Every Python block of the README runs, as it stands, from an empty folder."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(
    r"^## ([^\n]+)\n(?:(?!^## ).)*?```python\n(.*?)```", README.read_text(), re.S | re.M
)
PRINTED = {
    "Quickstart": r"0 edges: .*\n.* 10 edges: .*\n(.*\n)*.*1519 edges: 100.0 %",
    "Patch one edge": r"\w+\n",
    "Use your own prompts": r"1519 edges, 6 prompts",
    "Add an algorithm": r"",
}


@pytest.mark.parametrize("title,code", BLOCKS, ids=[title for title, _ in BLOCKS])
def test_block(
    title: str,
    code: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, f"README.md, {title}", "exec"), {"__name__": title})
    assert re.search(PRINTED[title], capsys.readouterr().out)


def test_every_block_is_found() -> None:
    assert len(BLOCKS) == README.read_text().count("```python") == len(PRINTED)


def test_the_quickstart_is_short() -> None:
    lines = [line for line in dict(BLOCKS)["Quickstart"].splitlines() if line.strip()]
    assert len(lines) <= 15


def test_the_files_of_the_map_exist() -> None:
    paths = re.findall(r"^\| `([^`]+)` \|", README.read_text(), re.M)
    assert len(paths) > 10
    assert [path for path in paths if not (README.parent / path).exists()] == []

"""Every Python block of the README runs, from an empty folder."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from auto_circuit.experiments import parse
from auto_circuit.sweep_config import check_config

REPO = Path(__file__).parents[1]
README = REPO / "README.md"
PAGES = [README]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.S | re.M)
HEADING = re.compile(r"^## ([^\n]+)$", re.M)


def _blocks(page: Path) -> Iterator[tuple[str, str]]:
    """(the heading above it, the code) of each block."""
    text = page.read_text()
    for block in BLOCK.finditer(text):
        yield HEADING.findall(text, 0, block.start())[-1], block[1]


BLOCKS = [(page.name, *block) for page in PAGES for block in _blocks(page)]
PRINTED = {
    "Quickstart": r"\[\(0, 4\..*\(50, 82\..*\(1519, (100\.0|99\.99).*\)\]",
}


@pytest.mark.parametrize("page,title,code", BLOCKS, ids=[block[1] for block in BLOCKS])
def test_block(
    page: str,
    title: str,
    code: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, f"{page}, {title}", "exec"), {"__name__": title})
    assert re.search(PRINTED[title], capsys.readouterr().out)


def test_every_block_is_found() -> None:
    found = sum(page.read_text().count("```python") for page in PAGES)
    assert len(BLOCKS) == found == len(PRINTED)


def test_the_quickstart_is_short() -> None:
    lines = [line for line in BLOCKS[0][2].splitlines() if line.strip()]
    assert len(lines) <= 8 and BLOCKS[0][1] == "Quickstart"


def test_what_the_readme_links_to_exists() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README.read_text())
    assert any(link.endswith(".png") for link in links)
    for link in links:
        assert (README.parent / link).is_file(), link
        assert not link.endswith(".png") or (README.parent / link).stat().st_size < 2e5


def test_the_files_of_the_map_exist() -> None:
    page = REPO / "docs" / "where-things-are.md"
    paths = re.findall(r"^\| `([^`]+)` \|", page.read_text(), re.M)
    assert len(paths) > 10
    assert [path for path in paths if not (REPO / path).exists()] == []


def test_from_clone_to_circuit_in_twelve_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the README has one type is a prompt file and a sweep that the checks let pass."""
    part = README.read_text().partition("## Your own prompts, from clone to circuit")[2]
    lines = part.partition("```sh\n")[2].partition("\n```")[0].splitlines()
    assert len(lines) <= 12 and lines[0].startswith("git clone ")
    start = lines.index("cat > mine.jsonl <<'END'")
    end = lines.index("END")
    monkeypatch.chdir(tmp_path)
    Path("mine.jsonl").write_text("\n".join(lines[start + 1 : end]))
    make = re.fullmatch(r'make run ARGS="(.+)"', lines[end + 1])
    assert make is not None
    _, config, _ = parse(shlex.split(make[1]))
    (task,) = check_config(config).tasks
    train, test = task.read_prompts()
    assert len(train) == len(test) == (end - start - 1) // 2
    for prompt in (*train, *test):
        clean, corrupt = (str(side).split() for side in (prompt.clean, prompt.corrupt))
        differing = [
            pair for pair in zip(clean, corrupt, strict=True) if len({*pair}) > 1
        ]
        assert differing == [(prompt.wrong_answers[0].strip(), prompt.answers[0].strip())]

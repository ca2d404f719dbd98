"""Every Python block of the README runs, from an empty folder."""

from __future__ import annotations

import html
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import auto_circuit as ac
from auto_circuit.experiments import parse
from auto_circuit.metrics.prune_metrics.prune_metrics import PRUNE_METRICS
from auto_circuit.prune_algos.prune_algos import PRUNE_ALGOS
from auto_circuit.sweep_config import check_config
from auto_circuit.types import AblationType
from tests.browser import drawn

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


def typed_lines() -> list[str]:
    """What the README has one type, from clone to circuit."""
    part = README.read_text().partition("## Your own prompts, from clone to circuit")[2]
    return part.partition("```sh\n")[2].partition("\n```")[0].splitlines()


def options_and_prompts(folder: Path) -> tuple[list[str], int]:
    """The options of `make run` there, and how many prompts are now in their file."""
    lines = typed_lines()
    start, end = lines.index("cat > mine.jsonl <<'END'") + 1, lines.index("END")
    (folder / "mine.jsonl").write_text("\n".join(lines[start:end]))
    make = re.fullmatch(r'make run ARGS="(.+)"', lines[end + 1])
    assert make is not None
    return shlex.split(make[1]), end - start


def test_from_clone_to_circuit_in_twelve_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt file, in whose prompts one name differs, and a sweep that the checks let pass."""
    lines = typed_lines()
    assert len(lines) <= 12 and lines[0].startswith("git clone ")
    assert lines[-1].startswith("xdg-open results/mine-") and "report.html" in lines[-1]
    options, n_prompts = options_and_prompts(tmp_path)
    monkeypatch.chdir(tmp_path)
    _, config, _ = parse(options)
    (task,) = check_config(config).tasks
    train, test = task.read_prompts()
    assert len(train) == len(test) == n_prompts // 2
    for prompt in (*train, *test):
        clean, corrupt = (str(side).split() for side in (prompt.clean, prompt.corrupt))
        differing = [
            pair for pair in zip(clean, corrupt, strict=True) if len(set(pair)) > 1
        ]
        assert differing == [(prompt.wrong_answers[0].strip(), prompt.answers[0].strip())]


@pytest.mark.slow
def test_ones_own_prompts_and_circuit_are_in_the_report(tmp_path: Path) -> None:
    """The same with one quick algorithm: its page has the prompts and the circuit to explore."""
    options, _ = options_and_prompts(tmp_path)
    words = [sys.executable, "-m", "auto_circuit.experiments", *options, "--algos", "EAP"]
    environment = {**os.environ, "PYTHONPATH": str(REPO), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*words, "--n-seeds", "1"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (report,) = tmp_path.glob("results/mine-*/report.html")
    assert str(report.relative_to(tmp_path)) in done.stdout
    # Each name of a prompt is an element of its own, where the two prompts differ.
    page = html.unescape(re.sub("<[^>]*>", " ", drawn(report)))
    prompts = map(json.loads, (tmp_path / "mine.jsonl").read_text().splitlines())
    names = {prompt["answers"][0].strip() for prompt in prompts}
    assert "mine.jsonl" in page and len(names & set(re.findall(r"\w+", page))) >= 2
    assert "A0.3->Resid End" in page and "rank 1 of 1,519" in page


def test_what_the_readme_counts() -> None:
    text = README.read_text()
    rows = {
        line.split("|")[1].strip(): line.split("|")[-2].strip()
        for line in text.partition("## What others have")[2].splitlines()
        if line.count("|") == 7
    }
    assert rows["algorithms"].startswith(f"{len(PRUNE_ALGOS)}: ")
    assert rows["metrics"].startswith(f"{len(PRUNE_METRICS)}, ")
    assert rows["what is patched in"] == f"resample, zero, {len(AblationType) - 2} means"
    for words in (text, (REPO / "CITATION.cff").read_text()):
        assert ac.__version__ in words

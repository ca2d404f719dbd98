"""The notebooks: valid, small, the same on every machine, and what they show is what they give."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest

REPO = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((REPO / "notebooks").glob("*.ipynb"))
SCRIPT = REPO / "scripts" / "run_notebooks.py"


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def test_there_are_three() -> None:
    assert [path.stem for path in NOTEBOOKS] == [
        "compare_algorithms",
        "find_and_test_a_circuit",
        "own_model_and_prompts",
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_as_a_code_host_shows_it(path: Path) -> None:
    notebook = read(path)
    nbformat.validate(notebook)
    assert path.stat().st_size < 1e6
    assert notebook.metadata == {
        "kernelspec": {
            "display_name": "Python 3",
            "language": "python",
            "name": "python3",
        },
        "language_info": {"name": "python"},
    }
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        assert cell.outputs and cell.metadata == {}, cell.source
        for output in cell.outputs:
            assert output.output_type != "error" and output.get("name") != "stderr"
            # Scripts and widgets are not run there: a picture, a table or a text is seen.
            kinds = set(output.get("data", {"text/plain": ""}))
            assert kinds <= {"text/plain", "text/html", "image/png"} and kinds
            assert "<script" not in output.get("data", {}).get("text/html", "")
    texts = re.sub(r'"image/png": "[^"]*"', "", path.read_text())
    assert not re.search(
        r"/(?:home|root|tmp|work|usr)/|\d+ s\b|it/s|0x[0-9a-f]{6}", texts
    )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_it_links_to_is_there(path: Path) -> None:
    text = "".join(cell.source for cell in read(path).cells if cell.cell_type != "code")
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
    assert links and all((path.parent / link).is_file() for link in links)


def test_what_a_check_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import run_notebooks  # type: ignore[import-not-found]

    assert run_notebooks.is_alike(
        "EAP: 1,519 edges do 98.70 %", "EAP:  1519 edges do 98.8 %"
    )
    for other in (
        "EAP: 1519 edges do 94.0 %",
        "EAP: 1519 edges do -98.7 %",
        "EAP: 1619 edges do 98.7 %",
        "IEG: 1519 edges do 98.7 %",
        "EAP: 1519 edges do",
    ):
        assert not run_notebooks.is_alike("EAP: 1519 edges do 98.7 %", other)
    notebook = read(NOTEBOOKS[0])
    assert run_notebooks.differences(notebook, notebook) == []
    changed = copy.deepcopy(notebook)
    cell = next(cell for cell in changed.cells if cell.get("outputs"))
    cell.outputs[0]["text"] = "nothing"
    (found,) = run_notebooks.differences(notebook, changed)
    assert cell.id in found and "nothing" in found
    cell.outputs.clear()
    assert len(run_notebooks.differences(notebook, changed)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_shows_what_it_gives(path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--check", str(path)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_a_notebook_that_shows_something_else_is_told(tmp_path: Path) -> None:
    notebook = json.loads(NOTEBOOKS[-1].read_text())
    notebook["cells"] = [
        {
            "cell_type": "code",
            "id": "only",
            "metadata": {},
            "execution_count": 1,
            "source": "print(1 + 1)",
            "outputs": [{"output_type": "stream", "name": "stdout", "text": "3\n"}],
        }
    ]
    path = tmp_path / "wrong.ipynb"
    path.write_text(json.dumps(notebook))
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--check", str(path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "cell only: '3\\n' has become '2\\n'" in done.stderr

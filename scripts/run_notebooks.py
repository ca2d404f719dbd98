"""Run the notebooks, and write them back with what they show.

    python scripts/run_notebooks.py                     # all; needs Chromium or Chrome
    python scripts/run_notebooks.py notebooks/own_model_and_prompts.ipynb
    python scripts/run_notebooks.py --check             # do they still show what they show?

Each runs in an empty folder of its own. What is kept of it is the same on every run and machine:
tables and texts without times, progress and paths; figures as pictures, which every page that shows
notebooks can show (in Jupyter, a figure is one that can be moved).
"""

from __future__ import annotations

import argparse
import base64
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from typing import Any

import nbformat
from draw_quickstart import checked_browser, draw, found_browser, screenshot
from nbclient import NotebookClient

REPO = Path(__file__).resolve().parents[1]
NOTEBOOKS = REPO / "notebooks"
FIGURE = "application/vnd.plotly.v1+json"
WIDGET = "application/vnd.jupyter.widget-view+json"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
PICTURE, EXPLORER = (900, 540), (1000, 900)
MAX_BYTES = 1_000_000
"""No notebook is larger: pages that show notebooks give up on large ones."""


NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?")
RELATIVE, ABSOLUTE = 0.02, 0.15
"""How far numbers may be from those that are kept: another machine rounds in another way."""


def main() -> None:
    """Run each notebook, and keep what it shows, or compare it with what is kept."""
    parser = argparse.ArgumentParser(description="Run the notebooks.")
    known = sorted(NOTEBOOKS.glob("*.ipynb"))
    parser.add_argument("paths", nargs="*", type=Path, default=known)
    parser.add_argument("--browser", default=found_browser())
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    different = []
    for path in args.paths:
        with tempfile.TemporaryDirectory() as folder:
            notebook = executed(path, Path(folder))
            if args.check:
                old: Any = nbformat.read(path, as_version=4)
                different += [
                    f"{path.name}, {what}" for what in differences(old, notebook)
                ]
            else:
                write(with_pictures(notebook, Path(folder), args.browser), path)
    if different:
        sys.exit("\n".join(different))


def write(notebook: Any, path: Path) -> None:
    """Write it, unless it is too large."""
    text = nbformat.writes(notebook)
    if len(text) > MAX_BYTES:
        sys.exit(f"{path} would have {len(text):,} bytes: show less in it.")
    path.write_text(text + "\n", encoding="utf-8")
    print(f"{path}: {len(text):,} bytes")


# ------------------------------------------------------------------------------ comparing


def differences(old: Any, new: Any) -> list[str]:
    """What two runs of a notebook show that is not the same, by cell. [] for the same."""
    return [
        f"cell {cell.id}: {was!r:.300} has become {become!r:.300}"
        for cell, run in zip(old.cells, new.cells, strict=True)
        for was, become in zip_longest(shown(cell), shown(run))
        if was is None or become is None or not is_alike(was, become)
    ]


def shown(cell: Any) -> list[str]:
    """What a cell shows: texts, and of a figure that it is one."""
    outputs = cell.get("outputs", [])
    return [
        (
            "a figure"
            if is_figure(output)
            else output.get("text") or output.data["text/plain"]
        )
        for output in outputs
    ]


def is_figure(output: Any) -> bool:
    """Is it a figure, or the picture that stands for it?"""
    return bool({"image/png", FIGURE, WIDGET} & set(output.get("data", {})))


def is_alike(one: str, other: str) -> bool:
    """The same words, and nearly the same numbers?"""
    words, others = (" ".join(NUMBER.sub("#", text).split()) for text in (one, other))
    numbers = [
        [float(n.replace(",", "")) for n in NUMBER.findall(t)] for t in (one, other)
    ]
    return words == others and all(
        math.isclose(a, b, rel_tol=RELATIVE, abs_tol=ABSOLUTE)
        for a, b in zip(*numbers, strict=True)
    )


# ------------------------------------------------------------------------------- running


def executed(path: Path, folder: Path) -> Any:
    """The notebook with what its cells show in an empty folder; an error ends it."""
    notebook: Any = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        cell.metadata = {}
    environment = {
        **os.environ,
        "PLOTLY_RENDERER": "plotly_mimetype",
        "PYTHONPATH": os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")]),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    client = NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute(env=environment)
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [kept(output) for output in cell.outputs if is_kept(output)]
    return notebook


def is_kept(output: Any) -> bool:
    """Is it no progress bar, and no message to the person who runs it?"""
    is_progress = output.output_type == "display_data" and WIDGET in output.data
    return output.get("name") != "stderr" and not is_progress


def kept(output: Any) -> Any:
    """Without what is another number on each run: addresses of objects."""
    if "text" in output:
        output["text"] = re.sub(r" at 0x[0-9a-f]+", "", output["text"])
    return output


def with_pictures(notebook: Any, folder: Path, browser: str | None) -> Any:
    """The notebook with a picture in the place of each figure, and of the explorer."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if FIGURE in data:
                title, image = figure_picture(data[FIGURE], browser)
            elif WIDGET in data:
                title, image = "The circuit explorer", explorer_picture(folder, browser)
            else:
                continue
            output["data"] = nbformat.from_dict({"image/png": image, "text/plain": title})
            output["metadata"] = nbformat.from_dict({})
    return notebook


def figure_picture(figure: Any, browser: str | None) -> tuple[str, str]:
    """A figure's title, for those who cannot see it, and its picture."""
    import plotly.graph_objects as go

    fig = go.Figure(data=figure["data"], layout=figure["layout"])
    layout: Any = fig.layout
    title = re.sub("<[^>]*>", " ", layout.title.text or "A figure")
    return title, png(lambda out: draw(browser, fig, out, PICTURE))


def explorer_picture(folder: Path, browser: str | None) -> str:
    """What the page shows that is written in the cell that shows the explorer."""
    (page,) = folder.glob("*.html")
    return png(lambda out: screenshot(checked_browser(browser), page, out, EXPLORER, 1))


def png(draw_into: Callable[[Path], None]) -> str:
    """A picture as notebooks hold it."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "picture.png")
        draw_into(out)
        return base64.b64encode(out.read_bytes()).decode("ascii")


if __name__ == "__main__":
    main()

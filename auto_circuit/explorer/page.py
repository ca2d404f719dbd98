"""The explorer in a page: a piece of HTML that needs nothing else, or a page of its own."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from auto_circuit.checks import checked
from auto_circuit.explorer.data import TaskView
from auto_circuit.explorer.packing import packed
from auto_circuit.explorer.picture import first_picture
from auto_circuit.files import path_in_folder, write_text

BUILT = Path(__file__).parent / "built" / "explorer.js"
"""The JavaScript, built from `src/` by `npm run build`."""


@checked
def explorer_html(views: Sequence[TaskView]) -> str:
    """The explorer of some tasks, to be put into the body of a page.

    It loads nothing: data, JavaScript and styles are inside. Where no JavaScript runs it
    shows a picture of the first circuit.
    """
    return (
        "<div data-auto-circuit-explorer>"
        f'<script type="text/plain">{packed(views)}</script>'
        f"{first_picture(views)}</div>\n"
        f'<script type="module">{built_javascript()}</script>'
    )


@checked
def write_explorer(
    path: Path | str, views: Sequence[TaskView], title: str = "Circuit explorer"
) -> Path:
    """Write a page with the explorer; returns its path. It needs no network.

    Raises ConfigError if there is no such folder, FileError if it cannot be written.
    """
    path = path_in_folder(path)
    write_text(
        path,
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>body{{margin:0 auto;max-width:1500px;"
        "padding:16px;font-family:system-ui,sans-serif;color:#1f2430;background:#fff}"
        "h1{font-size:22px;margin:0 0 14px}</style></head>"
        f"<body><main><h1>{escape(title)}</h1>\n{explorer_html(views)}\n</main></body>"
        "</html>\n",
    )
    return path


def built_javascript() -> str:
    """The explorer's JavaScript, an ES module."""
    return BUILT.read_text(encoding="utf-8")

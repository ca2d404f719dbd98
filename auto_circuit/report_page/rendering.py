"""Templates, which escape whatever they are given; and the style and script of the pages."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from auto_circuit.explorer.page import BUILT
from auto_circuit.files import checksum
from auto_circuit.fingerprints import digest

TEMPLATES = Path(__file__).parent / "templates"
UNZIPPED = BUILT.parents[1] / "src" / "unzipped.js"


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        auto_reload=False,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.tests["with_space"] = lambda text: any(map(str.isspace, text))
    return environment


def rendered(template: str, **content: Any) -> str:
    """A template's text. What is given is text: HTML is only what a template calls safe."""
    page = _environment().get_template(template)
    return page.render(style=asset("page.css"), script=_script(), **content) + "\n"


@cache
def _script() -> str:
    """The page's own JavaScript, with what it shares with the explorer's."""
    shared = UNZIPPED.read_text(encoding="utf-8").replace("export ", "")
    return f"{asset('page.js')}\n{shared}"


@cache
def page_version() -> str:
    """Another one whenever what makes pages changes: they are then written again."""
    own = TEMPLATES.parent.rglob("*.*")
    sources = [path for path in own if path.suffix in (".py", ".html", ".css", ".js")]
    sources += [BUILT, UNZIPPED]
    return checksum([digest(path.read_bytes()) for path in sorted(sources)])


@cache
def asset(name: str) -> str:
    """One of the package's own files, as it is."""
    return (TEMPLATES / name).read_text(encoding="utf-8")

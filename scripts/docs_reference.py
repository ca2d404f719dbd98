"""The reference pages of the documentation site: one for each module of the package.

What stands on them comes from the docstrings (mkdocstrings). A module that also gives names that
another one defines, as the published auto-circuit's did, lists them with an anchor of their own,
so that every name that can be imported is found where it is imported from.
"""

from __future__ import annotations

import ast
import json
from dataclasses import dataclass
from pathlib import Path

import auto_circuit
from auto_circuit.published_names import PUBLISHED

REPO = Path(__file__).resolve().parents[1]
PACKAGE = "auto_circuit"
FOLDER = "reference"


@dataclass(frozen=True)
class Module:
    """A module of the package, read without importing it."""

    name: str
    summary: str
    defined: tuple[str, ...]
    """The public names that it defines itself."""

    @property
    def page(self) -> str:
        """Where its page is, from the site's root."""
        return f"{FOLDER}/{self.name}.md"


def modules() -> list[Module]:
    """All public modules, in the order of their names."""
    paths = sorted((REPO / PACKAGE).rglob("*.py"))
    return [_module(path) for path in paths]


def _module(path: Path) -> Module:
    tree = ast.parse(path.read_text())
    parts = path.relative_to(REPO).with_suffix("").parts
    name = ".".join(part for part in parts if part != "__init__")
    summary = (ast.get_docstring(tree) or "").split("\n", 1)[0]
    return Module(name, summary, tuple(dict.fromkeys(_defined(tree))))


def _defined(tree: ast.Module) -> list[str]:
    """Public classes, functions and constants, at the top of the module."""
    names = []
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.append(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.append(node.target.id)
        elif isinstance(node, ast.Assign):
            names += [t.id for t in node.targets if isinstance(t, ast.Name)]
    return [name for name in names if not name.startswith("_")]


def names_from_elsewhere() -> dict[str, dict[str, str]]:
    """{module: {name that it gives: the module that defines it}}."""
    found = {PACKAGE: {n: f"{PACKAGE}.{m}" for n, m in auto_circuit._HOME_OF.items()}}
    defined = {module.name: module.defined for module in modules()}
    for entry in json.loads((REPO / "tests" / "upstream_api.json").read_text()):
        module, name = entry.split(":")
        home = module
        while name not in defined[home]:
            home = _given_by(home, name)
        if home != module:
            found.setdefault(module, {})[name] = home
    return found


def _given_by(module: str, name: str) -> str:
    """The module that another one takes a name from."""
    path = REPO / Path(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and name in {a.name for a in node.names}:
            return str(node.module)
    return next(f"{PACKAGE}.{home}" for home, names in PUBLISHED.items() if name in names)


def module_page(module: Module, elsewhere: dict[str, str]) -> str:
    """The Markdown of a module's page."""
    parts = [f"# `{module.name}` {{#{module.name}}}", f"::: {module.name}"]
    if elsewhere:
        parts.append(f"## Also here {{#{module.name}-also}}")
        parts.append(_elsewhere_table(module.name, elsewhere))
    return "\n\n".join(parts) + "\n"


def _elsewhere_table(module: str, elsewhere: dict[str, str]) -> str:
    rows = ["| name | defined in |", "|---|---|"]
    for name, home in sorted(elsewhere.items()):
        anchor = f'<a id="{module}.{name}"></a>'
        rows.append(f"| {anchor}`{name}` | [`{home}`]({home}.md#{home}.{name}) |")
    return "\n".join(rows)


def module_table(of: list[Module]) -> str:
    """Every module with its first line, as a table with links."""
    rows = ["| module | what is in it |", "|---|---|"]
    rows += [f"| [`{m.name}`]({m.page}) | {m.summary} |" for m in of]
    return "\n".join(rows)


def facade_table() -> str:
    """The names of `import auto_circuit as ac`, with links to what defines them."""
    rows = ["| name | defined in |", "|---|---|"]
    for name, home in sorted(names_from_elsewhere()[PACKAGE].items()):
        rows.append(f"| [`ac.{name}`]({FOLDER}/{home}.md#{home}.{name}) | `{home}` |")
    return "\n".join(rows)


def nav() -> list[dict[str, str | list[dict[str, str]]]]:
    """The reference's part of the site's navigation: modules, by the package they are in."""
    groups: dict[str, list[dict[str, str]]] = {}
    for module in modules():
        group = _group(module.name)
        title = module.name.removeprefix(f"{group}.")
        groups.setdefault(group, []).append({title: module.page})
    return [{group: pages} for group, pages in groups.items()]


def _group(name: str) -> str:
    """The folder below the package, or the package itself."""
    parts = name.split(".")
    is_folder = (REPO / PACKAGE / parts[1]).is_dir() if len(parts) > 1 else False
    return ".".join(parts[:2]) if is_folder else PACKAGE

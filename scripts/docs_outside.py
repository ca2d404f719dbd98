"""Pages of the documentation site that are made of files outside of `docs/`.

Those who read `docs/` where the code is follow a link to the file itself; on the site it leads
to the page that shows it.
"""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
CONTRIBUTING, EXAMPLES = "project/contributing.md", "project/examples.md"
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)(#[^)\s]*)?(?=\))")


def pages() -> dict[str, str]:
    """Where on the site -> its Markdown."""
    found = {CONTRIBUTING: (REPO / "CONTRIBUTING.md").read_text(), EXAMPLES: _examples()}
    return found | {_page_of(path): notebook(path) for path in notebooks()}


def notebooks() -> list[Path]:
    """The notebooks, in the order of their names."""
    return sorted((REPO / "notebooks").glob("*.ipynb"))


def nav() -> list[dict[str, str]]:
    """Their part of the navigation."""
    found = [{_title(path): _page_of(path)} for path in notebooks()]
    return [*found, {"Examples": EXAMPLES}, {"Contributing": CONTRIBUTING}]


def _title(notebook: Path) -> str:
    first = re.search(r"^# (.+)$", _source(_cells(notebook)[0]), re.M)
    return notebook.stem if first is None else first[1]


def _page_of(path: Path) -> str:
    return f"project/{path.stem}.md"


def _examples() -> str:
    parts = ["# Examples\n\nOne file for each thing that can be added; each can be run."]
    for path in sorted((REPO / "examples").glob("*.py")):
        code = path.read_text().rstrip()
        parts.append(f"## {path.name} {{#{path.stem}}}\n\n```python\n{code}\n```")
    return "\n\n".join(parts) + "\n"


def notebook(path: Path) -> str:
    """A notebook with its outputs, as Markdown."""
    return "\n\n".join(_cell(cell) for cell in _cells(path)) + "\n"


def _cells(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["cells"]


def _source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def _cell(cell: dict[str, Any]) -> str:
    if cell["cell_type"] != "code":
        return _source(cell)
    shown = [_output(output) for output in cell["outputs"]]
    code = f"```python\n{_source(cell).rstrip()}\n```"
    return "\n\n".join([code, *filter(None, shown)])


def _output(output: dict[str, Any]) -> str:
    """A picture if it has one, else its text; nothing of what writes to stderr."""
    data = output.get("data", {})
    if "image/png" in data:
        return (
            f"![what this cell draws](data:image/png;base64,{''.join(data['image/png'])})"
        )
    words = "".join(data.get("text/plain", []))
    if output.get("name") == "stdout":
        words = "".join(output["text"])
    return f"```text\n{words.rstrip()}\n```" if words.strip() else ""


def with_links(markdown: str, page: str) -> str:
    """A page's Markdown, with links out of `docs/` leading to the pages of those files."""
    folder = _written_in(page)

    def there(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, match[1]))
        found = _site_path(target, match[2] or "")
        if found is None:
            return match[0]
        return posixpath.relpath(found, posixpath.dirname(page) or ".")

    return LINK.sub(there, markdown)


def _written_in(page: str) -> str:
    """The folder of the repository from which a page's links lead."""
    if page in (CONTRIBUTING, EXAMPLES):
        return ""
    is_notebook = page in map(_page_of, notebooks())
    return "notebooks" if is_notebook else posixpath.dirname(f"docs/{page}")


def _site_path(target: str, anchor: str) -> str | None:
    """Where a file of the repository is shown; None if it is a page's own neighbour."""
    if target == "CONTRIBUTING.md":
        return CONTRIBUTING + anchor
    if target == "README.md":
        return f"index.md{anchor}"
    path = Path(target)
    if path.parts[0] == "examples":
        return f"{EXAMPLES}#{path.stem}" if path.suffix == ".py" else EXAMPLES
    if path.parts[0] == "notebooks":
        return f"project/{path.stem}.md" if path.suffix == ".ipynb" else EXAMPLES
    return target.removeprefix("docs/") + anchor if target.startswith("docs/") else None

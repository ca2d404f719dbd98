"""Writes imports.json from a checkout of auto-circuit 1.0.1, whose folder is the argument."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
OURS = HERE.parents[1] / "auto_circuit"


def imported_names(path: Path) -> list[str]:
    """What a module imports from auto_circuit, at its top level."""
    return sorted(
        alias.asname or alias.name
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ImportFrom)
        and (node.module or "").startswith("auto_circuit")
        for alias in node.names
    )


def main(package: Path) -> None:
    """Of the modules that are here too."""
    found = {
        ".".join(path.relative_to(package).with_suffix("").parts): imported_names(path)
        for path in sorted(package.rglob("*.py"))
        if (OURS / path.relative_to(package)).exists()
    }
    kept = {module: names for module, names in found.items() if names}
    (HERE / "imports.json").write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) / "auto_circuit")

"""The explorer's JavaScript is that of its source."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from pathlib import Path

import pytest

from auto_circuit.explorer.page import BUILT, built_javascript

EXPLORER = BUILT.parents[1]


def sources_digest() -> str:
    """As `build.mjs` makes it."""
    names = [f"src/{path.name}" for path in (EXPLORER / "src").iterdir()]
    digest = hashlib.sha256()
    for name in sorted([*names, "package-lock.json"]):
        digest.update(f"{name}\0".encode() + (EXPLORER / name).read_bytes() + b"\0")
    return digest.hexdigest()


def test_the_built_file_names_the_sources_that_it_is_of() -> None:
    found = re.search(r"^sources: ([0-9a-f]{64})$", built_javascript(), re.MULTILINE)
    assert found is not None
    assert found[1] == sources_digest(), (
        "auto_circuit/explorer/src has changed: build it again, with `npm ci && npm run "
        "build` in auto_circuit/explorer."
    )


def test_the_built_file_can_stand_in_a_page_and_has_its_licences() -> None:
    built = built_javascript()
    assert "</script" not in built.lower() and "<!--" not in built
    assert built.isascii()
    assert "cytoscape.js 3" in built and "Permission is hereby granted" in built


def test_the_lock_file_names_no_place() -> None:
    lock = json.loads((EXPLORER / "package-lock.json").read_text())
    packages = {name: p for name, p in lock["packages"].items() if name}
    assert {"node_modules/cytoscape", "node_modules/esbuild"} <= set(packages)
    for name, package in packages.items():
        assert package["integrity"].startswith("sha512-"), name
        resolved = package.get("resolved", "https://registry.npmjs.org/")
        assert resolved.startswith("https://registry.npmjs.org/"), name


@pytest.mark.slow
def test_building_gives_the_same_bytes(explorer_packages: Path) -> None:
    build = ["npm", "run", "build"]
    subprocess.run(build, cwd=explorer_packages, check=True, capture_output=True)
    assert (
        explorer_packages / "built" / "explorer.js"
    ).read_bytes() == BUILT.read_bytes()

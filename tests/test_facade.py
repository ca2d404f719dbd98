"""`import auto_circuit as ac`: the names of the README, each from its home."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import auto_circuit as ac

REPO = Path(__file__).parents[1]


@pytest.mark.parametrize("name", ac._HOME_OF)
def test_a_name_is_that_of_its_home(name: str) -> None:
    thing = getattr(ac, name)
    assert not isinstance(thing, ModuleType)
    assert thing.__module__.startswith("auto_circuit.")
    assert thing.__name__ == name and name in dir(ac)


def test_what_a_type_checker_sees_is_what_there_is() -> None:
    tree = ast.parse(Path(ac.__file__).read_text())
    seen = {
        alias.asname: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname
    }
    assert seen == {name: f"auto_circuit.{home}" for name, home in ac._HOME_OF.items()}


def test_importing_the_package_loads_nothing_heavy() -> None:
    program = "import sys, auto_circuit; print(sorted({'torch', 'pandas', 'plotly', "
    program += "'transformer_lens'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=REPO
    )
    assert done.stdout == "[]\n", done.stderr


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="'auto_circuit' has no attribute 'Tusk'"):
        ac.Tusk  # noqa: B018

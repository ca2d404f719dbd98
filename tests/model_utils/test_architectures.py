"""The site's table of architectures: every number is what it was, or as good.

A family is built from its plain Hugging Face model, and compared with it; see
`tests/architecture_table.py`.
"""

from __future__ import annotations

import pytest

from tests.architecture_table import (
    CHECKS,
    NOT_SUPPORTED,
    committed,
    differences,
    row,
)
from tests.architectures import FAMILIES
from tests.families import FAMILIES as MODELS
from tests.families import REFUSED

FAST = ("gpt2", "llama")
on_all_families = pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in FAMILIES],
)


@on_all_families
def test_the_table_is_true(name: str) -> None:
    """If it has become better, `make architectures` brings it up to date."""
    assert differences(name, row(name), committed()[name]) == []


def test_every_cell_is_a_number_or_says_why_there_is_none() -> None:
    table = committed()
    assert [*table] == [*FAMILIES]
    assert {*MODELS, *REFUSED} == {*table}
    for name, cells in table.items():
        assert [*cells] == [*CHECKS]
        for cell in cells.values():
            if isinstance(cell, str):
                assert cell.startswith(NOT_SUPPORTED) and len(cell) > 40, (name, cell)
    supported = [
        name for name, cells in table.items() if cells["edges"] != cells["masks"]
    ]
    assert len(supported) >= 40


def test_a_wrong_number_is_found() -> None:
    good = committed()["gpt2"]
    for key, bad in (
        ("edges", 109),
        ("single edges", 1e-5),
        ("gradients", float("nan")),
        ("bf16 ranks", 0.5),
        ("unpatched", 1e-9),
        ("GIM", NOT_SUPPORTED + "it is another model"),
    ):
        (line,) = differences("gpt2", {**good, key: bad}, good)
        assert line.startswith(f"gpt2, {CHECKS[key].title}: {bad!r}")

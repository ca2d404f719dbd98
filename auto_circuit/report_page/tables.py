"""Tables of the report, as data: what a cell shows, and what it is sorted by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Cell:
    """text: what is shown. value: what it is sorted by, None last. shade: from 0 to 1."""

    text: str
    value: int | float | str | None = None
    shade: int | float | None = None


@dataclass(frozen=True)
class Table:
    """label: its accessible name. columns: (title, are these numbers?).

    n_headers: how many of the first cells of a row name it. note: what stands under it.
    """

    label: str
    columns: tuple[tuple[str, bool], ...]
    rows: tuple[tuple[Cell, ...], ...]
    is_sortable: bool = False
    n_headers: int = 1
    note: str = ""


def name_cell(name: str) -> Cell:
    """A name, sorted as text."""
    return Cell(name, name)


def number_cell(
    value: int | float, digits: int, plus_minus: int | float = math.nan
) -> Cell:
    """A number with half of its interval, if that is known; a dash for NaN."""
    if math.isnan(value):
        return Cell("–", None)
    return Cell(shown_number(value, digits, plus_minus), value)


def shown_number(
    value: int | float, digits: int, plus_minus: int | float = math.nan
) -> str:
    """A number with so many digits after the point, and half of its interval."""
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    shown = f"{round(value, digits) + 0.0:,.{digits}f}"  # no minus before a zero
    return shown if math.isnan(plus_minus) else f"{shown} ± {plus_minus:,.{digits}f}"


def plain_table(
    label: str, titles: Sequence[str], rows: Sequence[Sequence[str]]
) -> Table:
    """A table of texts."""
    cells = tuple(tuple(name_cell(text) for text in row) for row in rows)
    return Table(label, tuple((title, False) for title in titles), cells)

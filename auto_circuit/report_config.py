"""What the command line says of a report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional


@dataclass(frozen=True)
class ReportConfig:
    """Which results the report is of, and where it goes."""

    folder: Positional[str] = ""
    """The results' folder, such as results/pocket-0123abcd, or its address."""
    out: Path | None = None
    """The page. None: report.html in the folder."""


@dataclass(frozen=True)
class CompareConfig:
    """Which results are compared, and where the page goes."""

    first: Positional[str] = ""
    """A results' folder, such as results/pocket-0123abcd, or its address."""
    second: Positional[str] = ""
    """The folder of the results beside which they are put."""
    out: Path | None = None
    """The page. None: compare-<first>-<second>.html, beside the first folder."""

"""How the panels, titles and the legend of a figure share its pixels.

A figure is legible at 1000 pixels: at most three panels stand side by side, long titles are
broken, the legend stands below the panels and as high as it has to be, and of more than 12 lines
those after the 11th are thin, grey and named where the mouse is.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from auto_circuit.metrics.line_style import line_style

Pixels = int | float

WIDTH = 1000
"""The pixels at which every figure is legible."""
LEFT, RIGHT = 85, 30
"""The pixels beside the panels; left, of an axis with numbers."""
MAX_COLUMNS = 3
CHARACTER = 7.6
"""The pixels of a letter of a legend, or of a panel's title, on average in wide words."""
LINE = 20
"""The pixels of a line of text."""
MAX_LINES = 12
"""With more lines, all after the 11th are grey, with one entry of the legend."""
MAX_NAME = 40
OTHERS, OTHERS_COLOR = "others", "rgb(190, 190, 190)"


# -------------------------------------------------------------------------------- texts


def wrapped(text: str, pixels: Pixels) -> str:
    """A text in lines of at most so many pixels."""
    n_characters = max(8, int(pixels / CHARACTER))
    lines = [
        line for part in text.split("<br>") for line in textwrap.wrap(part, n_characters)
    ]
    return "<br>".join(lines)


def shortened(text: str, n_characters: int = MAX_NAME) -> str:
    """A text of at most so many letters: names of one family differ at their ends."""
    if len(text) <= n_characters:
        return text
    n_last = n_characters // 3
    return f"{text[: n_characters - 1 - n_last]}\u2026{text[-n_last:]}"


def n_lines(text: str | None) -> int:
    """The lines of a text."""
    return 1 + text.count("<br>") if text else 0


def listed(names: Collection[str]) -> str:
    """The first names of a list, and how many more there are."""
    first = list(names)[:MAX_LINES]
    more = f" and {len(names) - len(first)} more" if len(names) > len(first) else ""
    return ", ".join(first) + more


# -------------------------------------------------------------------------------- lines


@dataclass(frozen=True)
class LineOfMany:
    """How a line looks. is_other: is it one of the grey ones?"""

    color: str
    dash: str
    is_other: bool

    @property
    def width(self) -> Pixels:
        """In pixels."""
        return 1 if self.is_other else 2


def line_of_many(idx: int, n: int) -> LineOfMany:
    """How a line looks in a figure of so many."""
    if n > MAX_LINES and idx >= MAX_LINES - 1:
        return LineOfMany(OTHERS_COLOR, "solid", True)
    return LineOfMany(**line_style(idx), is_other=False)


def in_legend(trace: Any, line: LineOfMany, group: str, n: int, seen: set[str]) -> Any:
    """The trace with its entry in the legend; the grey lines have one together.

    n: of all lines. seen: the groups that have an entry already; it grows.
    """
    name = shortened(trace.name)
    trace.update(name=name)
    if line.is_other:
        group = OTHERS
        trace.update(hovertemplate=f"{trace.hovertemplate}<extra>{name}</extra>")
        if group not in seen:
            trace.update(name=f"{n - MAX_LINES + 1} more (hover to see their names)")
    trace.update(legendgroup=group, showlegend=group not in seen)
    seen.add(group)
    return trace


# ------------------------------------------------------------------------------- panels


@dataclass(frozen=True)
class Panels:
    """A figure with panels, row after row.

    width, height: the pixels of a panel. gap: those between two rows; top: those of the
    titles over the first one; left: those left of the first column.
    """

    fig: go.Figure
    n_rows: int
    n_cols: int
    width: Pixels
    height: Pixels
    gap: Pixels
    top: Pixels
    left: Pixels

    def place(self, idx: int) -> dict[str, Any]:
        """Where the panel with a number is."""
        return {"row": idx // self.n_cols + 1, "col": idx % self.n_cols + 1}

    @property
    def plot_height(self) -> Pixels:
        """The pixels of all panels with the gaps between them."""
        return self.n_rows * self.height + (self.n_rows - 1) * self.gap

    def finish(self, title: str | None = None, below: Pixels = 75) -> go.Figure:
        """Give the figure its title, its legend and its height.

        below: the pixels below the panels of the axis' labels and title.
        """
        title = wrapped_title(title)
        legend, legend_height = _legend(self.fig, below / self.plot_height)
        top = self.top + 30 + 24 * n_lines(title)
        height = top + self.plot_height + below + legend_height
        self.fig.update_layout(
            template="plotly_white",
            margin={"l": self.left, "r": RIGHT, "t": top, "b": below + legend_height},
            height=height,
            legend=legend,
            title={"text": title, "y": 1 - 14 / height, "yanchor": "top"},
        )
        return self.fig


def panels(
    titles: Sequence[str],
    shared_yaxes: bool = False,
    height: Pixels = 300,
    gap: Pixels = 75,
    max_columns: int = MAX_COLUMNS,
    left: Pixels = LEFT,
    **options: Any,
) -> Panels:
    """A figure with a panel for each title.

    gap: between two rows, without their titles. options: of `make_subplots`.
    """
    n_cols = max(1, min(len(titles), max_columns))
    n_rows = max(1, math.ceil(len(titles) / n_cols))
    width = WIDTH - left - RIGHT
    space = 0.0 if n_cols == 1 else (0.03 if shared_yaxes else 0.09)
    pixels = width * (1 - space * (n_cols - 1)) / n_cols
    broken = [wrapped(title, pixels) for title in titles]
    title_height = LINE * max(map(n_lines, broken), default=0)
    gap += title_height
    whole = n_rows * height + (n_rows - 1) * gap
    fig = make_subplots(
        rows=n_rows,
        cols=n_cols,
        subplot_titles=broken,
        shared_yaxes=shared_yaxes,
        vertical_spacing=gap / whole if n_rows > 1 else 0.0,
        horizontal_spacing=space,
        **options,
    )
    fig.update_annotations(font_size=14)
    return Panels(fig, n_rows, n_cols, pixels, height, gap, title_height + 10, left)


def wrapped_title(title: str | None) -> str | None:
    """A figure's title in lines; what is <sub> stays so."""
    if not title:
        return title
    main, is_broken, rest = title.partition("<br><sub>")
    main = "<br>".join(textwrap.wrap(main, 85))
    if not is_broken:
        return main
    notes = textwrap.wrap(rest.removesuffix("</sub>"), 130)
    return main + "".join(f"<br><sub>{note}</sub>" for note in notes)


def _legend(fig: go.Figure, below: Pixels) -> tuple[dict[str, Any], Pixels]:
    """A legend of equally wide entries under the panels, and its height in pixels."""
    traces: Any = fig.data
    names = [one.name for one in traces if one.name and one.showlegend is not False]
    if len(traces) < 2 or not names:
        return {}, 0.0
    entry = min(WIDTH / 2 - 60, 30 + CHARACTER * max(map(len, names)))
    columns = max(1, int((WIDTH - LEFT - RIGHT) / (entry + 45)))
    legend = {
        "orientation": "h",
        "entrywidth": entry,
        "x": 0,
        "y": -below,
        "yanchor": "top",
    }
    return legend, 20 + 29 * math.ceil(len(names) / columns)

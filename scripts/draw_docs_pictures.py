"""Draw the pictures of `docs/how-patching-works.md`: run it after a change, and commit the SVGs.

python scripts/draw_docs_pictures.py
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "images"
INK, GREY, BLUE, ORANGE = "#1f2430", "#616b7a", "#0b62a4", "#c2500a"
"""Blue: what the clean run has; orange, and dashed: what is patched in."""

Point = tuple[float, float]


def text(
    at: Point, words: str, color: str = INK, size: int = 16, where: str = "middle"
) -> str:
    """Words, centred (or from `where` on) at a point."""
    x, y = at
    style = f'font-size="{size}" fill="{color}" text-anchor="{where}"'
    return f'<text x="{x}" y="{y}" {style}>{escape(words)}</text>'


def node(at: Point, words: str, color: str = INK, width: float = 108) -> str:
    """A rounded box with words."""
    x, y = at
    box = f'x="{x - width / 2}" y="{y - 19}" width="{width}" height="38" rx="8"'
    return f'<rect {box} fill="#fff" stroke="{color}" stroke-width="2"/>' + text(
        (x, y + 5.5), words, color
    )


def arrow(start: Point, end: Point, color: str = BLUE, dashed: bool = False) -> str:
    """A line with a head."""
    name = {BLUE: "blue", ORANGE: "orange"}.get(color, "grey")
    dash = ' stroke-dasharray="7 5"' if dashed else ""
    line = f'x1="{start[0]}" y1="{start[1]}" x2="{end[0]}" y2="{end[1]}"'
    return f'<line {line} stroke="{color}" stroke-width="2.5"{dash} marker-end="url(#{name})"/>'


def picture(name: str, title: str, size: tuple[int, int], parts: Iterable[str]) -> None:
    """Write an SVG on a white ground, so that it can be read on a dark page too."""
    heads = "".join(
        f'<marker id="{word}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="6" '
        f'markerHeight="6" orient="auto"><path d="M0 0L10 5L0 10z" fill="{color}"/></marker>'
        for word, color in (("blue", BLUE), ("orange", ORANGE), ("grey", GREY))
    )
    width, height = size
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'width="{width}" height="{height}" font-family="system-ui, sans-serif">',
        f"<title>{escape(title)}</title><defs>{heads}</defs>",
        f'<rect width="{width}" height="{height}" rx="10" fill="#fff"/>',
        *parts,
        "</svg>",
    ]
    (FOLDER / f"{name}.svg").write_text("\n".join(lines) + "\n")


def draw_graph() -> None:
    """The graph of a model with one block: every later reader reads every earlier source."""
    places = {
        "Resid Start": (90, 120),
        "A0.0": (270, 60),
        "A0.1": (270, 180),
        "MLP 0": (450, 120),
        "Resid End": (630, 120),
    }
    rank = {"Resid Start": 0, "A0.0": 1, "A0.1": 1, "MLP 0": 2, "Resid End": 3}
    edges = [(a, b) for a in places for b in places if rank[a] < rank[b]]
    parts = []
    for a, b in edges:
        (x, y), (u, v) = places[a], places[b]
        if rank[b] - rank[a] == 1:
            parts.append(arrow((x + 54, y), (u - 56, v), GREY))
        else:
            bend = 235 if (a == "A0.1" or b == "MLP 0") else 8
            side = 1 if bend > 120 else -1
            d = f"M{x} {y + 19 * side} C{x + 30} {bend} {u - 30} {bend} {u} {v + 21 * side}"
            parts.append(
                f'<path d="{d}" fill="none" stroke="{GREY}" stroke-width="2.5" '
                'marker-end="url(#grey)"/>'
            )
    parts += [node(at, name) for name, at in places.items()]
    parts.append(
        text(
            (360, 268),
            "every arrow is an edge: what one node writes, a later one reads",
            GREY,
            15,
        )
    )
    picture(
        "graph", "The graph of a model with one block of two heads", (720, 285), parts
    )


def draw_one_edge() -> None:
    """What happens along one edge: a weight between what was written in two runs."""
    parts = [
        node((100, 60), "source, now", BLUE, 150),
        node((100, 160), "source, corrupt", ORANGE, 150),
        node((560, 110), "destination", INK, 130),
        arrow((175, 60), (490, 104), BLUE),
        arrow((175, 160), (490, 116), ORANGE, dashed=True),
        text((330, 62), "(1 − m) · z", BLUE),
        text((330, 170), "m · p", ORANGE),
        text(
            (360, 220),
            "reads  x + m (p − z):  m = 0 nothing changes, m = 1 the edge is patched",
            INK,
            15,
        ),
    ]
    picture(
        "one-edge",
        "An edge carries what its source writes, or what it wrote in another run",
        (720, 240),
        parts,
    )


def draw_two_ways() -> None:
    """The circuit alone, or all but the circuit: which edges are patched."""
    parts = []
    for left, title, runs, patched in (
        (0, "TREE_PATCH (noising)", "clean prompt", "all other edges patched"),
        (360, "EDGE_PATCH (denoising)", "corrupt prompt", "the circuit patched"),
    ):
        a, b, c, d = (
            (left + 60, 130),
            (left + 180, 84),
            (left + 180, 176),
            (left + 300, 130),
        )
        parts += [
            text((left + 180, 26), title, INK, 15),
            text((left + 180, 47), f"{runs}, {patched}", INK, 14),
            arrow((a[0] + 20, 122), (b[0] - 22, 92), BLUE),
            arrow((b[0] + 20, 92), (d[0] - 22, 122), BLUE),
            arrow((a[0] + 20, 138), (c[0] - 22, 168), ORANGE, dashed=True),
            arrow((c[0] + 20, 168), (d[0] - 22, 138), ORANGE, dashed=True),
            arrow((b[0], 105), (c[0], 154), ORANGE, dashed=True),
        ]
        for x, y in (a, b, c, d):
            parts.append(
                f'<circle cx="{x}" cy="{y}" r="19" fill="#fff" stroke="{INK}" stroke-width="2"/>'
            )
        parts.append(text((left + 180, 232), "blue, the circuit: clean", BLUE, 14))
        parts.append(text((left + 180, 254), "dashed, all others: corrupt", ORANGE, 14))
    picture("two-ways", "The two ways to test a circuit", (720, 275), parts)


def draw_matrix() -> None:
    """Masks times differences: one matrix product for all edges into a place."""
    parts = [
        text((90, 30), "M: one weight an edge", INK, 14),
        text((330, 30), "D = P − Z", INK, 14),
        text((560, 30), "what is added", INK, 14),
    ]
    values = (
        (("1", "0"), ("½", "1")),
        (("1", "2"), ("10", "20")),
        (("1", "2"), ("10½", "21")),
    )
    for (left, color), rows in zip(
        ((40, INK), (280, ORANGE), (510, BLUE)), values, strict=True
    ):
        for i, row in enumerate(rows):
            for j, value in enumerate(row):
                x, y = left + 50 * j, 50 + 44 * i
                parts.append(
                    f'<rect x="{x}" y="{y}" width="50" height="44" fill="#fff" '
                    f'stroke="{color}" stroke-width="2"/>'
                )
                parts.append(text((x + 25, y + 28), value, color))
    parts += [
        text((212, 100), "×", INK, 26),
        text((445, 100), "=", INK, 26),
        text((90, 165), "rows: readers", GREY, 14),
        text((90, 184), "columns: sources", GREY, 14),
        text((330, 165), "rows: sources", GREY, 14),
        text((330, 184), "columns: the residual stream", GREY, 14),
        text((560, 165), "rows: readers", GREY, 14),
    ]
    picture("matrix", "Masks times differences, as one matrix product", (720, 205), parts)


if __name__ == "__main__":
    draw_graph()
    draw_one_edge()
    draw_two_ways()
    draw_matrix()

"""Draw the pictures of the README, in docs/images: a circuit, and curves of several algorithms.

    python scripts/draw_quickstart.py                  # needs Chromium or Chrome
    python scripts/draw_quickstart.py --browser chromium --out elsewhere

The circuit is that of the quickstart, and the curves are those of a sweep: only sizes and margins
are for a page of text.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import plotly.graph_objects as go

import auto_circuit as ac
from auto_circuit.summary import mean_measurements, seed_measurements

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
WIDTH, HEIGHT = 1000, 600
THRESHOLD = 0.1
ALGOS = ("Random", "Act Mag", "EAP", "EAP-IG inputs")


def main() -> None:
    """Draw each figure in a browser, and keep what it shows."""
    parser = argparse.ArgumentParser(description="Draw the pictures of the README.")
    parser.add_argument("--out", type=Path, default=IMAGES)
    parser.add_argument("--browser", default=found_browser())
    parser.add_argument("--only", nargs="+", choices=FIGURES, default=list(FIGURES))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.only:
        out = args.out / f"{name}.png"
        draw(args.browser, FIGURES[name](), out)
        print(f"{out}: {out.stat().st_size:,} bytes")


def found_browser() -> str | None:
    """The first browser that is installed."""
    return next(filter(shutil.which, BROWSERS), None)


def checked_browser(browser: str | None) -> str:
    """It, if there is one; else the program ends."""
    if browser is None:
        sys.exit(
            f"No browser was found ({', '.join(BROWSERS)}): name one, --browser PATH."
        )
    return browser


def circuit() -> go.Figure:
    """The quickstart's figure."""
    task = ac.find_task("Pocket IOI")
    scores = ac.find_prune_algo("EAP").func(task.model, task.train_loader, None)
    fig = ac.draw_seq_graph(task.model, scores, THRESHOLD)
    return fig.update_traces(textfont={"size": 14}).update_layout(height=HEIGHT)


def curves() -> go.Figure:
    """How much of the task circuits of growing size do, means and intervals of five seeds."""
    with tempfile.TemporaryDirectory() as folder:
        config = ac.ExperimentConfig(
            tasks=("Pocket IOI",),
            algos=ALGOS,
            metrics=("Logit Diff Percent",),
            n_seeds=5,
            out=folder,
        )
        rows = ac.run_experiment(config).rows
    names = {ac.find_prune_algo(name).key: name for name in ALGOS}
    (fig,) = ac.measurement_figs(
        mean_measurements(rows), algo_names=names, of_seeds=seed_measurements(rows)
    )
    return fig


FIGURES: Mapping[str, Callable[[], go.Figure]] = {
    "pocket_ioi_circuit": circuit,
    "pocket_ioi_curves": curves,
}
"""The picture's name -> what is in it."""


def draw(
    browser: str | None,
    fig: go.Figure,
    out: Path,
    size: tuple[int, int] = (WIDTH, HEIGHT),
) -> None:
    """What a browser shows of a figure alone, as PNG; of its own height, if it has one."""
    height = round(fig.layout.height or size[1])  # type: ignore[attr-defined]
    fig = go.Figure(fig).update_layout(width=size[0], height=height)
    html = fig.to_html(full_html=False, config={"displayModeBar": False})
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder, "figure.html")
        page.write_text(
            f"<!doctype html><meta charset=utf-8><body style='margin:0'>{html}",
            encoding="utf-8",
        )
        screenshot(checked_browser(browser), page, out, (size[0], height))


def screenshot(
    browser: str, page: Path, out: Path, size: tuple[int, int], scale: float = 1.5
) -> None:
    """What a browser shows of a page; larger ones are sharp on fine screens too."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    options += ["--virtual-time-budget=20000", f"--force-device-scale-factor={scale}"]
    options += ["--disable-background-networking", f"--window-size={size[0]},{size[1]}"]
    subprocess.run(
        [browser, *options, f"--screenshot={out}", page.as_uri()],
        check=True,
        capture_output=True,
        timeout=240,
    )


if __name__ == "__main__":
    main()

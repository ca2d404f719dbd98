"""Draw the picture of README's quickstart: docs/images/pocket_ioi_circuit.png.

    python scripts/draw_quickstart.py                  # needs Chromium or Chrome
    python scripts/draw_quickstart.py --browser chromium --out elsewhere.png

The circuit is that of the quickstart; only the size and the margins are for a page of text.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import auto_circuit as ac

IMAGE = Path(__file__).resolve().parents[1] / "docs" / "images" / "pocket_ioi_circuit.png"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
WIDTH, HEIGHT = 1000, 600
THRESHOLD = 0.1


def main() -> None:
    """Draw the circuit in a browser, and keep what it shows."""
    parser = argparse.ArgumentParser(description="Draw the picture of the README.")
    parser.add_argument("--out", type=Path, default=IMAGE)
    parser.add_argument("--browser", default=next(filter(shutil.which, BROWSERS), None))
    args = parser.parse_args()
    if args.browser is None:
        sys.exit(
            f"No browser was found ({', '.join(BROWSERS)}): name one, --browser PATH."
        )
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder, "circuit.html")
        page.write_text(circuit_page(), encoding="utf-8")
        screenshot(args.browser, page, args.out)
    print(f"{args.out}: {args.out.stat().st_size:,} bytes")


def circuit_page() -> str:
    """The quickstart's figure as a page without margins."""
    task = ac.find_task("Pocket IOI")
    scores = ac.find_prune_algo("EAP").func(task.model, task.train_loader, None)
    fig = ac.draw_seq_graph(task.model, scores, THRESHOLD)
    fig.update_layout(width=WIDTH, height=HEIGHT)
    fig.update_traces(textfont={"size": 14})
    figure = fig.to_html(full_html=False, config={"displayModeBar": False})
    return f"<!doctype html><meta charset=utf-8><body style='margin:0'>{figure}"


def screenshot(browser: str, page: Path, out: Path) -> None:
    """What a browser shows of a page, at a size that is sharp on fine screens too."""
    size = f"--window-size={WIDTH},{HEIGHT}"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    options += ["--virtual-time-budget=20000", "--force-device-scale-factor=1.5", size]
    subprocess.run(
        [browser, *options, f"--screenshot={out}", page.as_uri()],
        check=True,
        capture_output=True,
        timeout=240,
    )


if __name__ == "__main__":
    main()

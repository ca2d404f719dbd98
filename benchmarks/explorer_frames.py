"""How long frames take in the circuit explorer while the slider moves.

    python benchmarks/explorer_frames.py

Opens pages with the graph of GPT-2 small (32,491 edges) in headless Chromium, which draws
without a GPU, and prints for each the file's size, the time until the first circuit is
drawn, and the median and the 95th percentile of the time between two frames.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
from playwright.sync_api import Page, sync_playwright

sys.path.insert(0, str(Path(__file__).parents[1]))

from auto_circuit.explorer.page import write_explorer  # noqa: E402
from tests.browser import find_browser  # noqa: E402
from tests.explorer.views import made_algorithm, made_graph, made_view  # noqa: E402

MOVE = """async ([last, millis]) => {
  const slider = document.querySelector('.ace-slider input');
  const times = [];
  let before = performance.now();
  const start = before;
  await new Promise((done) => {
    const frame = (now) => {
      times.push(now - before);
      before = now;
      const share = (now - start) / millis;
      if (share > 1) return done();
      // There and back, as a hand does it.
      const at = Math.round(last * (share < 0.5 ? 2 * share : 2 - 2 * share));
      if (slider.value !== `${at}`) {
        slider.value = `${at}`;
        slider.dispatchEvent(new Event('input', { bubbles: true }));
      }
      requestAnimationFrame(frame);
    };
    requestAnimationFrame(frame);
  });
  return times;
}"""
OPENED = "document.querySelector('.ace-outcome')?.textContent.includes('edges')"


def sizes_to(n_edges: int, n_sizes: int = 40) -> list[int]:
    """Sizes from 0 to the whole, as many as a sweep measures."""
    return sorted({0, *np.geomspace(1, n_edges, n_sizes).astype(int).tolist()})


def frame_times(page: Page, last: int, seconds: float = 8) -> np.ndarray:
    """The times between frames in ms while the slider goes to a size and back."""
    return np.array(page.evaluate(MOVE, [last, 1000 * seconds])[2:])


def report(page: Page, path: Path, what: str, most: int) -> None:
    """Print what one page takes when at most so many edges are drawn."""
    page.goto(path.as_uri())
    page.wait_for_function(OPENED)
    opened = page.evaluate("performance.now()")
    page.get_by_label("Draw at most").select_option(str(most))
    last = int(page.get_by_label("Circuit size").get_attribute("max") or 0)
    times = frame_times(page, last)
    print(
        f"{what}: {path.stat().st_size / 1e6:.1f} MB, opens in {opened / 1000:.2f} s; "
        f"{len(times)} frames, median {np.median(times):.0f} ms, "
        f"95 % within {np.percentile(times, 95):.0f} ms, longest {times.max():.0f} ms",
        flush=True,
    )


def main() -> None:
    """Print the frame times of three pages."""
    gpt2, pocket = made_graph(12, 12), made_graph(4, 8, 34)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        pages = {}
        for name, graph, most in (
            ("2,000 of GPT-2's edges", gpt2, 2000),
            ("20,000 of GPT-2's edges", gpt2, 20_000),
            ("2,000 edges at 34 positions", pocket, 2000),
        ):
            algorithms = [
                made_algorithm(graph, f"A{i}", (2 * i, 2 * i + 1), sizes_to(most))
                for i in range(10)
            ]
            path = Path(folder) / f"{len(pages)}.html"
            write_explorer(path, [made_view(graph, algorithms)])
            pages[name] = path
        browser = playwright.chromium.launch(
            executable_path=find_browser(), args=["--no-sandbox", "--disable-gpu"]
        )
        for name, path in pages.items():
            for most in (2000, 20_000) if "20,000" in name else (2000,):
                page = browser.new_page(viewport={"width": 1400, "height": 900})
                report(page, path, f"{name}, at most {most:,} drawn", most)
                page.close()
        browser.close()


if __name__ == "__main__":
    main()

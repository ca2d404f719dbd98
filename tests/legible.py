"""What is wrong with a figure for a reader: texts that overlap, leave it or do not fit.

A figure is drawn in Chromium, and the box of every text is looked at, turned as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from tests.browser import chromium

WIDTH, HEIGHT = 1000, 720

PROBLEMS = """
() => {
  const place = document.querySelector('.js-plotly-plot').getBoundingClientRect();
  const texts = [];
  for (const text of document.querySelectorAll('svg.main-svg text')) {
    const said = (text.getAttribute('data-unformatted') || text.textContent).trim();
    const style = getComputedStyle(text);
    if (!said || style.display === 'none' || +style.opacity === 0) continue;
    if (text.closest('.hoverlayer, .modebar, defs')) continue;
    const box = text.getBBox(), turn = text.getScreenCTM();
    if (box.width === 0 || box.height === 0) continue;
    // A line's box has room above and below its letters.
    const lines = 1 + (said.match(/<br>/g) || []).length;
    const trim = 0.22 * box.height / lines;
    const corners = [[0, 0], [1, 0], [1, 1], [0, 1]].map(([right, down]) => {
      const x = box.x + right * box.width;
      const y = box.y + trim + down * (box.height - 2 * trim);
      return [turn.a * x + turn.c * y + turn.e, turn.b * x + turn.d * y + turn.f];
    });
    texts.push([said, corners]);
  }
  const apart = (one, other) => {
    for (const polygon of [one, other])
      for (let i = 0; i < 4; i++) {
        const [x0, y0] = polygon[i], [x1, y1] = polygon[(i + 1) % 4];
        const along = ([x, y]) => (x * (y1 - y0) - y * (x1 - x0)) / Math.hypot(x1 - x0, y1 - y0);
        const a = one.map(along), b = other.map(along);
        if (Math.min(...a) >= Math.max(...b) - 0.5) return true;
        if (Math.min(...b) >= Math.max(...a) - 0.5) return true;
      }
    return false;
  };
  const problems = [];
  texts.forEach(([said, box], i) => {
    if (box.some(([x, y]) => x < place.left - 1 || x > place.right + 1
                          || y < place.top - 1 || y > place.bottom + 1))
      problems.push(`leaves the figure: ${said}`);
    for (const [other, its] of texts.slice(i + 1))
      if (!apart(box, its)) problems.push(`overlap: ${said} | ${other}`);
  });
  for (const bar of document.querySelectorAll('.legend .scrollbar'))
    if (+bar.getAttribute('height') > 0) problems.push('the legend has to be scrolled');
  if (place.width > innerWidth + 1) problems.push(`it is ${place.width} px wide`);
  if (!texts.length) problems.push('it has no text');
  return problems;
}
"""


@contextmanager
def browser_page() -> Iterator[Any]:
    """A page of Chromium, 1000 px wide."""
    with chromium() as browser:
        yield browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})


def problems(page: Any, fig: go.Figure, folder: Path, name: str) -> list[str]:
    """What is wrong with a figure's texts; its picture is left in the folder."""
    path = folder / f"{name}.html"
    fig.write_html(path, include_plotlyjs="directory")
    page.goto(path.as_uri())
    page.wait_for_selector(".js-plotly-plot .main-svg")
    page.wait_for_timeout(300)
    found = page.evaluate(PROBLEMS)
    page.screenshot(path=folder / f"{name}.png", full_page=True)
    return found

"use strict";
document.documentElement.classList.add("with-script");
// Sortable tables: each title becomes a button. Without this script they are plain tables.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const titles = [...table.tHead.rows[0].cells];
  titles.forEach((title, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...title.childNodes);
    title.append(button);
    button.addEventListener("click", () => {
      const isNumber = title.classList.contains("number");
      const now = title.getAttribute("aria-sort");
      const order = now === "ascending" ? "descending" : "ascending";
      titles.forEach((other) => other.removeAttribute("aria-sort"));
      title.setAttribute("aria-sort", order);
      body.append(...sorted([...body.rows], column, isNumber, order === "ascending" ? 1 : -1));
    });
  });
}

function sorted(rows, column, isNumber, sign) {
  const value = (row) => {
    const text = row.cells[column].dataset.value;
    if (text === undefined) return null;
    if (!isNumber) return text;
    return text === "inf" ? Infinity : text === "-inf" ? -Infinity : Number(text);
  };
  return rows.sort((first, second) => {
    const [a, b] = [value(first), value(second)];
    if (a === null || b === null) return (a === null) - (b === null); // unknown ones last
    return sign * (isNumber ? Math.sign(a - b) || 0 : a.localeCompare(b));
  });
}

// Figures are drawn when they come near, and Plotly is read when the first one does, so that the
// page opens at once.
const config = { displayModeBar: false, responsive: true };
let library = null;
async function readLibrary() {
  const bytes = await unzipped(document.getElementById("plotly").textContent);
  const script = document.createElement("script");
  script.textContent = new TextDecoder().decode(bytes);
  document.head.append(script);
}
async function draw(place) {
  if (typeof DecompressionStream === "undefined") {
    place.textContent = "This figure needs a newer browser (2023 or later, with DecompressionStream).";
    return;
  }
  library ??= readLibrary();
  await library;
  const { data, layout } = JSON.parse(document.getElementById(place.dataset.figure).textContent);
  delete layout.height;
  layout.autosize = true;
  Plotly.newPlot(place, data, layout, config);
}
const near = new IntersectionObserver(
  (entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      near.unobserve(entry.target);
      draw(entry.target);
    }
  },
  { rootMargin: "600px" },
);
document.querySelectorAll(".drawn").forEach((place) => near.observe(place));

// The contents show where the reader is.
const links = new Map([...document.querySelectorAll("nav a")].map((a) => [a.hash.slice(1), a]));
const seen = new IntersectionObserver(
  (entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      links.forEach((link) => link.removeAttribute("aria-current"));
      links.get(entry.target.id)?.setAttribute("aria-current", "true");
    }
  },
  { rootMargin: "-10% 0px -80% 0px" },
);
document.querySelectorAll("main > section").forEach((section) => seen.observe(section));

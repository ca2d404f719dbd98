// Where a head attends on the first prompt, and which words a node writes for.

import { arrayOf, signed } from "./numbers.js";
import { el, fill, newId, select, tokenText } from "./dom.js";

const CELL = 13;
const SIDES = [
  ["clean", "Clean prompt"],
  ["corrupt", "Corrupt prompt"],
];

/** The panel of a head: two maps, and for one token a table of where it looks. */
export function attentionPanel(task, key) {
  const head = task.attentionOfNode.get(Number(key.split("@")[0]));
  const data = task.data.attention;
  if (head === undefined || data === null) return null;
  const patterns = SIDES.map(([side, title]) => {
    const [, n] = data[side].shape;
    const all = patternsOf(task, side);
    const tokens = task.data.prompts[0][side].tokens.map(tokenText);
    return { title, tokens, n, values: all.subarray(head * n * n, (head + 1) * n * n) };
  });
  const last = patterns[0].n - 1;
  const table = el("div", { class: "ace-tables" });
  const show = (query) => fill(table, patterns.map((pattern) => lookTable(pattern, query)));
  const at = task.columnOf(key);
  const first = at === null ? last : at + task.data.graph.first_token;
  const options = patterns[0].tokens.map((token, i) => [`${i}`, `${i} ${token}`]);
  const { field, input } = select("From token", options, (value) => show(Number(value)));
  input.value = `${first}`;
  show(first);
  return el(
    "section",
    { class: "ace-section" },
    el("h4", {}, `Attention of ${task.nodeOf(key).name}`),
    el("div", { class: "ace-maps" }, patterns.map(mapOf)),
    field,
    table,
  );
}

function patternsOf(task, side) {
  task.patterns ??= {};
  task.patterns[side] ??= arrayOf(task.data.attention[side]);
  return task.patterns[side];
}

function mapOf(pattern) {
  const { n, values, tokens, title } = pattern;
  const margin = 6.2 * Math.min(12, Math.max(...tokens.map((token) => [...token].length))) + 8;
  const size = margin + n * CELL;
  const ratio = Math.min(window.devicePixelRatio || 1, 2);
  const canvas = el("canvas", {
    width: Math.round(size * ratio),
    height: Math.round(size * ratio),
    role: "img",
    "aria-label": `${title}: ${inWords(pattern)}`,
  });
  const draw = canvas.getContext("2d");
  draw.scale(ratio, ratio);
  draw.font = "10px system-ui, sans-serif";
  for (let query = 0; query < n; query += 1) {
    for (let k = 0; k < n; k += 1) {
      const share = values[query * n + k] / 255;
      draw.fillStyle = shade(share);
      draw.fillRect(margin + k * CELL, margin + query * CELL, CELL - 1, CELL - 1);
    }
  }
  draw.fillStyle = "#1f2430";
  draw.textBaseline = "middle";
  tokens.forEach((token, i) => {
    const text = [...token].slice(0, 12).join("");
    const middle = margin + (i + 0.5) * CELL;
    draw.textAlign = "right";
    draw.fillText(text, margin - 4, middle);
    draw.save();
    draw.translate(middle, margin - 4);
    draw.rotate(-Math.PI / 2);
    draw.textAlign = "left";
    draw.fillText(text, 0, 0);
    draw.restore();
  });
  return el("figure", {}, el("figcaption", {}, `${title} (rows look at columns)`), canvas);
}

function shade(share) {
  const mix = (low, high) => Math.round(low + (high - low) * share ** 0.6);
  return `rgb(${mix(243, 11)}, ${mix(244, 60)}, ${mix(246, 140)})`;
}

/** The strongest look of a map, for those who do not see it. */
function inWords({ n, values, tokens }) {
  const query = n - 1;
  const best = strongest(values, n, query)[0];
  const share = percent(best.share);
  return `the last token, ${tokens[query]}, looks most at ${tokens[best.key]} (${share})`;
}

function strongest(values, n, query) {
  const row = [...values.subarray(query * n, (query + 1) * n)];
  return row
    .map((value, key) => ({ key, share: value / 255 }))
    .sort((a, b) => b.share - a.share);
}

function percent(share) {
  return `${Math.round(share * 100)} %`;
}

function lookTable({ title, tokens, n, values }, query) {
  if (query >= n) return el("p", {}, `${title}: it has no such token.`);
  const most = strongest(values, n, query).slice(0, 5);
  const rows = most.filter(({ share }, i) => i === 0 || share >= 0.01);
  return wordTable(
    `${title}: ${tokens[query]} looks at`,
    ["Token", "Share"],
    rows.map(({ key, share }) => [`${tokens[key]} (${key})`, percent(share), share]),
  );
}

/** A small table of [text, number as text, share of the bar]. */
function wordTable(caption, heads, rows) {
  const widest = Math.max(...rows.map((row) => Math.abs(row[2])), 1e-9);
  return el(
    "table",
    { class: "ace-words" },
    el("caption", {}, caption),
    el("thead", {}, el("tr", {}, heads.map((head) => el("th", { scope: "col" }, head)))),
    el(
      "tbody",
      {},
      rows.map(([text, number, share]) => {
        const bar = el("span", { class: share < 0 ? "ace-bar ace-minus" : "ace-bar" });
        bar.style.width = `${(Math.abs(share) / widest) * 56}px`;
        return el(
          "tr",
          {},
          el("td", {}, el("bdi", {}, text)),
          el("td", { class: "ace-number" }, number, bar),
        );
      }),
    ),
  );
}

/** The words that a node writes for, on both sides. */
export function effectsPanel(task, key) {
  const data = task.data.effects;
  const source = task.sourceOfNode.get(Number(key.split("@")[0]));
  if (data === null || source === undefined) return null;
  const prompt = task.data.prompts[0];
  const tables = SIDES.map(([side, title]) => {
    const [, n] = data[side].words.shape;
    const words = arrayOf(data[side].words).subarray(source * n, (source + 1) * n);
    const values = arrayOf(data[side].values).subarray(source * n, (source + 1) * n);
    const rows = [...words].map((word, i) => [
      tokenText(data.words[word]),
      signed(values[i]),
      values[i],
    ]);
    return wordTable(title, ["Word", "Adds to its logit"], rows);
  });
  const toAnswer = SIDES.map(([side, title]) => answerText(data[side], source, title, prompt));
  const id = newId();
  return el(
    "section",
    { class: "ace-section", "aria-labelledby": id },
    el("h4", { id }, `Words that ${task.nodeOf(key).name} writes for`),
    el(
      "p",
      { class: "ace-note" },
      "Direct effect on the logits at the last position of the first prompt, through the " +
        "final norm and the unembedding.",
    ),
    toAnswer.map((text) => (text ? el("p", { class: "ace-note" }, text) : null)),
    el("div", { class: "ace-tables" }, tables),
  );
}

function answerText(side, source, name, prompt) {
  if (side.answer === null) return null;
  const part = (values, word) => `${signed(arrayOf(values)[source])} to ${tokenText(word)}`;
  const parts = [`${part(side.answer, prompt.answers[0])} (the answer)`];
  if (side.wrong_answer !== null) parts.push(part(side.wrong_answer, prompt.wrong_answers[0]));
  return `${name}: ${parts.join(", ")}`;
}

// What is beside the graph: a node's edges, or the circuit's, as lists.

import { attentionPanel, effectsPanel } from "./attention.js";
import { el, fill, newId } from "./dom.js";
import { counted } from "./numbers.js";

const FIRST = 10;

/** A list of edges, strongest first, of which more can be shown. */
function edgeList(title, edges, app) {
  const id = newId();
  const list = el("ol", { class: "ace-edges", "aria-labelledby": id });
  const more = el("button", { type: "button", class: "ace-more" });
  let n = 0;
  const grow = () => {
    const next = [...edges.slice(n, n === 0 ? FIRST : n + 100)];
    const rows = next.map((edge) => edgeRow(edge, app));
    list.append(...rows);
    n += next.length;
    more.textContent = `Show more (${n} of ${edges.length})`;
    more.hidden = n >= edges.length;
    return rows[0];
  };
  more.addEventListener("click", () => grow()?.querySelector("button").focus());
  grow();
  const heading = el("h4", { id }, `${title} (${edges.length})`);
  if (!edges.length) return [heading, el("p", { class: "ace-note" }, "None.")];
  return [heading, list, more];
}

function edgeRow(edge, app) {
  const { task, algorithm } = app;
  const score = algorithm.scores[edge];
  const look = app.wanted.get(edge);
  const notes = [algorithm.rankText(edge)];
  if (look && look.kind !== "positive" && look.kind !== "negative") notes.push(app.naming(look.text));
  if (!algorithm.isIn(edge, app.nDrawn)) notes.push("not in this circuit");
  const button = el(
    "button",
    { type: "button", class: "ace-edge" },
    el("span", { class: "ace-name" }, el("bdi", {}, task.edgeName(edge))),
    el(
      "span",
      { class: score < 0 ? "ace-score ace-negative" : "ace-score ace-positive" },
      algorithm.scoreText(edge),
    ),
    el("span", { class: "ace-place" }, notes.join(", ")),
  );
  button.addEventListener("focus", () => app.pointAt(edge));
  button.addEventListener("mouseenter", () => app.pointAt(edge));
  button.addEventListener("blur", () => app.pointAt(null));
  button.addEventListener("mouseleave", () => app.pointAt(null));
  button.addEventListener("click", () => app.follow(edge));
  return el("li", {}, button);
}

/** The panel without a node: the circuit's edges. */
export function circuitPanel(element, app) {
  const edges = [...app.algorithm.circuit(app.nDrawn)];
  fill(
    element,
    el("h3", { tabindex: "-1" }, "The circuit"),
    el("p", { class: "ace-note" }, "Choose a node in the graph, or by search, to see its edges."),
    edgeList("Edges, strongest first", edges, app),
    notes(app),
    prompts(app),
  );
}

/** The panel of a node. */
export function nodePanel(element, app, key) {
  const { task, algorithm } = app;
  const { into, out } = task.edgesOf(key, algorithm);
  const inside = (edges) => edges.filter((edge) => algorithm.isIn(edge, app.nDrawn)).length;
  const node = task.nodeOf(key);
  const at = task.columnOf(key);
  const where = at === null ? null : positionText(task, at);
  fill(
    element,
    el(
      "div",
      { class: "ace-title" },
      el("h3", { tabindex: "-1" }, task.nodeName(key)),
      el("button", { type: "button", onclick: () => app.choose(null) }, "Close"),
    ),
    el(
      "p",
      { class: "ace-note" },
      [
        node.kind,
        `layer ${node.layer}`,
        where,
        `${counted(inside(into), "edge")} in and ${inside(out)} out in this circuit`,
      ]
        .filter(Boolean)
        .join(" · "),
    ),
    edgeList("Incoming edges", into, app),
    edgeList("Outgoing edges", out, app),
    attentionPanel(task, key),
    effectsPanel(task, key),
    notes(app),
  );
}

export function positionText(task, at) {
  const token = task.token(at);
  return `position ${at}, ${task.label(at)}${token === null ? "" : ` “${token.trim()}”`}`;
}

function notes(app) {
  return app.task.data.notes.map((note) => el("p", { class: "ace-note" }, note));
}

/** The example prompts, clean and corrupt, what differs marked. */
function prompts(app) {
  const shown = app.task.data.prompts.map((prompt) =>
    el(
      "li",
      {},
      side("Clean", prompt.clean),
      side("Corrupt", prompt.corrupt),
      el(
        "p",
        {},
        "Answer: ",
        el("bdi", {}, prompt.answers.join(", ")),
        prompt.wrong_answers.length ? ", not " : "",
        el("bdi", {}, prompt.wrong_answers.join(", ")),
      ),
    ),
  );
  if (!shown.length) return null;
  const details = el(
    "details",
    {
      class: "ace-prompts",
      open: app.hasPrompts === true,
      // It stays open when the panel is made again.
      ontoggle: () => {
        app.hasPrompts = details.open;
      },
    },
    el("summary", {}, "Example prompts"),
    el("ol", {}, shown),
  );
  return details;
}

function side(name, { tokens, differs }) {
  const marked = new Set(differs);
  const words = tokens.map((token, i) => [
    el(marked.has(i) ? "mark" : "span", {}, el("bdi", {}, token)),
    " ",
  ]);
  return el("p", {}, el("b", {}, `${name}: `), words.flat());
}

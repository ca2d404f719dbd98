// The picture of a circuit: layers upwards, heads (or token positions) sideways.

import cytoscape from "cytoscape";
import { el, short, tokenText } from "./dom.js";
import { Lines } from "./lines.js";

const BLUE = "#0b5cad";
const ORANGE = "#c05a00";
const INK = "#1f2430";
const ACCENT = "#6d28d9";
const [DASHED, DOTTED] = [
  [7, 4],
  [2, 4],
];

/** How edges of each kind are drawn. Colour never stands alone: lines differ too. */
export const KINDS = {
  positive: { color: BLUE, dash: [], text: "positive score (helps the task)" },
  negative: { color: ORANGE, dash: DASHED, text: "negative score (works against it)" },
  hit: { color: BLUE, dash: [], text: "hit: in both" },
  extra: { color: ORANGE, dash: DASHED, text: "extra: not in the known circuit" },
  missed: { color: INK, dash: DOTTED, text: "missed: only in the known circuit" },
  both: { color: INK, dash: [], text: "both" },
  onlyA: { color: BLUE, dash: DASHED, text: "only A" },
  onlyB: { color: ORANGE, dash: DOTTED, text: "only B" },
};

const FONT = "Helvetica Neue, Helvetica, Arial, sans-serif";
const GAP = { x: 58, y: 58 };
const LINE = 30;
const EDGE = 16;
// What is larger than the picture at this zoom is seen in parts: in a narrow one, such that
// names can be read.
const MIN_ZOOM = { wide: 0.14, narrow: 0.5 };
const NARROW = 600;

const STYLE = [
  {
    selector: "node",
    style: {
      shape: "round-rectangle",
      width: 46,
      height: 24,
      "background-color": "#f3f4f6",
      "border-width": 1,
      "border-color": "#9ca3af",
      label: "data(label)",
      color: INK,
      "font-family": FONT,
      "font-size": 12,
      "min-zoomed-font-size": 6,
      "text-valign": "center",
      "text-halign": "center",
    },
  },
  {
    // Thousands of nodes: what is quick to draw.
    selector: "node.many",
    style: { shape: "rectangle", "border-width": 0, "background-color": "#e1e4ea" },
  },
  { selector: "node.mlp", style: { "background-color": "#dbe6fc", width: 64 } },
  {
    selector: "node.end",
    style: { shape: "rectangle", width: 96, "background-color": "#e5e7eb" },
  },
  {
    selector: "node.idle",
    style: { "background-color": "#fafafb", "border-color": "#dcdfe5", color: "#6b7280" },
  },
  { selector: "node.gone", style: { display: "none" } },
  {
    selector: "node.token",
    style: {
      "background-opacity": 0,
      "border-width": 0,
      "font-size": 11,
      "min-zoomed-font-size": 0,
      "text-wrap": "wrap",
      events: "no",
    },
  },
  {
    selector: "node.focused, node.selected",
    style: { "border-width": 3, "border-color": ACCENT, color: INK },
  },
  { selector: "node.selected", style: { "background-color": "#ede9fe" } },
];

export class Graph {
  constructor(element, handlers) {
    this.handlers = handlers;
    this.calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
    const canvas = el("canvas", { class: "ace-lines", "aria-hidden": "true" });
    const nodes = el("div", { class: "ace-nodes" });
    element.append(canvas, nodes);
    this.lines = new Lines(canvas, KINDS);
    this.cy = cytoscape({
      container: nodes,
      style: STYLE,
      layout: { name: "preset" },
      autoungrabify: true,
      autounselectify: true,
      boxSelectionEnabled: false,
      userZoomingEnabled: false,
      pixelRatio: Math.min(window.devicePixelRatio || 1, 2),
      minZoom: 0.05,
      maxZoom: 3,
    });
    // Cytoscape remembers where it is on the page, and does not see that it was moved there.
    for (const name of ["pointermove", "pointerdown", "touchstart", "mousemove", "mousedown"]) {
      const forget = () => this.cy.renderer().invalidateContainerClientCoordsCache();
      element.addEventListener(name, forget, { capture: true, passive: true });
    }
    this.listen();
    this.frame = null;
    this.observer = new ResizeObserver(() => {
      this.cy.resize();
      if (this.isFitted) this.fit();
      this.draw();
    });
    this.observer.observe(element);
  }

  listen() {
    const { cy, handlers } = this;
    cy.on("mouseover", "node", (event) => handlers.hover(event.target.id()));
    cy.on("mouseout", "node", () => handlers.hover(null));
    cy.on("tap", "node", (event) => handlers.select(event.target.id()));
    cy.on("mousemove tap", (event) => {
      if (event.target !== cy) return;
      const { x, y } = event.position;
      const edge = this.lines.at(x, y, cy.zoom());
      if (edge === this.pointed) return;
      this.pointed = edge;
      this.lines.focused = edge;
      this.draw();
      handlers.hover(edge === null ? null : `e${edge}`);
    });
    cy.on("viewport", () => this.draw());
  }

  destroy() {
    this.observer.disconnect();
    if (this.frame !== null) cancelAnimationFrame(this.frame);
    this.cy.destroy();
  }

  /** Another task: its nodes, without edges. */
  setTask(task) {
    this.task = task;
    this.wanted = new Map();
    this.focused = this.chosen = this.lines.chosen = this.lines.focused = null;
    this.lines.carried = [];
    this.pointed = null;
    this.cy.elements().remove();
    this.byPosition = task.nPositions !== null;
    const keys = task.nodes.flatMap((_, node) =>
      this.byPosition
        ? [...Array(task.nPositions).keys()].map((at) => task.key(node, at))
        : [task.key(node, null)],
    );
    this.keys = new Set(keys);
    this.idle = new Set(keys);
    this.busy = new Set();
    this.cy.add(
      keys.map((key) => ({
        group: "nodes",
        data: { id: key, label: task.nodeOf(key).name },
        classes: `${className(task, key)} ${this.byPosition ? "gone many" : "idle"}`,
      })),
    );
    this.cy.add(tokenNodes(task));
    this.tokenSize = null;
    this.isFitted = true;
    this.place();
  }

  /** Put the nodes where they belong; with positions, only those of the circuit have a place. */
  place() {
    const isShown = this.byPosition ? (key) => this.busy.has(key) : () => true;
    this.places = placesOf(this.task, isShown, this.ratio);
    this.cy.batch(() => {
      for (const [key, at] of this.places) this.cy.getElementById(key).position(at);
      if (this.byPosition) this.placeTokens();
    });
    if (this.isFitted) this.fit();
  }

  /** Of the width to the height that the graph should have. */
  get ratio() {
    const [w, h] = [this.cy.width() || 3, this.cy.height() || 2];
    return w < NARROW ? Infinity : w / h;
  }

  placeTokens() {
    let x = 0;
    const columns = new Map();
    for (const [key, place] of this.places) {
      const at = this.task.columnOf(key);
      columns.set(at, [...(columns.get(at) ?? []), place.x]);
    }
    for (let at = 0; at < this.task.nPositions; at += 1) {
      const xs = columns.get(at) ?? [];
      const left = xs.length ? Math.min(...xs) : x;
      const right = xs.length ? Math.max(...xs) : x;
      this.cy.getElementById(`t${at}`).position({ x: (left + right) / 2, y: 46 });
      x = right + 1.2 * GAP.x;
    }
  }

  /** Draw these edges, the strongest first: Map of edge -> {kind, width}. */
  setEdges(wanted) {
    if (sameLooks(wanted, this.wanted)) return;
    this.wanted = wanted;
    if (this.markBusy() && this.byPosition) {
      this.place();
      this.lines.carried = this.carried();
    }
    this.lines.set(this.task, wanted, this.places);
    this.draw();
  }

  /** Draws the lines in the next frame. */
  draw() {
    if (this.frame !== null || !this.task) return;
    this.frame = requestAnimationFrame(() => {
      this.frame = null;
      const { cy } = this;
      const [width, height] = [cy.width(), cy.height()];
      this.lines.draw({ zoom: cy.zoom(), pan: cy.pan(), width, height });
    });
  }

  /** Nodes without an edge are pale, or not there. Have they changed? */
  markBusy() {
    const busy = new Set();
    for (const edge of this.wanted.keys()) {
      for (const key of this.task.ends(edge)) busy.add(key);
    }
    const changed = [...this.keys].filter((key) => busy.has(key) === this.idle.has(key));
    const name = this.byPosition ? "gone" : "idle";
    this.cy.batch(() => {
      for (const key of changed) {
        const isIdle = !busy.has(key);
        this.cy.getElementById(key).toggleClass(name, isIdle);
        if (isIdle) this.idle.add(key);
        else this.idle.delete(key);
      }
    });
    this.busy = busy;
    return changed.length > 0;
  }

  /** With positions: thin lines join the places at which one head is in the circuit. */
  carried() {
    const last = new Map();
    const lines = [];
    for (let at = 0; at < this.task.nPositions; at += 1) {
      this.task.nodes.forEach((node, i) => {
        const place = this.places.get(this.task.key(i, at));
        if (node.kind !== "attention" || place === undefined) return;
        const before = last.get(i);
        if (before) lines.push({ x1: before.x, y1: before.y, x2: place.x, y2: place.y });
        last.set(i, place);
      });
    }
    return lines;
  }

  fit() {
    this.isFitted = true;
    const { cy } = this;
    const box = boxOf(this.places, this.byPosition);
    const [w, h] = [cy.width() - 2 * EDGE, cy.height() - 2 * EDGE];
    const whole = Math.min(w / (box.x2 - box.x1), h / (box.y2 - box.y1), 1.6);
    const least = w < NARROW ? MIN_ZOOM.narrow : MIN_ZOOM.wide;
    const zoom = Math.max(whole, least);
    // What is too large is as small as can be read, from its left end.
    const x = whole < least ? EDGE : EDGE + (w - zoom * (box.x2 - box.x1)) / 2;
    const y = EDGE + (h - zoom * (box.y2 - box.y1)) / 2;
    cy.viewport({ zoom, pan: { x: x - zoom * box.x1, y: y - zoom * box.y1 } });
    // Tokens stay legible.
    const size = Math.round(Math.min(19, Math.max(11, 11 / zoom)));
    if (this.byPosition && size !== this.tokenSize) {
      this.tokenSize = size;
      cy.elements("node.token").style("font-size", size);
    }
    this.draw();
  }

  zoom(factor) {
    this.isFitted = false;
    const center = { x: this.cy.width() / 2, y: this.cy.height() / 2 };
    this.cy.zoom({ level: this.cy.zoom() * factor, renderedPosition: center });
  }

  /** Mark the node or edge (its id) that the keyboard is on; a node is brought into sight. */
  focus(id) {
    const isEdge = id !== null && id.startsWith("e");
    this.lines.focused = isEdge ? Number(id.slice(1)) : null;
    this.cy.batch(() => {
      if (this.focused !== null) this.cy.getElementById(this.focused).removeClass("focused");
      this.focused = isEdge ? null : id;
      if (this.focused !== null) this.cy.getElementById(id).addClass("focused");
    });
    if (this.focused !== null && this.places.has(id)) this.bringIntoSight(id);
    this.draw();
  }

  bringIntoSight(id) {
    const at = this.renderedPosition(id);
    if (at === null) return;
    const [w, h] = [this.cy.width(), this.cy.height()];
    if (at.x > 20 && at.y > 20 && at.x < w - 20 && at.y < h - 20) return;
    this.isFitted = false;
    const pan = this.cy.pan();
    const to = { x: pan.x + w / 2 - at.x, y: pan.y + h / 2 - at.y };
    if (this.calm) this.cy.pan(to);
    else this.cy.animate({ pan: to }, { duration: 150 });
  }

  /** Mark the chosen node, and make all edges pale that are not its own. */
  choose(key) {
    this.cy.batch(() => {
      if (this.chosen !== null) this.cy.getElementById(this.chosen).removeClass("selected");
      this.chosen = this.lines.chosen = key;
      if (key !== null) this.cy.getElementById(key).addClass("selected");
    });
    this.draw();
  }

  /** Where a node or an edge is, in the element of the graph; null if it is not there. */
  renderedPosition(id) {
    const isEdge = id.startsWith("e");
    const at = isEdge ? this.lines.middle(Number(id.slice(1))) : this.places.get(id);
    if (!at) return null;
    const [zoom, pan] = [this.cy.zoom(), this.cy.pan()];
    return { x: pan.x + zoom * at.x, y: pan.y + zoom * at.y };
  }

  /** The node that is next to another in a direction. */
  next(id, direction) {
    const from = this.places.get(id);
    if (from === undefined) return this.first();
    let best = null;
    let bestCost = Infinity;
    for (const [key, at] of this.places) {
      const [dx, dy] = [at.x - from.x, at.y - from.y];
      const along = { left: -dx, right: dx, up: -dy, down: dy }[direction];
      const across = Math.abs(direction === "left" || direction === "right" ? dy : dx);
      const isSideways = direction === "left" || direction === "right";
      if (along <= 1 || (isSideways && across > 1)) continue;
      const cost = isSideways ? along : along * 1000 + across;
      if (cost < bestCost) [best, bestCost] = [key, cost];
    }
    return best;
  }

  /** The bottommost node. */
  first() {
    let best = null;
    for (const [key, at] of this.places) {
      const lowest = best === null ? null : this.places.get(best);
      if (lowest === null || at.y > lowest.y || (at.y === lowest.y && at.x < lowest.x)) {
        best = key;
      }
    }
    return best;
  }
}

/** Are the same edges drawn in the same way? */
function sameLooks(one, other) {
  if (one.size !== other.size) return false;
  for (const [edge, { kind, width }] of one) {
    const look = other.get(edge);
    if (look === undefined || look.kind !== kind || look.width !== width) return false;
  }
  return true;
}

function className(task, key) {
  const kind = task.nodeOf(key).kind;
  if (kind === "mlp") return "mlp";
  return kind === "embed" || kind === "unembed" ? "end" : "other";
}

/** The box around all nodes, and the tokens below them. */
function boxOf(places, hasTokens) {
  const found = { x1: 0, y1: 0, x2: 1, y2: 1 };
  const all = [...places.values()];
  if (!all.length) return found;
  const [xs, ys] = [all.map((at) => at.x), all.map((at) => at.y)];
  return {
    x1: Math.min(...xs) - 52,
    x2: Math.max(...xs) + 52,
    y1: Math.min(...ys) - 18,
    y2: Math.max(...ys) + (hasTokens ? 78 : 18),
  };
}

/** Layer -> its nodes, the first layer first. */
function rowsOf(task) {
  const rows = new Map();
  task.nodes.forEach((node, i) => {
    rows.set(node.layer, [...(rows.get(node.layer) ?? []), i]);
  });
  return [...rows].sort(([a], [b]) => a - b).map(([, row]) => row);
}

/** Where each drawn node is: one row for each layer, the first at the bottom.
 *
 * With positions, a position is a column, as wide as the nodes are that it shows (isShown),
 * and the heads of a layer stand in short lines one above the other. ratio: of the picture's
 * width to its height; layers move apart to fill it.
 */
export function placesOf(task, isShown, ratio) {
  const rows = rowsOf(task);
  const perLine = task.nPositions === null ? Infinity : 3;
  const positions = task.nPositions === null ? [null] : [...Array(task.nPositions).keys()];
  const columns = positions.map((at) =>
    rows.map((row) => linesOf(row.map((node) => task.key(node, at)).filter(isShown), perLine)),
  );
  const bottoms = [0];
  rows.forEach((_, y) => {
    const nLines = Math.max(1, ...columns.map((column) => column[y].length));
    bottoms.push(bottoms[y] + GAP.y + (nLines - 1) * LINE);
  });
  const found = new Map();
  let left = 0;
  for (const column of columns) left += placeColumn(task, rows, column, { left, bottoms, found });
  const stretch = Math.min(2.5, Math.max(1, left / ratio / bottoms[rows.length]));
  for (const at of found.values()) at.y *= stretch;
  return found;
}

function linesOf(keys, perLine) {
  const lines = [];
  for (let i = 0; i < keys.length; i += perLine) {
    lines.push(keys.slice(i, perLine === Infinity ? undefined : i + perLine));
  }
  return lines;
}

/** Adds one column's nodes to `found`; how wide it is. */
function placeColumn(task, rows, column, { left, bottoms, found }) {
  const widest = Math.max(1, ...column.flat().map((line) => line.length));
  const middle = left + ((widest - 1) * GAP.x) / 2;
  let hasBeside = false;
  let least = 1;
  column.forEach((lines, y) => {
    lines.forEach((line, up) => {
      line.forEach((key, i) => {
        // MLPs stand beside the heads, so that no edge runs behind them.
        const isBeside = rows[y].length === 1 && task.nodeOf(key).kind === "mlp";
        hasBeside = hasBeside || isBeside;
        if (className(task, key) === "end") least = 1.9;
        const place = isBeside ? widest / 2 + 0.35 : i - (line.length - 1) / 2;
        // Nor behind the only head of a layer.
        const shift = rows[y].length === 1 && !isBeside ? [0, -14, 14][y % 3] : 0;
        found.set(key, {
          x: middle + place * GAP.x + shift,
          y: -(bottoms[y] + up * LINE),
        });
      });
    });
  });
  const isEmpty = column.every((lines) => lines.length === 0);
  return (isEmpty ? 1 : Math.max(least, widest + 0.4 + (hasBeside ? 1 : 0))) * GAP.x;
}

/** The tokens of the first prompt, which stand under their positions. */
function tokenNodes(task) {
  return [...Array(task.nPositions ?? 0).keys()].map((at) => {
    const token = task.token(at);
    const label = short(task.label(at), 9);
    const text = token === null ? label : `${label}\n${short(tokenText(token), 9)}`;
    return { group: "nodes", data: { id: `t${at}`, label: text }, classes: "token" };
  });
}

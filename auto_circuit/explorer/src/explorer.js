// The explorer: choices above, the graph, and a panel beside it.

import { Graph, KINDS } from "./graph.js";
import { MAX_STYLED } from "./lines.js";
import { MAIN_METRIC, Task } from "./task.js";
import { circuitPanel, nodePanel, positionText } from "./panel.js";
import { el, fill, newId, select, setOptions } from "./dom.js";
import { count, counted, plain, signed } from "./numbers.js";

const CAPS = [250, 500, 1000, 2000, 5000, 20000];
const DIRECTIONS = {
  ArrowLeft: "left",
  ArrowRight: "right",
  ArrowUp: "up",
  ArrowDown: "down",
};
const HELP =
  "Arrow keys go from node to node, Enter shows a node's edges in the panel, + and − zoom, " +
  "0 shows all, Escape lets go; drag to move the picture. The lists in the panel hold every " +
  "edge of the graph.";

export class Explorer {
  constructor(root, data) {
    this.root = root;
    this.tasks = data.tasks.map((task) => new Task(task));
    this.cap = 2000;
    this.wanted = new Map();
    this.build();
    this.setTask(0);
  }

  destroy() {
    clearTimeout(this.sayLater);
    this.graph.destroy();
    fill(this.root);
  }

  // ------------------------------------------------------------------- the elements

  build() {
    this.taskChoice = select(
      "Task",
      this.tasks.map((task, i) => [`${i}`, task.data.name]),
      (value) => this.setTask(Number(value)),
    );
    this.algorithmChoice = select("Algorithm", [], (value) => this.setAlgorithm(Number(value)));
    this.viewChoice = select("Show", [], (value) => this.setView(value));
    this.capChoice = select(
      "Draw at most",
      CAPS.map((cap) => [`${cap}`, `${count(cap)} edges`]),
      (value) => {
        this.cap = Number(value);
        this.update();
      },
    );
    this.capChoice.input.value = `${this.cap}`;
    this.buildSlider();
    this.buildSearch();
    this.buildGraph();
    this.panel = el("div", { class: "ace-panel", role: "region", "aria-label": "Edges and nodes" });
    this.live = el("div", { class: "ace-hidden", "aria-live": "polite", role: "status" });
    fill(
      this.root,
      el(
        "div",
        { class: "ace-choices" },
        this.taskChoice.field,
        this.algorithmChoice.field,
        this.viewChoice.field,
        this.search,
      ),
      this.sizeRow,
      el("div", { class: "ace-main" }, this.stage, this.panel),
      this.live,
    );
    this.graph = new Graph(this.canvas, {
      hover: (id) => this.hover(id),
      select: (key) => this.choose(key, false),
    });
  }

  buildSlider() {
    const id = newId();
    this.slider = el("input", {
      id,
      type: "range",
      min: "0",
      step: "1",
      oninput: () => this.setSize(Number(this.slider.value)),
    });
    this.outcome = el("p", { class: "ace-outcome" });
    this.others = el("p", { class: "ace-note" });
    this.sizeRow = el(
      "div",
      { class: "ace-size" },
      el("div", { class: "ace-slider" }, el("label", { for: id }, "Circuit size"), this.slider),
      el("div", { class: "ace-says" }, this.outcome, this.others),
    );
  }

  buildSearch() {
    const [id, listId] = [newId(), newId()];
    this.names = el("datalist", { id: listId });
    this.searchInput = el("input", {
      id,
      type: "search",
      list: listId,
      autocomplete: "off",
      placeholder: "A0.1, MLP 2 …",
    });
    this.searchInput.addEventListener("change", () => this.find());
    this.searchInput.addEventListener("keydown", (event) => {
      if (event.key === "Enter") this.find();
    });
    this.searchNote = el("p", { class: "ace-note", role: "status" });
    this.search = el(
      "div",
      { class: "ace-field" },
      el("label", { for: id }, "Find a node"),
      this.searchInput,
      this.names,
      this.searchNote,
    );
  }

  buildGraph() {
    const help = newId();
    this.canvas = el("div", { class: "ace-canvas" });
    this.application = el(
      "div",
      {
        class: "ace-graph",
        tabindex: "0",
        role: "application",
        "aria-label": "Graph of the circuit",
        "aria-describedby": help,
      },
      this.canvas,
    );
    this.application.addEventListener("keydown", (event) => this.key(event));
    this.application.addEventListener("focus", () => {
      if (this.focused !== null) return;
      const isThere = this.chosen !== null && this.graph.places.has(this.chosen);
      this.focusNode(isThere ? this.chosen : this.graph.first());
    });
    this.application.addEventListener("blur", () => this.focusNode(null));
    this.tip = el("div", { class: "ace-tip", hidden: true });
    this.legend = el("ul", { class: "ace-legend" });
    this.drawn = el("p", { class: "ace-note" });
    const button = (text, label, act) =>
      el("button", { type: "button", "aria-label": label, onclick: act }, text);
    const zoom = el(
      "div",
      { class: "ace-zoom" },
      button("+", "Zoom in", () => this.graph.zoom(1.3)),
      button("−", "Zoom out", () => this.graph.zoom(1 / 1.3)),
      button("Fit", "Fit: show all", () => this.graph.fit()),
    );
    this.stage = el(
      "div",
      { class: "ace-stage" },
      this.legend,
      el("div", { class: "ace-frame" }, this.application, this.tip),
      el("div", { class: "ace-under" }, this.drawn, this.capChoice.field, zoom),
      el("p", { class: "ace-note", id: help }, HELP),
    );
  }

  // -------------------------------------------------------------------- what is shown

  setTask(index) {
    this.task = this.tasks[index];
    this.chosen = this.focused = null;
    const names = this.task.algorithms.map((algorithm, i) => [`${i}`, algorithm.name]);
    setOptions(this.algorithmChoice.input, names);
    this.graph.setTask(this.task);
    const shown = new Set(this.task.nodes.map((node) => node.name));
    fill(this.names, [...shown].map((name) => el("option", { value: name })));
    this.setAlgorithm(0);
  }

  setAlgorithm(index) {
    const before = this.algorithm && this.size.n_edges;
    this.algorithm = this.task.algorithms[index];
    this.setViews();
    const { sizes } = this.algorithm;
    this.slider.max = `${sizes.length - 1}`;
    const isSame = before !== undefined && this.shownTask === this.task;
    this.shownTask = this.task;
    this.slider.value = `${isSame ? this.algorithm.nearest(before) : this.algorithm.firstShown}`;
    this.setSize(Number(this.slider.value));
  }

  /** The ways to see this task's circuits; the one that was chosen stays, if it can. */
  setViews() {
    const before = this.viewChoice.input.value;
    const views = [["sign", "Signs of the scores"]];
    if (this.task.known) views.push(["known", "The known circuit: hits and misses"]);
    this.task.algorithms.forEach((other, i) => {
      if (other !== this.algorithm) views.push([`${i}`, `Compare with ${other.name}`]);
    });
    setOptions(this.viewChoice.input, views);
    const isThere = views.some(([value]) => value === before);
    this.viewChoice.input.value = isThere ? before : this.task.known ? "known" : "sign";
    this.view = this.viewChoice.input.value;
  }

  setView(view) {
    this.view = view;
    this.update();
  }

  setSize(index) {
    this.size = this.algorithm.sizes[index];
    this.nDrawn = this.size.n_drawn;
    this.update();
  }

  update() {
    this.looks();
    this.graph.setEdges(this.wanted);
    this.showOutcome();
    this.showLegend();
    // Long lists wait until the slider rests.
    clearTimeout(this.panelLater);
    this.panelLater = setTimeout(() => this.showPanel(), 120);
  }

  /** Which edges are drawn, and how. */
  looks() {
    const { algorithm } = this;
    const circuit = algorithm.circuit(this.nDrawn);
    const wanted = new Map();
    this.counts = {};
    if (this.view === "sign") {
      this.nWanted = circuit.length;
      for (const edge of circuit.subarray(0, this.cap)) {
        wanted.set(edge, this.look(edge, algorithm.scores[edge] < 0 ? "negative" : "positive", algorithm));
      }
      const negative = circuit.reduce((n, edge) => n + (algorithm.scores[edge] < 0), 0);
      this.counts = { positive: circuit.length - negative, negative };
    } else {
      const [other, kinds] = this.other();
      const isHere = (edge) => algorithm.isIn(edge, this.nDrawn);
      const rest = [...other.edges].filter((edge) => !isHere(edge));
      const all = [...circuit].map((edge) => [edge, other.has(edge) ? kinds[0] : kinds[1]]);
      // In turns, so that the cap leaves some of both.
      const others = rest.map((edge) => [edge, kinds[2]]);
      this.counts = Object.fromEntries(kinds.map((kind) => [kind, 0]));
      for (const [, kind] of [...all, ...others]) this.counts[kind] += 1;
      this.nWanted = all.length + others.length;
      for (let i = 0; wanted.size < Math.min(this.cap, this.nWanted); i += 1) {
        for (const list of [all, others]) {
          if (i < list.length && wanted.size < this.cap) {
            const [edge, kind] = list[i];
            wanted.set(edge, this.look(edge, kind, kind === "onlyB" ? other.algorithm : algorithm));
          }
        }
      }
    }
    this.wanted = wanted;
  }

  /** What this circuit is compared with, and what to call [both, only this, only that]. */
  other() {
    if (this.view === "known") {
      const known = this.task.known;
      return [
        { edges: known, has: (edge) => known.has(edge) },
        ["hit", "extra", "missed"],
      ];
    }
    const algorithm = this.task.algorithms[Number(this.view)];
    this.otherSize = algorithm.sizes[algorithm.nearest(this.size.n_edges)];
    const n = this.otherSize.n_drawn;
    return [
      { algorithm, edges: algorithm.circuit(n), has: (edge) => algorithm.isIn(edge, n) },
      ["both", "onlyA", "onlyB"],
    ];
  }

  look(edge, kind, algorithm) {
    const largest = Math.abs(algorithm.scores[algorithm.order[0]]) || 1;
    const score = Math.abs(algorithm.scores[edge]);
    const share = Number.isFinite(score) ? Math.sqrt(score / largest) : 1;
    const width = 1 + 4.5 * (Number.isFinite(share) ? share : 1);
    return { kind, width: Math.round(width * 10) / 10, text: KINDS[kind].text };
  }

  showOutcome() {
    const { size, algorithm } = this;
    const main = size.values[MAIN_METRIC];
    const parts = [el("strong", {}, counted(this.nDrawn, "edge")), ` of ${count(this.task.nEdges)}`];
    if (main && main.mean !== null) {
      const half = main.plus_minus === null ? "" : ` ± ${plain(main.plus_minus)}`;
      parts.push(" · ", el("strong", {}, `${plain(main.mean)} %${half}`));
      parts.push(" of the model's logit difference");
    } else if (!Object.keys(size.values).length) {
      parts.push(" · not measured");
    }
    fill(this.outcome, parts);
    const others = Object.entries(size.values).filter(
      ([name, value]) => name !== MAIN_METRIC && value.mean !== null,
    );
    const texts = others.map(([name, value]) => {
      const half = value.plus_minus === null ? "" : ` ± ${plain(value.plus_minus)}`;
      return `${name} ${plain(value.mean)}${half}`;
    });
    if (size.n_edges !== this.nDrawn) {
      texts.unshift(
        `size ${count(size.n_edges)}; with all edges that tie with the last one by their ` +
          `mean score ${count(this.nDrawn)}`,
      );
    }
    fill(this.others, texts.join(" · "));
    this.slider.setAttribute("aria-valuetext", this.outcome.textContent);
    clearTimeout(this.sayLater);
    this.sayLater = setTimeout(() => {
      this.live.textContent = `${algorithm.name}: ${this.outcome.textContent}`;
    }, 400);
  }

  showLegend() {
    const rows = Object.entries(this.counts).map(([kind, n]) => {
      const { dash, text } = KINDS[kind];
      const line = dash.length ? (dash[0] < 4 ? "dotted" : "dashed") : "solid";
      return el(
        "li",
        {},
        el("span", { class: `ace-line ace-${kind}`, "data-line": line, "aria-hidden": "true" }),
        `${this.naming(text)}: ${count(n)}`,
      );
    });
    const said = this.summary();
    if (said) rows.push(el("li", { class: "ace-said" }, said));
    fill(this.legend, rows);
    const shown = this.wanted.size;
    const strongest = shown < this.nWanted ? ", the strongest" : "";
    const styled = shown > MAX_STYLED ? `, of the strongest ${MAX_STYLED}; others thin` : "";
    this.drawn.textContent =
      `${count(shown)} of ${counted(this.nWanted, "edge")} drawn${strongest}. ` +
      `Width: |score|${styled}.`;
  }

  naming(text) {
    if (this.view === "sign" || this.view === "known") return text;
    const b = this.task.algorithms[Number(this.view)].name;
    return text.replace("only A", `only ${this.algorithm.name}`).replace("only B", `only ${b}`);
  }

  summary() {
    const { counts } = this;
    const share = (part, whole) => (whole ? `${Math.round((100 * part) / whole)} %` : "none");
    if (this.view === "known") {
      const [found, all] = [counts.hit, counts.hit + counts.missed];
      return (
        `${share(found, all)} of the known circuit's ${counted(all, "edge")} found; ` +
        `${share(found, found + counts.extra)} of this circuit known`
      );
    }
    if (this.view === "sign") return null;
    const union = counts.both + counts.onlyA + counts.onlyB;
    const sizes =
      this.otherSize.n_edges === this.size.n_edges
        ? ""
        : `; its nearest size has ${counted(this.otherSize.n_edges, "edge")}`;
    return `Jaccard index ${union ? plain(counts.both / union) : "1"}${sizes}`;
  }

  showPanel() {
    if (this.chosen === null) circuitPanel(this.panel, this);
    else nodePanel(this.panel, this, this.chosen);
    if (this.focusPanel) this.panel.querySelector("h3").focus();
    this.focusPanel = false;
  }

  // ----------------------------------------------------------------- what is pointed at

  /** An element of the graph under the mouse. */
  hover(id) {
    const isNode = id !== null && this.graph.keys.has(id);
    if (id === null || (!isNode && !id.startsWith("e"))) this.hideTip();
    else if (isNode) this.showTip(id, this.nodeLines(id));
    else this.showTip(id, this.edgeLines(Number(id.slice(1))));
  }

  /** An edge of a list that has the focus, or null. */
  pointAt(edge) {
    this.graph.focus(edge === null ? null : `e${edge}`);
    if (edge === null) this.hideTip();
    else this.showTip(`e${edge}`, this.edgeLines(edge));
  }

  edgeLines(edge) {
    const { algorithm, task } = this;
    const look = this.wanted.get(edge);
    const lines = [
      task.edgeName(edge),
      `score ${signed(algorithm.scores[edge])}, ${algorithm.rankText(edge)}`,
      algorithm.intervalText(edge),
    ];
    const at = task.position(edge);
    if (at !== null) lines.push(positionText(task, at));
    if (look) lines.push(this.naming(look.text));
    return lines;
  }

  nodeLines(key) {
    const { task } = this;
    const inside = (end) => [...this.wanted.keys()].filter((e) => task.ends(e)[end] === key);
    const [out, into] = [inside(0), inside(1)];
    const strength = (edges) => {
      const best = edges.reduce(
        (a, b) => (a === null || this.algorithm.places[b] < this.algorithm.places[a] ? b : a),
        null,
      );
      if (best === null) return "none";
      return `${edges.length}, strongest ${task.edgeName(best)} (${this.algorithm.scoreText(best)})`;
    };
    const at = task.columnOf(key);
    return [
      task.nodeName(key),
      ...(at === null ? [] : [positionText(task, at)]),
      `in: ${strength(into)}`,
      `out: ${strength(out)}`,
    ];
  }

  showTip(id, [title, ...lines]) {
    fill(this.tip, el("b", {}, title), lines.map((line) => el("span", {}, line)));
    this.tip.hidden = false;
    const at = this.graph.renderedPosition(id) ?? { x: 12, y: 12 };
    const frame = this.tip.parentElement;
    const clamp = (x, most) => Math.max(6, Math.min(x, most));
    const { offsetWidth: w, offsetHeight: h } = this.tip;
    this.tip.style.left = `${clamp(at.x + 16, frame.clientWidth - w - 6)}px`;
    this.tip.style.top = `${clamp(at.y + 16, frame.clientHeight - h - 6)}px`;
  }

  hideTip() {
    this.tip.hidden = true;
    if (this.focused !== null) this.showTip(this.focused, this.nodeLines(this.focused));
  }

  // ------------------------------------------------------------------- nodes and keys

  key(event) {
    const { key } = event;
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    const at = this.focused ?? this.graph.first();
    if (DIRECTIONS[key]) this.focusNode(this.graph.next(at, DIRECTIONS[key]) ?? at, true);
    else if (key === "Enter" || key === " ") this.choose(at, true);
    else if (key === "Escape") this.choose(null, false);
    else if (key === "+" || key === "=") this.graph.zoom(1.3);
    else if (key === "-") this.graph.zoom(1 / 1.3);
    else if (key === "0") this.graph.fit();
    else return;
    event.preventDefault();
  }

  /** The node that the keyboard is on. */
  focusNode(key, isMoved = false) {
    this.focused = key;
    this.graph.focus(key);
    if (key === null) {
      this.tip.hidden = true;
      return;
    }
    const lines = this.nodeLines(key);
    this.showTip(key, lines);
    if (isMoved) {
      clearTimeout(this.sayLater);
      this.live.textContent = lines.join(", ");
    }
  }

  /** Show a node's edges; null: the circuit's. */
  choose(key, isByKey) {
    const before = this.chosen;
    this.chosen = key;
    this.graph.choose(key);
    this.focusPanel = isByKey || (key === null && before !== null && isByKey !== false);
    this.showPanel();
  }

  /** An edge of a list is chosen: go to its other end. */
  follow(edge) {
    const [source, target] = this.task.ends(edge);
    this.hideTip();
    this.choose(this.chosen === source ? target : source, true);
    this.graph.bringIntoSight(this.chosen);
  }

  find() {
    const text = this.searchInput.value;
    const keys = [...this.graph.keys];
    // Where one node is at many positions: the first one that the circuit has.
    const found = this.task.find(text, keys);
    const key = found.find((one) => this.graph.busy.has(one)) ?? found[0];
    if (text.trim() === "") this.searchNote.textContent = "";
    else if (key === undefined) this.searchNote.textContent = `There is no node “${text}”.`;
    else {
      const name = this.task.nodeName(key);
      const more = found.length > 1 ? `${name}, the first of ${found.length}` : "";
      this.searchNote.textContent = more;
      this.live.textContent = `Found ${name}`;
      this.choose(key, false);
      this.graph.bringIntoSight(key);
    }
  }
}

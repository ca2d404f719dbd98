// A task's data, ready to be asked: edges, circuits, what is known of a node.

import { arrayOf, count, digits, signed, upperHalves } from "./numbers.js";

export const MAIN_METRIC = "Logit Diff Percent";

export class Task {
  constructor(data) {
    this.data = data;
    const graph = data.graph;
    this.nodes = graph.nodes;
    this.sources = graph.sources;
    this.destinations = graph.destinations;
    this.src = arrayOf(graph.src);
    this.dest = arrayOf(graph.dest);
    this.nPositions = graph.n_positions;
    // Edges through attention come after those from sources, head by head.
    this.crossings = graph.crossings;
    this.pairs = arrayOf(graph.pairs) ?? [];
    this.nFromSources = this.src.length * (this.nPositions ?? 1);
    this.nEdges = this.nFromSources + (this.crossings.length * this.pairs.length) / 2;
    const known = arrayOf(graph.true_edges);
    this.known = known && new Set(known);
    this.algorithms = data.algorithms.map((algorithm) => new Algorithm(algorithm));
    this.sourceOfNode = new Map(this.sources.map((source, i) => [source.node, i]));
    this.attentionOfNode = new Map((data.attention?.nodes ?? []).map((n, i) => [n, i]));
  }

  /** Of an edge through attention: its head, where that is, and where it reads. */
  crossing(edge) {
    const place = edge - this.nFromSources;
    if (place < 0) return null;
    const nPairs = this.pairs.length / 2;
    const pair = 2 * (place % nPairs);
    const head = this.crossings[Math.floor(place / nPairs)];
    return { head, to: this.pairs[pair], from: this.pairs[pair + 1] };
  }

  /** Where an edge ends. */
  position(edge) {
    if (this.nPositions === null) return null;
    return this.crossing(edge)?.to ?? Math.floor(edge / this.src.length);
  }

  /** Where it begins: at another position only if it leads through attention. */
  start(edge) {
    return this.crossing(edge)?.from ?? this.position(edge);
  }

  source(edge) {
    const crossing = this.crossing(edge);
    if (crossing === null) return this.sources[this.src[edge % this.src.length]];
    const { head, from } = crossing;
    return { name: `${head.source}[${from}]`, node: head.source_node };
  }

  destination(edge) {
    const crossing = this.crossing(edge);
    return crossing?.head ?? this.destinations[this.dest[edge % this.src.length]];
  }

  /** The drawn nodes that an edge joins. */
  ends(edge) {
    return [
      this.key(this.source(edge).node, this.start(edge)),
      this.key(this.destination(edge).node, this.position(edge)),
    ];
  }

  edgeName(edge) {
    const at = this.position(edge);
    const name = `${this.source(edge).name}->${this.destination(edge).name}`;
    return at === null ? name : `${name} @ ${at}`;
  }

  /** The key of a drawn node: its number, and its position if these are told apart. */
  key(node, position) {
    return position === null ? `${node}` : `${node}@${position}`;
  }

  nodeOf(key) {
    return this.nodes[Number(key.split("@")[0])];
  }

  columnOf(key) {
    const at = key.split("@")[1];
    return at === undefined ? null : Number(at);
  }

  nodeName(key) {
    const at = this.columnOf(key);
    const name = this.nodeOf(key).name;
    return at === null ? name : `${name} @ ${at}`;
  }

  /** What a position is called, and the first prompt's token there. */
  label(position) {
    return this.data.graph.position_labels?.[position] ?? `${position}`;
  }

  token(position, side = "clean") {
    const texts = this.data.graph.span_texts;
    if (texts) return texts[position] ?? null;
    const tokens = this.data.prompts[0]?.[side].tokens ?? [];
    return tokens[position + this.data.graph.first_token] ?? null;
  }

  /** The edges into and out of a drawn node, in an algorithm's order. */
  edgesOf(key, algorithm) {
    const node = Number(key.split("@")[0]);
    const at = this.columnOf(key);
    const into = [];
    const out = [];
    for (const edge of algorithm.order) {
      if (this.source(edge).node === node && (at === null || this.start(edge) === at)) {
        out.push(edge);
      }
      if (this.destination(edge).node === node && (at === null || this.position(edge) === at)) {
        into.push(edge);
      }
    }
    return { into, out };
  }

  /** The drawn nodes whose name begins with a text, or contains it; exact ones first. */
  find(text, keys) {
    const wanted = text.trim().toLowerCase();
    if (!wanted) return [];
    const named = keys.map((key) => [key, this.nodeName(key).toLowerCase()]);
    const tests = [
      (name) => name === wanted,
      (name) => name.split(" @ ")[0] === wanted,
      (name) => name.startsWith(wanted),
      (name) => name.includes(wanted),
    ];
    for (const test of tests) {
      const found = named.filter(([, name]) => test(name));
      if (found.length) return found.map(([key]) => key);
    }
    return [];
  }
}

export class Algorithm {
  constructor(data) {
    this.data = data;
    this.name = data.name;
    this.sizes = data.sizes;
    this.firstShown = data.first_size;
  }

  // Made when they are first asked for: a page may hold many algorithms.
  get scores() {
    return this.lazily("scores", () => this.byEdge(arrayOf(this.data.scores)));
  }

  get order() {
    return this.lazily("order", () => arrayOf(this.data.order));
  }

  get plusMinus() {
    const halves = () => upperHalves(arrayOf(this.data.plus_minus));
    return this.lazily("plusMinus", () => this.byEdge(halves()));
  }

  /** Edge -> its place in the order. */
  get places() {
    return this.lazily("places", () => {
      const places = new Uint32Array(this.order.length);
      this.order.forEach((edge, place) => {
        places[edge] = place;
      });
      return places;
    });
  }

  /** Place -> the place at which the edges of its |score| begin, and how many they are. */
  get ties() {
    return this.lazily("ties", () => {
      const pairs = arrayOf(this.data.ties);
      const runs = [];
      for (let i = 0; i < pairs.length; i += 2) runs.push([pairs[i], pairs[i + 1]]);
      return runs;
    });
  }

  /** Numbers that were in the algorithm's order, edge by edge. */
  byEdge(ranked) {
    if (ranked === null) return null;
    const numbers = new Float32Array(ranked.length);
    this.order.forEach((edge, place) => {
      numbers[edge] = ranked[place];
    });
    return numbers;
  }

  lazily(name, make) {
    const value = make();
    Object.defineProperty(this, name, { value });
    return value;
  }

  rankText(edge) {
    const place = this.places[edge];
    const run = this.ties.find(([start, length]) => place >= start && place < start + length);
    const of = `of ${count(this.order.length)}`;
    if (!run) return `rank ${count(place + 1)} ${of}`;
    return `ranks ${count(run[0] + 1)} to ${count(run[0] + run[1])} (equal) ${of}`;
  }

  scoreText(edge) {
    const half = this.plusMinus;
    if (half === null || !Number.isFinite(half[edge])) return signed(this.scores[edge]);
    return `${signed(this.scores[edge])} ± ${digits(half[edge])}`;
  }

  /** Half the interval's width in words. */
  intervalText(edge) {
    const half = this.plusMinus;
    if (half === null) return "one seed, so no interval";
    return `95 % interval over ${this.data.n_seeds} seeds: ± ${digits(half[edge])}`;
  }

  /** The edges of a circuit of so many, strongest first. */
  circuit(nDrawn) {
    return this.order.subarray(0, nDrawn);
  }

  isIn(edge, nDrawn) {
    return this.places[edge] < nDrawn;
  }

  /** The measured size that is nearest to another. */
  nearest(nEdges) {
    let best = 0;
    this.sizes.forEach((size, i) => {
      const better = Math.abs(size.n_edges - nEdges) < Math.abs(this.sizes[best].n_edges - nEdges);
      if (better) best = i;
    });
    return best;
  }
}

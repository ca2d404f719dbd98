// The edges, on a canvas of their own below the nodes: thousands of lines in a few strokes.

const ACCENT = "#6d28d9";
const CARRY = "#c9ced8";
/** Of more lines than these the weaker ones are thin and solid, which takes a tenth of the
 * time: without a GPU, wide lines and dashes cost the most. */
export const MAX_STYLED = 200;
const NEAR = 6;
const SPREAD = 30;

/** Numbers that look random and are the same for the same edge: from -0.5 to 0.5. */
function spread(edge, salt) {
  return ((Math.imul(edge + 1, 2654435761 + salt * 40503) >>> 8) % 4096) / 4096 - 0.5;
}

export class Lines {
  constructor(canvas, kinds) {
    this.canvas = canvas;
    this.kinds = kinds;
    this.segments = [];
    this.carried = [];
    this.chosen = this.focused = null;
  }

  /** What to draw. edges: Map of edge -> look, the strongest first. */
  set(task, edges, places) {
    this.segments = [];
    for (const [edge, look] of edges) {
      const [source, target] = task.ends(edge);
      const [from, to] = [places.get(source), places.get(target)];
      if (from !== undefined && to !== undefined) {
        this.segments.push({
          edge,
          source,
          target,
          look,
          x1: from.x + SPREAD * spread(edge, 1),
          y1: from.y,
          x2: to.x + SPREAD * spread(edge, 2),
          y2: to.y,
        });
      }
    }
    this.byEdge = new Map(this.segments.map((segment) => [segment.edge, segment]));
  }

  /** Draw all, as the nodes are seen: zoom and pan. */
  draw({ zoom, pan, width, height }) {
    const ratio = Math.min(window.devicePixelRatio || 1, 2);
    const { canvas } = this;
    if (canvas.width !== width * ratio || canvas.height !== height * ratio) {
      canvas.width = width * ratio;
      canvas.height = height * ratio;
    }
    const ctx = canvas.getContext("2d");
    ctx.setTransform(ratio, 0, 0, ratio, 0, 0);
    ctx.clearRect(0, 0, width, height);
    ctx.setTransform(ratio * zoom, 0, 0, ratio * zoom, ratio * pan.x, ratio * pan.y);
    const thin = 1 / (zoom * ratio);
    const pixel = 1 / zoom;
    this.stroke(ctx, this.carried, { color: CARRY, width: thin, alpha: 1, dash: [] });
    for (const { segments, ...look } of this.thinGroups()) {
      this.stroke(ctx, segments, { ...look, width: thin });
    }
    for (const segment of this.segments.slice(0, MAX_STYLED).reverse()) {
      const { color, dash } = this.kinds[segment.look.kind];
      const isFar = this.isFar(segment);
      const alpha = isFar ? 0.13 : 0.75;
      const onScreen = isFar ? [] : dash.map((length) => length * pixel);
      const width = Math.max(segment.look.width, pixel);
      this.stroke(ctx, [segment], { color, width, alpha, dash: onScreen });
    }
    const focused = this.byEdge?.get(this.focused);
    if (focused) {
      const { color, dash } = this.kinds[focused.look.kind];
      const width = Math.max(focused.look.width, pixel);
      const glow = { color: ACCENT, width: width + 7 * pixel, alpha: 0.35, dash: [] };
      this.stroke(ctx, [focused], glow);
      const onScreen = dash.map((length) => length * pixel);
      this.stroke(ctx, [focused], { color, width, alpha: 1, dash: onScreen });
    }
  }

  /** A node is chosen, and the line is none of its. */
  isFar({ source, target }) {
    return this.chosen !== null && source !== this.chosen && target !== this.chosen;
  }

  /** The weaker lines, those that look alike together. */
  thinGroups() {
    const groups = new Map();
    for (const segment of this.segments.slice(MAX_STYLED)) {
      const isFar = this.isFar(segment);
      const key = `${segment.look.kind} ${isFar}`;
      if (!groups.has(key)) {
        const { color } = this.kinds[segment.look.kind];
        groups.set(key, { color, alpha: isFar ? 0.13 : 0.7, dash: [], segments: [] });
      }
      groups.get(key).segments.push(segment);
    }
    return [...groups.values()];
  }

  stroke(ctx, segments, { color, width, alpha, dash }) {
    ctx.beginPath();
    for (const { x1, y1, x2, y2 } of segments) {
      ctx.moveTo(x1, y1);
      ctx.lineTo(x2, y2);
    }
    ctx.strokeStyle = color;
    ctx.lineWidth = width;
    ctx.globalAlpha = alpha;
    ctx.setLineDash(dash);
    ctx.stroke();
  }

  /** The edge that is nearest to a point, if it is near; the strongest of several. */
  at(x, y, zoom) {
    let found = null;
    let nearest = NEAR / zoom;
    for (const segment of this.segments) {
      const distance = distanceTo(segment, x, y) - segment.look.width / 2;
      if (distance < nearest - 0.5 / zoom) [found, nearest] = [segment.edge, distance];
    }
    return found;
  }

  /** Where an edge can be pointed at. */
  middle(edge) {
    const segment = this.byEdge?.get(edge);
    if (!segment) return null;
    return { x: (segment.x1 + segment.x2) / 2, y: (segment.y1 + segment.y2) / 2 };
  }
}

function distanceTo({ x1, y1, x2, y2 }, x, y) {
  const [dx, dy] = [x2 - x1, y2 - y1];
  const along = ((x - x1) * dx + (y - y1) * dy) / (dx * dx + dy * dy || 1);
  const share = Math.min(1, Math.max(0, along));
  return Math.hypot(x - x1 - share * dx, y - y1 - share * dy);
}

// --- What is told of a trial. ---

const complete = trials.filter((t) => t.s === 'complete' && isNumber(t.v));
complete.sort((a, b) => sign * (a.v - b.v) || a.n - b.n);
complete.forEach((t, i) => {
  t.q = complete.length > 1 ? i / (complete.length - 1) : 0;
});
// The best come last, and so lie on top.
const layers = { failed: 0, diverged: 1, pruned: 2, running: 3, complete: 4 };
const bottomUp = (a, b) =>
  layers[a.s] - layers[b.s] || (b.q || 0) - (a.q || 0);

function classOf(trial) {
  return trial.q === undefined ? trial.s : `${trial.s} ranked`;
}

function told(trial) {
  const lines = [`trial ${trial.n}: ${trial.s}`];
  if (isNumber(trial.v)) lines.push(`${data.metric} = ${shown(trial.v)}`);
  data.axes.forEach((axis, i) => {
    const place = trial.p[i];
    const text = axis.labels.length ? axis.labels[place] : shown(place);
    lines.push(`${axis.short} = ${text}`);
  });
  if (trial.last !== null) lines.push(`step ${shown(trial.last)}`);
  return lines.join('\n');
}

// --- Pieces of a drawing. ---

function add(parent, tag, attributes, text) {
  const node = document.createElementNS(svgName, tag);
  for (const name in attributes) node.setAttribute(name, attributes[name]);
  if (text !== undefined) node.textContent = text;
  parent.append(node);
  return node;
}

const paths = {
  diverged: (x, y) => `M${x - 4},${y - 4}l8,8m0,-8l-8,8`,
  failed: (x, y) => `M${x - 4},${y - 4}h8v8h-8z`,
  beyond: (x, y, up) => `M${x - 5},${y}h10l-5,${up ? -8 : 8}z`,
};

function rounded(points) {
  const tenths = (v) => Math.round(v * 10) / 10;
  return points.map(([x, y]) => [tenths(x), tenths(y)]);
}

/** One chart: its drawing, and where its trials lie in it. */
class Chart {
  constructor(figure, draw, { height = 280, least = 0 } = {}) {
    this.box = figure.querySelector('.chart');
    this.note = figure.querySelector('.note');
    this.title = figure.querySelector('figcaption').textContent;
    this.height = height;
    this.least = least;
    this.drawn = draw;
    this.box.addEventListener('pointermove', (event) => this.point(event));
    this.box.addEventListener('pointerleave', () => highlight(null));
    this.box.addEventListener('click', (event) => reveal(this.nearest(event)));
  }

  draw(visible) {
    const width = Math.floor(Math.max(this.box.clientWidth, this.least));
    this.width = width;
    const { height } = this;
    const svg = document.createElementNS(svgName, 'svg');
    const options = { width, height, viewBox: `0 0 ${width} ${height}` };
    for (const name in options) svg.setAttribute(name, options[name]);
    svg.setAttribute('role', 'img');
    svg.classList.toggle('many', visible.length > MANY);
    const said = `${this.title}, of ${visible.length} trials. The table of `;
    svg.setAttribute('aria-label', `${said}trials has their values.`);
    this.svg = svg;
    this.hits = [];
    this.notes = [];
    this.lines = null; // A clipped group, where a chart has one.
    this.drawn(this, visible);
    this.hot = add(this.lines || svg, 'g', { class: 'hot' });
    this.box.replaceChildren(svg);
    if (this.note) this.note.textContent = this.notes.join(' ');
  }

  /** Adds a mark of a trial, found near `points`, or along their line. */
  mark(parent, trial, tag, attributes, points, isLine) {
    const node = add(parent, tag, attributes);
    if (trial.q !== undefined) {
      node.style.setProperty('--q', `${Math.round(100 * trial.q)}%`);
    }
    this.hits.push({ trial, node, points, isLine });
  }

  xAxis(x, bottom, label) {
    const { svg, width } = this;
    for (const [value, text] of x.ticks) {
      const at = x.at(value);
      const half = (text.length * CHARACTER) / 2;
      const place = Math.min(Math.max(at, half), width - half);
      const options = { x: place, y: bottom + 16, 'text-anchor': 'middle' };
      add(svg, 'text', options, text);
      add(svg, 'line', { class: 'grid', x1: at, x2: at, y1: 8, y2: bottom });
    }
    const middle = { x: width / 2, y: bottom + 34, 'text-anchor': 'middle' };
    add(svg, 'text', middle, cut(label, width / CHARACTER));
  }

  yAxis(y, left) {
    const { svg, width } = this;
    for (const [value, text] of y.ticks) {
      const at = y.at(value);
      const options = { x: left - 6, y: at + 4, 'text-anchor': 'end' };
      add(svg, 'text', options, text);
      const line = { class: 'grid', x1: left, x2: width - 8, y1: at, y2: at };
      add(svg, 'line', line);
    }
  }

  point(event) {
    const trial = this.nearest(event);
    highlight(trial);
    if (!trial) return;
    tip.textContent = told(trial);
    tip.hidden = false;
    const { width, height } = tip.getBoundingClientRect();
    const x = Math.min(event.clientX + 14, innerWidth - width - 4);
    const below = event.clientY + 14;
    const isLow = below + height > innerHeight;
    tip.style.left = `${Math.max(4, x)}px`;
    tip.style.top = `${isLow ? event.clientY - height - 10 : below}px`;
  }

  nearest(event) {
    const { left, top } = this.svg.getBoundingClientRect();
    const x = event.clientX - left;
    const y = event.clientY - top;
    let best = REACH;
    let found = null;
    for (const { trial, points, isLine } of this.hits) {
      const distance = (isLine ? toLine : toPoints)(points, x, y);
      // Of equals the last, which lies on top.
      if (distance <= best) [best, found] = [distance, trial];
    }
    return found;
  }
}

function toPoints(points, x, y) {
  return Math.min(...points.map(([px, py]) => Math.hypot(px - x, py - y)));
}

function toLine(points, x, y) {
  if (points.length === 1) return toPoints(points, x, y);
  let best = Infinity;
  for (let i = 1; i < points.length; i++) {
    const [x0, y0] = points[i - 1];
    const [dx, dy] = [points[i][0] - x0, points[i][1] - y0];
    const along = ((x - x0) * dx + (y - y0) * dy) / (dx * dx + dy * dy || 1);
    const share = Math.min(1, Math.max(0, along));
    const distance = Math.hypot(x0 + share * dx - x, y0 + share * dy - y);
    if (distance < best) best = distance;
  }
  return best;
}

// --- The charts. ---

const lineOf = (points) => `M${points.map((p) => p.join(',')).join('L')}`;
const plural = (n, one, many) => `${n} ${n === 1 ? one : many}`;

/** Rows for trials without a finite result, on the side of bad results. */
function bandsOf(visible) {
  return ['diverged', 'failed'].filter((s) => visible.some((t) => t.s === s));
}

/** The values by which an axis of results is chosen. */
function resultsOf(visible) {
  const done = visible.filter((t) => t.q !== undefined);
  // Values of pruned trials are of other steps.
  const some = done.length > 4 ? done : visible.filter((t) => t.s !== 'failed');
  return some.map((t) => t.v);
}

/** Where results lie from top to bottom: {y, bandAt}. */
function layout(chart, visible, values, top, bottom) {
  const bands = bandsOf(visible);
  const room = bands.length && bands.length * BAND + 6;
  const isUp = sign > 0;
  const axis = valueAxis(values);
  const ends = isUp ? [bottom, top + room] : [bottom - room, top];
  const most = Math.max(2, Math.floor((bottom - top - room) / 38));
  const first = isUp ? top + BAND / 2 : bottom - room + BAND / 2;
  return {
    y: scaleOf(axis, ends[0], ends[1], most),
    bands: bands.map((name, i) => [name, first + i * BAND]),
    isAbove: (value) => value > axis.high,
  };
}

function drawCurves(chart, visible) {
  const [left, bottom] = [LEFT, chart.height - 42];
  const lines = visible.filter((t) => t.c[0].length);
  const last = Math.max(1, ...lines.map((t) => t.last));
  // What only the first steps reach is left out of the axis.
  const values = lines.flatMap((t) =>
    t.c[1].filter((_, i) => t.c[0][i] >= last / 10)
  );
  const x = scaleOf({ scale: 'linear', low: 0, high: last, whole: true },
    left, chart.width - 12, Math.max(2, Math.floor(chart.width / 90)));
  const axis = valueAxis(values.length ? values : lines.flatMap((t) => t.c[1]));
  const y = scaleOf(axis, bottom, 10, 7);
  chart.xAxis(x, bottom, 'step');
  chart.yAxis(y, left);
  const clip = add(chart.svg, 'clipPath', { id: 'curves' });
  const inside = { x: left, y: 8, width: chart.width - left - 8 };
  add(clip, 'rect', { ...inside, height: bottom - 8 });
  chart.lines = add(chart.svg, 'g', { 'clip-path': 'url(#curves)' });
  lines.sort(bottomUp).forEach((t) => drawCurve(chart, t, x, y));
  const without = visible.length - lines.length;
  if (without) {
    const said = plural(without, 'trial has', 'trials have');
    chart.notes.push(`${said} no values.`);
  }
  sayBeyond(chart, lines.filter((t) =>
    t.c[1].some((v, i) => t.c[0][i] >= last / 10 && beyond(y, v))));
}

const beyond = (y, value) => isNumber(value) && y.beyond(value);

function sayBeyond(chart, some) {
  if (!some.length) return;
  const said = plural(some.length, 'trial has', 'trials have');
  chart.notes.push(`${said} values beyond the axis.`);
}

function drawCurve(chart, trial, x, y) {
  const points = rounded(
    trial.c[0]
      .map((step, i) => [step, trial.c[1][i]])
      .filter(([, value]) => isNumber(value))
      .map(([step, value]) => [x.at(step), y.free(value)])
  );
  const kind = classOf(trial);
  if (points.length === 1) {
    const [cx, cy] = points[0];
    const options = { class: `dot ${kind}`, cx, cy, r: 3.5 };
    chart.mark(chart.lines, trial, 'circle', options, points);
  } else if (points.length) {
    const options = { class: `line ${kind}`, d: lineOf(points) };
    chart.mark(chart.lines, trial, 'path', options, points, true);
  }
  if (trial.s === 'failed' || trial.s === 'diverged') {
    const worst = sign > 0 ? 10 : chart.height - 42;
    const end = points[points.length - 1];
    if (!end) return;
    if (trial.s === 'diverged') end[1] = worst;
    end[1] = Math.min(Math.max(end[1], 10), chart.height - 42);
    const options = { class: `mark ${trial.s}`, d: paths[trial.s](...end) };
    chart.mark(chart.svg, trial, 'path', options, [[...end]]);
  }
}

/** Draws results against a number of each trial. */
function drawScatter(chart, visible, axis, placeOf, label, isHistory) {
  const [left, top, bottom] = [LEFT, 10, chart.height - 42];
  const most = Math.max(2, Math.floor((chart.width - left) / 52));
  const slots = axis.labels ? axis.labels.length : 1;
  const room = (chart.width - left - 20) / Math.max(1, slots) - 6;
  const x = scaleOf({ ...axis, room }, left + 8, chart.width - 14, most);
  const values = resultsOf(visible);
  const { y, bands, isAbove } = layout(chart, visible, values, top, bottom);
  chart.xAxis(x, bottom, label);
  chart.yAxis(y, left);
  for (const [name, at] of bands) {
    const options = { x: left - 6, y: at + 4, 'text-anchor': 'end' };
    add(chart.svg, 'text', options, name);
  }
  if (isHistory) drawBest(chart, visible, x, y);
  const jitter = slots > 1 ? Math.min(16, room / 3) : 0;
  for (const trial of [...visible].sort(bottomUp)) {
    const shift = jitter * (((trial.n * 0.618) % 1) - 0.5) * 2;
    const px = x.at(placeOf(trial)) + shift;
    const band = bands.find(([name]) => name === trial.s);
    if (band) {
      const d = paths[trial.s](px, band[1]);
      const options = { class: `mark ${trial.s}`, d };
      chart.mark(chart.svg, trial, 'path', options, [[px, band[1]]]);
    } else if (isNumber(trial.v)) {
      const py = y.at(trial.v);
      const kind = `dot ${classOf(trial)}`;
      if (y.beyond(trial.v)) {
        const d = paths.beyond(px, py, isAbove(trial.v));
        chart.mark(chart.svg, trial, 'path', { class: kind, d }, [[px, py]]);
      } else {
        const options = { class: kind, cx: px, cy: py, r: 3.5 };
        chart.mark(chart.svg, trial, 'circle', options, [[px, py]]);
      }
    }
  }
  if (isHistory) sayMissing(chart, visible, y);
}

function sayMissing(chart, visible, y) {
  const none = visible.filter((t) => t.s !== 'failed' && t.s !== 'diverged');
  const without = none.filter((t) => !isNumber(t.v)).length;
  if (without) {
    const said = plural(without, 'trial has', 'trials have');
    chart.notes.push(`${said} no result.`);
  }
  sayBeyond(chart, visible.filter((t) => beyond(y, t.v)));
}

/** Draws the best result so far as a line. */
function drawBest(chart, visible, x, y) {
  const done = visible.filter((t) => t.q !== undefined);
  done.sort((a, b) => a.n - b.n);
  let best = Infinity;
  let d = '';
  for (const trial of done) {
    if (sign * trial.v >= best) continue;
    best = sign * trial.v;
    const [px, py] = [x.at(trial.n), y.at(trial.v)];
    d += d ? `H${px}V${py}` : `M${px},${py}`;
  }
  if (!d) return;
  d += `H${chart.width - 14}`;
  add(chart.svg, 'path', { class: 'best-line', d });
}

function drawParallel(chart, visible) {
  const [top, bottom] = [34, chart.height - 12];
  const values = resultsOf(visible);
  const result = layout(chart, visible, values, top, bottom);
  const scales = data.axes.map((axis) => scaleOf(axis, bottom, top, 8));
  // The outer axes have their labels outside, where no line runs.
  const bands = result.bands.map(([name]) => [0, name]);
  const sides = [scales[0].ticks, [...result.y.ticks, ...bands]].map((ticks) =>
    Math.min(110, 14 + CHARACTER * Math.max(...ticks.map(([, t]) => t.length))));
  const gap = (chart.width - sides[0] - sides[1]) / data.axes.length;
  const xs = [...scales, result.y].map((_, i) => sides[0] + i * gap);
  const lines = add(chart.svg, 'g', {});
  for (const trial of [...visible].sort(bottomUp)) {
    const points = scales.map((scale, i) => [xs[i], scale.at(trial.p[i])]);
    const band = result.bands.find(([name]) => name === trial.s);
    const end = xs[xs.length - 1];
    if (band) points.push([end, band[1]]);
    else if (isNumber(trial.v)) points.push([end, result.y.at(trial.v)]);
    const at = rounded(points);
    const options = { class: `line ${classOf(trial)}`, d: lineOf(at) };
    chart.mark(lines, trial, 'path', options, at, true);
  }
  const names = [...data.axes.map((axis) => axis.short), data.metric];
  xs.forEach((x, i) => {
    const isLast = i === xs.length - 1;
    const ticks = (isLast ? result.y : scales[i]).ticks;
    const at = (value) => (isLast ? result.y : scales[i]).at(value);
    const labels = ticks.map(([value, text]) => [at(value), text]);
    if (isLast) for (const [name, y] of result.bands) labels.push([y, name]);
    const side = i === 0 ? sides[0] : isLast ? sides[1] : 0;
    drawUpright(chart, x, i, side, names[i], labels, gap, top, bottom);
  });
  sayMissing(chart, visible, result.y);
}

function drawUpright(chart, x, i, side, name, labels, gap, top, bottom) {
  const { svg } = chart;
  add(svg, 'line', { class: 'axis', x1: x, x2: x, y1: top, y2: bottom });
  const [isFirst, isLast] = [i === 0, i > 0 && side > 0];
  const anchor = isFirst ? 'start' : isLast ? 'end' : 'middle';
  const shift = isFirst ? 4 - side : isLast ? side - 4 : 0;
  const heading = { x: x + shift, y: 18, 'text-anchor': anchor };
  const width = isFirst || isLast ? gap / 2 + side : gap;
  add(svg, 'text', heading, cut(name, Math.floor((width - 10) / CHARACTER)));
  for (const [y, text] of labels) {
    const options = { x: x + (isFirst ? -6 : 6), y: y + 4 };
    options['text-anchor'] = isFirst ? 'end' : 'start';
    const room = (side || gap) - 10;
    add(svg, 'text', options, cut(text, Math.floor(room / CHARACTER)));
  }
}

function drawSeconds(chart, visible) {
  const [left, bottom] = [LEFT, chart.height - 42];
  const timed = visible.filter((t) => isNumber(t.t));
  const numbers = trials.map((t) => t.n);
  const high = Math.max(1e-9, ...timed.map((t) => t.t));
  const y = scaleOf({ scale: 'linear', low: 0, high }, bottom, 10, 5);
  const axis = {
    scale: 'linear',
    low: Math.min(...numbers) - 0.5,
    high: Math.max(...numbers) + 0.5,
    whole: true,
  };
  const most = Math.max(2, Math.floor(chart.width / 90));
  const x = scaleOf(axis, left, chart.width - 12, most);
  chart.xAxis(x, bottom, 'trial');
  chart.yAxis(y, left);
  const slot = x.at(1) - x.at(0);
  const width = Math.min(28, Math.max(1, 0.8 * slot));
  for (const trial of timed) {
    const [px, py] = [x.at(trial.n), y.at(trial.t)];
    const height = Math.max(1, bottom - py);
    const options = { class: `block ${trial.s}`, x: px - width / 2, width };
    Object.assign(options, { y: bottom - height, height });
    const line = [[px, py], [px, bottom]];
    chart.mark(chart.svg, trial, 'rect', options, line, true);
  }
  const without = visible.length - timed.length;
  if (without) {
    const said = plural(without, 'trial has', 'trials have');
    chart.notes.push(`${said} no time yet.`);
  }
}

const charts = [];

function prepare(name, draw, options) {
  const found = document.querySelectorAll(`figure[data-chart=${name}]`);
  for (const figure of found) {
    const i = Number(figure.dataset.axis);
    const drawn = (chart, visible) => draw(chart, visible, i);
    charts.push(new Chart(figure, drawn, options));
  }
}

const history = {
  scale: 'linear',
  low: 0,
  high: Math.max(1, ...trials.map((t) => t.n)),
  whole: true,
};
prepare('curves', drawCurves, { height: 380 });
prepare('history', (chart, visible) =>
  drawScatter(chart, visible, history, (t) => t.n, 'trial', true));
prepare('parallel', drawParallel, {
  height: 360, least: 130 * data.axes.length + 40,
});
prepare('slice', (chart, visible, i) => {
  const axis = data.axes[i];
  drawScatter(chart, visible, axis, (t) => t.p[i], axis.short, false);
}, { height: 240 });
prepare('seconds', drawSeconds, { height: 220 });

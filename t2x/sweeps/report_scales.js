'use strict';
// Draws a study's charts from the JSON in the page, and sorts and filters its
// table. Texts of the study are only ever set as text, never as HTML.

const data = JSON.parse(document.getElementById('data').textContent);
const sign = data.direction === 'minimize' ? 1 : -1;
const trials = data.trials;
const REACH = 14; // Pixels from a mark within which it is the one meant.
const BAND = 18; // Height of the rows of trials without a finite result.
const LEFT = 68; // Of charts with labels on that side.
const CHARACTER = 6.4; // Mean width in pixels.
const FEW = 12; // Trials of which each counts.
const WILD = 20; // Times the middle value.
const MANY = 250; // Trials from which lines are thin and let others through.
const svgName = 'http://www.w3.org/2000/svg';

// --- Numbers. ---

function shown(value) {
  if (value === null || value === undefined) return '–';
  const size = Math.abs(value);
  if (size && (size < 1e-3 || size >= 1e6)) {
    return value.toExponential(2).replace(/\.?0+e/, 'e').replace('e+', 'e');
  }
  return Number(value.toPrecision(4)).toLocaleString('en-US', {
    maximumSignificantDigits: 4,
  });
}

const isNumber = (value) => typeof value === 'number';

/** The range of values without those that lie far from all others. */
function fenced(values) {
  const sorted = values.filter(isNumber).sort((a, b) => a - b);
  if (!sorted.length) return null;
  const last = sorted.length - 1;
  const at = (share) => sorted[Math.floor(share * last)];
  // Of few values all are shown, unless one is wild.
  const wild = WILD * (Math.abs(at(0.5)) || 1);
  if (sorted.length <= FEW && Math.max(-sorted[0], sorted[last]) < wild) {
    return [sorted[0], sorted[last]];
  }
  const spread = 3 * (at(0.75) - at(0.25) || Math.abs(at(0.5)) || 1);
  let low = Math.max(sorted[0], at(0.25) - spread);
  let high = Math.min(sorted[last], at(0.75) + spread);
  if (sign > 0) low = sorted[0]; // The best is always within.
  else high = sorted[last];
  return [low, high];
}

/** An axis for values of the metric. */
function valueAxis(values) {
  let [low, high] = fenced(values) || [0, 1];
  if (low === high) {
    const room = Math.abs(low) / 10 || 1;
    [low, high] = [low - room, high + room];
  }
  if (low > 0 && high / low > 50) return { scale: 'log', low, high };
  const room = 0.04 * (high - low);
  return { scale: 'linear', low: low - room, high: high + room };
}

/** Places values of an axis between two pixels, and chooses its ticks. */
function scaleOf(axis, from, to, numTicks) {
  const isLog = axis.scale === 'log';
  const of = isLog ? (v) => Math.log10(Math.max(v, 1e-300)) : (v) => v;
  const margin = axis.scale === 'category' ? 0.5 : 0;
  const low = of(axis.low) - margin;
  const span = of(axis.high) + margin - low || 1;
  const isFlat = of(axis.high) === of(axis.low) && !margin;
  const between = (least, most, value) => {
    const share = isFlat ? 0.5 : (of(value) - low) / span;
    return from + (to - from) * Math.min(most, Math.max(least, share));
  };
  return {
    at: (value) => between(0, 1, value),
    // Beyond the axis as well, where the drawing is clipped.
    free: (value) => between(-9, 9, value),
    beyond: (value) => value < axis.low || value > axis.high,
    ticks: ticksOf(axis, numTicks),
  };
}

function ticksOf(axis, most) {
  if (axis.scale === 'category') {
    const step = Math.ceil(axis.labels.length / most);
    const room = Math.floor((axis.room || 1e9) / CHARACTER);
    return axis.labels
      .map((label, i) => [i, cut(label, room * step)])
      .filter(([i]) => i % step === 0);
  }
  let values = axis.ticks || [];
  const step = Math.ceil(values.length / most);
  values = values.filter((_, i) => i % step === 0);
  if (!values.length && axis.scale === 'log') values = logTicks(axis, most);
  if (values.length < 2) values = linearTicks(axis, most);
  return values.map((value) => [value, shown(value)]);
}

function linearTicks({ low, high, whole }, most) {
  const rough = (high - low) / Math.max(1, most - 1) || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  let step = [1, 2, 5, 10].find((n) => n * power >= rough) * power;
  if (whole) step = Math.max(1, step);
  const result = [];
  const first = Math.ceil(low / step - 1e-9);
  for (let i = first; i * step <= high + 1e-9 * step; i++) {
    result.push(Number((i * step).toPrecision(12)));
  }
  // One tick says nothing of the scale.
  return result.length < 2 && most < 20
    ? linearTicks({ low, high, whole }, most + 1) : result;
}

function logTicks({ low, high }, most) {
  const first = Math.ceil(Math.log10(low) - 1e-9);
  const last = Math.floor(Math.log10(high) + 1e-9);
  const step = Math.max(1, Math.ceil((last - first + 1) / most));
  const tens = [];
  for (let i = first; i <= last; i += step) tens.push(10 ** i);
  if (tens.length > 2 || 3 * (last - first + 1) > most) return tens;
  const more = [];
  for (let i = first - 1; i <= last; i++) {
    for (const n of [1, 2, 5]) more.push(Number((n * 10 ** i).toPrecision(6)));
  }
  return more.filter((v) => v >= low * 0.999 && v <= high * 1.001);
}

function cut(text, most) {
  if (text.length <= most) return text;
  return `${text.slice(0, Math.max(1, most - 1))}…`;
}

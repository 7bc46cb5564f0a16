// --- The table. ---

const tip = document.getElementById('tip');
const box = document.querySelector('.trials');
const body = box ? box.querySelector('tbody') : null;
const rows = new Map();
const byNumber = new Map(trials.map((t) => [t.n, t]));
if (body) {
  for (const row of body.rows) rows.set(Number(row.dataset.trial), row);
}
const texts = new Map(
  [...rows].map(([n, row]) => [n, row.textContent.toLowerCase()])
);
let hotRow = null;

function highlight(trial) {
  for (const chart of charts) {
    const nodes = trial ? chart.hits.filter((h) => h.trial === trial) : [];
    chart.hot.replaceChildren(...nodes.map((h) => h.node.cloneNode()));
  }
  if (hotRow) hotRow.classList.remove('hot');
  hotRow = trial ? rows.get(trial.n) : null;
  if (hotRow) hotRow.classList.add('hot');
  if (!trial) tip.hidden = true;
}

/** Scrolls the table to a trial, without moving the page. */
function reveal(trial) {
  if (trial) box.scrollTop = rows.get(trial.n).offsetTop - box.clientHeight / 2;
}

function keyOf(trial, name) {
  if (name[0] === 'p' && name.length > 1) return trial.p[Number(name.slice(1))];
  if (name === 'v' && trial.s === 'diverged') return sign * Infinity;
  return trial[name];
}

function sortBy(header) {
  const isUp = header.getAttribute('aria-sort') !== 'ascending';
  for (const other of box.querySelectorAll('th[aria-sort]')) {
    other.setAttribute('aria-sort', 'none');
  }
  header.setAttribute('aria-sort', isUp ? 'ascending' : 'descending');
  const trialOf = (row) => byNumber.get(Number(row.dataset.trial));
  const key = (row) => keyOf(trialOf(row), header.dataset.key);
  const isMissing = (value) => [null, undefined, ''].includes(value);
  const sorted = [...body.rows].map((row) => [key(row), row]);
  sorted.sort(([a], [b]) => {
    // What is not known comes last either way.
    if (isMissing(a) || isMissing(b)) return isMissing(a) - isMissing(b);
    return (isUp ? 1 : -1) * (a < b ? -1 : a > b ? 1 : 0);
  });
  body.append(...sorted.map(([, row]) => row));
}

const search = document.getElementById('search');
const states = [...document.querySelectorAll('.bar input[type=checkbox]')];
const count = document.getElementById('count');

function visibleTrials() {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  const kept = new Set(states.filter((s) => s.checked).map((s) => s.value));
  return trials.filter(
    (t) => kept.has(t.s) && words.every((w) => texts.get(t.n).includes(w))
  );
}

function update() {
  const visible = visibleTrials();
  const numbers = new Set(visible.map((t) => t.n));
  for (const [n, row] of rows) row.hidden = !numbers.has(n);
  count.textContent = `${visible.length} of ${trials.length} shown`;
  for (const chart of charts) chart.draw(visible);
}

let waiting = 0;
function soon() {
  clearTimeout(waiting);
  waiting = setTimeout(update, 120);
}

if (body) {
  for (const header of box.querySelectorAll('th[data-key]')) {
    const button = header.querySelector('button');
    button.addEventListener('click', () => sortBy(header));
  }
  body.addEventListener('mouseover', (event) => {
    const row = event.target.closest('tr');
    highlight(row ? byNumber.get(Number(row.dataset.trial)) : null);
  });
  body.addEventListener('mouseleave', () => highlight(null));
  search.addEventListener('input', soon);
  for (const state of states) state.addEventListener('change', soon);
  let width = innerWidth;
  addEventListener('resize', () => {
    if (innerWidth === width) return;
    width = innerWidth;
    soon();
  });
  document.querySelector('.bar').hidden = false;
  update();
}

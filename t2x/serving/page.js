// The page that tries a model: /v1/completions as a stream, each piece of text
// coloured by how unlikely its tokens were.
'use strict';

const byId = (id) => document.getElementById(id);
const NUMBERS = [
  'temperature', 'top_p', 'min_p', 'repetition_penalty', 'max_tokens',
];
let running = null; // Ends the request that is under way.

function headers() {
  const key = byId('key').value;
  const result = { 'Content-Type': 'application/json' };
  if (key) result.Authorization = `Bearer ${key}`;
  return result;
}

function body() {
  const result = { prompt: byId('prompt').value, stream: true, logprobs: 5 };
  for (const name of NUMBERS) result[name] = Number(byId(name).value);
  const seed = byId('seed').value;
  if (seed !== '') result.seed = Number(seed);
  if (byId('regex').value) result.regex = byId('regex').value;
  if (byId('stop').value) result.stop = [byId('stop').value];
  result.stream_options = { include_usage: true };
  return result;
}

function tell(message) {
  byId('error').textContent = message;
  byId('error').hidden = !message;
}

function askForKey() {
  document.querySelector('details').open = true;
  byId('key').focus();
}

// Spaces and ends of lines, made visible.
function shown(piece) {
  return piece.replaceAll(' ', '\u00b7').replaceAll('\n', '\u21b5') || '\u2205';
}

const percent = (logProb) => `${(100 * Math.exp(logProb)).toFixed(1)}%`;

function showToken(span, tokens) {
  document.querySelectorAll('.shown').forEach((s) => {
    s.classList.remove('shown');
  });
  span.classList.add('shown');
  const box = byId('token');
  box.hidden = false;
  const names = tokens.map((t) => `${shown(t.token)} ${percent(t.logProb)}`);
  box.querySelector('h2').textContent = names.join(', ');
  const rows = tokens.flatMap((t) => {
    const top = Object.entries(t.top).sort((a, b) => b[1] - a[1]);
    return top.map(([piece, logProb]) => {
      const row = document.createElement('tr');
      if (piece === t.token) row.className = 'taken';
      const cell = (name, text) => {
        const made = document.createElement('td');
        made.className = name;
        made.textContent = text;
        row.append(made);
        return made;
      };
      cell('piece', shown(piece));
      cell('share', percent(logProb));
      const bar = document.createElement('i');
      bar.style.width = percent(logProb);
      cell('bar', '').append(bar);
      return row;
    });
  });
  box.querySelector('tbody').replaceChildren(...rows);
}

function addText(text, tokens) {
  const span = document.createElement('span');
  span.className = 'new';
  span.textContent = text;
  const least = Math.min(...tokens.map((t) => t.logProb));
  const alpha = Math.min(-least / 6, 1) * 0.6;
  span.style.backgroundColor = `rgba(var(--surprise), ${alpha.toFixed(3)})`;
  span.title = tokens.map((t) => percent(t.logProb)).join(' ');
  span.addEventListener('click', () => showToken(span, tokens));
  byId('text').append(span);
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = '';
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    rest += value;
    const parts = rest.split('\n\n');
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, '');
      if (data === '[DONE]') return;
      yield JSON.parse(data);
    }
  }
}

function tokensOf(logprobs) {
  return logprobs.tokens.map((token, i) => ({
    token,
    logProb: logprobs.token_logprobs[i],
    top: logprobs.top_logprobs[i],
  }));
}

async function write() {
  const wanted = body();
  running = new AbortController();
  byId('write').disabled = true;
  byId('halt').disabled = false;
  tell('');
  byId('figures').textContent = '';
  byId('token').hidden = true;
  const given = document.createElement('span');
  given.className = 'given';
  given.textContent = wanted.prompt;
  byId('text').replaceChildren(given);
  const start = performance.now();
  let first = null;
  let count = 0;
  let reason = 'stopped by you';
  let waiting = []; // Tokens whose text is not certain yet.
  try {
    const response = await fetch('/v1/completions', {
      method: 'POST',
      headers: headers(),
      body: JSON.stringify(wanted),
      signal: running.signal,
    });
    if (response.status === 401) askForKey();
    if (!response.ok) {
      throw new Error((await response.json()).error.message);
    }
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      const [choice] = event.choices;
      if (!choice) continue;
      waiting.push(...tokensOf(choice.logprobs));
      count += choice.logprobs.tokens.length;
      first ??= performance.now();
      if (choice.text && waiting.length) {
        addText(choice.text, waiting);
        waiting = [];
      } else if (choice.text) {
        byId('text').append(choice.text);
      }
      reason = choice.finish_reason ?? reason;
    }
  } catch (error) {
    if (error.name !== 'AbortError') {
      tell(error.message);
      reason = 'failed';
    }
  }
  if (count) {
    const seconds = (performance.now() - first) / 1000;
    const rate = count > 1 ? ((count - 1) / seconds).toFixed(1) : '-';
    byId('figures').textContent =
      `${count} tokens, the first after ${((first - start) / 1000).toFixed(2)} s,` +
      ` then ${rate} a second; end: ${reason}`;
  }
  byId('write').disabled = false;
  byId('halt').disabled = true;
  running = null;
}

async function about() {
  const response = await fetch('/v1/models', { headers: headers() });
  if (response.status === 401) askForKey();
  if (!response.ok) return;
  const [model] = (await response.json()).data;
  byId('model').textContent = model.id;
  document.title = `${model.id} \u2013 t2x`;
  byId('about').textContent = `up to ${model.max_model_len} tokens`;
  byId('max_tokens').max = model.max_model_len - 1;
}

for (const name of NUMBERS) {
  const input = byId(name);
  const tellValue = () => {
    input.parentElement.querySelector('output').value = input.value;
  };
  input.addEventListener('input', tellValue);
  tellValue();
}
byId('form').addEventListener('submit', (event) => {
  event.preventDefault();
  if (!running) write();
});
byId('halt').addEventListener('click', () => running?.abort());
byId('prompt').addEventListener('keydown', (event) => {
  if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) {
    byId('form').requestSubmit();
  }
});
byId('key').addEventListener('change', about);
about();

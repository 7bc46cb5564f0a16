r"""A load test of a running server, with clients that misbehave.

python experiments/serve.py --workdir=RUN --port=8000 &
python scripts/bench_serve.py --url=http://127.0.0.1:8000 [--clients=32]
    [--requests=300] [--faults=0.3] [--json]

Needs: bash scripts/setup.sh serve bench

Clients in parallel stream greedy completions of mixed lengths, some of whose
prompts begin alike. A share of the requests is faulty: clients that go while
they are answered, that read slowly, that send half a body, no JSON, a giant
body, wrong types or a rule that cannot be met. Afterwards every good answer is
asked for again, alone, and must be the same, and the server must hold nothing.

Prints tokens/s, times to the first token and between tokens, and what the
faulty ones were answered.
"""

import argparse
import asyncio
import collections
import importlib.util
import json
import random
import statistics
import sys
import time

_WORDS = 'the function returns a list of values and then it stops when'.split()
_FAULTS = {
  # name -> the statuses that it may be answered with; 0 is no answer.
  'vanish': {0},
  'slow': {200},
  'half': {0},
  'not_json': {400},
  'giant': {413},
  'types': {400},
  'rule': {400},
}


def main() -> None:
  parser = argparse.ArgumentParser(description='load test')
  parser.add_argument('--url', default='http://127.0.0.1:8000')
  parser.add_argument('--clients', type=int, default=32)
  parser.add_argument('--requests', type=int, default=300)
  parser.add_argument('--faults', type=float, default=0.3)
  parser.add_argument('--max_tokens', type=int, default=64)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--json', action='store_true')
  args = parser.parse_args()
  if importlib.util.find_spec('httpx') is None:
    sys.exit('httpx is missing: bash scripts/setup.sh bench')
  import httpx

  try:
    found = asyncio.run(run(args))
  except httpx.TransportError as error:
    sys.exit(f'error: {args.url} does not answer: {error!r}')
  for name, value in found.items():
    print(f'{name:24}{value}')
  if args.json:
    print(json.dumps(found))
  if found['different'] or found['unexpected'] or found['held_after']:
    sys.exit('error: an answer, a status or what is held is not as it must be')


def body_of(rng: random.Random, most: int) -> dict:
  words = [rng.choice(_WORDS) for _ in range(rng.randrange(1, 12))]
  if rng.random() < 0.5:
    words = 3 * _WORDS + words[:4]  # These begin alike.
  return {
    'prompt': ' '.join(words),
    'max_tokens': rng.randrange(4, most + 1),
    'temperature': 0,
    'stream': True,
    'ignore_eos': True,
  }


async def run(args) -> dict:
  import httpx

  rng = random.Random(args.seed)
  jobs = [
    (
      rng.choice(list(_FAULTS)) if rng.random() < args.faults else None,
      body_of(rng, args.max_tokens),
    )
    for _ in range(args.requests)
  ]
  pending = collections.deque(jobs)
  first, between, statuses = [], [], collections.Counter()
  answers, unexpected = [], []
  limits = httpx.Limits(max_connections=args.clients + 8)
  async with httpx.AsyncClient(
    base_url=args.url, timeout=120, limits=limits
  ) as client:
    before = await figures(client)

    async def work():
      while pending:
        fault, body = pending.popleft()
        if fault is None:
          answers.append((body, await good(client, body, first, between)))
          continue
        status = await faulty(client, fault, body)
        statuses[f'{fault} {status}'] += 1
        if status not in _FAULTS[fault]:
          unexpected.append((fault, status))

    start = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(args.clients)))
    seconds = time.perf_counter() - start
    tokens = sum(body['max_tokens'] for body, _ in answers)
    await settled(client)
    after = await figures(client)
    different = 0
    for body, text in answers[:: max(len(answers) // 40, 1)]:
      different += text != await good(client, body, [], [])
  grown = lambda name: after[name] - before[name]
  millis = lambda values, q: round(percentile(values, q) * 1e3, 1)
  held = ('t2x_running', 't2x_pending', 't2x_pages_used')
  return {
    'requests': len(jobs),
    'good': len(answers),
    'tokens_per_s': round(tokens / seconds, 1),
    'first_p50_ms': millis(first, 50),
    'first_p99_ms': millis(first, 99),
    'between_p50_ms': millis(between, 50),
    'between_p99_ms': millis(between, 99),
    'shared_of_prompts': round(
      grown('t2x_shared_tokens_total') / grown('t2x_prompt_tokens_total'), 3
    ),
    'faults': dict(sorted(statuses.items())),
    'unexpected': unexpected,
    'different': different,
    'held_after': sum(after[name] for name in held),
  }


def percentile(values, q: int) -> float:
  return statistics.quantiles(values, n=100, method='inclusive')[q - 1]


async def figures(client) -> dict[str, float]:
  text = (await client.get('/metrics')).text
  lines = [line.rsplit(' ', 1) for line in text.splitlines() if line[0] != '#']
  return {name: float(value) for name, value in lines}


async def settled(client) -> None:
  """Waits until the server has noticed who went."""
  for _ in range(100):
    if not (await figures(client))['t2x_pending']:
      return
    await asyncio.sleep(0.1)


async def good(client, body, first, between) -> str:
  """Returns the text of a stream; asks again where there is no room."""
  while True:
    last, text, is_first = time.perf_counter(), '', True
    async with client.stream('POST', '/v1/completions', json=body) as answer:
      if answer.status_code == 429:
        await asyncio.sleep(float(answer.headers['retry-after']))
        continue
      answer.raise_for_status()
      async for line in answer.aiter_lines():
        if not line.startswith('data: {'):
          continue
        now = time.perf_counter()
        (first if is_first else between).append(now - last)
        last, is_first = now, False
        text += json.loads(line[6:])['choices'][0]['text']
    return text


async def faulty(client, fault: str, body: dict) -> int:
  """Does something wrong; returns the status of the answer, or 0."""
  import httpx

  post = lambda **kwargs: client.post('/v1/completions', **kwargs)
  kind = {'content-type': 'application/json'}
  if fault in ('vanish', 'slow'):
    async with client.stream('POST', '/v1/completions', json=body) as answer:
      num = 0
      async for _ in answer.aiter_lines():
        num += 1
        if fault == 'vanish' and num > 4:
          return 0
        if fault == 'slow' and num < 8:
          await asyncio.sleep(0.2)
      return 0 if fault == 'vanish' else answer.status_code
  if fault == 'half':
    url = client.base_url
    _, writer = await asyncio.open_connection(url.host, url.port)
    writer.write(
      b'POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: '
      b'application/json\r\nContent-Length: 500\r\n\r\n{"prompt": '
    )
    await writer.drain()
    await asyncio.sleep(0.5)
    writer.close()
    return 0
  wrong = {
    'not_json': {'content': b'{"prompt": ', 'headers': kind},
    'giant': {'json': body | {'prompt': 'a' * 2_000_000}},
    'types': {'json': body | {'max_tokens': 'many'}},
    'rule': {'json': body | {'regex': '(unclosed'}},
  }
  try:
    return (await post(**wrong[fault])).status_code
  except httpx.WriteError:  # The server has closed on a body of this length.
    return 413


if __name__ == '__main__':
  main()

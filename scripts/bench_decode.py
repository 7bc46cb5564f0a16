r"""Speed of writing token by token, against `transformers` on PyTorch.

python scripts/bench_decode.py [--rounds=5] [--json] [--what=peer,flat,...]

GPT-2 small (124M, random weights, float32), on this machine's CPU:

peer      greedy, prompt of 64, 128 new tokens, 1 and 16 rows; `transformers`
          with its cache, in subprocesses that take turns
flat      milliseconds a token at position 960 by those at position 64
sampling  milliseconds a token with temperature, top-k and top-p, by greedy
engine    tokens/s of 64 requests of mixed lengths through 16 slots of the
          engine, by one after the other; and, where requests come at random at
          70% of that rate, time to the first token and between tokens
draft     tokens/s with a draft of a tenth of the parameters of whose tokens 80%
          are accepted, drawn at random, by those of plain greedy decoding

Prints medians over rounds; with --json one object in the last line, in which
`ratio.batch_1` and `ratio.batch_16` are t2x / transformers in tokens/s, and the
others are as said above.

Needs: bash scripts/setup.sh bench
"""

# Without the extra `bench` there is no torch to check types against.
# pyright: reportMissingImports=false

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

PROMPT, NEW, VOCAB = 64, 128, 50257
BATCHES = (1, 16)
WHAT = ('peer', 'flat', 'sampling', 'draft', 'engine')
CONFIG = {
  'model_type': 'gpt2',
  'vocab_size': VOCAB,
  'n_embd': 768,
  'n_layer': 12,
  'n_head': 12,
  'n_positions': 1024,
}


def main() -> None:
  parser = argparse.ArgumentParser(description='decoding speed')
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--json', action='store_true')
  parser.add_argument('--what', default=','.join(WHAT))
  parser.add_argument('--worker')
  args = parser.parse_args()
  workers = {
    't2x': run_t2x,
    'transformers': run_transformers,
    'flat': run_flat,
    'sampling': run_sampling,
    'draft': run_draft,
    'engine': run_engine,
  }
  if args.worker:
    print(json.dumps(workers[args.worker]()))
    return
  wanted = args.what.split(',')
  for name in wanted:
    if name not in WHAT:
      parser.error(f'--what={name}; it is of {", ".join(WHAT)}')
  if 'peer' in wanted:
    for package in ('torch', 'transformers'):
      if importlib.util.find_spec(package) is None:
        sys.exit(f'{package} is missing: bash scripts/setup.sh bench')
  found: dict[str, list[dict[str, float]]] = {}
  for number in range(args.rounds):
    names = [n for n in wanted if n != 'peer']
    if 'peer' in wanted:
      pair = ['t2x', 'transformers']
      names += pair if number % 2 == 0 else pair[::-1]
    for name in names:
      found.setdefault(name, []).append(run_worker(name))
      print(f'round {number + 1} {name}: {found[name][-1]}', file=sys.stderr)
  report(found, args.json)


def run_worker(name: str) -> dict[str, float]:
  command = [sys.executable, __file__, f'--worker={name}']
  env = {'JAX_PLATFORMS': 'cpu', **os.environ}
  out = subprocess.run(command, env=env, check=True, capture_output=True)
  return json.loads(out.stdout.decode().splitlines()[-1])


def report(found, as_json: bool) -> None:
  result = {}
  for name, rows in found.items():
    for key in rows[0]:
      values = [row[key] for row in rows]
      print(
        f'{name + " " + key:32}{statistics.median(values):10.2f}'
        f'   {min(values):.2f} to {max(values):.2f}'
      )
      result[f'{name}.{key}'] = round(statistics.median(values), 3)
  if 't2x' in found:
    for key in found['t2x'][0]:
      pairs = zip(found['t2x'], found['transformers'])
      ratios = [ours[key] / theirs[key] for ours, theirs in pairs]
      result[f'ratio.{key}'] = round(statistics.median(ratios), 3)
      print(
        f'{"ratio " + key:32}{statistics.median(ratios):10.2f}'
        f'   {min(ratios):.2f} to {max(ratios):.2f}'
      )
  if as_json:
    print(json.dumps(result))


def prompts(rows: int, length: int = PROMPT):
  import numpy as np

  return np.random.default_rng(0).integers(0, VOCAB, (rows, length))


def seconds(run) -> float:
  start = time.perf_counter()
  run()
  return time.perf_counter() - start


def our_model(**settings):
  from flax import nnx
  import jax

  from t2x.decode import decoding_weights
  from t2x.interop import configs
  from t2x.models import model as model_lib

  _, config = configs.to_t2x(CONFIG | settings)
  model = decoding_weights.prepare(model_lib.make(config, rngs=nnx.Rngs(0)))
  return jax.block_until_ready(model)


def write(model, rows: int, new: int, *, length=PROMPT, **settings) -> None:
  from t2x.decode import generate
  from t2x.decode import sampling

  config = settings.pop('sampling', sampling.SamplingConfig(temperature=0))
  found = generate.generate(
    model,
    prompts(rows, length).tolist(),
    num_tokens=new,
    num_rows=rows,
    sampling=config,
    **settings,
  )
  assert all(len(row) == new for row in found.tokens)


def run_t2x() -> dict[str, float]:
  model = our_model()
  result = {}
  for rows in BATCHES:
    run = lambda rows=rows: write(model, rows, NEW)
    run()  # Compiles.
    result[f'batch_{rows}'] = rows * NEW / seconds(run)
  return result


def run_transformers() -> dict[str, float]:
  import torch
  import transformers

  torch.manual_seed(0)
  config = transformers.GPT2Config(eos_token_id=None, pad_token_id=0)
  model: Any = transformers.GPT2LMHeadModel(config).eval()
  result = {}
  for rows in BATCHES:
    ids = torch.tensor(prompts(rows))

    def run(ids=ids, new=NEW):
      with torch.no_grad():
        out = model.generate(ids, max_new_tokens=new, do_sample=False)
      assert out.shape[1] == PROMPT + new

    run(new=8)
    result[f'batch_{rows}'] = rows * NEW / seconds(run)
  return result


def run_flat() -> dict[str, float]:
  """Both with the capacity of 1,024 positions that the later one needs."""
  model, new = our_model(), 48

  def a_token(length):
    run = lambda new: write(model, 1, new, length=length, capacity=1024)
    run(1)
    return (seconds(lambda: run(new + 1)) - seconds(lambda: run(1))) / new

  early, late = a_token(64), a_token(960)
  return {
    'ms_at_64': early * 1e3,
    'ms_at_960': late * 1e3,
    'ratio': late / early,
  }


def run_sampling() -> dict[str, float]:
  from t2x.decode import sampling

  model, result = our_model(), {}
  drawn = sampling.SamplingConfig(temperature=0.8, top_k=50, top_p=0.95)
  nucleus = sampling.SamplingConfig(temperature=0.8, top_p=0.95)
  settings = {
    'greedy': sampling.SamplingConfig(temperature=0),
    'drawn': drawn,
    'p': nucleus,
  }
  for rows in BATCHES:
    times = {name: [] for name in settings}
    for _ in range(6):  # In turns, as the machine is not always as fast.
      for name, config in settings.items():
        run = lambda new, c=config, rows=rows: write(
          model, rows, new, sampling=c
        )
        once = seconds(lambda run=run: run(1))
        times[name].append(seconds(lambda run=run: run(33)) - once)
    # The first of each compiles.
    ratio = lambda name, times=times: statistics.median(
      a / b for a, b in list(zip(times[name], times['greedy']))[1:]
    )
    result[f'batch_{rows}'] = ratio('drawn')
    result[f'batch_{rows}_top_p_alone'] = ratio('p')
  return result


def requests(num: int):
  """Prompts of 16 to 128 tokens, 16 to 128 new ones; none begin alike."""
  import numpy as np

  from t2x.decode import engine
  from t2x.decode import sampling

  rng = np.random.default_rng(0)
  return [
    engine.Request(
      prompt=rng.integers(0, VOCAB, rng.integers(16, 129)).tolist(),
      num_tokens=int(rng.integers(16, 129)),
      sampling=sampling.SamplingConfig(temperature=0),
    )
    for _ in range(num)
  ]


def run_engine() -> dict[str, float]:
  import numpy as np

  from t2x.decode import engine as engine_lib
  from t2x.decode import generate

  model, wanted = our_model(), requests(64)
  total = sum(request.num_tokens for request in wanted)
  engine = engine_lib.Engine(model)
  engine.warm()

  def together():
    texts = [engine.add(request) for request in wanted]
    while engine.is_busy:
      engine.step()
    assert sum(len(text.tokens) for text in texts) == total
    engine.forget()

  def in_turn(wanted):
    for request in wanted:
      generate.generate(
        model,
        [request.prompt],
        num_tokens=request.num_tokens,
        num_rows=1,
        capacity=256,
        sampling=request.sampling,
      )

  in_turn(wanted[:1])
  rates = {
    'together': total / seconds(together),
    'in_turn': total / seconds(lambda: in_turn(wanted)),
  }
  rates['ratio'] = rates['together'] / rates['in_turn']
  # Arrivals of a Poisson process.
  mean = total / len(wanted) / (0.7 * rates['together'])
  arrivals = np.random.default_rng(1).exponential(mean, len(wanted)).cumsum()
  first, between = under_load(engine, wanted, arrivals.tolist())
  for name, values in (('first', first), ('between', between)):
    for q in (50, 99):
      rates[f'{name}_p{q}_ms'] = float(np.percentile(values, q)) * 1e3
  return rates


def under_load(engine, wanted, arrivals):
  """Returns seconds to each text's first token, and between its tokens."""
  start = time.perf_counter()
  now = lambda: time.perf_counter() - start
  pending = list(zip(arrivals, wanted))
  last: dict[Any, float] = {}
  first, between = [], []
  while pending or engine.is_busy:
    while pending and pending[0][0] <= now():
      arrival, request = pending.pop(0)
      last[engine.add(request)] = arrival
    if not engine.is_busy:
      time.sleep(max(0.0, pending[0][0] - now()))
      continue
    for text in engine.step():
      (between if len(text.tokens) > 1 else first).append(now() - last[text])
      last[text] = now()
  return first, between


def run_draft() -> dict[str, float]:
  from t2x.decode import drafts
  from t2x.decode import sampling
  from t2x.decode import speculative

  model = our_model()
  small = our_model(n_embd=192, n_layer=4, n_head=3)
  draft = drafts.ModelDraft(model=small, num=4)
  ids = prompts(1).tolist()
  greedy = sampling.SamplingConfig(temperature=0)

  def speculate(new):
    found = speculative.speculate(
      model, ids, num_tokens=new, draft=draft, sampling=greedy, num_rows=1,
      forced=0.8,
    )  # fmt: skip
    assert len(found.tokens[0]) == new

  plain = lambda new: write(model, 1, new)
  rates = []
  for run in (plain, speculate, plain, speculate):
    if len(rates) < 2:
      run(1)
    rates.append(NEW / seconds(lambda run=run: run(NEW)))
  return {
    'plain': (rates[0] + rates[2]) / 2,
    'speculative': (rates[1] + rates[3]) / 2,
    'ratio': (rates[1] / rates[0] + rates[3] / rates[2]) / 2,
  }


if __name__ == '__main__':
  main()

r"""Speed of the input pipeline alone, in tokens/s.

python scripts/bench_input.py [--steps=2000] [--json]

Reads packed causal rows, masked rows and span-corrupted rows of the default
corpus (built once) through Grain with one thread, batch 8, length 256: the
shape of bench_train.py, whose model eats a small share of this.
"""

import argparse
import dataclasses
import json
import time

from t2x.data import config as data
from t2x.data import corpus as corpus_lib
from t2x.data import input_pipeline
from t2x.objectives import causal_lm
from t2x.objectives import masked_lm
from t2x.objectives import masking
from t2x.objectives import span_corruption


def main() -> None:
  parser = argparse.ArgumentParser(description='The input pipeline alone')
  parser.add_argument('--steps', type=int, default=2000)
  parser.add_argument('--json', action='store_true')
  args = parser.parse_args()
  config = data.DataConfig(length=256, batch_size=8)
  corpus = corpus_lib.prepare(config)
  masked = lambda own: masked_lm.MaskedLM(masking=own)
  objectives = {
    'causal_lm': causal_lm.CausalLM(),
    'masked_lm': masked_lm.MaskedLM(),
    'masked words': masked(masking.Words()),
    'masked spans': masked(masking.Spans()),
    'masked phrases': masked(masking.Phrases()),
    'masked hierarchy': masked(masking.Hierarchy(phrases=1.0)),
    'masked rare': masked(masking.Rare()),
    'span_corruption': span_corruption.SpanCorruption(),
  }
  result = {}
  for name, objective in objectives.items():
    own = dataclasses.replace(config, objective=objective)
    result[name] = round(tokens_per_second(corpus, own, args.steps))
    print(f'{name:20}{result[name]:>14,} tokens/s')
  if args.json:
    print(json.dumps(result))


def tokens_per_second(corpus, config, steps: int) -> float:
  batches = input_pipeline.train_batches(corpus, config, seed=0)
  next(batches)  # Starts the thread.
  start, tokens = time.perf_counter(), 0
  for _ in range(steps):
    batch = next(batches)
    tokens += sum(
      int((values != 0).sum())
      for name, values in batch.items()
      if 'segments' in name
    )
  seconds = time.perf_counter() - start
  batches.close()
  return tokens / seconds


if __name__ == '__main__':
  main()

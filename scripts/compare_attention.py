r"""The same small model on the same tokens, with each kind of attention.

python scripts/compare_attention.py [--what=kinds|maskings] [--steps=400]
    [--only=NAME,...] [--plot=FILE.png] [--json]

An encoder of 2 layers, 128 wide, learns to predict masked tokens of the
installed documentation, one document to a row of 128. `kinds` changes its
attention, `maskings` which tokens it predicts. For each: the held-out loss
after so many steps (nats a predicted token), the median time of a step and the
compiler's temporaries. Different maskings ask different questions, so beside
each one's own loss stands that of masked `tokens`. Kinds look at about 64
tokens, where they choose. `--json` prints one object in the last line. Two
cores take about two minutes for each.
"""

import argparse
import json
import statistics
import time
from typing import Any

import jax

from t2x.compilation import program as program_lib
from t2x.config import experiment
from t2x.config import overrides
from t2x.data import config as data
from t2x.data import corpus as corpus_lib
from t2x.data import input_pipeline
from t2x.data import tokenizers
from t2x.hardware import backends
from t2x.layers import attention_config
from t2x.layers import convolution
from t2x.layers import linear
from t2x.layers import low_rank
from t2x.layers import mlp
from t2x.layers import position
from t2x.layers import regional
from t2x.layers import sparse
from t2x.models import encoder
from t2x.objectives import masked_lm
from t2x.objectives import masking
from t2x.parallel import mesh as mesh_lib
from t2x.parallel import sharding
from t2x.training import evaluate as evaluate_lib
from t2x.training import optim

LENGTH, EVERY, SHOWN = 128, 10, 20  # Losses are means of so many steps.
SPLIT = 'validation'
_HEADS: Any = {'num_heads': 8, 'head_dim': 16}
_BLOCKS = tuple(
  ''.join('01'[j in (0, i - 1, i, i + 1)] for j in range(16)) for i in range(16)
)
KINDS = {
  'dense': attention_config.Dense(**_HEADS),
  'local': attention_config.Local(**_HEADS, window=32),
  'dilated': sparse.Dilated(**_HEADS, window=32, dilation=3),
  'block_sparse': sparse.BlockSparse(**_HEADS, sparse_block=16, rows=_BLOCKS),
  'random': sparse.Random(**_HEADS, sparse_block=16, num_random=3),
  'bigbird': sparse.BigBird(
    **_HEADS, window=16, num_global=4, sparse_block=16, num_random=2
  ),
  'longformer': sparse.Longformer(**_HEADS, window=32, num_global=4),
  'regional': regional.Regional(**_HEADS, region=64),
  'linear': linear.Linear(**_HEADS),
  'performer': linear.Performer(**_HEADS, num_features=64),
  'linformer': low_rank.Linformer(**_HEADS, rank=64, length=LENGTH),
  'nystromformer': low_rank.Nystromformer(**_HEADS, landmarks=32),
  'convolution': convolution.Convolution(**_HEADS, width=15),
  'dynamic': convolution.Convolution(**_HEADS, width=15, dynamic=True),
}
MASKINGS = {
  'tokens': masking.Tokens(),
  'words': masking.Words(),
  'spans': masking.Spans(),
  'phrases': masking.Phrases(),
  'hierarchy': masking.Hierarchy(phrases=1.0),
  'rare': masking.Rare(),
  'by_loss': masking.ByLoss(),
}


def config_of(what: str, name: str, steps: int) -> experiment.Experiment:
  """Returns the experiment with one kind, or one masking."""
  kind = KINDS[name if what == 'kinds' else 'dense']
  own = MASKINGS[name if what == 'maskings' else 'tokens']
  return experiment.Experiment(
    model=encoder.EncoderConfig(
      vocab_size=1024,
      num_layers=2,
      embed_dim=128,
      attention=kind,
      mlp=mlp.MlpConfig(hidden=512, activation='gelu'),
      residual='pre_norm',
      position=position.Rotary(),
      embed_norm=True,
    ),
    data=data.DataConfig(
      length=LENGTH,
      batch_size=32,
      batching=data.Pad(),
      tokenizer=tokenizers.SentencePiece(vocab_size=1024),
      objective=masked_lm.MaskedLM(rate=0.4, masking=own),
    ),
    optim=optim.Muon(
      learning_rate=1e-2, schedule=optim.Schedule(warmup_steps=20)
    ),
    train=experiment.TrainConfig(num_steps=steps),
  )


def run(config: experiment.Experiment, corpus, mesh) -> dict[str, Any]:
  """Trains; returns losses by step, held-out loss, seconds, temporaries."""
  steps = experiment.num_steps(config)
  assert steps is not None
  with sharding.use(mesh, config.rules):
    program = program_lib.Program(config, mesh, num_steps=steps)
    compiled = program.lower_step(program.batch_shapes()).compile()
    program.replace({'step': compiled})
    stats: Any = compiled.memory_analysis()
    state, losses, times = program.init_state(), [], []
    batches = input_pipeline.train_batches(corpus, config.data, seed=0)
    for _ in range(steps):
      batch = program.place(next(batches))
      start = time.perf_counter()
      state, metrics = program.step(state, batch)
      losses.append(float(metrics['nll']))
      times.append(time.perf_counter() - start)
    batches.close()
    found = held_out(config, program, state.model, corpus)
    asked = overrides.override(config, {'data.objective.masking': 'tokens'})
    if asked != config:
      program = program_lib.Program(asked, mesh, num_steps=steps)
    of_tokens = held_out(asked, program, state.model, corpus)
  return {
    'losses': losses,
    'loss': round(found, 4),
    'tokens_loss': round(of_tokens, 4),
    'seconds': statistics.median(times),
    'temporaries_bytes': stats.temp_size_in_bytes,
  }


def held_out(config, program, model, corpus) -> float:
  """Returns the loss of held-out rows, masked as `config` says."""
  batches = input_pipeline.eval_batches(
    corpus, config.data, SPLIT, max_batches=8
  )
  rows = map(program.place, batches)
  return evaluate_lib.evaluate(program.evaluate, model, rows)['loss']


def show(result: dict[str, Any], steps: int) -> None:
  # Columns: the own loss, and where it was asked something else, of tokens.
  other = any(own['tokens_loss'] != own['loss'] for own in result.values())
  titles = [f'loss, {steps} steps', *['of tokens'] * other]
  titles += ['ms a step', 'temporaries, MiB']
  print(f'{"":16}{"".join(f"{title:>18}" for title in titles)}')
  for name, own in result.items():
    losses = [own['loss'], *[own['tokens_loss']] * other]
    print(
      f'{name:16}{"".join(f"{loss:18.3f}" for loss in losses)}'
      f'{1e3 * own["seconds"]:18.0f}{own["temporaries_bytes"] / 2**20:18.1f}'
    )


def plot(result: dict[str, Any], what: str, path: str) -> None:
  """Draws losses by step, and by time."""
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot
  import numpy as np

  figure, axes = pyplot.subplots(1, 2, figsize=(12, 5.2), layout='constrained')
  colors = matplotlib.colormaps['tab20']
  for number, (name, own) in enumerate(result.items()):
    mean = np.convolve(own['losses'], np.ones(SHOWN) / SHOWN, 'valid')
    step = np.arange(len(mean)) + SHOWN
    style: Any = {'color': colors(number), 'label': name, 'linewidth': 1.5}
    style['marker'] = '.' if len(step) < 2 * EVERY else None
    axes[0].plot(step[::EVERY], mean[::EVERY], **style)
    axes[1].plot((step * own['seconds'])[::EVERY], mean[::EVERY], **style)
  axes[0].set(xlabel='step', ylabel=f'loss, mean of {SHOWN} steps')
  axes[1].set(xlabel='seconds')
  for ax in axes:
    ax.grid(alpha=0.3)
  handles, labels = axes[0].get_legend_handles_labels()
  figure.legend(handles, labels, loc='outside right center', frameon=False)
  figure.suptitle(f'The same encoder with different {what}: masked tokens')
  figure.savefig(path, dpi=110)
  print(f'wrote {path}')


def main() -> None:
  args = parse()
  names = KINDS if args.what == 'kinds' else MASKINGS
  chosen = args.only.split(',') if args.only else list(names)
  wrong = set(chosen) - set(names)
  if wrong:
    args.parser.error(
      f'no {", ".join(sorted(wrong))} among the {args.what}: '
      f'{", ".join(names)}.'
    )
  backends.skip_missing_tpu()
  mesh = mesh_lib.make(mesh_lib.MeshConfig(), jax.devices()[:1])
  result: dict[str, Any] = {}
  for name in chosen:
    config = config_of(args.what, name, args.steps)
    corpus = corpus_lib.prepare(config.data)
    result[name] = run(config, corpus, mesh)
    print(f'{name}: {result[name]["loss"]:.3f}', flush=True)
  show(result, args.steps)
  if args.plot:
    plot(result, args.what, args.plot)
  if args.json:
    print(json.dumps({'steps': args.steps, args.what: result}))


def parse() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description='Kinds and maskings, trained')
  parser.add_argument('--what', choices=['kinds', 'maskings'], default='kinds')
  parser.add_argument('--steps', type=int, default=400)
  parser.add_argument('--only', help='Names, with commas.')
  parser.add_argument('--plot', help='A picture to write.')
  parser.add_argument('--json', action='store_true')
  args = parser.parse_args()
  if args.steps < SHOWN:
    parser.error(f'--steps={args.steps}; losses are means of {SHOWN} steps.')
  args.parser = parser
  return args


if __name__ == '__main__':
  main()

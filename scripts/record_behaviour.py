r"""Records what t2x computes, and compares it with an earlier record.

python scripts/record_behaviour.py --out=before.json
(change the code)
python scripts/record_behaviour.py --against=before.json

The tool for a refactoring that must change no number. A record holds

- `training`: of every tiny experiment, on one device and on two layouts of four
  simulated ones, the loss and the gradient norm of three steps and a checksum
  of the parameters after them; likewise of further kinds of attention,
  positions and objectives on one device;
- `texts`: greedy tokens, beams and vectors of the models so trained;
- `batches`: a checksum of every array of each objective's first batch, with the
  first ids in plain;
- `plans`: FLOPs, bytes sent and peak bytes of four compiled plans, and of six
  estimates of large runs.

Values are compared bit for bit. `--tolerance=1e-6` lets floats differ by as
much of their size (a sum in another order) and prints which did; checksums
must be equal all the same unless `--ignore=REGEX` names them. Exit code 1 where
something differs. Records of other versions of JAX, or of a machine with
another number of cores, are compared, after a warning.

`--only=training,plans` records or compares these parts alone. All of it takes
ten minutes on two cores, half of that once JAX's cache holds the programs.
"""

import argparse
import hashlib
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import Any

PARTS = ('training', 'texts', 'batches', 'plans')

_TINY = (
  'quickstart',
  'gpt2_tiny',
  'bert_tiny',
  't5_tiny',
  'mixture_tiny',
  'moe_tiny',
)
# Of devices in all: one, or four that the machine simulates.
_LAYOUTS = {
  'one_device': ('mesh.data=1',),
  'fsdp=2,tensor=2': ('mesh.data=1', 'mesh.fsdp=2', 'mesh.tensor=2'),
  'data=2,pipe=2': (
    'mesh.data=2',
    'mesh.pipe=2',
    'pipeline.microbatches=2',
  ),
}
# Two groups of its layers would be four, which take long to compile.
_EXPERTS = {'data=2,expert=2': ('mesh.data=2', 'mesh.expert=2')}
# name: (experiment, settings); what the tiny experiments do not have.
_VARIANTS = {
  'linear': ('quickstart', ('model.attention.kind=linear',)),
  'performer': ('quickstart', ('model.attention.kind=performer',)),
  'local_alibi': (
    'gpt2_tiny',
    (
      'model.attention.kind=local',
      'model.attention.window=8',
      'model.position.kind=alibi',
    ),
  ),
  'grouped_queries': ('quickstart', ('model.attention.num_kv_heads=2',)),
  'prefix_lm': ('quickstart', ('data.objective.kind=prefix_lm',)),
  'denoising': (
    't5_tiny',
    ('data.objective.kind=denoising', 'data.tokenizer.num_sentinels=0'),
  ),
  'whole_words': ('bert_tiny', ('data.objective.masking.kind=words',)),
  'accumulated': ('gpt2_tiny', ('train.accumulate=2', 'train.remat=full')),
}
_SMALL = (
  'model.vocab_size=512',
  'model.num_layers=2',
  'data.source=text_files',
  'data.eval_splits=train',
  'data.tokenizer=bytes',
  'data.length=32',
  'data.batch_size=8',
  'train.num_steps=3',
  'train.eval_batches=1',
)
# name: (experiment, devices, settings); compiled for simulated devices.
_PLANS = {
  'gpt2_tiny': (4, ('mesh.fsdp=2', 'mesh.tensor=2', 'mesh.data=1')),
  't5_tiny': (4, ('mesh.data=4',)),
  'moe_tiny': (4, ('mesh.expert=4', 'mesh.data=1')),
  'quickstart': (
    4,
    ('mesh.data=2', 'mesh.pipe=2', 'pipeline.microbatches=2'),
  ),
}
_ESTIMATES = {
  'llama2_7b': ('mesh.fsdp=16', 'data.batch_size=64'),
  'gpt3_175b': (
    'mesh.fsdp=64',
    'mesh.tensor=8',
    'data.batch_size=512',
  ),
  'mixtral_8x7b': (
    'mesh.fsdp=8',
    'mesh.expert=8',
    'data.batch_size=64',
  ),
  't5_11b': ('mesh.fsdp=32', 'data.batch_size=64'),
  'bert_base': ('mesh.data=8', 'data.batch_size=64'),
  'llama_1b': (
    'mesh.data=2',
    'mesh.pipe=4',
    'pipeline.microbatches=4',
    'data.batch_size=64',
  ),
}
_WORDS = 'the record is kept so that no number moves when the code does'.split()


def main() -> None:
  args = parse()
  if args.child:
    record(
      args.child,
      check_parts(args.only),
      pathlib.Path(args.out),
      args.directory,
    )
    return
  if args.against and not pathlib.Path(args.against).is_file():
    sys.exit(f'error: --against={args.against}: there is no such file.')
  names = check_parts(args.only)
  with tempfile.TemporaryDirectory() as directory:
    found = collect(names, directory)
  if args.out:
    pathlib.Path(args.out).write_text(json.dumps(found, indent=1) + '\n')
    print(f'{args.out} holds {len(found["values"])} values.')
  if args.against:
    before = json.loads(pathlib.Path(args.against).read_text())
    warn_of_place(before['about'], found['about'])
    same = compare(
      {k: v for k, v in before['values'].items() if part_of(k) in names},
      found['values'],
      args.tolerance,
      args.ignore,
    )
    sys.exit(0 if same else 1)


def parse() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument('--out', help='file to write the record to')
  parser.add_argument('--against', help='file of an earlier record')
  parser.add_argument('--only', default=','.join(PARTS), help='some parts')
  parser.add_argument(
    '--tolerance', type=float, default=0.0, help='relative, of floats'
  )
  parser.add_argument(
    '--ignore', default='$^', help='names of values that may differ'
  )
  # Of the processes that this one starts, one for each number of devices.
  parser.add_argument('--child', help=argparse.SUPPRESS)
  parser.add_argument('--directory', help=argparse.SUPPRESS)
  args = parser.parse_args()
  if not args.out and not args.against:
    parser.error('--out=FILE writes a record, --against=FILE compares with one')
  return args


def check_parts(text: str) -> list[str]:
  names = text.split(',')
  unknown = [name for name in names if name not in PARTS]
  if unknown:
    sys.exit(
      f'error: --only={text}: {unknown[0]!r} is no part; the parts are '
      f'{", ".join(PARTS)}.'
    )
  return names


def part_of(name: str) -> str:
  return name.partition('/')[0]


def collect(names: list[str], directory: str) -> dict[str, Any]:
  """Returns the record, made by processes of one and of four devices."""
  children = {'one': 1, 'four': 4}
  values: dict[str, Any] = {}
  for child, devices in children.items():
    out = pathlib.Path(directory) / f'{child}.json'
    command = [sys.executable, os.path.abspath(__file__), '--child', child]
    command += ['--only', ','.join(names), '--out', str(out)]
    flags = f'--xla_force_host_platform_device_count={devices}'
    subprocess.run(
      [*command, '--directory', directory],
      env={**os.environ, 'XLA_FLAGS': flags, 'JAX_PLATFORMS': 'cpu'},
      check=True,
    )
    values |= json.loads(out.read_text())
  kept = {k: v for k, v in sorted(values.items()) if part_of(k) in names}
  return {'about': about(), 'values': kept}


def about() -> dict[str, Any]:
  """Returns what the numbers may depend on besides t2x."""
  from importlib import metadata

  packages = ('jax', 'jaxlib', 'flax', 'optax', 'numpy', 'grain')
  versions = {name: metadata.version(name) for name in packages}
  return {**versions, 'cores': os.cpu_count()}


def warn_of_place(before: dict[str, Any], now: dict[str, Any]) -> None:
  for name in before.keys() | now.keys():
    if before.get(name) != now.get(name):
      print(
        f'warning: the record was made with {name} {before.get(name)}, and '
        f'this is {now.get(name)}: numbers may differ by that alone.',
        file=sys.stderr,
      )


def compare(
  before: dict[str, Any], now: dict[str, Any], tolerance: float, ignore: str
) -> bool:
  """Prints what differs, and returns whether nothing does that may not."""
  differing, close = [], []
  ignored = re.compile(ignore)
  for name in sorted(before.keys() | now.keys()):
    old, new = before.get(name), now.get(name)
    if old == new:
      continue
    line = f'{name}: {old} before, {new} now'
    if isinstance(old, float) and isinstance(new, float):
      near = abs(old - new) <= tolerance * abs(old)
    else:
      near = False
    if near or ignored.search(name):
      close.append(line)
    else:
      differing.append(line)
  for title, lines in (('allowed', close), ('differs', differing)):
    for line in lines:
      print(f'{title}: {line}')
  print(
    f'{len(before)} values: {len(before) - len(close) - len(differing)} equal '
    f'bit for bit, {len(close)} allowed, {len(differing)} differ.'
  )
  return not differing


def record(
  child: str, parts: list[str], out: pathlib.Path, directory: str
) -> None:
  """Writes the values of one process."""
  from absl import flags

  from t2x import main as main_lib

  flags.FLAGS(sys.argv[:1])  # Grain reads absl flags.
  main_lib.use_compilation_cache()
  values: dict[str, Any] = {}
  if child == 'one':
    if 'training' in parts or 'texts' in parts:
      runs = {name: (name, ()) for name in _TINY} | _VARIANTS
      for name, (experiment, settings) in runs.items():
        key = f'{name}/one_device'
        workdir = f'{directory}/{key}'
        settings = (*settings, *_LAYOUTS['one_device'])
        values |= trained(key, experiment, settings, workdir, directory)
        if 'texts' in parts:
          values |= written(key, workdir)
    if 'batches' in parts:
      values |= batches(directory)
  else:
    if 'training' in parts:
      for name in _TINY:
        for layout, settings in layouts_of(name).items():
          key = f'{name}/{layout}'
          values |= trained(
            key, name, settings, f'{directory}/{key}', directory
          )
    if 'plans' in parts:
      values |= plans(directory)
  out.write_text(json.dumps(values))


def layouts_of(name: str) -> dict[str, tuple[str, ...]]:
  """Returns the two layouts of four devices on which an experiment trains."""
  split = {k: v for k, v in _LAYOUTS.items() if k != 'one_device'}
  if name == 'moe_tiny':
    split = {k: v for k, v in split.items() if 'pipe' not in k} | _EXPERTS
  return split


def small(experiment: str, settings: tuple[str, ...], directory: str):
  """Returns an experiment with few layers and bytes of a text of its own."""
  from t2x.config import catalog
  from t2x.config import overrides as overrides_lib

  corpus = pathlib.Path(directory) / 'corpus'
  corpus.mkdir(exist_ok=True)
  for i in range(16):
    words = [_WORDS[(i * 5 + j * (i + 3)) % len(_WORDS)] for j in range(90)]
    # A sentence is eight words long.
    lines = [' '.join(words[k : k + 8]) + '.' for k in range(0, 90, 8)]
    (corpus / f'{i}.txt').write_text(f'{i}. ' + ' '.join(lines))
  own = (
    f'data.files={corpus}/*.txt',
    f'data.data_dir={directory}/data',
  )
  config = catalog.load(experiment)
  values = overrides_lib.parse_settings([*_SMALL, *own, *settings])
  return overrides_lib.override(config, values)


def trained(
  key: str,
  experiment: str,
  settings: tuple[str, ...],
  workdir: str,
  directory: str,
) -> dict[str, Any]:
  """Trains three steps and returns what they gave."""
  from t2x.inference import loading
  from t2x.tracking import metrics
  from t2x.trainer import train

  print(f'training {key}', flush=True)
  config = small(experiment, settings, directory)
  train.train(config, workdir, show=False)
  values: dict[str, Any] = {}
  for row in metrics.read_rows(workdir):
    for name in ('loss', 'grad_norm', 'eval/train/loss'):
      if name in row:
        values[f'training/{key}/step{row["step"]}/{name}'] = row[name]
  model = loading.load(workdir).model
  values[f'training/{key}/parameters'] = checksum(model)
  return values


def checksum(model: Any) -> str:
  """Returns a hash of the names, shapes, dtypes and bits of a model's state."""
  import jax
  import numpy as np

  found = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(model):
    array = np.asarray(leaf)
    about = f'{jax.tree_util.keystr(path)} {array.shape} {array.dtype}'
    found.update(about.encode())
    found.update(array.tobytes())
  return found.hexdigest()[:16]


def written(key: str, workdir: str) -> dict[str, Any]:
  """Returns what the model of a run writes, or its vectors of texts."""
  import numpy as np

  from t2x.inference import embeddings
  from t2x.inference import generation
  from t2x.inference import loading
  from t2x.models import encoder
  from t2x.models import encoder_decoder

  print(f'texts of {key}', flush=True)
  loaded = loading.load(workdir)
  prompts = ['the record', 'no number moves']
  kind = loaded.config.model
  values: dict[str, Any] = {}
  if not isinstance(kind, encoder.EncoderConfig):
    found = generation.generation(
      loaded, prompts, num_tokens=12, ignore_end=True
    )
    values[f'texts/{key}/greedy'] = [list(map(int, t)) for t in found.tokens]
    best = generation.search_text(loaded, prompts, num_tokens=6, num_best=2)
    values[f'texts/{key}/beams'] = [[list(b) for b in row] for row in best]
  if isinstance(
    kind, encoder.EncoderConfig | encoder_decoder.EncoderDecoderConfig
  ):
    vectors = np.asarray(embeddings.embed(loaded, prompts))
    digest = hashlib.sha256(vectors.tobytes()).hexdigest()[:16]
    values[f'texts/{key}/vectors'] = digest
    values[f'texts/{key}/vector'] = vectors[0, :4].tolist()
  return values


def batches(directory: str) -> dict[str, Any]:
  """Returns checksums of the first two batches of each objective."""
  import itertools

  import numpy as np

  from t2x.data import corpus as corpus_lib
  from t2x.data import input_pipeline

  plain = ('causal_lm', 'prefix_lm', 'masked_lm', 'permutation', 'denoising')
  ways: dict[str, tuple[str, ...]] = {
    kind: (f'data.objective.kind={kind}',) for kind in plain
  }
  for kind in ('span_corruption', 'ul2'):
    ways[kind] = (
      f'data.objective.kind={kind}',
      'data.tokenizer.num_sentinels=32',
    )
  ways['next_sentence'] = (
    'data.objective.kind=next_sentence',
    'data.batching=pad',
  )
  ways['padded'] = ('data.batching=pad', 'data.batching.buckets=16,32')
  ways['stream'] = ('data.batching=stream',)
  for masking in ('words', 'spans', 'rare'):
    ways[f'masked_lm.{masking}'] = (
      'data.objective.kind=masked_lm',
      f'data.objective.masking.kind={masking}',
    )
  values: dict[str, Any] = {}
  for name, settings in ways.items():
    print(f'batches of {name}', flush=True)
    config = small('quickstart', settings, directory).data
    corpus = corpus_lib.prepare(config)
    made = input_pipeline.train_batches(corpus, config, seed=3)
    for number, batch in enumerate(itertools.islice(made, 2)):
      for array, content in sorted(batch.items()):
        content = np.asarray(content)
        key = f'batches/{name}/{number}/{array}'
        digest = hashlib.sha256(content.tobytes()).hexdigest()[:16]
        values[key] = f'{content.dtype} {content.shape} {digest}'
        if number == 0:
          values[f'{key}/first'] = content.ravel()[:16].tolist()
    made.close()
    lengths = {
      n: config.objective.lengths(32)[n] for n in ('inputs', 'targets')
    }
    values[f'batches/{name}/lengths'] = lengths
  return values


def plans(directory: str) -> dict[str, Any]:
  """Returns what compiled plans and estimates say."""
  from t2x.config import catalog
  from t2x.config import overrides as overrides_lib
  from t2x.cost_model import estimate
  from t2x.planning import plan as plan_lib

  values: dict[str, Any] = {}
  for name, (devices, settings) in _PLANS.items():
    print(f'plan of {name}', flush=True)
    config = small(name, settings, directory)
    plan = plan_lib.make(config, f'cpu:{devices}')
    values |= {
      f'plans/{name}/model_flops': plan.flops.model,
      f'plans/{name}/executed_flops': plan.flops.executed,
      f'plans/{name}/sent_bytes': sum(sent.bytes for sent in plan.collectives),
      f'plans/{name}/peak_bytes': plan.memory.peak,
      f'plans/{name}/argument_bytes': plan.memory.arguments,
    }
  for name, settings in _ESTIMATES.items():
    print(f'estimate of {name}', flush=True)
    config = catalog.load(name)
    whole = ('mesh.data=1', 'mesh.fsdp=1', *settings)
    config = overrides_lib.override(config, overrides_lib.parse_settings(whole))
    found = estimate.step(config)
    values |= {
      f'plans/{name}/estimated_flops': found.executed_flops,
      f'plans/{name}/estimated_peak': found.peak_bytes,
      f'plans/{name}/estimated_sent': found.sent_bytes(),
    }
  return values


if __name__ == '__main__':
  main()

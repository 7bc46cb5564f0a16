"""The benchmark of attention kinds: its figures and its last line."""

import json

import commands
import numpy as np


def run(*arguments):
  return commands.run('scripts/bench_attention.py', *arguments)


def test_figures_by_length(tmp_path):
  picture = tmp_path / 'attention.png'
  done = run(
    '--lengths=512,1024',
    '--kinds=dense,local,linear,convolution',
    '--rounds=1',
    '--skip_torch',
    f'--plot={picture}',
    '--json',
  )
  assert done.returncode == 0, done.stderr
  kinds = json.loads(done.stdout.splitlines()[-1])['kinds']
  assert list(kinds) == ['dense', 'local', 'linear', 'convolution']
  assert picture.stat().st_size > 10_000
  for kind in kinds.values():
    for name in ('', 'train_'):
      for what in ('seconds', 'temporaries_bytes', 'flops'):
        assert list(kind[f'{name}{what}']) == ['512', '1024']
      flops = kind[f'{name}flops']
      slope = np.log2(flops['1024'] / flops['512'])
      assert abs(kind[f'{name}flops_exponent'] - slope) < 1e-3
  # Half of the pairs and the diagonal; constant work for each token.
  assert 1.8 < kinds['dense']['flops_exponent'] < 2.2
  assert kinds['linear']['flops_exponent'] == 1.0
  assert kinds['dense']['torch_ratio'] is None


def test_a_kind_that_does_not_exist():
  done = run('--kinds=dense,lokal')
  assert done.returncode == 2
  assert 'no kind lokal; there are dense,local,' in done.stderr

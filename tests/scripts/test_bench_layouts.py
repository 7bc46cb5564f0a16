"""The benchmark of layouts, at small sizes: figures that must come out."""

import json
import pathlib

import commands
import pytest

_SCRIPT = pathlib.Path(__file__).parents[2] / 'scripts' / 'bench_layouts.py'


def bench(*flags):
  """Returns what the script prints: lines, and its JSON."""
  done = commands.run(_SCRIPT, '--json', *flags)
  assert done.returncode == 0, done.stderr
  lines = done.stdout.splitlines()
  return lines[:-1], json.loads(lines[-1])


def test_a_ring_grows_with_its_length():
  lines, result = bench('--only=ring', '--width=64', '--heads=2')
  short, middle, long = result['ring']
  assert [row['length'] for row in result['ring']] == [2048, 8192, 32768]
  for a, b in ((short, middle), (middle, long)):
    assert 3.5 < b['arguments'] / a['arguments'] < 4.1
    assert b['temporaries'] < 4.6 * a['temporaries']
  for row in result['ring']:
    # A block of 128 queries meets a piece of a sixteenth; of two heads.
    assert row['largest'] <= 2 * 4 * 128 * row['length'] // 16
    # Not even the scores of a device's own queries and keys.
    assert row['largest'] < row['scores'] // 8**2
  assert len(lines) == 4 and lines[1].startswith('length 2048')


@pytest.mark.slow
def test_layouts_send_what_theory_says():
  sizes = '--layers=2 --width=64 --hidden=128 --vocab=512 --length=256 --rows=8'
  lines, result = bench(
    '--only=layouts', '--match=^(data|tensor|context)=8$', *sizes.split()
  )
  rows = {row['layout']: row for row in result['layouts']}
  assert len(rows) == len(lines) - 1 == 4
  one = rows['data=1']
  assert one['sent'] == one['theory'] == 0
  for name, row in rows.items():
    # A ring makes its scores a second time.
    again = 2 * 2 * 8 * 256 * 256 * 17 // 32 * 64 if name == 'context=8' else 0
    num = 1 if row is one else 8
    assert row['flops'] * num == one['flops'] + again
    if row is not one:
      assert row['temporaries'] < one['temporaries'] / 3
      assert row['arguments'] <= one['arguments']
  for name in ('data=8', 'context=8'):
    ratio = rows[name]['sent'] / rows[name]['theory']
    assert ratio == pytest.approx(1, rel=0.01), name
  # CPUs sum the gradients of queries, keys and values apart.
  layers = rows['tensor=8']
  activation = 4 * 8 * 256 * 64
  assert layers['theory'] == (4 * 2 + 2) * activation
  assert layers['sent'] == pytest.approx((6 * 2 + 2) * activation, rel=0.03)


def test_an_unknown_target_is_answered():
  done = commands.run(_SCRIPT, '--only=ring', '--target=v5e:4x4')
  assert done.returncode == 1
  assert 'v5e:4x4 has 16 devices; 8 needed' in done.stderr or (
    'needs the TPU compiler, libtpu' in done.stderr
  )

"""The benchmark of pipelines, at small sizes: figures that must come out."""

import json
import pathlib

import commands
import pytest

_SCRIPT = pathlib.Path(__file__).parents[2] / 'scripts' / 'bench_pipeline.py'
_SIZES = '--layers=8 --width=16 --hidden=32 --heads=2 --vocab=256 --length=32'


def bench(*flags):
  return commands.run(_SCRIPT, *flags)


@pytest.mark.slow
def test_schedules_are_compared():
  done = bench(
    *_SIZES.split(),
    '--json',
    '--schedules=gpipe,one_f_one_b',
    '--microbatches=4,16',
    '--remat=none',
    '--rounds=1',
  )
  assert done.returncode == 0, done.stderr
  *lines, last = done.stdout.splitlines()
  one, gpipe, alternating = json.loads(last)['none']
  assert [row['name'] for row in (gpipe, alternating)] == [
    'gpipe',
    'one_f_one_b',
  ]
  assert len(lines) == 4 and all('step' in line for line in lines[:1])
  assert 'of model' in lines[0]
  for row in (gpipe, alternating):
    # Two devices of each of the four stages do what eight do of the whole.
    assert 2 * sum(row['flops']) == pytest.approx(8 * one['flops'][0], rel=0.01)
    assert row['published'] == pytest.approx(3 / 7)
    assert row['bubble'] == pytest.approx(6 / 18)
    assert len(row['times']) == 1
  few, many = gpipe['temporaries']
  assert many > 2 * few
  few, many = alternating['temporaries']
  assert many < 1.2 * few


def test_a_layout_of_other_devices_is_answered():
  done = bench('--layout=pipe=4,data=4')
  assert done.returncode == 1
  assert 'pipe=4,data=4,pipeline.schedule=gpipe takes 16 devices' in done.stderr

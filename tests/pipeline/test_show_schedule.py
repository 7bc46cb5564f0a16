"""The command, its drawings, and tables kept as CSV."""

import json
import pathlib
from xml.etree import ElementTree

import commands
import numpy as np
import pytest

from t2x.pipeline import schedule as schedule_lib
from t2x.pipeline import schedules
from t2x.pipeline import simulation
from t2x.pipeline import table_search

_SCRIPT = pathlib.Path(__file__).parents[2] / 'scripts' / 'show_schedule.py'


def show(*flags):
  """Returns the exit code, stdout and stderr of the script."""
  done = commands.run(_SCRIPT, *flags)
  return done.returncode, done.stdout, done.stderr


def _sizes(name, stages=4, microbatches=8):
  return (
    f'--schedule={name}',
    f'--stages={stages}',
    f'--microbatches={microbatches}',
  )


def test_json_holds_the_figures_and_the_table(tmp_path):
  files = tmp_path / 'new' / 'a.svg', tmp_path / 'a.csv'
  code, out, err = show(
    *_sizes('zb_h1'), '--json', f'--svg={files[0]}', f'--csv={files[1]}'
  )
  assert code == 0, err
  found = json.loads(out)
  assert found['ticks'] == 27
  assert found['bubble'] == pytest.approx(3 / 27)
  assert found['bubble_executed'] == pytest.approx(3 / 27)
  assert len(found['bubble_per_stage']) == 4
  assert found['peak_in_flight'] == [4, 4, 4, 4]
  assert found['table'][1] == [
    {'operation': 'F', 'microbatch': 1, 'chunk': 0},
    {'operation': 'F', 'microbatch': 0, 'chunk': 0},
    None,
    None,
  ]
  ElementTree.parse(files[0])
  table = schedule_lib.from_csv(files[1].read_text())
  assert table.name == 'zb_h1'


def test_a_table_is_made_for_costs_kept_and_shown_again(tmp_path):
  file = tmp_path / 'own.csv'
  code, made, err = show(
    *_sizes('generated'), '--limit=6', '--costs=1,1.3,0.8', f'--csv={file}'
  )
  assert code == 0, err
  wanted = table_search.search(
    4, 8, limit=6, costs=simulation.parse_costs('1,1.3,0.8')
  )
  _equal(schedule_lib.from_csv(file.read_text()), wanted)
  code, again, err = show(f'--schedule={file}', '--costs=1,1.3,0.8')
  assert code == 0, err
  assert again == made.replace(f'Written: {file}\n', '')


def test_text_has_a_line_a_stage_and_the_costs_count():
  code, out, err = show(*_sizes('one_f_one_b', 2, 2), '--costs=1,2,1')
  assert code == 0, err
  lines = out.splitlines()
  assert lines[0] == 'stage 0  F0 F1 .  B0 W0 .  B1 W1'
  assert lines[1] == 'stage 1  .  F0 B0 W0 F1 B1 W1 .'
  costs = simulation.Costs(backward=2)
  bubble = schedules.one_f_one_b(2, 2).simulate(costs).bubble_executed
  assert f'bubble_executed   {bubble:.2%}' in out


@pytest.mark.parametrize(
  'flags, message',
  [
    (_sizes('zbh1'), "Did you mean 'zb_h1'?"),
    (_sizes('wave'), "no schedule 'wave'. There are gpipe"),
    (('--schedule=zb_h1', '--stages=2'), 'needs --stages and --microbatches'),
    (_sizes('generated'), '--limit'),
    ((*_sizes('gpipe'), '--limit=2'), 'give both or neither'),
    ((*_sizes('generated'), '--limit=0'), 'the least that works is 1'),
    (('--schedule=no.csv',), 'no.csv: there is no such file'),
    ((*_sizes('zb_h1'), '--placement=v'), 'of --schedule=generated alone'),
    (('--schedule=no.csv', '--limit=3'), '--limit: no.csv says it itself'),
    (_sizes('no.csv'), '--stages: no.csv says it itself'),
    (_sizes('gpipe', 4, 0), 'microbatches=0; the nearest that works is 1'),
    ((*_sizes('zb_v'), '--chunks=3'), 'the nearest that works is 2'),
    ((*_sizes('gpipe'), '--costs=1,1'), 'three numbers are needed'),
    ((*_sizes('gpipe'), '--svg=a.pdf'), 'a drawing is one of .svg or .png'),
  ],
)
def test_what_cannot_be_is_said_in_one_line(flags, message):
  code, out, err = show(*flags)
  assert code == 1 and not out
  assert err.startswith('error: ') and message in err
  assert len(err.splitlines()) == 1


@pytest.mark.parametrize('name', schedules.NAMES)
def test_drawings_show_every_operation(name, tmp_path):
  table = schedules.make(name, num_stages=3, num_microbatches=5)
  file = tmp_path / 'a.svg'
  table.draw(str(file))
  texts = [
    ''.join(e.itertext())
    for e in ElementTree.parse(file).iter()
    if e.tag.endswith('}text')
  ]
  digits = [t for t in texts if t in set('01234')]
  # Each part's F, B and W; the axes have some of these numbers too.
  assert len(digits) >= 3 * 5 * table.num_parts
  assert any(t.startswith(f'{name}: 3 stages, 5 microbatches') for t in texts)
  table.draw(str(tmp_path / 'a.png'))
  assert (tmp_path / 'a.png').read_bytes().startswith(b'\x89PNG')


def test_a_notebook_shows_the_chart():
  table = schedules.gpipe(2, 3)
  shown = ElementTree.fromstring(table._repr_html_())
  assert shown.tag.endswith('}svg')
  texts = [''.join(e.itertext()) for e in shown.iter()]
  assert any(t.startswith('gpipe: 2 stages, 3 microbatches') for t in texts)


def test_a_large_table_is_drawn_without_numbers(tmp_path):
  table = schedules.gpipe(32, 128)
  file = tmp_path / 'a.svg'
  table.draw(str(file))
  assert file.stat().st_size < 1_000_000


# --- CSV. ---


@pytest.mark.parametrize('recompute', [False, True])
@pytest.mark.parametrize('name', schedules.NAMES)
def test_csv_keeps_a_table(name, recompute):
  table = schedules.make(
    name, num_stages=3, num_microbatches=11, recompute=recompute
  )
  _equal(schedule_lib.from_csv(table.to_csv()), table)


def test_csv_keeps_a_table_of_forwards():
  table = schedules.forward_only(2, 3, 2, 'v')
  _equal(schedule_lib.from_csv(table.to_csv()), table)


def _equal(found, table):
  for name in ('operation_TS', 'microbatch_TS', 'chunk_TS'):
    np.testing.assert_array_equal(getattr(found, name), getattr(table, name))
  for name in (
    'name',
    'num_microbatches',
    'num_chunks',
    'placement',
    'recompute',
    'training',
  ):
    assert getattr(found, name) == getattr(table, name)


@pytest.mark.parametrize(
  'old, new, message',
  [
    ('3,B0,W0', '3,B0,Q0', "line 6, stage 1: 'Q0' is no entry"),
    ('3,B0,W0', '3,B0,W9999999999', "stage 1: 'W9999999999' is no entry"),
    ('3,B0,W0', '3,B0', "line 6: '3,B0'; tick 3 and 2 entries"),
    ('3,B0,W0', '7,B0,W0', 'line 6: .*; tick 3 and 2 entries'),
    ('3,B0,W0', '3,B0,', 'W of microbatch 0 on stage 1 is lost'),
    ('# name', 'name', None),
    ('microbatches=1', 'microbatches=x', 'line 1: .* is not of the form'),
    ('training=1', '', 'line 1: .* is not of the form'),
    ('tick,stage 0', 'time,stage 0', 'line 2: .*tick,stage 0'),
  ],
)
def test_a_malformed_line_is_named(old, new, message):
  text = schedules.gpipe(2, 1).to_csv()
  assert old in text
  if message is None:
    assert schedule_lib.from_csv(text.replace(old, new))
    return
  with pytest.raises(ValueError, match=message):
    schedule_lib.from_csv(text.replace(old, new))


def test_an_empty_csv_is_refused():
  with pytest.raises(ValueError, match='here are 0 lines'):
    schedule_lib.from_csv('')

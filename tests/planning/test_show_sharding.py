"""The table and the page of a layout, held to arrays on devices."""

import html
import html.parser
import json
import pathlib
import re
import time
from xml.etree import ElementTree

import commands
import jax
import pytest
import tiny

from t2x.compilation import program
from t2x.config import catalog
from t2x.config import layout_flag
from t2x.config import overrides
from t2x.parallel import mesh as mesh_lib
from t2x.parallel import sharding
from t2x.planning import sharding_drawing
from t2x.planning import sharding_page
from t2x.planning import sharding_table

_SCRIPT = pathlib.Path(__file__).parents[2] / 'scripts' / 'show_sharding.py'
_TOOLS = ('generate', 'evaluate', 'embed', 'classify', 'serve')
_NAMES = sorted(
  p.stem for p in catalog.DIRECTORY.glob('*.py') if p.stem not in _TOOLS
)


def show(*flags):
  """Returns the exit code, stdout and stderr of the script."""
  done = commands.run(_SCRIPT, *flags)
  return done.returncode, done.stdout, done.stderr


def table_of(name, layout, *settings):
  config = overrides.override(
    catalog.load(name), overrides.parse_settings(settings)
  )
  parsed = layout_flag.parse(layout)
  return sharding_table.make(parsed.applied(config), parsed.num_devices)


def test_a_notebook_shows_the_table():
  table = table_of('gpt2_tiny', 'fsdp=2,tensor=2')
  shown = table._repr_html_()
  assert shown.startswith('<pre>') and shown.endswith('</pre>')
  assert html.unescape(shown[5:-6]) == sharding_table.text(table)


# --- Numbers. ---


@pytest.mark.parametrize(
  'settings',
  [
    {'train__ema_decay': 0.9},
    {'optim': 'adafactor', 'mesh__data': 1, 'mesh__fsdp': 4},
  ],
  ids=['adamw', 'adafactor'],
)
def test_every_row_is_what_devices_hold(tmp_path, settings):
  config = tiny.experiment_of(tmp_path, **settings)
  table = sharding_table.make(config, 8)
  mesh = mesh_lib.make(config.mesh)
  made = program.Program(config, mesh, num_steps=2)
  with sharding.use(mesh, config.rules):
    state = made.init_state()
  parts = {
    'parameters': state.model,
    'optimizer state': state.opt_state,
    'moving average': state.ema,
    'counters': {'num_skipped': state.num_skipped, 'step': state.step},
  }
  for name, tree in parts.items():
    arrays = jax.tree.leaves(tree)
    rows = table.groups.get(name, ())
    assert len(rows) == len(arrays)
    for row, array in zip(rows, arrays):  # Both in the order of the tree.
      shards = array.addressable_shards
      assert {s.data.nbytes for s in shards} == {row.bytes_per_device}
      same = [s for s in shards if s.index == shards[0].index]
      assert row.copies == len(same)
      assert row.num_bytes == array.nbytes
    if rows:
      sums = sharding_table.total(table, name)
      held = [s.data.nbytes for a in arrays for s in a.addressable_shards]
      assert sums.bytes_per_device * 8 == sum(held)
      copies = sum(held) - sum(a.nbytes for a in arrays)
      assert sums.replicated == pytest.approx(copies / sum(held))
  every = sharding_table.total(table)
  assert every.num_bytes == sum(a.nbytes for a in jax.tree.leaves(state))


def test_by_hand():
  table = table_of('gpt2_tiny', 'data=2,fsdp=2,tensor=2')
  rows = {row.path: row for row in table.groups['parameters']}
  tokens = rows['embeddings.tokens.table_VD']
  assert tokens.axes == ('vocab', 'embed')
  assert tokens.spec == "P('tensor', 'fsdp')"
  assert tokens.bytes_per_device == 4 * (4096 // 2) * (256 // 2)
  assert (tokens.copies, tokens.replicated) == (2, 0.5)
  norm = rows['tower.final_norm.scale']
  assert norm.bytes_per_device == 4 * 256 and norm.replicated == 7 / 8
  assert norm.axes == (None,)
  most = sharding_table.largest_copies(table, 1)
  assert most[0].spare_bytes == tokens.spare_bytes == 2**19
  assert table.layout == 'data=2, fsdp=2, tensor=2'


@pytest.mark.parametrize('name', _NAMES)
def test_every_experiment_has_a_table_and_a_page(name):
  table = table_of(name, 'data=2,fsdp=4,tensor=2')
  lines = sharding_table.text(table).splitlines()
  rows = table.groups['parameters']
  for line, row in zip(lines[1:], rows):
    assert line.split()[0] == row.path
  page = sharding_page.page(table, title=name)
  assert page.count('<svg') == len(rows)
  assert json.loads(json.dumps(sharding_table.to_json(table)))


@pytest.mark.parametrize(
  ('num', 'text'),
  [
    (0, '0 B'),
    (999, '999 B'),
    (1000, '1.00 kB'),
    (999_700, '1.00 MB'),
    (12_340, '12.3 kB'),
    (1_234_567, '1.23 MB'),
    (512e6, '512 MB'),
    (1.2346e12, '1,235 GB'),
  ],
)
def test_bytes_as_text(num, text):
  assert sharding_table.bytes_text(num) == text


# --- The page. ---


class _Texts(html.parser.HTMLParser):
  """Collects tags; checks that they are closed in order."""

  def __init__(self):
    super().__init__()
    self.open, self.tags = [], []

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    if tag not in ('meta', 'wbr', 'rect', 'path'):
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))

  def handle_endtag(self, tag):
    assert self.open.pop() == tag


def test_the_page_stands_alone_and_escapes():
  table = table_of('gpt2_tiny', 'data=2,fsdp=2,tensor=2')
  page = sharding_page.page(
    table, title='<script>alert(1)</script>', notes=['a < b & c']
  )
  parser = _Texts()
  parser.feed(page)
  assert not parser.open
  tags = {tag for tag, _ in parser.tags}
  assert not tags & {'script', 'link', 'img', 'iframe'}
  assert not any('src' in a or 'href' in a for _, a in parser.tags)
  assert 'http' not in page
  assert '&lt;script&gt;' in page and 'a &lt; b &amp; c' in page
  for axis in ('data', 'fsdp', 'tensor'):
    assert f'<i class="axis {axis}">{axis} 2</i>' in page


def drawing(table, path):
  row = next(r for r in table.groups['parameters'] if r.path == path)
  return ElementTree.fromstring(sharding_drawing.draw(row, table.sizes))


def area(shape):
  return float(shape.get('width')) * float(shape.get('height'))


def test_a_drawing_cuts_as_the_mesh_does():
  table = table_of('gpt2_tiny', 'data=2,fsdp=4,tensor=2')
  svg = drawing(table, 'tower.layers.group.0.mlp.up_DF')
  classes = [shape.get('class') for shape in svg]
  assert classes.count('cut fsdp') == 3
  assert classes.count('cut tensor') == 1
  assert classes.count('sheet') == 1  # Behind it, for two copies.
  by_class = dict(zip(classes, svg))
  share = area(by_class['held']) / area(by_class['whole'])
  assert share == pytest.approx(1 / 8, rel=1e-3)
  svg = drawing(table, 'tower.final_norm.scale')
  assert [s.get('class') for s in svg][-2:] == ['whole', 'held']


def test_a_third_cut_is_drawn_as_panels():
  layout = 'data=2,fsdp=2,tensor=2'
  table = table_of('gpt2_tiny', layout, 'rules.layers=data')
  svg = drawing(table, 'tower.layers.group.0.mlp.up_DF')
  classes = [shape.get('class') for shape in svg]
  assert classes.count('whole') == classes.count('cut data') == 2
  assert 'sheet' not in classes


# --- The script. ---


def test_a_large_model_on_absent_devices(tmp_path):
  file = tmp_path / 'page.html'
  start = time.perf_counter()
  code, out, error = show(
    '--experiment=llama2_7b', '--layout=fsdp=64,tensor=4', f'--html={file}'
  )
  assert code == 0, error
  assert time.perf_counter() - start < 60  # And not hours, nor 27 GB.
  lines = {line.split()[0]: line for line in out.splitlines() if line}
  up = lines['tower.layers.group.0.mlp.up_DF']
  size = 4 * 32 * (4096 // 64) * (11008 // 4)
  assert up.split()[1:4] == ['32x4096x11008', 'float32', 'layers,embed,mlp']
  assert "P(None, 'fsdp', 'tensor')" in up and f'{size:,}' in up
  assert lines['parameters'].split()[1:] == '27.0 GB 106 MB 1.0%'.split()
  assert 'To train so, --set data.batch_size=64: its 16 rows' in out
  assert '<h1>Sharding of llama2_7b</h1>' in file.read_text()


def test_json_and_settings():
  code, out, error = show(
    '--experiment=gpt2_tiny',
    '--layout=data=1,tensor=-1',
    '--num_devices=4',
    '--set=rules.vocab=none',
    '--json',
  )
  assert code == 0, error
  found = json.loads(out)
  assert found['mesh']['tensor'] == found['num_devices'] == 4
  tokens = found['parameters'][1]
  assert tokens['path'] == 'embeddings.tokens.table_VD'
  assert tokens['spec'] == "P(None, 'fsdp')" and tokens['copies'] == 4
  assert found['totals']['all']['bytes_per_device'] > 0


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    ([], r'--experiment=NAME is missing'),
    (['--experiment=gpt2_tin'], r"Did you mean 'gpt2_tiny'\?"),
    (['--experiment=generate'], r'has no get_config\(\), so it is a tool'),
    (
      ['--experiment=gpt2_tiny', '--layout=data=2,tensr=2'],
      r"there is no mesh axis 'tensr'; .* Did you mean 'tensor'\?",
    ),
    (
      ['--experiment=gpt2_tiny', '--layout=fsdp=-1'],
      r'takes the devices that remain \(-1\).* a flag --num_devices',
    ),
    (
      ['--experiment=gpt2_tiny', '--layout=tensor=16'],
      r"kv_heads'\) of size 8 is not divisible by 16 .* Layouts of 16 devices "
      'that work: --layout=data=2,tensor=8; --layout=fsdp=2,tensor=8',
    ),
    (
      ['--experiment=gpt2_tiny', '--layout=data=3', '--num_devices=4'],
      r'needs 3 devices and there are 4.* that work: --layout=data=4; ',
    ),
    (
      ['--experiment=gpt2_tiny', '--set=mesh.data=3', '--num_devices=4'],
      r'needs 3 devices and there are 4.* that work: mesh\.data=4; ',
    ),
    (
      # Twelve rows were tried, and those that are given are kept.
      [
        '--experiment=moe_tiny',
        '--layout=data=2,expert=3',
        '--set=data.batch_size=8',
      ],
      r'of size 8 is not divisible by 3.* Layouts that work: '
      r'--layout=data=2,expert=4 \(8 devices\); --layout=data=2,expert=2 ',
    ),
    (
      [
        '--experiment=moe_tiny',
        '--layout=data=2,expert=3',
        '--num_devices=6',
        '--set=data.batch_size=8',
      ],
      r'Layouts of 6 devices that work with data\.batch_size=12: --layout=',
    ),
  ],
)
def test_messages(flags, message):
  code, out, error = show(*flags)
  assert code == 1 and not out
  assert error.startswith('error: ') and len(error.splitlines()) == 1, error
  assert re.search(message, error), error


@pytest.mark.parametrize('num', [0, -3])
def test_a_number_of_devices(num):
  flags = '--experiment=gpt2_tiny', '--layout=data=2', f'--num_devices={num}'
  code, out, error = show(*flags)
  assert code == 1 and not out
  assert f'--num_devices={num}: {num} is not a positive integer' in error

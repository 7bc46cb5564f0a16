"""Formats a sharding table as an HTML page, with a drawing of each parameter.

It is the page of scripts/show_sharding.py: one file without scripts, whose
style follows the reader's light or dark setting.
"""

from collections.abc import Iterable
import html
import math

from t2x.planning import sharding_drawing
from t2x.planning import sharding_table
from t2x.tracking import html_page

# Number of the color of each mesh axis in the page's style.
_COLORS = {
  'fsdp': 0,
  'tensor': 1,
  'data': 2,
  'context': 3,
  'expert': 4,
  'pipe': 5,
}

_STYLE = """
body { max-width: 84rem; }
.sub { margin: .25rem 0 1.25rem; color: var(--ink); }
.axis {
  display: inline-block; padding: 0 .45rem; border-radius: 999px;
  font-size: .8rem; font-style: normal; line-height: 1.45; color: var(--card);
}
.lay th, .lay td { text-align: left; vertical-align: middle; }
.lay tbody th { min-width: 17rem; max-width: 24rem; white-space: normal; }
.lay b { font-weight: 600; font-size: .95rem; overflow-wrap: break-word; }
.lay code, .rest code { font-size: .8rem; color: var(--ink); }
.lay th code { display: block; }
.dims { display: grid; grid-template-columns: auto auto auto; gap: .1rem .6rem;
  justify-content: start; font-size: .85rem; }
.dims span:nth-child(3n + 2) { text-align: right; }
.dims span:nth-child(3n + 1) { color: var(--ink); }
.lay svg { display: block; }
.cut { fill: none; }
.sheet { fill: var(--card); stroke: var(--ink); }
.whole { fill: var(--grid); stroke: var(--ink); }
.held { fill: var(--text); opacity: .55; }
.bar { display: flex; height: .7rem; min-width: 9rem; }
.bar i { background: var(--text); opacity: .55; }
.bar .copied, .legend .copied {
  opacity: 1; border: 1px solid var(--ink); background:
  repeating-linear-gradient(135deg, var(--ink) 0 1.5px, var(--card) 1.5px 5px);
}
.legend { margin: .5rem 0; gap: .25rem 1.25rem; align-items: center; }
.legend i.axis { width: auto; height: auto; margin: 0; border-radius: 999px; }
.legend .box { width: 1.3rem; height: .8rem; border-radius: 0; }
.legend .own { background: var(--text); opacity: .55; }
.memory { display: flex; height: 1.6rem; gap: 3px; margin: .75rem 0 .25rem; }
.memory .bar { height: 100%; min-width: 2px; }
.names { display: flex; gap: 3px; font-size: .85rem; color: var(--ink); }
.names span { min-width: 2px; overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap; }
.rest td:nth-child(2), .rest td:nth-child(3) { text-align: left; }
.note { color: var(--ink); font-size: .9rem; max-width: 48rem; }
"""


def page(
  table: sharding_table.ShardingTable, *, title: str, notes: Iterable[str] = ()
) -> str:
  """Returns a complete HTML page.

  Args:
    table: the table, from `sharding_table.make`.
    title: title of the page.
    notes: lines to show under the title.
  """
  style = html_page.STYLE + _STYLE + ''.join(map(_axis_style, _COLORS))
  lines = [f'{table.layout} ({table.num_devices:,} devices)', *notes]
  body = [
    *(f'<p class="sub">{html.escape(line)}</p>' for line in lines if line),
    _tiles(table),
    '<h2>What each device holds</h2>',
    _memory(table),
    '<h2>Parameters</h2>',
    _legend(table),
    _parameters(table),
    '<h2>The rest of the state</h2>',
    _rest(table),
  ]
  return html_page.PAGE.format(
    title=html.escape(title), style=style, body='\n'.join(body)
  )


def _axis_style(axis: str) -> str:
  color = f'var(--s{_COLORS[axis]})'
  # A legend's own marks are more specific.
  return (
    f'.axis.{axis}, .legend .axis.{axis} {{ background: {color}; }}\n'
    f'.cut.{axis} {{ stroke: {color}; }}\n'
  )


def _chip(axis: str, size: int) -> str:
  return f'<i class="axis {axis}">{axis} {size}</i>'


def _tiles(table: sharding_table.ShardingTable) -> str:
  name = sharding_table.PARAMETERS
  parameters = sharding_table.total(table, name)
  state = sharding_table.total(table)
  count = sum(math.prod(row.shape) for row in table.groups[name])
  figures = [
    ('parameters', f'{count:,}'),
    ('their bytes', sharding_table.bytes_text(parameters.num_bytes)),
    (
      'of them on each device',
      sharding_table.bytes_text(parameters.bytes_per_device),
    ),
    ('replicated', sharding_table.percent(parameters.replicated)),
    (
      'whole state on each device',
      sharding_table.bytes_text(state.bytes_per_device),
    ),
  ]
  cells = (f'<div><dt>{n}</dt><dd>{v}</dd></div>' for n, v in figures)
  return f'<dl class="tiles">{"".join(cells)}</dl>'


def _memory(table: sharding_table.ShardingTable) -> str:
  """Returns a bar as long as the page: the parts of a device's state."""
  sums = {name: sharding_table.total(table, name) for name in table.groups}
  bars, names = [], []
  for name, s in sums.items():
    grow = f'style="flex: {s.bytes_per_device} 1 0"'
    bars.append(f'<div {grow}>{_bar(1.0, s.replicated)}</div>')
    text = f'{name} {sharding_table.bytes_text(s.bytes_per_device)}'
    names.append(f'<span {grow} title="{text}">{text}</span>')
  copies = [
    f'{html.escape(row.path)} '
    f'({sharding_table.bytes_text(row.bytes_per_device)}, '
    f'{sharding_table.copies_text(row, table)})'
    for row in sharding_table.largest_copies(table)
  ]
  return (
    f'<div class="memory">{"".join(bars)}</div>'
    f'<div class="names">{"".join(names)}</div>'
    f'<p class="note">Largest replicated: {", ".join(copies) or "none"}.</p>'
  )


def _bar(share: float, replicated: float) -> str:
  """Returns a bar whose part of replicated bytes is hatched.

  Args:
    share: length of the bar, over that of the longest.
    replicated: share of the bar that copies take.
  """
  single = 100 * share * (1 - replicated)
  copied = 100 * share * replicated
  parts = f'<i style="width: {single:.2f}%"></i>'
  if replicated:
    parts += f'<i class="copied" style="width: {copied:.2f}%"></i>'
  return f'<div class="bar">{parts}</div>'


def _legend(table: sharding_table.ShardingTable) -> str:
  chips = [_chip(axis, n) for axis, n in table.sizes.items() if n > 1]
  most = sharding_drawing.MOST
  return (
    f'<div class="legend">{"".join(chips)}'
    '<span><i class="box own"></i>what one device holds</span>'
    '<span><i class="box copied"></i>the share of it that copies take'
    '</span></div>'
    '<p class="note">A drawing is the array; lines are cuts, in the color of '
    f'the mesh axis (at most {most} parts to a dimension are drawn), and '
    'sheets behind it are copies. Replicated is, of the bytes that all '
    'devices hold of an array, the share that are copies beyond the first: '
    '1 - 1 / copies.</p>'
  )


def _parameters(table: sharding_table.ShardingTable) -> str:
  rows = table.groups[sharding_table.PARAMETERS]
  most = max(row.bytes_per_device for row in rows)
  columns = (
    'parameter, spec',
    'logical axes, shape',
    'cuts',
    'on each device',
    'copies',
    'replicated',
  )
  head = ''.join(f'<th scope="col">{name}</th>' for name in columns)
  body = ''.join(_parameter(row, table, most) for row in rows)
  return (
    f'<div class="wide"><table class="lay"><thead><tr>{head}</tr></thead>'
    f'<tbody>{body}</tbody></table></div>'
  )


def _parameter(
  row: sharding_table.ArrayRow, table: sharding_table.ShardingTable, most: int
) -> str:
  copied = sharding_table.copied_over(row, table)
  chips = ' '.join(_chip(axis, size) for axis, size in copied.items())
  cells = (
    _dimensions(row, table),
    sharding_drawing.draw(row, table.sizes),
    sharding_table.bytes_text(row.bytes_per_device)
    + _bar(row.bytes_per_device / most, row.replicated),
    f'{row.copies:,} over {chips}' if row.copies > 1 else 'none',
    sharding_table.percent(row.replicated),
  )
  return (
    f'<tr><th scope="row"><b>{_breaking(row.path)}</b>'
    f'<code>{html.escape(row.spec)}</code></th>'
    f'{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
  )


def _breaking(path: str) -> str:
  """Returns a path that a browser can break after its dots."""
  return html.escape(path).replace('.', '.<wbr>')


def _dimensions(
  row: sharding_table.ArrayRow, table: sharding_table.ShardingTable
) -> str:
  """Returns a line for each dimension: logical axis, size, mesh axes."""
  if not row.shape:
    return f'scalar, {row.dtype}'
  cells = []
  for axis, size, cuts in zip(row.axes, row.shape, row.cuts):
    chips = ' '.join(
      _chip(a, table.sizes[a]) for a in cuts if table.sizes[a] > 1
    )
    name = html.escape(axis or 'no axis')
    cells.append(
      f'<span>{name}</span><span>{size:,}</span><span>{chips}</span>'
    )
  return f'<div class="dims">{"".join(cells)}</div><code>{row.dtype}</code>'


def _rest(table: sharding_table.ShardingTable) -> str:
  rows = []
  for name, group in table.groups.items():
    if name == sharding_table.PARAMETERS:
      continue
    s = sharding_table.total(table, name)
    size = sharding_table.bytes_text(s.bytes_per_device)
    lines = ''.join(
      f'<tr><th scope="row">{html.escape(row.path)}</th>'
      f'<td>{" x ".join(f"{n:,}" for n in row.shape) or "scalar"}</td>'
      f'<td><code>{html.escape(row.spec)}</code></td>'
      f'<td>{sharding_table.bytes_text(row.bytes_per_device)}</td>'
      f'<td>{row.copies:,}</td>'
      f'<td>{sharding_table.percent(row.replicated)}</td></tr>'
      for row in group
    )
    rows.append(
      f'<details><summary>{name}: {size} on each device, '
      f'{sharding_table.percent(s.replicated)} replicated</summary>'
      '<div class="wide"><table class="rest"><thead><tr><th>array</th>'
      '<th>shape</th><th>spec</th><th>on each device</th><th>copies</th>'
      f'<th>replicated</th></tr></thead><tbody>{lines}</tbody></table></div>'
      '</details>'
    )
  return ''.join(rows)

"""Formats a plan as an HTML page: bars of memory and time, and tables.

The page is one file without scripts. Its style follows the reader's light or
dark setting.
"""

from collections.abc import Iterable
from collections.abc import Mapping
import html

from t2x.planning import memory as memory_lib
from t2x.planning import plan as plan_lib
from t2x.planning import sharding_table
from t2x.planning import text as text_lib
from t2x.tracking import html_page

_STYLE = """
.sub { margin: .25rem 0 1.25rem; color: var(--ink); }
.stack { display: flex; height: 2rem; gap: 2px; margin: .5rem 0; position:
  relative; background: var(--grid); border-radius: 4px; overflow: hidden; }
.stack i { height: 100%; }
.s0 { background: var(--s0); } .s1 { background: var(--s1); }
.s2 { background: var(--s2); } .s3 { background: var(--s3); }
.s4 { background: var(--s4); } .s5 { background: var(--s5); }
.legend i { width: .8rem; height: .8rem; }
.legend span { background: none; }
.rows td:nth-child(2), .rows thead th:nth-child(2) { text-align: left; }
.rows .bar { display: inline-block; height: .7rem; vertical-align: middle; }
.cell { width: 40%; min-width: 12rem; text-align: left; }
.warn { margin: .5rem 0; padding: .6rem .9rem; border-left: 4px solid var(--s1);
  background: var(--card); }
.note { color: var(--ink); font-size: .9rem; max-width: 48rem; }
.yes { color: var(--s2); } .no { color: var(--s1); }
"""


def page(name: str, plan: plan_lib.Plan, advice: Iterable[str] = ()) -> str:
  """Returns a complete HTML page.

  Args:
    name: name of the experiment.
    plan: its plan.
    advice: warnings, from `advice.of`.
  """
  title, _, where = text_lib.title(
    name, plan.topology, plan.num_slices, plan.sizes
  ).partition(' on ')
  body = [
    f'<p class="sub">{html.escape(where)}</p>',
    _tiles(plan),
    *(f'<p class="warn">{html.escape(line)}</p>' for line in advice),
    '<h2>Memory of a device</h2>',
    _memory(plan),
  ]
  if plan.roofline is not None:
    body += ['<h2>Least time of a step</h2>', _times(plan)]
  if plan.collectives:
    body += ['<h2>Sent by a device</h2>', _sent(plan)]
  if plan.stages:
    body += ['<h2>Stages</h2>', _stages(plan)]
  note = '<br>'.join(map(html.escape, plan.formula.splitlines()[:3]))
  body += [f'<h2>FLOPs</h2><p class="note">{note}</p>']
  return html_page.PAGE.format(
    title=html.escape(f'Plan of {title}'),
    style=html_page.STYLE + _STYLE,
    body='\n'.join(body),
  )


def _tiles(plan: plan_lib.Plan) -> str:
  verdict = {True: 'fits', False: 'does not fit', None: 'not known'}[plan.fits]
  color = {True: 'yes', False: 'no', None: ''}[plan.fits]
  memory, f = plan.memory, plan.flops
  figures = [
    ('memory', f'<span class="{color}">{verdict}</span>'),
    ('peak', f'{text_lib.gib(memory.peak)} GiB'),
    ('FLOPs of the model', text_lib.flops(f.model)),
  ]
  if f.executed:
    figures.append(('executed / model', f'{f.ratio:.2f}'))
  if plan.collectives:
    sent = sum(row.bytes for row in plan.collectives)
    figures.append(('sent', sharding_table.bytes_text(sent)))
  if plan.roofline is not None and plan.mfu_limit is not None:
    figures.append(('least time', text_lib.time(plan.roofline.seconds)))
    figures.append(('MFU at most', sharding_table.percent(plan.mfu_limit)))
  figures.append(('compiled in', f'{plan.compile_seconds:.0f} s'))
  cells = (f'<div><dt>{n}</dt><dd>{v}</dd></div>' for n, v in figures)
  return f'<dl class="tiles">{"".join(cells)}</dl>'


def _stack(parts: list[tuple[str, float, str]], whole: float) -> str:
  """Returns a bar cut into parts, and its legend.

  Args:
    parts: (name, size, size as text) of each part.
    whole: size that the whole length of the bar stands for.
  """
  bars, names = [], []
  for i, (name, size, text) in enumerate(parts):
    color = f's{i % 6}'
    width = 100 * size / whole
    tip = html.escape(f'{name}: {text}')
    bars.append(
      f'<i class="{color}" style="width: {width:.2f}%" title="{tip}"></i>'
    )
    names.append(f'<span class="{color}"><i></i>{tip}</span>')
  return (
    f'<div class="stack">{"".join(bars)}</div>'
    f'<div class="legend">{"".join(names)}</div>'
  )


def _memory(plan: plan_lib.Plan) -> str:
  memory = plan.memory
  groups = memory_lib.on_device(memory.state)
  parts = [(n, size, _gib(size)) for n, size in groups.items() if size > 1e5]
  batch = memory.arguments - sum(groups.values())
  if batch > 1e5:
    parts.append(('batch and padding', batch, _gib(batch)))
  temporary = memory.peak - memory.arguments
  parts.append(('temporaries at the peak', temporary, _gib(temporary)))
  whole = max(memory.limit or 0.0, memory.peak)
  limit = memory.limit
  note = (
    f'<p class="note">Of {_gib(limit)} that a device has.</p>' if limit else ''
  )
  tables = ''.join(
    _table(name, modules)
    for name, modules in memory.state.items()
    if name != 'counters'
  )
  if memory.activations:
    tables += _table('temporaries at the peak', memory.activations)
  return _stack(parts, whole) + note + tables


def _gib(num: float) -> str:
  return f'{text_lib.gib(num)} GiB'


def _table(title: str, sums: Mapping[str, float]) -> str:
  """Returns a table of sizes in bytes, which the reader can fold away."""
  most = max(sums.values(), default=0.0) or 1.0
  rows = ''.join(
    f'<tr><th scope="row">{html.escape(name)}</th><td class="cell">'
    f'<i class="bar s0" style="width: {100 * size / most:.1f}%"></i></td>'
    f'<td>{_gib(size)}</td></tr>'
    for name, size in sums.items()
    if size >= most / 500
  )
  total = _gib(sum(sums.values()))
  return (
    f'<details open><summary>{html.escape(title)}: {total}</summary>'
    f'<div class="wide"><table class="rows"><tbody>{rows}</tbody></table></div>'
    '</details>'
  )


def _times(plan: plan_lib.Plan) -> str:
  r = plan.roofline
  assert r is not None
  rows = [
    ('products', r.compute),
    ('memory', r.memory),
    ('exchanges', r.network),
    ('of them beside no product', r.exposed),
  ]
  most = max(value for _, value in rows) or 1.0
  lines = ''.join(
    f'<tr><th scope="row">{name}</th><td class="cell">'
    f'<i class="bar s{i}" style="width: {100 * value / most:.1f}%"></i></td>'
    f'<td>{text_lib.time(value)}</td></tr>'
    for i, (name, value) in enumerate(rows)
  )
  idle = (
    f' Stages are idle {sharding_table.percent(r.idle)} of the time.'
    if r.idle
    else ''
  )
  return (
    f'<div class="wide"><table class="rows"><tbody>{lines}</tbody></table>'
    '</div><p class="note">A model by the published figures of the chip, and '
    f'no measurement: bound by {r.bound}.{idle}</p>'
  )


def _stages(plan: plan_lib.Plan) -> str:
  rows = ''.join(
    f'<tr><th scope="row">{i}</th><td>{text_lib.flops(stage.executed)}</td>'
    f'<td>{sharding_table.bytes_text(stage.sent)}</td></tr>'
    for i, stage in enumerate(plan.stages)
  )
  head = ''.join(
    f'<th scope="col">{name}</th>' for name in ('stage', 'executed', 'sent')
  )
  return (
    f'<p class="note">{html.escape(plan.schedule)}</p>'
    f'<div class="wide"><table><thead><tr>{head}</tr></thead>'
    f'<tbody>{rows}</tbody></table></div>'
  )


def _sent(plan: plan_lib.Plan) -> str:
  rows = ''.join(
    f'<tr><th scope="row">{row.kind}</th><td>{row.along}</td>'
    f'<td>{row.times:,.0f}</td><td>{sharding_table.bytes_text(row.bytes)}</td>'
    f'<td>{sharding_table.percent(row.hidden / row.bytes if row.bytes else 0)}'
    '</td></tr>'
    for row in plan.collectives
    if row.bytes >= plan.collectives[0].bytes / 1e4
  )
  head = ''.join(
    f'<th scope="col">{name}</th>'
    for name in ('exchange', 'along', 'times', 'bytes', 'beside products')
  )
  return (
    f'<div class="wide"><table class="rows"><thead><tr>{head}</tr></thead>'
    f'<tbody>{rows}</tbody></table></div>'
  )

"""Draws one array of a sharding table as SVG, with the cuts of its dimensions.

Colors come from the page's style: `cut AXIS` is a line of a mesh axis, `whole`
the array, `held` the part of one device, `sheet` a copy behind it.
"""

from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import html
import math

from t2x.planning import sharding_table

MOST = 12  # The most parts of one dimension that are drawn.

_WIDTH, _HEIGHT = 148, 56
_STEP, _SHEETS = 4, 3  # Distance from sheet to sheet, and most sheets.
_GAP = 5  # Distance between panels.

# The mesh axes that cut a dimension and their sizes, the outermost first.
Cuts = list[tuple[str, int]]


def draw(row: sharding_table.ArrayRow, sizes: Mapping[str, int]) -> str:
  """Returns the drawing of an array.

  Two cut dimensions are the rows and the columns of a box. If three dimensions
  are cut, there is a box for each part of the first.

  Args:
    row: the array.
    sizes: number of devices along each mesh axis.
  """
  panels, down, across = _arranged(row, sizes)
  num = min(_parts(panels), 4)
  width = (_WIDTH - _GAP * (num - 1)) / num
  height = _HEIGHT if len(row.shape) > 1 else _HEIGHT / 4
  sheets = min(row.copies - 1, _SHEETS)
  shapes = [
    _box('sheet', _STEP * i, _STEP * i, _WIDTH, height)
    for i in range(sheets, 0, -1)
  ]
  for panel in range(num):
    x = panel * (width + _GAP)
    shapes.append(_box('whole', x, 0, width, height))
    if panel == 0:
      part = width / _parts(across), height / _parts(down)
      shapes.append(_box('held', 0, 0, *part))
    for axis, at, thick in _lines(across, width):
      shapes.append(_line(axis, thick, f'M{x + at:g} 0V{height:g}'))
    for axis, at, thick in _lines(down, height):
      shapes.append(_line(axis, thick, f'M{x:g} {at:g}h{width:g}'))
    if panels:
      shapes.append(_box(f'cut {panels[0][0]}', x, 0, width, height))
  full = _WIDTH + _STEP * _SHEETS + 2, height + _STEP * sheets + 2
  words = html.escape(f'{row.spec}, held by {row.copies} each')
  return (
    f'<svg width="{full[0]:g}" height="{full[1]:g}" role="img" '
    f'viewBox="-1 -1 {full[0]:g} {full[1]:g}"><title>{words}</title>'
    f'{"".join(shapes)}</svg>'
  )


def _arranged(
  row: sharding_table.ArrayRow, sizes: Mapping[str, int]
) -> tuple[Cuts, Cuts, Cuts]:
  """Returns the cuts of panels, rows and columns; [] if there are none."""
  cuts = [[(a, sizes[a]) for a in axes if sizes[a] > 1] for axes in row.cuts]
  cut = [dim for dim, of_dim in enumerate(cuts) if of_dim][-3:]
  if len(cut) == 1:
    down, across = ([], cut) if cut[0] == len(cuts) - 1 else (cut, [])
  else:
    down, across = cut[-2:-1], cut[-1:]
  get = lambda dims: _drawn(cuts[dims[0]]) if dims else []
  return get(cut[:-2]), get(down), get(across)


def _drawn(cuts: Cuts) -> Cuts:
  """Returns cuts into no more parts than are drawn."""
  shown, left = [], MOST
  for axis, size in cuts:
    shown.append((axis, min(size, left)))
    left //= shown[-1][1]
  return shown


def _parts(cuts: Sequence[tuple[str, int]]) -> int:
  return math.prod(size for _, size in cuts)


def _lines(cuts: Cuts, length: float) -> Iterator[tuple[str, float, float]]:
  """Yields the mesh axis of each line, its place, and its width."""
  num = _parts(cuts)
  thick = min(2.0, length / num / 4)  # Thin enough to see the parts between.
  for i in range(1, num):
    # The outermost axis whose parts end here draws the line.
    inner = num
    for depth, (axis, size) in enumerate(cuts):
      inner //= size
      if i % inner == 0:
        yield axis, i * length / num, thick if depth == 0 else thick / 2
        break


def _box(name: str, x: float, y: float, width: float, height: float) -> str:
  return (
    f'<rect class="{name}" x="{x:g}" y="{y:g}" width="{width:g}" '
    f'height="{height:g}"/>'
  )


def _line(axis: str, thick: float, path: str) -> str:
  return f'<path class="cut {axis}" stroke-width="{thick:g}" d="{path}"/>'

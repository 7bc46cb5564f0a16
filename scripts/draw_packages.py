r"""Draws the packages of t2x by floor: docs/packages.svg.

python scripts/draw_packages.py

The floors are those of tests/test_imports.py: a package imports only from
packages below it. Coloured dots mark the packages that the three walks of
docs/architecture.md pass through.
"""

import ast
from collections.abc import Sequence
import pathlib

ROOT = pathlib.Path(__file__).parents[1]
PICTURE = ROOT / 'docs' / 'packages.svg'

# Name, colour and packages of each walk.
WALKS = (
  (
    'from mesh.tensor to a sharded parameter',
    '#d55e00',
    'main config parallel layers models training compilation trainer',
  ),
  (
    'from files to the loss',
    '#0072b2',
    'data objectives trainer compilation multihost training models layers'
    ' attention losses',
  ),
  (
    'from a prompt to a completion',
    '#00896a',
    'serving inference interop data decode models layers attention',
  ),
)
# Files beside the packages, which hold helpers for all of them.
_FILES = ('field_checks', 'files', 'reading')

_WIDTH, _BOX, _HEIGHT, _GAP, _STEP = 760, 132, 34, 14, 52


def floors() -> list[list[str]]:
  """Returns the names on each floor, from the lowest."""
  tree = ast.parse((ROOT / 'tests' / 'test_imports.py').read_text())
  for node in tree.body:
    if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == (
      '_FLOORS'
    ):
      return [line.split() for line in ast.literal_eval(node.value)]
  raise ValueError('tests/test_imports.py has no _FLOORS.')


def svg(rows: Sequence[Sequence[str]]) -> str:
  """Returns the picture of floors, the lowest one at the bottom."""
  height = _STEP * len(rows) + 26 * len(WALKS) + 30
  parts = [
    f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" '
    f'height="{height}" viewBox="0 0 {_WIDTH} {height}" '
    'font-family="sans-serif" font-size="13">',
    f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
  ]
  for number, row in enumerate(reversed(rows)):
    width = len(row) * _BOX + (len(row) - 1) * _GAP
    for i, name in enumerate(row):
      x = (_WIDTH - width) / 2 + i * (_BOX + _GAP)
      parts += _box(name, x, 15 + number * _STEP)
  for i, (name, colour, _) in enumerate(WALKS):
    y = _STEP * len(rows) + 30 + 26 * i
    parts.append(f'<circle cx="40" cy="{y}" r="6" fill="{colour}"/>')
    parts.append(f'<text x="56" y="{y + 5}" fill="#222">{name}</text>')
  return '\n'.join([*parts, '</svg>', ''])


def _box(name: str, x: float, y: float) -> list[str]:
  fill = '#f4f4f4' if name in _FILES else '#e8eef7'
  parts = [
    f'<rect x="{x:g}" y="{y}" width="{_BOX}" height="{_HEIGHT}" rx="5" '
    f'fill="{fill}" stroke="#8a97a8"/>',
    f'<text x="{x + 10:g}" y="{y + 22}" fill="#222">{name}</text>',
  ]
  passing = [c for _, c, names in WALKS if name in names.split()]
  for i, colour in enumerate(passing):
    cx = x + _BOX - 12 - 15 * (len(passing) - 1 - i)
    parts.append(f'<circle cx="{cx:g}" cy="{y + 17}" r="6" fill="{colour}"/>')
  return parts


if __name__ == '__main__':
  PICTURE.write_text(svg(floors()))

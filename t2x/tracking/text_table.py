"""Rows of cells as lines of text."""

from collections.abc import Sequence


def aligned(
  rows: Sequence[Sequence[str]], sides: str | None = None
) -> list[str]:
  """Returns rows of cells as lines with aligned columns.

  Args:
    rows: texts of the cells of each row.
    sides: alignment of each column: `<` for the left, `>` for the right; None
      puts numbers, and all of their column, to the right.
  """
  if sides is None:
    sides = ''.join(map(_side, zip(*rows[1:]))) or '<' * len(rows[0])
  widths = [max(map(len, column)) for column in zip(*rows)]
  line = lambda row: '  '.join(
    f'{cell:{side}{width}}' for cell, side, width in zip(row, sides, widths)
  )
  return [line(row).rstrip() for row in rows]


def _side(cells: Sequence[str]) -> str:
  def is_number(cell: str) -> bool:
    try:
      float(cell.replace(',', ''))
    except ValueError:
      return False
    return True

  given = [cell for cell in cells if cell]
  return '>' if given and all(map(is_number, given)) else '<'

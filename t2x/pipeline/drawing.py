"""Draws a schedule as a Gantt chart: a row for each stage.

Each operation is a box at the time at which the lock-step executor runs it. The
color says which kind of operation it is, a darker shade means a later chunk,
and the number is the microbatch. Idle time is grey.
"""

from collections.abc import Iterable
import io
import pathlib
from typing import Any

import numpy as np

from t2x.pipeline import operations as ops
from t2x.pipeline import simulation as simulation_lib
from t2x.pipeline import table as table_lib

# From the palette of Okabe and Ito, made for all forms of color vision.
_COLORS = {
  ops.FORWARD: '#56b4e9',
  ops.BACKWARD: '#e69f00',
  ops.WEIGHT: '#009e73',
  ops.RECOMPUTE: '#cc79a7',
}
_NAMES = {
  ops.FORWARD: 'F forward',
  ops.BACKWARD: 'B gradient of the input',
  ops.WEIGHT: 'W gradient of the weights',
  ops.RECOMPUTE: 'R forward again',
}
_IDLE = '#e8e8e8'
_MAX_NUMBERED = 2500  # Boxes; the numbers of more could not be read.
_MAX_VECTORS = 10000  # Boxes; more would make an .svg of many megabytes.
_SUFFIXES = ('.svg', '.png')


def draw(simulation: simulation_lib.Simulation, path: str) -> None:
  """Writes the chart to a file.

  Args:
    simulation: schedule with the times of its operations.
    path: name of the file; its folder is created if there is none.

  Raises:
    ValueError: the name ends in neither .svg nor .png.
  """
  file = pathlib.Path(path)
  if file.suffix not in _SUFFIXES:
    raise ValueError(
      f'{path!r}: a drawing is one of {" or ".join(_SUFFIXES)}, by the name of '
      'its file.'
    )
  file.parent.mkdir(parents=True, exist_ok=True)
  _save(simulation, file, file.suffix[1:])


def svg(simulation: simulation_lib.Simulation) -> str:
  """Returns the chart as the text of an SVG element, for notebooks."""
  text = io.StringIO()
  _save(simulation, text, 'svg')
  whole = text.getvalue()
  return whole[whole.index('<svg') :]


def _save(
  simulation: simulation_lib.Simulation,
  file: pathlib.Path | io.StringIO,
  suffix: str,
) -> None:
  # Imported here, since nothing else needs it. Not pyplot: its global state
  # belongs to the caller.
  import matplotlib
  from matplotlib import figure
  from matplotlib import ticker

  table = simulation.schedule
  width = np.clip(2 + 0.26 * table.num_ticks, 7, 24)
  height = 1.7 + np.clip(0.32 * table.num_stages, 0.4, 14)
  fig = figure.Figure(figsize=(width, height), layout='constrained')
  axes = fig.subplots()
  _boxes(axes, simulation, size=width / table.num_ticks)
  axes.set_xlim(0, simulation.span_executed)
  axes.set_ylim(table.num_stages - 0.5, -0.5)
  axes.set_xlabel('time')
  axes.set_ylabel('stage')
  axes.yaxis.set_major_locator(ticker.MaxNLocator(16, integer=True))
  axes.spines[:].set_visible(False)
  axes.tick_params(length=0)
  axes.set_title(_title(simulation), loc='left', fontsize=10)
  _legend(fig, table)
  with matplotlib.rc_context({'svg.fonttype': 'none'}):
    metadata = {'Date': None} if suffix == 'svg' else None
    fig.savefig(file, format=suffix, dpi=120, metadata=metadata)


def _title(simulation: simulation_lib.Simulation) -> str:
  table = simulation.schedule
  chunks = f', {table.num_chunks} chunks' if table.num_chunks > 1 else ''
  return (
    f'{table.name}: {table.num_stages} stages, {table.num_microbatches} '
    f'microbatches{chunks}\nidle: {simulation.bubble_executed:.1%} in '
    f'lock-step, {simulation.bubble:.1%} by dependencies only, at most '
    f'{max(simulation.bubble_per_stage):.1%} within a stage'
  )


def _boxes(
  axes: Any, simulation: simulation_lib.Simulation, size: float
) -> None:
  """Draws all operations; `size` is the width of a tick in inches."""
  from matplotlib import collections

  table = simulation.schedule
  ticks, stages = np.nonzero(table.operation_TS)
  start_N = simulation.executed_start_TS[ticks, stages]
  finish_N = simulation.executed_finish_TS[ticks, stages]
  kind_N = table.operation_TS[ticks, stages]
  micro_N = table.microbatch_TS[ticks, stages]
  chunk_N = table.chunk_TS[ticks, stages]
  corners = [(start_N, -1), (finish_N, -1), (finish_N, 1), (start_N, 1)]
  boxes_NCX = np.stack(
    [np.stack([x_N, stages + 0.42 * side], -1) for x_N, side in corners], 1
  )
  for stage in range(table.num_stages):
    span = (0, simulation.span_executed)
    axes.fill_between(span, stage - 0.42, stage + 0.42, color=_IDLE, lw=0)
  axes.add_collection(
    collections.PolyCollection(
      list(boxes_NCX),
      facecolors=[
        _shade(kind, chunk, table.num_chunks)
        for kind, chunk in zip(kind_N, chunk_N)
      ],
      edgecolors='white',
      linewidths=min(0.8, 4 * size),
      rasterized=len(ticks) > _MAX_VECTORS,
    )
  )
  if len(ticks) > _MAX_NUMBERED or size < 0.12:
    return
  fontsize = min(8, 40 * size)
  for start, finish, stage, micro in zip(start_N, finish_N, stages, micro_N):
    center = ((start + finish) / 2, stage)
    axes.text(
      *center,
      str(micro),
      ha='center',
      va='center',
      fontsize=fontsize,
      clip_on=True,
    )


def _shade(kind: int, chunk: int, num_chunks: int) -> tuple[float, ...]:
  """Returns the color of an operation: light for chunk 0, full for the last."""
  from matplotlib import colors

  share = 1.0 if num_chunks == 1 else 0.45 + 0.55 * chunk / (num_chunks - 1)
  return tuple(1 + share * (x - 1) for x in colors.to_rgb(_COLORS[kind]))


def _legend(fig: Any, table: table_lib.Table) -> None:
  from matplotlib import patches

  kinds: Iterable[int] = ops.kinds(
    training=table.training, recompute=table.recompute
  )
  handles = [
    patches.Patch(color=_COLORS[kind], label=_NAMES[kind]) for kind in kinds
  ]
  handles.append(patches.Patch(color=_IDLE, label='idle'))
  if table.num_chunks > 1:
    # A patch without a color of its own: a line of text.
    last = table.num_chunks - 1
    handles.append(
      patches.Patch(alpha=0, label=f'light: chunk 0, full: chunk {last}')
    )
  fig.legend(
    handles=handles,
    loc='outside lower left',
    ncols=len(handles),
    frameon=False,
    fontsize=8,
    handlelength=1,
    handleheight=1,
  )

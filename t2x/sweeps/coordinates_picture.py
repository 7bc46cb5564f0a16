"""A coordinate check as a table and as a picture."""

from collections.abc import Sequence

from t2x.sweeps import coordinates

_REACH = 10**0.75  # Of a panel's axis above and below its middle.
_COLORS = ('#0072b2', '#d55e00', '#00896a', '#b0568c', '#a67c00', '#3d8fc0')


def rows(
  found: Sequence[coordinates.Size], slopes: Sequence[coordinates.Slope]
) -> list[list[str]]:
  """Returns a table: each place with its change at each width, and slopes.

  Args:
    found: all sizes.
    slopes: slopes of all places.
  """
  widths = sorted({size.width for size in found})
  last = max(size.step for size in found)
  change = {(s.place, s.width): s.change for s in found if s.step == last}
  result = [
    ['change of', *[f'at {w}' for w in widths], 'slope', 'slope of size', '']
  ]
  for slope in slopes:
    verdict = 'GROWS' if slope.grows else 'VANISHES' if slope.vanishes else ''
    result.append(
      [
        slope.place,
        *[f'{change[slope.place, w]:.3g}' for w in widths],
        f'{slope.change:+.2f}',
        f'{slope.size:+.2f}',
        verdict,
      ]
    )
  return result


def write(found: Sequence[coordinates.Size], file: str) -> None:
  """Draws the change of each place over the widths, a line for each step.

  All panels have as many decades, so that slopes look alike, and say the slope
  of the last step.

  Args:
    found: all sizes.
    file: path of the picture, whose ending says what it is.
  """
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot
  from matplotlib import ticker

  places = list(dict.fromkeys(size.place for size in found))
  steps = sorted({size.step for size in found} - {0})
  columns = min(len(places), 4)
  num_rows = -(-len(places) // columns)
  figure, axes = pyplot.subplots(
    num_rows,
    columns,
    figsize=(2.8 * columns, 2.4 * num_rows + 0.5),
    sharex=True,
    squeeze=False,
    layout='constrained',
  )
  widths = sorted({size.width for size in found})
  slopes = {slope.place: slope.change for slope in coordinates.slopes(found)}
  for place, axis in zip(places, axes.flat):
    for i, step in enumerate(steps):
      own = [s for s in found if s.place == place and s.step == step]
      axis.plot(
        [s.width for s in own],
        [max(s.change, 1e-12) for s in own],
        marker='o',
        markersize=3,
        color=_COLORS[i % len(_COLORS)],
        label=f'after step {step}',
      )
    axis.set_title(f'{place}: slope {slopes[place]:+.2f}', fontsize=8)
    axis.set_xscale('log', base=2)
    axis.set_yscale('log')
    changes = [
      max(s.change, 1e-12) for s in found if s.place == place and s.step
    ]
    middle = (min(changes) * max(changes)) ** 0.5
    reach = max(_REACH, 1.3 * (max(changes) / min(changes)) ** 0.5)
    axis.set_ylim(middle / reach, middle * reach)
    axis.set_xticks(widths, [str(w) for w in widths])
    axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.yaxis.set_major_formatter('{x:g}')
    axis.minorticks_off()
    axis.tick_params(labelbottom=True, labelsize=8)
    axis.grid(alpha=0.3)
  for axis in axes.flat[len(places) :]:
    axis.set_visible(False)
  figure.supxlabel('width (embed_dim)', fontsize=9)
  figure.supylabel('mean |x - x before training|', fontsize=9)
  handles, labels = axes.flat[0].get_legend_handles_labels()
  figure.legend(
    handles, labels, loc='outside upper right', ncols=len(steps), fontsize=8
  )
  figure.savefig(file, dpi=120)
  pyplot.close(figure)

"""The picture of a scaling study: loss against compute, and against size."""

from collections.abc import Sequence

import numpy as np

from t2x.sweeps import scaling_law

_COLORS = ('#0072b2', '#d55e00', '#00896a', '#b0568c', '#a67c00', '#3d8fc0')


def write(
  found: scaling_law.Fit,
  points: Sequence[scaling_law.Point],
  held_out: Sequence[scaling_law.Point],
  budgets: Sequence[float],
  file: str,
) -> None:
  """Draws the runs, the law's frontier with its interval, and each budget.

  Args:
    found: the law.
    points: runs that it was fitted to.
    held_out: runs that it has not seen.
    budgets: budgets of the runs, in FLOPs.
    file: path of the picture, whose ending says what it is.
  """
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot

  figure, (left, right) = pyplot.subplots(
    1, 2, figsize=(10.5, 4.4), layout='constrained'
  )
  everything = [*points, *held_out]
  low = min(p.flops for p in everything) / 1.5
  high = max(p.flops for p in everything) * 1.5
  compute = np.geomspace(low, high, 60)
  frontier = [found.law.loss(*found.law.best(c)) for c in compute]
  spread = np.array(
    [[law.loss(*law.best(c)) for c in compute] for law in found.samples]
  )
  left.fill_between(
    compute,
    *np.quantile(spread, [0.05, 0.95], axis=0),
    color='0.5',
    alpha=0.25,
    label='90% of samples',
  )
  left.plot(compute, frontier, color='0.2', label='least loss by the law')
  by_size = sorted({p.parameters for p in everything})
  for i, n in enumerate(by_size):
    color = _COLORS[i % len(_COLORS)]
    own = sorted(
      (p for p in points if p.parameters == n), key=lambda p: p.flops
    )
    left.plot(
      [p.flops for p in own],
      [p.loss for p in own],
      'o-',
      color=color,
      markersize=4,
      linewidth=0.8,
      label=f'N = {n:.3g}',
    )
  for j, p in enumerate(held_out):
    left.plot(
      p.flops,
      p.loss,
      '*',
      color='black',
      markersize=12,
      label='held out' if j == 0 else None,
    )
  left.set(xscale='log', xlabel='FLOPs of training', ylabel='loss (nats)')
  left.grid(alpha=0.3)
  left.legend(fontsize=8)
  for i, budget in enumerate(budgets):
    color = _COLORS[i % len(_COLORS)]
    own = [p for p in points if abs(p.flops / budget - 1) < 0.1]
    if not own:
      continue
    right.plot(
      [p.parameters for p in own],
      [p.loss for p in own],
      'o',
      color=color,
      label=f'{budget:.3g} FLOPs',
    )
    ends = min(p.parameters for p in own), max(p.parameters for p in own)
    line = np.geomspace(ends[0] / 1.3, ends[1] * 1.3, 50)
    right.plot(
      line,
      [found.law.loss(n, budget / 6 / n) for n in line],
      color=color,
      linewidth=0.9,
    )
  right.set(xscale='log', xlabel='N (a sixth of the FLOPs a token)')
  right.set_ylabel('loss (nats)')
  right.grid(alpha=0.3)
  right.legend(fontsize=8, title='lines: the law', title_fontsize=8)
  figure.savefig(file, dpi=120)
  pyplot.close(figure)

r"""Runs beside one another: where each stands, and their curves in one picture.

python scripts/compare_runs.py RUN RUN ... [--metric=nll] [--plot=FILE.png]
    [--json]

RUN is the workdir of a run, finished or not. `--metric` is a name in the rows
of metrics.jsonl; its curve is a line (a mean over neighbouring steps), and its
evaluations, `eval/SPLIT/METRIC`, are dots. The default is the loss of tokens,
`nll` in training and `loss` in evaluations: what training minimises, its
`loss`, has other terms and weights from run to run. `--json` prints one object
in the last line.
"""

import argparse
import json
from typing import Any

from t2x import files
from t2x.tracking import metrics
from t2x.tracking import run_report
from t2x.tracking import svg_charts

REACH = 10  # Steps on either side that a curve is the mean of.


def read(workdir: str, metric: str) -> dict[str, Any]:
  """Returns a run's curves and figures.

  Raises:
    ValueError: no run, or none that has trained; a metric that it lacks, with
      those that it has.
  """
  path = files.path(workdir)
  if not (path / metrics.FILE).exists():
    raise ValueError(
      f'{workdir} has no {metrics.FILE}: name the workdir of a run that has '
      'trained.'
    )
  rows = metrics.read_rows(path)
  known = list(dict.fromkeys(name for row in rows for name in row))
  end = '/loss' if metric == 'nll' else f'/{metric}'
  is_eval = lambda name: name.startswith('eval/') and name.endswith(end)
  named = {
    name: run_report.points(rows, name)
    for name in known
    if name == metric or is_eval(name)
  }
  if not any(named.values()):
    names = sorted({n.split('/')[-1] if 'eval/' in n else n for n in known})
    raise ValueError(
      f'--metric={metric}: {workdir} has no such values, but of '
      f'{", ".join(names)}.'
    )
  last = {name: points[-1][1] for name, points in named.items() if points}
  return {
    'steps': rows[-1]['step'],
    'seconds': run_report.training_seconds(rows),
    'last': last,
    'points': named,
  }


def show(runs: dict[str, dict[str, Any]]) -> None:
  names = list(dict.fromkeys(n for run in runs.values() for n in run['last']))
  wide = max(map(len, runs)) + 2
  columns = [f'{name:>{max(len(name), 7) + 2}}' for name in names]
  print(f'{"":{wide}}{"steps":>8}{"minutes":>9}{"".join(columns)}')
  for title, run in runs.items():
    cells = (
      f'{run["last"].get(name, float("nan")):{len(column)}.4g}'
      for name, column in zip(names, columns)
    )
    print(
      f'{title:{wide}}{run["steps"]:8,}{run["seconds"] / 60:9.1f}'
      f'{"".join(cells)}'
    )


def plot(runs: dict[str, dict[str, Any]], metric: str, path: str) -> None:
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot

  figure, ax = pyplot.subplots(figsize=(9, 5.2), layout='constrained')
  colors = matplotlib.colormaps['tab10' if len(runs) <= 10 else 'tab20']
  for number, (title, run) in enumerate(runs.items()):
    color = colors(number % colors.N)
    ax.plot([], [], color=color, label=title)
    for name, points in run['points'].items():
      if name == metric:
        line = svg_charts.thin(svg_charts.smooth(points, REACH))
        ax.plot(*zip(*line), color=color, linewidth=1.2)
      elif points:
        ax.plot(*zip(*points), 'o', color=color, markersize=5)
  ax.set(xlabel='step', ylabel=f'{metric}; dots: evaluations')
  ax.grid(alpha=0.3)
  figure.legend(loc='outside right center', frameon=False)
  figure.savefig(path, dpi=110)
  print(f'wrote {path}')


def main() -> None:
  args = parse()
  titles = [str(run).rstrip('/').split('/')[-1] for run in args.runs]
  if len(set(titles)) < len(titles):  # runs/a/seed0 and runs/b/seed0.
    titles = args.runs
  try:
    runs = {
      title: read(run, args.metric) for title, run in zip(titles, args.runs)
    }
  except ValueError as error:
    return args.parser.error(str(error))
  show(runs)
  if args.plot:
    plot(runs, args.metric, args.plot)
  if args.json:
    print(json.dumps({'metric': args.metric, 'runs': runs}))


def parse() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description='Runs beside one another')
  parser.add_argument('runs', nargs='+', metavar='RUN')
  parser.add_argument('--metric', default='nll')
  parser.add_argument('--plot', help='A picture to write.')
  parser.add_argument('--json', action='store_true')
  args = parser.parse_args()
  args.parser = parser
  return args


if __name__ == '__main__':
  main()

r"""A scaling study: small runs, a law of their losses, and a prediction.

python scripts/scaling.py --experiment=gpt2_tiny --study=DIR \
    --sizes=64x2,96x3,128x4 --budgets=1e13,3e13,1e14 --hold_out=192x4:3e14 \
    [--parallel=2] [--launcher=local] [--max_tokens=4e6] [--dry_run]

Trains every size (WIDTHxLAYERS) at every budget of FLOPs, as a sweep in
DIR/fit, and fits L(N, D) = E + A / N^a + B / D^b. Of the runs of --hold_out it
writes the predicted losses to DIR/prediction.json before they begin, then
trains them in DIR/held_out and says how far off it was. DIR/scaling.json and
DIR/scaling.png hold the result. The same command goes on where it was stopped.

With model.mup one learning rate serves all widths.
"""

import collections
import json
import sys

from absl import flags

from t2x import files
from t2x import main as main_lib
from t2x.sweeps import command_line
from t2x.sweeps import scaling
from t2x.sweeps import scaling_law
from t2x.sweeps import study as study_lib
from t2x.tracking import text_table


def main() -> None:
  command_line.define()
  flags.DEFINE_list('sizes', [], 'WIDTHxLAYERS of each size.')
  flags.DEFINE_list('budgets', [], 'FLOPs of training, of each size.')
  flags.DEFINE_list('hold_out', [], 'WIDTHxLAYERS:FLOPs of larger runs.')
  flags.DEFINE_float('max_tokens', None, 'Most tokens of a run.')
  flags.DEFINE_string('metric', 'eval/validation/loss', 'The final loss.')
  main_lib.app_run(_main)


def _main() -> None:
  values = flags.FLAGS
  name, config, command = command_line.experiment_of()
  budgets = command_line.numbers('budgets')
  if values.max_tokens is not None:
    command_line.number(str(values.max_tokens), 'max_tokens')
  wanted = [scaling.parse_size(text) for text in values.sizes]
  if not wanted or not budgets:
    sys.exit(
      'error: --sizes and --budgets are needed, as in --sizes=64x2,96x3,128x4 '
      '--budgets=1e13,3e13,1e14.'
    )
  runs, left_out = scaling.plan(
    config, wanted, budgets, max_tokens=values.max_tokens
  )
  for line in left_out:
    print(f'left out: {line}')
  if not runs:
    sys.exit('error: no run is left. Give larger --budgets.')
  held_out = [_held_out(config, text) for text in values.hold_out]
  _check(runs, held_out)
  print('\n'.join(text_table.aligned(_table(runs, held_out))))
  scaling_law.check([(run.parameters, run.tokens) for run in runs])
  launcher = command_line.launcher()
  directory = command_line.study_directory()

  parts = {'fit': runs, **({'held_out': held_out} if held_out else {})}
  facts_of = {
    folder: study_lib.Facts(
      experiment=name,
      config=config,
      sweep=scaling.sweep_of(config, part, values.metric),
      storage=values.storage,
    )
    for folder, part in parts.items()
  }
  for folder, facts in facts_of.items():
    command_line.check(facts, launcher, command, f'{directory}/{folder}')

  if values.dry_run:
    return

  def train(folder: str):
    study, stopped = command_line.run(
      facts_of[folder], launcher, command, f'{directory}/{folder}'
    )
    if stopped is not None:
      sys.exit(128 + stopped)
    return scaling.points_of(study, parts[folder])

  launcher.check()
  root = files.path(directory)
  try:
    points = list(train('fit').values())
    found = scaling_law.fit(points)
    valleys = [
      v
      for budget in budgets
      if (v := scaling_law.valley(_of_budget(points, budget)))
    ]
    print('\n' + '\n'.join(text_table.aligned(_law_table(found))))
    for v in valleys:
      edge = '' if v.is_inside else ', outside the sizes that were tried'
      print(f'least loss of {v.flops:.3g} FLOPs: N = {v.parameters:.4g}{edge}')
    predicted = scaling.predictions(found, held_out)
    if held_out:
      file = root / scaling.PREDICTION
      if not files.create_whole(file, scaling.dumps(predicted)):
        # What was written before the runs began is what counts.
        predicted = json.loads(file.read_text())
      print(f'predicted in {file}:')
      print('\n'.join(text_table.aligned(_predicted_table(predicted))))
    ends = train('held_out') if held_out else {}
  finally:
    launcher.close()
  result = scaling.to_json(found, points, valleys)
  for i, point in ends.items():
    predicted[i]['measured'] = point.loss
    predicted[i]['error'] = predicted[i]['loss'] / point.loss - 1
    print(
      f'{predicted[i]["size"]}: predicted {predicted[i]["loss"]:.4f}, measured '
      f'{point.loss:.4f}, off by {predicted[i]["error"]:+.2%}'
    )
  files.write_whole(
    root / scaling.FILE, scaling.dumps({**result, 'held_out': predicted})
  )
  if not files.is_remote(root):
    from t2x.sweeps import scaling_picture

    picture = str(root / 'scaling.png')
    scaling_picture.write(found, points, list(ends.values()), budgets, picture)
    print(f'The picture is {picture}')


def _check(
  runs: list[scaling.ScaledRun], held_out: list[scaling.ScaledRun]
) -> None:
  """Ends the script where runs stand twice, or nothing is predicted."""
  seen = collections.Counter((r.width, r.layers, r.budget) for r in runs)
  again = [run for run, count in seen.items() if count > 1]
  if again:
    width, layers, budget = again[0]
    sys.exit(
      f'error: {width}x{layers} with {budget:.3g} FLOPs stands twice among '
      '--sizes and --budgets.'
    )
  largest = max(run.flops for run in runs)
  for run in held_out:
    if run.flops <= 1.01 * largest:
      sys.exit(
        f'error: --hold_out={run.width}x{run.layers}:{run.budget:.3g} is no '
        f'larger than the runs of the fit, of up to {largest:.3g} FLOPs. It is '
        'to show that the law holds beyond these.'
      )


def _held_out(config, text: str) -> scaling.ScaledRun:
  size, colon, budget = text.partition(':')
  if not colon:
    sys.exit(
      f'error: --hold_out={text}: write WIDTHxLAYERS:FLOPs, such as 192x4:3e14.'
    )
  return scaling.run_of(
    config, scaling.parse_size(size), command_line.number(budget, 'hold_out')
  )


def _of_budget(points, budget: float) -> list[scaling_law.Point]:
  return [p for p in points if abs(p.flops / budget - 1) < 0.1]


def _table(runs, held_out) -> list[list[str]]:
  rows = [['size', 'N', 'tokens', 'steps', 'FLOPs', '']]
  for part, note in ((runs, ''), (held_out, 'held out')):
    rows += [
      [
        f'{r.width}x{r.layers}',
        f'{r.parameters:.4g}',
        f'{r.tokens:,.0f}',
        str(r.steps),
        f'{r.flops:.3g}',
        note,
      ]
      for r in part
    ]
  return rows


def _law_table(found: scaling_law.Fit) -> list[list[str]]:
  rows = [['', 'value', '5%', '95%']]
  for name, title in (
    ('floor', 'E'),
    ('a_scale', 'A'),
    ('a', 'a'),
    ('b_scale', 'B'),
    ('b', 'b'),
    ('size_exponent', 'N grows as FLOPs to the power'),
  ):
    low, high = found.interval(name)
    value = getattr(found.law, name)
    rows.append([title, f'{value:.4g}', f'{low:.4g}', f'{high:.4g}'])
  rows.append(['error of the fit', f'{found.error:.3%}', '', ''])
  return rows


def _predicted_table(predicted) -> list[list[str]]:
  rows = [['size', 'FLOPs', 'loss', '5%', '95%']]
  for p in predicted:
    losses = [f'{p[name]:.4f}' for name in ('loss', 'low', 'high')]
    rows.append([p['size'], f'{p["flops"]:.3g}', *losses])
  return rows


if __name__ == '__main__':
  main()

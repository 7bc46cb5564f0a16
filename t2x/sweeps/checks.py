"""What is looked at before a sweep begins, beside its single points."""

import difflib

from t2x.config import experiment
from t2x.data import config as data_config
from t2x.sweeps import definition
from t2x.sweeps import points
from t2x.sweeps import search


def check_population(
  sweep: definition.Sweep, config: experiment.Experiment
) -> None:
  """Raises ValueError if runs of a population could not go on as each other."""
  way = sweep.search
  if not isinstance(way, search.PopulationBased):
    return
  if sweep.pruning is not None:
    raise ValueError(
      f'pruning={sweep.pruning.kind}: a population replaces its worst runs, '
      'and prunes none. Leave it out, or choose another search.'
    )
  steps = experiment.num_steps(config)
  if steps is None or steps < way.generations:
    raise ValueError(
      f'search.generations={way.generations} divide the steps of a run, which '
      f'has {steps or "an unknown number"}. Set train.num_steps.'
    )
  lengths = ('train.seed', 'train.num_')
  if fixed := [field for field in sweep.fields if field.startswith(lengths)]:
    raise ValueError(
      f'A population cannot vary {fixed[0]}: its runs go on as each other, '
      'from generation to generation.'
    )
  keys = {
    points.structure_key(
      points.candidate(config, sweep, {**first, name: end}).runs[0].config
    )
    for first in way.first(sweep.parameters)[:1]
    for name, parameter in sweep.parameters.items()
    for end in parameter.ends
  }
  if len(keys) > 1:
    raise ValueError(
      'A population varies what a run may change as it goes, such as optim.'
      'learning_rate, and no sizes: one run takes over the weights of another.'
    )


def check_pruning(
  sweep: definition.Sweep, config: experiment.Experiment
) -> None:
  """Raises ValueError if a rule for ending trials could never act."""
  rule = sweep.pruning
  if rule is None:
    return
  steps = experiment.num_steps(config)
  if steps is None:
    raise ValueError(
      f'pruning={rule.kind} goes by steps, and how many a run takes is not '
      'known before its corpus is read. Set train.num_steps.'
    )
  if rule.first_step >= steps:
    raise ValueError(
      f'pruning={rule.kind} ends trials from step {rule.first_step} on, and '
      f'runs have {steps}: it would end none. Choose less, or leave it out.'
    )
  every = config.train.eval_every
  if sweep.metric.startswith('eval/') and not 0 < every < steps:
    raise ValueError(
      f'pruning={rule.kind} goes by {sweep.metric}, which with train.'
      f'eval_every={every} comes at step {steps} alone, the last. Set train.'
      'eval_every to less.'
    )


def check_metric(
  sweep: definition.Sweep, config: experiment.Experiment
) -> None:
  """Raises ValueError if a metric is of a set that no run evaluates."""
  parts = sweep.metric.split('/')
  if parts[0] != 'eval':
    return
  tasks = data_config.parts(config.data)
  titles = [
    f'{split}.{task}' if task else split
    for split in config.data.eval_splits
    for task in tasks
  ]
  if len(parts) != 3 or parts[1] not in titles:
    names = [f'eval/{title}/loss' for title in titles]
    close = difflib.get_close_matches(sweep.metric, names, n=1, cutoff=0.3)
    hint = f' Did you mean {close[0]!r}?' if close else ''
    raise ValueError(
      f'metric={sweep.metric!r}: the experiment evaluates '
      f'{", ".join(titles) or "nothing"} (data.eval_splits), which give '
      f'eval/NAME/METRIC.{hint}'
    )

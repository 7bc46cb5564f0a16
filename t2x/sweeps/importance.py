"""How much each parameter of a sweep matters, by Optuna."""

import dataclasses
import math
import warnings

import optuna

from t2x.sweeps import search
from t2x.sweeps import study as study_lib

_LEAST_TRIALS = 10  # Fewer say little about anything.
_ENOUGH_TRIALS = 50
_LEAST_BEST = 5  # Trials that PED-ANOVA wants among the best.
_BEST_SHARE = 0.1  # Its own choice, where there are trials enough.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Importance:
  """Shares of the parameters, or why there are none.

  Attributes:
    shares: share of each parameter, which add up to 1, the greatest first.
    said: sentences on how they were found, or on why they were not.
  """

  shares: dict[str, float]
  said: str


def of(study: study_lib.Study) -> Importance:
  """Returns the importance of a study's parameters for its best results.

  It is PED-ANOVA's (Watanabe et al., 2023): how differently a parameter is
  distributed among the best trials and among all. Trials that were pruned,
  failed or diverged have no say.
  """
  trials = [t for t in study.trials() if _counts(t)]
  why = _why_not(study, trials)
  if why:
    return Importance(shares={}, said=why)
  share = min(max(_BEST_SHARE, _LEAST_BEST / len(trials)), 0.5)
  evaluator = optuna.importance.PedAnovaImportanceEvaluator(
    target_quantile=share
  )
  with warnings.catch_warnings():
    # Experimental arguments; what it says of trials is said below.
    warnings.simplefilter('ignore')
    found = optuna.importance.get_param_importances(
      _copy(study, trials), evaluator=evaluator, normalize=False
    )
  total = sum(found.values())
  if not total:
    return Importance(
      shares={},
      said='No parameter tells the best trials from the others: results are '
      'too much alike.',
    )
  rough = ''
  if len(trials) < _ENOUGH_TRIALS:
    rough = f' With fewer than {_ENOUGH_TRIALS} trials it is rough.'
  return Importance(
    shares={name: value / total for name, value in found.items()},
    said=(
      f'PED-ANOVA (Watanabe et al., 2023), by Optuna, over {len(trials)} '
      'complete trials with finite results: how differently a parameter is '
      f'distributed among the best {share:.0%} of them and among all. It says '
      'nothing of parameters that act only together.' + rough
    ),
  )


def _counts(trial: study_lib.Trial) -> bool:
  return (
    trial.state == 'complete'
    and trial.value is not None
    and math.isfinite(trial.value)
  )


def _why_not(study: study_lib.Study, trials: list[study_lib.Trial]) -> str:
  if len(study.sweep.parameters) < 2:
    return 'With one parameter there is nothing to compare.'
  if len(trials) < _LEAST_TRIALS:
    return (
      f'Importance needs {_LEAST_TRIALS} complete trials with finite results, '
      f'and there are {len(trials)}.'
    )
  return ''


def _copy(
  study: study_lib.Study, trials: list[study_lib.Trial]
) -> optuna.Study:
  """Returns a study of Optuna, in memory, with some trials."""
  copy = optuna.create_study(direction=study.sweep.direction)
  distributions = search.to_optuna(study.sweep.parameters)
  copy.add_trials(
    optuna.trial.create_trial(
      params={n: search.optuna_value(v) for n, v in t.point.items()},
      distributions=distributions,
      value=t.value,
    )
    for t in trials
  )
  return copy

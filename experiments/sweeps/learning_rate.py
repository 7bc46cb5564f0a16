"""Five learning rates, from a tenth of 1e-2 to ten times it, on a grid.

python scripts/sweep.py --experiment=gpt2_tiny \
    --sweep=experiments/sweeps/learning_rate.py --study=studies/rates
"""

from t2x.sweeps import definition
from t2x.sweeps import search
from t2x.sweeps import space


def get_sweep() -> definition.Sweep:
  return definition.Sweep(
    parameters={'optim.learning_rate': space.log_spaced(1e-3, 1e-1, 5)},
    search=search.Grid(),
    metric='eval/validation/loss',
  )

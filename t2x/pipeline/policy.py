"""What a forward pass keeps for the backward pass, by `train.remat`."""

from jax.extend import core

from t2x import stack
from t2x.layers import param
from t2x.layers import routing
from t2x.pipeline import flow


def keeps(remat: str, eqn: core.JaxprEqn) -> bool:
  """Whether a policy keeps what an equation of the forward pass makes."""
  name = eqn.params.get('name') if eqn.primitive.name == 'name' else None
  if name == routing.CHOICE:
    return True
  if remat in ('none', 'full'):
    # What attention gives is smaller than the scores that it is made of.
    return eqn.primitive.name in flow.HEAVY or name == 'attention'
  if remat == 'dots':
    return name == param.PRODUCT
  saved = remat.partition(':')[2].split(',')
  assert set(saved) <= set(stack.SAVED_NAMES), remat
  return name in saved

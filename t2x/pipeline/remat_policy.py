"""What a forward pass keeps for the backward pass, by `train.remat`."""

from jax.extend import core

from t2x.layers import param
from t2x.layers import routing
from t2x.layers import stack
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
  names = _names(eqn)
  return bool(names) and names <= {*saved}


def _names(eqn: core.JaxprEqn) -> set[str]:
  """Returns the names of what an equation makes.

  A kernel's are inside a `shard_map`, which gives nothing else out.
  """
  if eqn.primitive.name == 'name':
    return {eqn.params['name']}
  return _inside(eqn) if eqn.primitive.name == 'shard_map' else set()


def _inside(eqn: core.JaxprEqn) -> set[str]:
  found = set()
  for jaxpr in core.jaxprs_in_params(eqn.params):
    for inner in jaxpr.eqns:
      is_name = inner.primitive.name == 'name'
      found |= {inner.params['name']} if is_name else _inside(inner)
  return found

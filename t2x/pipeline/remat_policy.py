"""Rematerialisation: activations that the forward pass keeps for the backward.

`train.remat` (`stack.Execution.remat`) names the policy.
"""

from jax.extend import core

from t2x.layers import param
from t2x.layers import routing
from t2x.layers import stack
from t2x.pipeline import flow


def keeps(remat: str, eqn: core.JaxprEqn) -> bool:
  """Whether a policy keeps the results of an equation of the forward pass.

  Args:
    remat: policy; see `stack.Execution`.
    eqn: equation of the forward pass.
  """
  name = eqn.params.get('name') if eqn.primitive.name == 'name' else None
  if name == routing.CHOICE:
    return True
  if remat in ('none', 'full'):
    # The output of attention is smaller than the scores that it takes.
    return eqn.primitive.name in flow.HEAVY or name == 'attention'
  if remat == 'dots':
    return name == param.PRODUCT
  saved = remat.partition(':')[2].split(',')
  assert set(saved) <= set(stack.SAVED_NAMES), remat
  names = _names(eqn)
  return bool(names) and names <= {*saved}


def _names(eqn: core.JaxprEqn) -> set[str]:
  """Returns the names that the program gives to the results of an equation.

  The names of a kernel's results are inside a `shard_map`, which has no other
  results.
  """
  if eqn.primitive.name == 'name':
    return {eqn.params['name']}
  return _names_inside(eqn) if eqn.primitive.name == 'shard_map' else set()


def _names_inside(eqn: core.JaxprEqn) -> set[str]:
  names = set()
  for jaxpr in core.jaxprs_in_params(eqn.params):
    for inner in jaxpr.eqns:
      is_name = inner.primitive.name == 'name'
      names |= {inner.params['name']} if is_name else _names_inside(inner)
  return names

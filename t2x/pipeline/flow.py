"""The data flow of a function: which equations make a value, of what.

Functions become flat jaxprs, calls inlined, whose equations can be run in
several programs.
"""

from collections.abc import Callable
from collections.abc import Iterable
import math
from typing import Any

import jax
from jax import core as jax_core
from jax.extend import core
import jax.numpy as jnp

# Primitives that hold a jaxpr, and under which name.
_CALLS = {
  'jit': 'jaxpr',
  'pjit': 'jaxpr',
  'closed_call': 'call_jaxpr',
  'core_call': 'call_jaxpr',
  'custom_jvp_call': 'call_jaxpr',
  'custom_vjp_call': 'call_jaxpr',
}
# Run once, or kept: products, loops, and whatever moves between devices.
HEAVY = {
  'all_gather',
  'all_to_all',
  'checkpoint',
  'cond',
  'conv_general_dilated',
  'dot_general',
  'pallas_call',
  'ppermute',
  'psum',
  'ragged_dot',
  'ragged_dot_general',
  'reduce_scatter',
  'remat2',
  'scan',
  'shard_map',
  'sort',
  'top_k',
  'while',
}

Stop = Callable[[Any], bool]


class Flow:
  """A flat jaxpr.

  Attributes:
    inputs: its variables.
    outputs: variables or literals.
    shapes: of the function's result.
  """

  def __init__(self, fn: Callable, *args: Any):
    """Traces fn(*args)."""
    closed, self.shapes = jax.make_jaxpr(fn, return_shape=True)(*args)
    inlined = lambda *leaves: _evaluate(closed.jaxpr, closed.consts, leaves)
    flat = jax.make_jaxpr(inlined)(*jax.tree.leaves(args))
    self._jaxpr, self._consts = flat.jaxpr, flat.consts
    self._constants = set(self._jaxpr.constvars)
    self._producer = {
      v: i for i, eqn in enumerate(self._jaxpr.eqns) for v in eqn.outvars
    }
    self._flags: dict[Any, int] = {}
    self.inputs = list(self._jaxpr.invars)
    self.outputs = list(self._jaxpr.outvars)

  def mark(self, flags: dict[Any, int]) -> None:
    """Says what inputs are; every value has the flags of all it depends on."""
    self._flags = dict.fromkeys(self._jaxpr.constvars, 0) | flags
    for eqn in self._jaxpr.eqns:
      own = 0
      for v in variables(eqn.invars):
        own |= self._flags[v]
      self._flags |= dict.fromkeys(eqn.outvars, own)

  def flags(self, v: Any) -> int:
    return 0 if isinstance(v, core.Literal) else self._flags[v]

  def equation(self, v: Any) -> Any:
    """Returns what makes a value; None for an input."""
    return self._jaxpr.eqns[self._producer[v]] if v in self._producer else None

  def closure(self, targets: Iterable[Any], stop: Stop):
    """Returns what makes `targets`, and all that is read for it.

    Args:
      targets: values.
      stop: whether a value is at hand, and need not be made.

    Returns:
      The numbers of equations, and inputs and values at hand.
    """
    made, reads, seen = set(), {}, set()
    todo = variables(targets)
    while todo:
      v = todo.pop()
      if v in seen or v in self._constants:
        continue
      seen.add(v)
      if v not in self._producer or stop(v):
        reads[v] = None
      elif self._producer[v] not in made:
        made.add(self._producer[v])
        todo += variables(self.equation(v).invars)
    return made, reads

  def makes(self, v: Any, equations: set[int]) -> bool:
    """Whether some equations make a value."""
    return self._producer.get(v) in equations

  def is_costly(self, v: Any, stop: Stop) -> bool:
    """Whether it takes a product, or the like, to make a value."""
    made, _ = self.closure([v], stop)
    return any(self._jaxpr.eqns[i].primitive.name in HEAVY for i in made)

  def run(self, targets: Iterable[Any], known: dict[Any, Any]) -> list[Any]:
    """Computes values of known ones, and nothing else."""
    targets = list(targets)
    made, reads = self.closure(targets, lambda v: v in known)
    missing = [v for v in reads if v not in known]
    assert not missing, f'not at hand: {missing}'
    part = _part(self._jaxpr, [self._jaxpr.eqns[i] for i in sorted(made)])
    part = part.replace(invars=list(reads), outvars=targets)
    return jax_core.eval_jaxpr(part, self._consts, *(known[v] for v in reads))


def variables(atoms: Iterable[Any]) -> list[Any]:
  """Returns those that are no literals."""
  return [v for v in atoms if isinstance(v, core.Var)]


def num_bytes(v: Any) -> int:
  dtype = v.aval.dtype
  size = dtype.itemsize if jnp.issubdtype(dtype, jnp.number) else 1
  return math.prod(v.aval.shape) * size


def _part(jaxpr, eqns):
  info = jaxpr.debug_info.with_unknown_names()
  return jaxpr.replace(eqns=eqns, debug_info=info)


def _evaluate(jaxpr, consts, args) -> list[Any]:
  """Evaluates a jaxpr, going into calls."""
  env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args]))
  read = lambda v: v.val if isinstance(v, core.Literal) else env[v]
  for eqn in jaxpr.eqns:
    name = _CALLS.get(eqn.primitive.name)
    if name is None:
      ins = list(dict.fromkeys(variables(eqn.invars)))
      outs = [v for v in eqn.outvars if not isinstance(v, core.DropVar)]
      one = _part(jaxpr, [eqn]).replace(constvars=[], invars=ins, outvars=outs)
      made = jax_core.eval_jaxpr(one, [], *(env[v] for v in ins))
    else:
      inner, outs = eqn.params[name], eqn.outvars
      closed = isinstance(inner, core.ClosedJaxpr)
      body, inner_consts = (
        (inner.jaxpr, inner.consts) if closed else (inner, [])
      )
      made = _evaluate(body, inner_consts, [read(v) for v in eqn.invars])
    env |= zip(outs, made)
  return [read(v) for v in jaxpr.outvars]

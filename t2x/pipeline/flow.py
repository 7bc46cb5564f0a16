"""The data flow of a function: which equations a value depends on.

A function becomes a flat jaxpr with all calls inlined. Its equations can then
be divided among several programs.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Sequence
import math
from typing import Any

import jax
from jax import core as jax_core
from jax.extend import core
import jax.numpy as jnp

# Primitives that call a jaxpr, and the name of the parameter that holds it.
_CALLS = {
  'jit': 'jaxpr',
  'pjit': 'jaxpr',
  'closed_call': 'call_jaxpr',
  'core_call': 'call_jaxpr',
  'custom_jvp_call': 'call_jaxpr',
  'custom_vjp_call': 'call_jaxpr',
}
# Costly primitives, whose results are kept rather than computed again: matrix
# products, loops, and communication between devices.
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

Atom = core.Var | core.Literal
Stop = Callable[[core.Var], bool]


class Flow:
  """A flat jaxpr.

  Attributes:
    inputs: variables of the function's arguments.
    outputs: variables or literals of its result.
    shapes: shapes of its result, as a tree.
  """

  def __init__(self, fn: Callable[..., Any], *args: Any):
    """Traces `fn` for arguments, or for their shapes.

    Args:
      fn: function of trees of arrays.
      *args: arguments, or their shapes.
    """
    closed, self.shapes = jax.make_jaxpr(fn, return_shape=True)(*args)
    inlined = lambda *leaves: _evaluate(closed.jaxpr, closed.consts, leaves)
    flat = jax.make_jaxpr(inlined)(*jax.tree.leaves(args))
    self._jaxpr, self._consts = flat.jaxpr, flat.consts
    self._constants = set(self._jaxpr.constvars)
    self._producer = {
      v: i for i, eqn in enumerate(self._jaxpr.eqns) for v in eqn.outvars
    }
    self._flags: dict[core.Var, int] = {}
    self.inputs = list(self._jaxpr.invars)
    self.outputs = list(self._jaxpr.outvars)

  def mark(self, flags: dict[core.Var, int]) -> None:
    """Sets the flags of all values.

    Every value has the flags of all inputs that it depends on.

    Args:
      flags: flags of each input, as the bits of an integer.
    """
    self._flags = dict.fromkeys(self._jaxpr.constvars, 0) | flags
    for eqn in self._jaxpr.eqns:
      union = 0
      for v in variables(eqn.invars):
        union |= self._flags[v]
      self._flags |= dict.fromkeys(eqn.outvars, union)

  def flags(self, v: Atom) -> int:
    """Returns the flags of a value; a literal has none."""
    return 0 if isinstance(v, core.Literal) else self._flags[v]

  def equation(self, v: core.Var) -> core.JaxprEqn | None:
    """Returns the equation whose result a value is; None for an input."""
    return self._jaxpr.eqns[self._producer[v]] if v in self._producer else None

  def closure(
    self, targets: Iterable[Atom], stop: Stop
  ) -> tuple[set[int], dict[core.Var, None]]:
    """Returns the equations that compute `targets`, and the values they read.

    Args:
      targets: values to be computed.
      stop: predicate that is true for a value that is known and need not be
        computed.

    Returns:
      The indices of the equations; and the inputs and known values that they
      read, in order, as the keys of a dictionary.
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
        todo += variables(self._jaxpr.eqns[self._producer[v]].invars)
    return made, reads

  def makes(self, v: core.Var, equations: set[int]) -> bool:
    """Whether one of some equations, given by index, computes a value."""
    return self._producer.get(v) in equations

  def is_costly(self, v: Atom, stop: Stop) -> bool:
    """Whether a value takes one of the primitives of `HEAVY`.

    Args:
      v: value to be computed.
      stop: predicate that is true for a value that is known.
    """
    made, _ = self.closure([v], stop)
    return any(self._jaxpr.eqns[i].primitive.name in HEAVY for i in made)

  def run(
    self, targets: Iterable[Atom], known: dict[core.Var, jax.Array]
  ) -> list[jax.Array]:
    """Computes values, with no equation that they do not need.

    Args:
      targets: values to be computed.
      known: arrays of known values.
    """
    targets = list(targets)
    made, reads = self.closure(targets, lambda v: v in known)
    missing = [v for v in reads if v not in known]
    assert not missing, f'not at hand: {missing}'
    part = _part(self._jaxpr, [self._jaxpr.eqns[i] for i in sorted(made)])
    part = part.replace(invars=list(reads), outvars=targets)
    return jax_core.eval_jaxpr(part, self._consts, *(known[v] for v in reads))


def variables(atoms: Iterable[Atom]) -> list[core.Var]:
  """Returns the atoms that are variables, without the literals."""
  return [v for v in atoms if isinstance(v, core.Var)]


def shape_of(v: Atom) -> jax.ShapeDtypeStruct:
  """Returns the shape and dtype of a value."""
  aval: Any = v.aval
  return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


def num_bytes(v: Atom) -> int:
  """Returns the size of a value; a key of random numbers counts as one byte."""
  shape = shape_of(v)
  is_number = jnp.issubdtype(shape.dtype, jnp.number)
  return math.prod(shape.shape) * (shape.dtype.itemsize if is_number else 1)


def _part(jaxpr: core.Jaxpr, eqns: list[core.JaxprEqn]) -> core.Jaxpr:
  info = jaxpr.debug_info.with_unknown_names()
  return jaxpr.replace(eqns=eqns, debug_info=info)


def _evaluate(
  jaxpr: core.Jaxpr, consts: Sequence[jax.Array], args: Sequence[jax.Array]
) -> list[jax.Array]:
  """Evaluates a jaxpr, with the equations of the jaxprs that it calls."""
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

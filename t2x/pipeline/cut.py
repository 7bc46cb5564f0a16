"""Cuts a layer's forward and backward pass into programs that repeat nothing.

A pipeline runs the pieces of one gradient in different ticks:

  fixed      what depends on parameters alone (casts): once, before all;
  forward    the output, and the activations that the backward pass needs;
  backward   the gradient by the input, needed by the stage before (B);
  weight     the gradients by the parameters, needed by no one yet (W).

The flat jaxpr of layer and gradient, calls inlined, is cut along its data flow,
so no layer knows of it. Splitting B from W follows Qi et al., 2023 (Zero Bubble
Pipeline Parallelism): W is what holds a product that the gradient by the input
does not need; a gradient without one (a bias, a norm) is made in B, from where
it is as small as it ever will be. Between the programs travel activations only:
nothing that depends on parameters alone, and of the others those that cost a
product, the rest being recomputed.
"""

from collections.abc import Callable
from collections.abc import Iterable
import dataclasses
import functools
import math
from typing import Any

import jax
from jax import core as jax_core
from jax.extend import core
import jax.numpy as jnp

from t2x import stack
from t2x.layers import param
from t2x.layers import routing

# What a value depends on.
_SLOT, _SHARED, _DATA, _GRAD = 1, 2, 4, 8
_CALLS = {
  'jit': 'jaxpr',
  'pjit': 'jaxpr',
  'closed_call': 'call_jaxpr',
  'core_call': 'call_jaxpr',
  'custom_jvp_call': 'call_jaxpr',
  'custom_vjp_call': 'call_jaxpr',
}
# Run once, or kept: products, loops, and whatever moves between devices.
_HEAVY = {
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


@dataclasses.dataclass(frozen=True)
class Params:
  """Parameters of a layer: its own, one set a slot, and those of the model.

  Attributes:
    slot: trained, of the layer itself.
    slot_frozen: the same, not trained.
    shared: trained, of the model.
    shared_frozen: the same, not trained.
  """

  slot: Any = None
  slot_frozen: Any = None
  shared: Any = None
  shared_frozen: Any = None


jax.tree_util.register_dataclass(Params)

# fn(params, x, side, rest) -> (y, aux, other).
Function = Callable[[Params, Any, Any, Any], tuple[Any, Any, Any]]


class Cut:
  """The programs of one function, traced once for given shapes.

  `fn(params, x, side, rest)` returns the output y, a scalar that is added to
  the loss (or None), and whatever else is measured. It has gradients by the
  trained parameters, by `x` and by `side`, which is an input that many layers
  share (an encoder's output); `rest` has none (tokens, keys of dropout).

  Attributes:
    early: leaves of `trained(params)` whose gradients `backward` returns.
    late: those whose gradients `weight` returns; the others have none.
    fixed_slot: shapes of what the loop needs of a layer's own parameters.
    fixed_shared: the same of the model's.
    stored: shapes of what `forward` keeps, for `backward` alone and for
      `weight` too.
    crossing: shapes of what `backward` keeps for `weight`.
    y: shape of the output.
    other: shapes of what else is measured.
  """

  def __init__(
    self,
    fn: Function,
    params: Params,
    x: Any,
    side: Any,
    rest: Any,
    *,
    remat: str = 'none',
  ):
    self._keeps = functools.partial(_keeps, remat)
    whole = functools.partial(_whole, fn)
    args = (params, x, side, rest)
    y, aux, self.other = jax.eval_shape(fn, *args)
    self.y, self.aux = y, aux
    flat, outputs = _flatten(whole, *args, y, aux)
    self._jaxpr = flat.jaxpr
    self._consts = flat.consts
    self._producer = {
      v: i for i, eqn in enumerate(self._jaxpr.eqns) for v in eqn.outvars
    }
    self._name_inputs(args, y, aux)
    self._depends = self._dependencies()
    self._name_outputs(outputs)
    self._cut()

  def _name_inputs(self, args, y, aux) -> None:
    params, x, side, rest = args
    trees = {
      'slot': params.slot,
      'slot_frozen': params.slot_frozen,
      'shared': params.shared,
      'shared_frozen': params.shared_frozen,
      'x': x,
      'side': side,
      'rest': rest,
      'd_y': y,
      'd_aux': aux,
    }
    left = list(self._jaxpr.invars)
    self._in: dict[str, list[Any]] = {}
    for name, tree in trees.items():
      num = len(jax.tree.leaves(tree))
      self._in[name], left = left[:num], left[num:]
    assert not left

  def _name_outputs(self, outputs) -> None:
    names = ('y', 'aux', 'other', 'slot', 'shared', 'x', 'side')
    left = list(self._jaxpr.outvars)
    self._out: dict[str, list[Any]] = {}
    self._tree: dict[str, Any] = {}
    for name, tree in zip(names, outputs):
      leaves, self._tree[name] = jax.tree.flatten(tree)
      self._out[name], left = left[: len(leaves)], left[len(leaves) :]

  def _dependencies(self) -> dict[Any, int]:
    of_group = {
      'slot': _SLOT,
      'slot_frozen': _SLOT,
      'shared': _SHARED,
      'shared_frozen': _SHARED,
      'd_y': _GRAD,
      'd_aux': _GRAD,
    }
    flags = dict.fromkeys(self._jaxpr.constvars, 0)
    for name, variables in self._in.items():
      flags |= dict.fromkeys(variables, of_group.get(name, _DATA))
    for eqn in self._jaxpr.eqns:
      own = 0
      for v in _variables(eqn.invars):
        own |= flags[v]
      flags |= dict.fromkeys(eqn.outvars, own)
    return flags

  def _flags(self, v) -> int:
    return 0 if isinstance(v, core.Literal) else self._depends[v]

  def _is_fixed(self, v) -> bool:
    """Whether a value is made before the loop: it has one kind of parameter.

    And is no larger than these: a table of positions times heads is made again
    wherever it is needed.
    """
    if self._flags(v) not in (_SLOT, _SHARED):
      return False
    if v not in self._producer:
      return True
    _, reads = self._closure([v], lambda _: False)
    return _bytes(v) <= sum(_bytes(r) for r in reads)

  def _is_stored(self, v) -> bool:
    """Whether the forward pass keeps a value, if the backward pass needs it."""
    flags = self._flags(v)
    if not flags & _DATA or flags & _GRAD or v not in self._producer:
      return False
    return self._keeps(self._jaxpr.eqns[self._producer[v]])

  def _closure(self, targets: Iterable[Any], stop: Callable[[Any], bool]):
    """Returns the equations that make `targets`, and all that they read.

    What they read is inputs and whatever `stop` holds true of.
    """
    eqns, reads, seen = set(), {}, set()
    todo = [v for v in targets if isinstance(v, core.Var)]
    while todo:
      v = todo.pop()
      if v in seen or v in self._constants:
        continue
      seen.add(v)
      if v not in self._producer or stop(v):
        reads[v] = None
      elif self._producer[v] not in eqns:
        eqns.add(self._producer[v])
        todo += _variables(self._jaxpr.eqns[self._producer[v]].invars)
    return eqns, reads

  @functools.cached_property
  def _constants(self) -> set[Any]:
    return set(self._jaxpr.constvars)

  def _cut(self) -> None:
    out = self._out
    grads = [*out['slot'], *out['shared']]
    inputs = [*out['x'], *out['side']]
    until = lambda v: self._is_fixed(v) or self._is_stored(v)
    base, _ = self._closure(inputs, until)
    self.early, self.late = [], []
    for i, v in enumerate(grads):
      if self._flags(v) & (_DATA | _GRAD):
        late = self._has_own_product(v, base, until)
        (self.late if late else self.early).append(i)
    self._early = [grads[i] for i in self.early]
    self._late = [grads[i] for i in self.late]

    b_eqns, b_reads = self._closure([*inputs, *self._early], until)

    def until_w(v):
      if until(v):
        return True
      if self._producer[v] not in b_eqns:
        return False
      # Made in B; made again only where that costs no product.
      return bool(self._flags(v) & _GRAD) or self._costs(v, until)

    w_eqns, w_reads = self._closure(self._late, until_w)
    reads = {**b_reads, **w_reads}
    primal = lambda v: self._flags(v) & _DATA and not self._flags(v) & _GRAD
    x = set(self._in['x'])
    kept = [v for v in reads if v in x or self._is_stored(v)]
    kept = [
      [v for v in kept if v not in w_reads],
      [v for v in kept if v in w_reads],
    ]
    inputs = {v for name in ('side', 'rest') for v in self._in[name]}
    crossing = [
      v
      for v in w_reads
      if v not in kept[1]
      and v not in inputs
      and (self._flags(v) & _GRAD or primal(v))
    ]
    self._define(kept, crossing, b_eqns, w_eqns)

  def _has_own_product(self, v, base, until) -> bool:
    """Whether a gradient takes a product that the input's does not."""
    made = lambda v: until(v) or self._producer[v] in base
    eqns, _ = self._closure([v], made)
    return any(self._is_heavy(i) for i in eqns)

  def _costs(self, v, until) -> bool:
    eqns, _ = self._closure([v], until)
    return any(self._is_heavy(i) for i in eqns)

  def _is_heavy(self, i: int) -> bool:
    return self._jaxpr.eqns[i].primitive.name in _HEAVY

  def _define(self, kept, crossing, b_eqns, w_eqns) -> None:
    out = self._out
    outputs = [*out['y'], *out['aux'], *out['other']]
    flat = [*kept[0], *kept[1]]
    f_eqns, f_reads = self._closure([*outputs, *flat], self._is_fixed)
    _, o_reads = self._closure(outputs, self._is_fixed)
    all_out = [*outputs, *out['x'], *out['side'], *self._early, *self._late]
    _, a_reads = self._closure(all_out, self._is_fixed)
    parts = [f_reads, o_reads, a_reads]
    for eqns in (f_eqns, b_eqns, w_eqns):
      reads = (v for i in eqns for v in _variables(self._jaxpr.eqns[i].invars))
      parts.append(dict.fromkeys(reads))
    fixed = dict.fromkeys(v for part in parts for v in part)
    fixed = [v for v in fixed if self._is_fixed(v)]
    self._fixed = {
      flag: [v for v in fixed if self._flags(v) == flag]
      for flag in (_SLOT, _SHARED)
    }
    self._kept, self._crossing = kept, crossing
    shapes = lambda vs: [
      jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in vs
    ]
    self.fixed_slot = shapes(self._fixed[_SLOT])
    self.fixed_shared = shapes(self._fixed[_SHARED])
    self.stored = [shapes(part) for part in kept]
    self.crossing = shapes(crossing)

  def _run(self, outs, known: dict[Any, Any], stop=()) -> list[Any]:
    """Computes `outs` from known values."""
    del stop
    eqns, reads = self._closure(outs, lambda v: v in known)
    missing = [v for v in reads if v not in known]
    assert not missing, f'not at hand: {missing}'
    ins = list(reads)
    jaxpr = self._jaxpr.replace(
      eqns=[self._jaxpr.eqns[i] for i in sorted(eqns)],
      invars=ins,
      outvars=list(outs),
      debug_info=self._jaxpr.debug_info.with_unknown_names(),
    )
    return jax_core.eval_jaxpr(jaxpr, self._consts, *(known[v] for v in ins))

  def _known(self, **values) -> dict[Any, Any]:
    known = {}
    for name, tree in values.items():
      leaves = jax.tree.leaves(tree)
      assert len(leaves) == len(self._in[name]), name
      known |= zip(self._in[name], leaves)
    return known

  def _with(self, known, fixed, *pairs):
    slot, shared = fixed
    known |= zip(self._fixed[_SLOT], slot)
    known |= zip(self._fixed[_SHARED], shared)
    for variables, values in pairs:
      known |= zip(variables, values)
    return known

  def slot_values(self, slot: Any, slot_frozen: Any) -> list[jax.Array]:
    """Returns what the loop needs of one layer's own parameters."""
    known = self._known(slot=slot, slot_frozen=slot_frozen)
    return self._run(self._fixed[_SLOT], known)

  def shared_values(self, shared: Any, shared_frozen: Any) -> list[jax.Array]:
    """Returns what the loop needs of the model's parameters."""
    known = self._known(shared=shared, shared_frozen=shared_frozen)
    return self._run(self._fixed[_SHARED], known)

  @property
  def origins(self) -> list[int | None]:
    """Of each of `fixed_slot`, the parameter of its shape that it comes from.

    As the place among the leaves of (slot, slot_frozen); None where it comes
    from several or has another shape.
    """
    inputs = [*self._in['slot'], *self._in['slot_frozen']]
    result = []
    for v in self._fixed[_SLOT]:
      _, reads = self._closure([v], lambda _: False)
      source = [r for r in reads if r in inputs]
      same = len(source) == 1 and source[0].aval.shape == v.aval.shape
      result.append(inputs.index(source[0]) if same else None)
    return result

  def forward(self, fixed, x, side, rest):
    """Returns (y, aux, other, stored); `fixed` is (slot's, shared's)."""
    known = self._with(self._known(x=x, side=side, rest=rest), fixed)
    out = self._out
    kept = [*self._kept[0], *self._kept[1]]
    targets = [*out['y'], *out['aux'], *out['other'], *kept]
    *trees, left = self._unpack(
      self._run(targets, known), ('y', 'aux', 'other')
    )
    return *trees, self._in_two(left)

  def forward_only(self, fixed, x, side, rest):
    """Returns (y, aux, other)."""
    known = self._with(self._known(x=x, side=side, rest=rest), fixed)
    out = self._out
    targets = [*out['y'], *out['aux'], *out['other']]
    return self._unpack(self._run(targets, known), ('y', 'aux', 'other'))[:3]

  def recompute(self, fixed, x, side, rest):
    """Returns (y, stored), what `forward` returned of them."""
    known = self._with(self._known(x=x, side=side, rest=rest), fixed)
    kept = [*self._kept[0], *self._kept[1]]
    y, left = self._unpack(self._run([*self._out['y'], *kept], known), ('y',))
    return y, self._in_two(left)

  def _in_two(self, values):
    num = len(self._kept[0])
    return [values[:num], values[num:]]

  def backward(self, fixed, stored, side, rest, d_y, d_aux):
    """Returns (d_x, d_side, early gradients, crossing)."""
    known = self._known(side=side, rest=rest, d_y=d_y, d_aux=d_aux)
    known = self._with(known, fixed, *zip(self._kept, stored))
    out = self._out
    targets = [*out['x'], *out['side'], *self._early, *self._crossing]
    d_x, d_side, left = self._unpack(self._run(targets, known), ('x', 'side'))
    num = len(self._early)
    return d_x, d_side, left[:num], left[num:]

  def weight(self, fixed, stored, side, rest, crossing):
    """Returns the late gradients; `stored` is the second part alone."""
    known = self._known(side=side, rest=rest)
    pairs = (self._kept[1], stored), (self._crossing, crossing)
    return self._run(self._late, self._with(known, fixed, *pairs))

  def at_once(self, fixed, x, side, rest, d_y, d_aux):
    """Returns (y, aux, other, d_x, d_side, gradients: early, then late)."""
    known = self._known(x=x, side=side, rest=rest, d_y=d_y, d_aux=d_aux)
    known = self._with(known, fixed)
    names = ('y', 'aux', 'other', 'x', 'side')
    targets = [v for name in names for v in self._out[name]]
    values = self._run([*targets, *self._early, *self._late], known)
    return self._unpack(values, names)

  def _unpack(self, values, names):
    """Returns the trees of `names`, and the values that are left."""
    result = []
    for name in names:
      num = len(self._out[name])
      tree = jax.tree.unflatten(self._tree[name], values[:num])
      result.append(tree)
      values = values[num:]
    return *result, values


def _whole(fn, params: Params, x, side, rest, d_y, d_aux):
  """Returns y, aux, other and all gradients."""

  def of(slot, shared, x, side):
    own = dataclasses.replace(params, slot=slot, shared=shared)
    y, aux, other = fn(own, x, side, rest)
    return (y, aux), other

  (y, aux), pull, other = jax.vjp(
    of, params.slot, params.shared, x, side, has_aux=True
  )
  return y, aux, other, *pull((d_y, d_aux))


def _flatten(fn, *args):
  """Returns the jaxpr of fn(*args) without calls, and its output's shapes."""
  closed, shapes = jax.make_jaxpr(fn, return_shape=True)(*args)

  def inlined(*leaves):
    return _evaluate(closed.jaxpr, closed.consts, leaves)

  return jax.make_jaxpr(inlined)(*jax.tree.leaves(args)), shapes


def _evaluate(jaxpr, consts, args) -> list[Any]:
  """Evaluates a jaxpr, going into calls."""
  env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args]))
  read = lambda v: v.val if isinstance(v, core.Literal) else env[v]
  for eqn in jaxpr.eqns:
    name = _CALLS.get(eqn.primitive.name)
    values = [read(v) for v in eqn.invars]
    if name is None:
      ins = list(dict.fromkeys(_variables(eqn.invars)))
      outs = [v for v in eqn.outvars if not isinstance(v, core.DropVar)]
      one = jaxpr.replace(
        eqns=[eqn],
        constvars=[],
        invars=ins,
        outvars=outs,
        debug_info=jaxpr.debug_info.with_unknown_names(),
      )
      made = jax_core.eval_jaxpr(one, [], *(env[v] for v in ins))
    else:
      inner = eqn.params[name]
      closed = isinstance(inner, core.ClosedJaxpr)
      outs = eqn.outvars
      made = _evaluate(
        inner.jaxpr if closed else inner, inner.consts if closed else [], values
      )
    env |= zip(outs, made)
  return [read(v) for v in jaxpr.outvars]


def _keeps(remat: str, eqn) -> bool:
  """Whether a policy keeps what an equation of the forward pass makes."""
  name = eqn.params.get('name') if eqn.primitive.name == 'name' else None
  if name == routing.CHOICE:
    return True
  if remat in ('none', 'full'):
    # What attention gives is smaller than the scores that it is made of.
    return eqn.primitive.name in _HEAVY or name == 'attention'
  if remat == 'dots':
    return name == param.PRODUCT
  saved = remat.partition(':')[2].split(',')
  assert set(saved) <= set(stack.SAVED_NAMES), remat
  return name in saved


def _variables(atoms) -> list[Any]:
  return [v for v in atoms if isinstance(v, core.Var)]


def _bytes(v) -> int:
  dtype = v.aval.dtype
  if not jnp.issubdtype(dtype, jnp.number):
    return math.prod(v.aval.shape)
  return math.prod(v.aval.shape) * dtype.itemsize

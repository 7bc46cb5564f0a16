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
import dataclasses
import functools
from typing import Any

import jax

from t2x.pipeline import flow as flow_lib
from t2x.pipeline import remat_policy

# What a value depends on.
_SLOT, _SHARED, _DATA, _GRAD = 1, 2, 4, 8


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
    self._keeps = functools.partial(remat_policy.keeps, remat)
    args = (params, x, side, rest)
    self.y, self.aux, self.other = jax.eval_shape(fn, *args)
    whole = functools.partial(_whole, fn)
    self._flow = flow_lib.Flow(whole, *args, self.y, self.aux)
    self._name_inputs(args)
    self._name_outputs()
    self._cut()

  def _name_inputs(self, args) -> None:
    params, x, side, rest = args
    trees = {
      'slot': (params.slot, _SLOT),
      'slot_frozen': (params.slot_frozen, _SLOT),
      'shared': (params.shared, _SHARED),
      'shared_frozen': (params.shared_frozen, _SHARED),
      'x': (x, _DATA),
      'side': (side, _DATA),
      'rest': (rest, _DATA),
      'd_y': (self.y, _GRAD),
      'd_aux': (self.aux, _GRAD),
    }
    left, flags = self._flow.inputs, {}
    self._in: dict[str, list[Any]] = {}
    for name, (tree, flag) in trees.items():
      num = len(jax.tree.leaves(tree))
      self._in[name], left = left[:num], left[num:]
      flags |= dict.fromkeys(self._in[name], flag)
    assert not left
    self._flow.mark(flags)

  def _name_outputs(self) -> None:
    names = ('y', 'aux', 'other', 'slot', 'shared', 'x', 'side')
    left = self._flow.outputs
    self._out: dict[str, list[Any]] = {}
    self._tree: dict[str, Any] = {}
    for name, tree in zip(names, self._flow.shapes):
      leaves, self._tree[name] = jax.tree.flatten(tree)
      self._out[name], left = left[: len(leaves)], left[len(leaves) :]

  def _is_fixed(self, v) -> bool:
    """Whether a value is made before the loop: it has one kind of parameter.

    And is no larger than these: a table of positions times heads is made again
    wherever it is needed.
    """
    if self._flow.flags(v) not in (_SLOT, _SHARED):
      return False
    _, reads = self._flow.closure([v], lambda _: False)
    return flow_lib.num_bytes(v) <= sum(map(flow_lib.num_bytes, reads))

  def _is_stored(self, v) -> bool:
    """Whether the forward pass keeps a value, if the backward pass needs it."""
    flags, eqn = self._flow.flags(v), self._flow.equation(v)
    primal = flags & _DATA and not flags & _GRAD
    return bool(primal) and eqn is not None and self._keeps(eqn)

  def _cut(self) -> None:
    flow, out = self._flow, self._out
    grads = [*out['slot'], *out['shared']]
    inputs = [*out['x'], *out['side']]
    until = lambda v: self._is_fixed(v) or self._is_stored(v)
    base, _ = flow.closure(inputs, until)
    made = lambda v: until(v) or flow.makes(v, base)
    used = [i for i, v in enumerate(grads) if flow.flags(v) & (_DATA | _GRAD)]
    # Those with a product that the gradient by the input does without.
    self.late = [i for i in used if flow.is_costly(grads[i], made)]
    self.early = [i for i in used if i not in self.late]
    self._early = [grads[i] for i in self.early]
    self._late = [grads[i] for i in self.late]
    in_b, b_reads = flow.closure([*inputs, *self._early], until)

    def until_w(v):
      # Of what B makes, W makes again what costs no product.
      costly = flow.flags(v) & _GRAD or flow.is_costly(v, until)
      return until(v) or (flow.makes(v, in_b) and bool(costly))

    _, w_reads = flow.closure(self._late, until_w)
    here = {v for name in ('side', 'rest') for v in self._in[name]}
    x = set(self._in['x'])
    kept = [v for v in b_reads | w_reads if v in x or self._is_stored(v)]
    self._kept = [
      [v for v in kept if v not in w_reads],
      [v for v in kept if v in w_reads],
    ]
    self._crossing = [
      v
      for v in w_reads
      if v not in kept
      and v not in here
      and flow.flags(v) & (_DATA | _GRAD)
      and not self._is_fixed(v)
    ]
    outputs = [*out['y'], *out['aux'], *out['other']]
    _, f_reads = flow.closure([*outputs, *kept], self._is_fixed)
    all_grads = [*inputs, *self._early, *self._late]
    _, reads = flow.closure([*outputs, *all_grads], self._is_fixed)
    self._fix(f_reads | reads | b_reads | w_reads)

  def _fix(self, reads) -> None:
    fixed = [v for v in reads if self._is_fixed(v)]
    self._fixed = {
      flag: [v for v in fixed if self._flow.flags(v) == flag]
      for flag in (_SLOT, _SHARED)
    }
    self.fixed_slot = _shapes(self._fixed[_SLOT])
    self.stored = [_shapes(part) for part in self._kept]
    self.crossing = _shapes(self._crossing)

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
    return self._flow.run(self._fixed[_SLOT], known)

  def shared_values(self, shared: Any, shared_frozen: Any) -> list[jax.Array]:
    """Returns what the loop needs of the model's parameters."""
    known = self._known(shared=shared, shared_frozen=shared_frozen)
    return self._flow.run(self._fixed[_SHARED], known)

  @property
  def origins(self) -> list[int | None]:
    """Of each of `fixed_slot`, the parameter of its shape that it comes from.

    As the place among the leaves of (slot, slot_frozen); None where it comes
    from several or has another shape.
    """
    inputs = [*self._in['slot'], *self._in['slot_frozen']]
    result = []
    for v in self._fixed[_SLOT]:
      _, reads = self._flow.closure([v], lambda _: False)
      source = [r for r in reads if r in inputs]
      same = len(source) == 1 and source[0].aval.shape == v.aval.shape
      result.append(inputs.index(source[0]) if same else None)
    return result

  def forward(self, fixed, x, side, rest):
    """Returns (y, aux, other, stored); `fixed` is (slot's, shared's)."""
    known = self._with(self._known(x=x, side=side, rest=rest), fixed)
    *out, for_b, for_w = self._made(known, ('y', 'aux', 'other'), *self._kept)
    return *out, [for_b, for_w]

  def forward_only(self, fixed, x, side, rest):
    """Returns (y, aux, other)."""
    known = self._with(self._known(x=x, side=side, rest=rest), fixed)
    return self._made(known, ('y', 'aux', 'other'))

  def recompute(self, fixed, x, side, rest):
    """Returns (y, stored), what `forward` returned of them."""
    known = self._with(self._known(x=x, side=side, rest=rest), fixed)
    y, for_b, for_w = self._made(known, ('y',), *self._kept)
    return y, [for_b, for_w]

  def backward(self, fixed, stored, side, rest, d_y, d_aux):
    """Returns (d_x, d_side, early gradients, crossing)."""
    known = self._known(side=side, rest=rest, d_y=d_y, d_aux=d_aux)
    known = self._with(known, fixed, *zip(self._kept, stored))
    return self._made(known, ('x', 'side'), self._early, self._crossing)

  def weight(self, fixed, stored, side, rest, crossing):
    """Returns the late gradients; `stored` is the second part alone."""
    known = self._known(side=side, rest=rest)
    pairs = (self._kept[1], stored), (self._crossing, crossing)
    return self._flow.run(self._late, self._with(known, fixed, *pairs))

  def at_once(self, fixed, x, side, rest, d_y, d_aux):
    """Returns (y, aux, other, d_x, d_side, gradients: early, then late)."""
    known = self._known(x=x, side=side, rest=rest, d_y=d_y, d_aux=d_aux)
    known = self._with(known, fixed)
    names = ('y', 'aux', 'other', 'x', 'side')
    return self._made(known, names, [*self._early, *self._late])

  def _made(self, known, names, *lists):
    """Returns the trees of some outputs, and lists of values, of known ones."""
    wanted = [*(self._out[name] for name in names), *lists]
    values = iter(self._flow.run(sum(wanted, []), known))
    made = [[next(values) for _ in part] for part in wanted]
    num = len(names)
    trees = zip(names, made[:num])
    trees = [self._tree[name].unflatten(leaves) for name, leaves in trees]
    return *trees, *made[num:]


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


def _shapes(variables) -> list[jax.ShapeDtypeStruct]:
  return [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in variables]

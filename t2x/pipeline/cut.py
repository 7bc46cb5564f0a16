"""Cuts a layer's forward and backward pass into programs that repeat no work.

A pipeline computes the pieces of one gradient in different ticks:

  fixed      values that depend on parameters alone (casts): once, before all;
  forward    the output, and the activations that the backward pass needs;
  backward   the gradient with respect to the input, which the stage before
             needs (B);
  weight     the gradients with respect to the parameters, which no other stage
             needs (W).

The layer and its gradient become one flat jaxpr with all calls inlined, which
is cut along its data flow. So no layer needs code for it. B and W are separated
as by Qi et al., 2023 (Zero Bubble Pipeline Parallelism,
https://arxiv.org/abs/2401.10241): W has every gradient that needs a product
which the gradient with respect to the input does not need. A gradient without
such a product (of a bias or a norm) is computed in B, where its inputs are.
Only activations are stored between the programs. Values that depend on
parameters alone are not, nor are activations that take no product: these are
computed again.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Sequence
import dataclasses
import functools
from typing import Any

import jax
from jax.extend import core

from t2x.pipeline import flow as flow_lib
from t2x.pipeline import remat_policy

# Flags of a value, by what it depends on.
_SLOT, _SHARED, _DATA, _GRAD = 1, 2, 4, 8

# Values that depend on parameters alone: the layer's own, the model's.
Fixed = tuple[Sequence[jax.Array], Sequence[jax.Array]]
# Activations that `forward` keeps: for `backward` alone, for `weight` too.
Stored = list[list[jax.Array]]


@dataclasses.dataclass(frozen=True)
class Params:
  """Parameters of a layer: its own, one set a slot, and those of the model.

  Attributes:
    slot: trained parameters of the layer itself.
    slot_frozen: parameters of the layer itself that are not trained.
    shared: trained parameters of the model outside its layers.
    shared_frozen: parameters of the model outside its layers that are not
      trained.
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
  the loss (or None), and any other values that are measured. It has gradients
  with respect to the trained parameters, `x` and `side`. `side` is an input
  that many layers share (the output of an encoder). `rest` has no gradient
  (tokens, dropout keys).

  Args:
    fn: function to be cut.
    params: parameters, or their shapes.
    x: shapes of the input.
    side: shapes of the shared input, or None.
    rest: shapes of the inputs without gradients.
    remat: activations that the backward pass computes again; see
      `stack.Execution`.

  Attributes:
    early: indices of the leaves of (slot, shared) whose gradients `backward`
      returns.
    late: indices of the leaves whose gradients `weight` returns. A leaf that is
      in neither list has no gradient.
    fixed_slot: shapes of the values that the loop needs of a layer's own
      parameters.
    stored: shapes of the values that `forward` keeps: those for `backward`
      alone, then those for `weight` too.
    crossing: shapes of the values that `backward` keeps for `weight`.
    y: shapes of the output.
    aux: shape of the scalar that is added to the loss, or None.
    other: shapes of the other values that are measured.
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
    with_gradients = functools.partial(_with_gradients, fn)
    self._flow = flow_lib.Flow(with_gradients, *args, self.y, self.aux)
    self._name_inputs(params, x, side, rest)
    self._name_outputs()
    self._cut()

  def _name_inputs(self, params: Params, x: Any, side: Any, rest: Any) -> None:
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
    self._in: dict[str, list[core.Var]] = {}
    for name, (tree, flag) in trees.items():
      num = len(jax.tree.leaves(tree))
      self._in[name], left = left[:num], left[num:]
      flags |= dict.fromkeys(self._in[name], flag)
    assert not left
    self._flow.mark(flags)

  def _name_outputs(self) -> None:
    names = ('y', 'aux', 'other', 'slot', 'shared', 'x', 'side')
    left = self._flow.outputs
    self._out: dict[str, list[flow_lib.Atom]] = {}
    self._tree: dict[str, Any] = {}
    for name, tree in zip(names, self._flow.shapes):
      leaves, self._tree[name] = jax.tree.flatten(tree)
      self._out[name], left = left[: len(leaves)], left[len(leaves) :]

  def _is_fixed(self, v: core.Var) -> bool:
    """Whether a value is computed before the loop.

    It must depend on one kind of parameters alone, and be no larger than they
    are. A table of positions times heads is larger, and is computed wherever it
    is needed.
    """
    if self._flow.flags(v) not in (_SLOT, _SHARED):
      return False
    _, reads = self._flow.closure([v], lambda _: False)
    return flow_lib.num_bytes(v) <= sum(map(flow_lib.num_bytes, reads))

  def _is_stored(self, v: core.Var) -> bool:
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
    # Gradients with a product that the gradient of the input does not need.
    self.late = [i for i in used if flow.is_costly(grads[i], made)]
    self.early = [i for i in used if i not in self.late]
    self._early = [grads[i] for i in self.early]
    self._late = [grads[i] for i in self.late]
    in_b, b_reads = flow.closure([*inputs, *self._early], until)

    def until_w(v: core.Var) -> bool:
      # Of the values that B computes, W repeats those that take no product.
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

  def _fix(self, reads: Iterable[core.Var]) -> None:
    fixed = [v for v in reads if self._is_fixed(v)]
    self._fixed = {
      flag: [v for v in fixed if self._flow.flags(v) == flag]
      for flag in (_SLOT, _SHARED)
    }
    self.fixed_slot = _shapes(self._fixed[_SLOT])
    self.stored = [_shapes(part) for part in self._kept]
    self.crossing = _shapes(self._crossing)

  def _known(
    self,
    fixed: Fixed = ((), ()),
    *pairs: tuple[Iterable[core.Var], Iterable[jax.Array]],
    **inputs: Any,
  ) -> dict[core.Var, jax.Array]:
    """Returns values by variable: inputs by name, fixed values, other pairs."""
    known = {}
    for name, tree in inputs.items():
      leaves = jax.tree.leaves(tree)
      assert len(leaves) == len(self._in[name]), name
      known |= zip(self._in[name], leaves)
    variables = (self._fixed[_SLOT], self._fixed[_SHARED])
    for some, values in (*zip(variables, fixed), *pairs):
      known |= zip(some, values)
    return known

  def slot_values(self, slot: Any, slot_frozen: Any) -> list[jax.Array]:
    """Returns the values that the loop needs of one layer's own parameters.

    Args:
      slot: trained parameters of the layer.
      slot_frozen: other parameters of the layer.
    """
    known = self._known(slot=slot, slot_frozen=slot_frozen)
    return self._flow.run(self._fixed[_SLOT], known)

  def shared_values(self, shared: Any, shared_frozen: Any) -> list[jax.Array]:
    """Returns the values that the loop needs of the model's parameters.

    Args:
      shared: trained parameters of the model outside its layers.
      shared_frozen: other parameters of the model outside its layers.
    """
    known = self._known(shared=shared, shared_frozen=shared_frozen)
    return self._flow.run(self._fixed[_SHARED], known)

  @property
  def origins(self) -> list[int | None]:
    """For each of `fixed_slot` the parameter that it comes from.

    It is an index among the leaves of (slot, slot_frozen). None means that the
    value comes from several parameters or has another shape than its one.
    """
    inputs = [*self._in['slot'], *self._in['slot_frozen']]
    result = []
    for v in self._fixed[_SLOT]:
      _, reads = self._flow.closure([v], lambda _: False)
      source = [r for r in reads if r in inputs]
      shapes = [flow_lib.shape_of(r).shape for r in source]
      same = shapes == [flow_lib.shape_of(v).shape]
      result.append(inputs.index(source[0]) if same else None)
    return result

  def forward(
    self, fixed: Fixed, x: Any, side: Any, rest: Any
  ) -> tuple[Any, ...]:
    """Returns (y, aux, other, stored); `stored` is for the backward pass."""
    known = self._known(fixed, x=x, side=side, rest=rest)
    *out, for_b, for_w = self._run(known, ('y', 'aux', 'other'), *self._kept)
    return *out, [for_b, for_w]

  def forward_only(
    self, fixed: Fixed, x: Any, side: Any, rest: Any
  ) -> tuple[Any, ...]:
    """Returns (y, aux, other)."""
    known = self._known(fixed, x=x, side=side, rest=rest)
    return self._run(known, ('y', 'aux', 'other'))

  def recompute(
    self, fixed: Fixed, x: Any, side: Any, rest: Any
  ) -> tuple[Any, Stored]:
    """Returns (y, stored), the same values as `forward`."""
    known = self._known(fixed, x=x, side=side, rest=rest)
    y, for_b, for_w = self._run(known, ('y',), *self._kept)
    return y, [for_b, for_w]

  def backward(
    self,
    fixed: Fixed,
    stored: Stored,
    side: Any,
    rest: Any,
    d_y: Any,
    d_aux: Any,
  ) -> tuple[Any, ...]:
    """Returns (d_x, d_side, gradients of `early`, crossing).

    Args:
      fixed: values of `slot_values` and of `shared_values`.
      stored: values that `forward` or `recompute` kept.
      side: shared input.
      rest: inputs without gradients.
      d_y: gradient of the loss with respect to the output.
      d_aux: gradient of the loss with respect to the added scalar, or None.
    """
    pairs = zip(self._kept, stored)
    known = self._known(
      fixed, *pairs, side=side, rest=rest, d_y=d_y, d_aux=d_aux
    )
    return self._run(known, ('x', 'side'), self._early, self._crossing)

  def weight(
    self,
    fixed: Fixed,
    stored: Sequence[jax.Array],
    side: Any,
    rest: Any,
    crossing: Sequence[jax.Array],
  ) -> list[jax.Array]:
    """Returns the gradients of `late`.

    Args:
      fixed: values of `slot_values` and of `shared_values`.
      stored: second part of the values that `forward` or `recompute` kept.
      side: shared input.
      rest: inputs without gradients.
      crossing: values that `backward` kept.
    """
    pairs = (self._kept[1], stored), (self._crossing, crossing)
    known = self._known(fixed, *pairs, side=side, rest=rest)
    return self._flow.run(self._late, known)

  def compute_all(
    self, fixed: Fixed, x: Any, side: Any, rest: Any, d_y: Any, d_aux: Any
  ) -> tuple[Any, ...]:
    """Returns (y, aux, other, d_x, d_side, gradients: early, then late)."""
    known = self._known(fixed, x=x, side=side, rest=rest, d_y=d_y, d_aux=d_aux)
    names = ('y', 'aux', 'other', 'x', 'side')
    return self._run(known, names, [*self._early, *self._late])

  def _run(
    self,
    known: dict[core.Var, jax.Array],
    names: Sequence[str],
    *lists: Sequence[flow_lib.Atom],
  ) -> tuple[Any, ...]:
    """Computes outputs and lists of values from known values.

    Args:
      known: values by variable.
      names: names of outputs.
      *lists: lists of variables.

    Returns:
      The trees of the outputs, then a list of values for each of `lists`.
    """
    wanted = [*(self._out[name] for name in names), *map(list, lists)]
    values = iter(self._flow.run(sum(wanted, []), known))
    parts = [[next(values) for _ in part] for part in wanted]
    num = len(names)
    trees = zip(names, parts[:num])
    trees = [self._tree[name].unflatten(leaves) for name, leaves in trees]
    return *trees, *parts[num:]


def _with_gradients(
  fn: Function,
  params: Params,
  x: Any,
  side: Any,
  rest: Any,
  d_y: Any,
  d_aux: Any,
) -> tuple[Any, ...]:
  """Returns y, aux, other and all gradients."""

  def primal(slot: Any, shared: Any, x: Any, side: Any) -> tuple[Any, Any]:
    replaced = dataclasses.replace(params, slot=slot, shared=shared)
    y, aux, other = fn(replaced, x, side, rest)
    return (y, aux), other

  (y, aux), pull, other = jax.vjp(
    primal, params.slot, params.shared, x, side, has_aux=True
  )
  return y, aux, other, *pull((d_y, d_aux))


def _shapes(variables: Iterable[core.Var]) -> list[jax.ShapeDtypeStruct]:
  return [flow_lib.shape_of(v) for v in variables]

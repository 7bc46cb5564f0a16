"""One stage of a pipeline: its weights, its buffers and its gradients.

Shape suffixes: M microbatches, B rows, N slots of a device, U units.
"""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from t2x.losses import load_balancing
from t2x.models import model as model_lib
from t2x.parallel import sharding
from t2x.pipeline import buffers
from t2x.pipeline import executor
from t2x.pipeline import pieces as pieces_lib
from t2x.pipeline import plan as plan_lib
from t2x.pipeline import tick
from t2x.pipeline import weights

# Parameters (N, ...) of the layers of a unit, by tower.
_Slots = dict[str, list[Any]]


class Stage:
  """The computation of one stage, inside the `shard_map`.

  Args:
    plan: schedule, and the layers of its parts.
    layouts: layouts of the trained and of the other parameters; see `weights`.
    loss: function from the terms of the loss and their batch to the loss and
      its metrics.
    combine: function that joins trained and other parameters.
    manual: mesh axes over which gradients are reduced once, after the last
      microbatch.
    trained: model with this device's share of the trained parameters alone.
    rest: model with this device's share of the other parameters alone.
    batch: arrays by name, (rows, ...) each: this device's rows of every
      microbatch.
    key: dropout key of the step, or None without dropout.
  """

  def __init__(
    self,
    plan: plan_lib.PipelinePlan,
    layouts: tuple[weights.StageLayout, ...],
    loss: pieces_lib.Loss,
    combine: pieces_lib.Combine,
    manual: tuple[str, ...],
    trained: model_lib.Transformer,
    rest: model_lib.Transformer,
    batch: pieces_lib.Rows,
    key: jax.Array | None,
  ):
    self._plan, self._layouts, self._combine = plan, layouts, combine
    self._loss, self._manual = loss, manual
    self._trained, self._batch, self._key = trained, batch, key
    self._shared = weights.outside_layers(trained)
    self._shared_frozen = weights.outside_layers(rest)
    self._slots = self._fetched(trained, layouts[0])
    self._slots_frozen = self._fetched(rest, layouts[1])

  def _fetched(
    self, tree: model_lib.Transformer, layout: weights.StageLayout
  ) -> _Slots:
    """Returns the parameters of the layers in this stage's slots."""
    result = {}
    for name in tree.towers:
      stacks = weights.stack_units(getattr(tree, name).layers)
      result[name] = [
        _map_leaves(lambda r, a: r.fetch(a), routes, stack)
        for routes, stack in zip(layout.routes[name], stacks)
      ]
    return result

  def run(self, accumulate: int) -> tuple[Any, dict[str, Any]]:
    """Returns the gradients and the sums of metrics.

    Args:
      accumulate: times that the table runs, each time with its share of the
        rows.

    Returns:
      The gradients where and as the parameters are kept, or None for a schedule
      without backward passes; and the sums of metrics by name, with the
      routers' `loads`.
    """
    plan = self._plan
    num = accumulate * plan.table.num_microbatches

    def split(a: jax.Array) -> jax.Array:
      a = jnp.moveaxis(a.reshape(-1, num, *a.shape[1:]), 1, 0)
      return a.reshape(accumulate, -1, *a.shape[1:])

    batches = jax.tree.map(split, self._batch)
    pieces = self._pieces(batches)
    values = self._values(pieces)
    step = lambda carry, rows: (
      executor.run(pieces, plan, values, rows, self._key, carry),
      None,
    )
    end = jax.lax.scan(step, self._start(pieces), batches)[0]
    sums = jax.lax.psum(end.sums, (sharding.PIPE, *self._manual))
    sums['loads'] = self._loads(end.loads)
    grads = self._grads(end) if plan.table.training else None
    return grads, sums

  def _pieces(self, batches: pieces_lib.Rows) -> pieces_lib.MicrobatchPrograms:
    one = lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype)
    units = {
      name: [
        jax.tree.map(one, (slots, self._slots_frozen[name][i]))
        for i, slots in enumerate(members)
      ]
      for name, members in self._slots.items()
    }
    execution = self._plan.execution
    return pieces_lib.make(
      self._shared,
      self._shared_frozen,
      units,
      jax.tree.map(lambda a: one(a[0]), batches),
      self._key,
      combine=self._combine,
      loss=self._loss,
      zigzag=execution.zigzag,
      remat=execution.remat,
    )

  def _values(self, pieces: pieces_lib.MicrobatchPrograms) -> tick.Values:
    shared = (self._shared, self._shared_frozen)
    layers = []
    for t, (name, members) in enumerate(self._slots.items()):
      layers.append([])
      for i, slots in enumerate(members):
        piece = pieces.layers[t][i]
        fixed = jax.vmap(piece.slot_values)(slots, self._slots_frozen[name][i])
        layers[-1].append(
          (
            self._placed(fixed, piece.origins, self._axes(name, i)),
            piece.shared_values(*shared),
          )
        )
    return tick.Values(
      enter=[piece.shared_values(*shared) for piece in pieces.enter],
      layers=layers,
      leave=pieces.leave.shared_values(*shared),
    )

  def _axes(self, name: str, i: int) -> list[tuple[str | None, ...]]:
    routes = (layout.routes[name][i] for layout in self._layouts)
    return [r.axes for part in routes for r in part]

  def _placed(
    self,
    values: Sequence[jax.Array],
    origins: Sequence[int | None],
    axes: Sequence[tuple[str | None, ...]],
  ) -> list[jax.Array]:
    """Gathers the values that `fsdp` splits, if weights are gathered once.

    Args:
      values: values of the layer's own parameters, (N, ...) each.
      origins: index of the parameter that each value comes from, or None.
      axes: logical axes of each parameter.
    """
    once = self._plan.config.gather == 'once'

    def place(value: jax.Array, origin: int | None) -> jax.Array:
      if origin is None:
        return value
      names = (
        'act_embed' if once and a == 'embed' else a for a in axes[origin]
      )
      return sharding.constrain(value, None, *names)

    return [place(v, o) for v, o in zip(values, origins)]

  def _start(self, pieces: pieces_lib.MicrobatchPrograms) -> tick.Carry:
    """Returns the buffers and sums of the first tick, all zeros."""
    instructions, place = self._plan.instructions, self._plan.placement
    zeros = buffers.zeros
    stored, crossing, loads = [], [], []
    for t, layers in enumerate(pieces.layers):
      most, num = place.most_units[t], place.unit_SN[t].shape[1]
      rows = [_rows(n * most) for n in instructions.stored[t]]
      stored.append(
        [[zeros(s, n) for s, n in zip(p.stored, rows)] for p in layers]
      )
      rows = _rows(instructions.crossing[t] * most)
      crossing.append([zeros(p.crossing, rows) for p in layers])
      loads.append([zeros(p.other and p.other[1], num) for p in layers])
    grads, shared = self._no_grads(pieces)
    return tick.Carry(
      inbox=zeros(pieces.state, instructions.inbox + 1),
      stored=stored,
      crossing=crossing,
      grads=grads,
      shared=shared,
      sums=self._no_sums(pieces),
      loads=loads,
    )

  def _no_grads(
    self, pieces: pieces_lib.MicrobatchPrograms
  ) -> tuple[list[list[buffers.Sums]], buffers.Sums]:
    """Returns zeros for the gradients of the layers and of the model."""
    used, grads = set(), []
    for piece in (*pieces.enter, pieces.leave):
      used |= {*piece.early, *piece.late}
    for t, (name, members) in enumerate(self._slots.items()):
      grads.append([])
      for i, slots in enumerate(members):
        leaves = jax.tree.leaves(slots)
        with_grads = {*pieces.layers[t][i].early, *pieces.layers[t][i].late}
        used |= {k - len(leaves) for k in with_grads if k >= len(leaves)}
        grads[t].append(
          [
            sharding.constrain(jnp.zeros_like(a), None, *axes)
            if k in with_grads
            else None
            for k, (a, axes) in enumerate(zip(leaves, self._axes(name, i)))
          ]
        )
    leaves = jax.tree.leaves(self._shared)
    shared = [
      jnp.zeros_like(a) if k in used else None for k, a in enumerate(leaves)
    ]
    return grads, shared

  def _no_sums(
    self, pieces: pieces_lib.MicrobatchPrograms
  ) -> dict[str, jax.Array]:
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    shapes = {'loss': scalar, **pieces.leave.other}
    for piece in sum(pieces.layers, ()):
      shapes |= dict.fromkeys(piece.other[0] if piece.other else (), scalar)
    zeros = lambda s: jnp.zeros(s.shape, s.dtype)
    return {name: zeros(shapes[name]) for name in sorted(shapes)}

  def _grads(self, end: tick.Carry) -> Any:
    """Returns the gradients where and as the parameters are kept."""
    end_grads, shared = end.grads, end.shared
    if self._manual:
      end_grads, shared = jax.lax.psum((end_grads, shared), self._manual)
    grads = _filled(jax.lax.psum(shared, sharding.PIPE), self._shared)
    for t, (name, members) in enumerate(self._slots.items()):
      stacks = []
      for i, slots in enumerate(members):
        filled = _filled(end_grads[t][i], slots)
        routes = self._layouts[0].routes[name][i]
        stacks.append(_map_leaves(lambda r, g: r.give_back(g), routes, filled))
      layers = getattr(self._trained, name).layers
      grads = weights.with_stack(grads, self._trained, name, layers, stacks)
    return grads

  def _loads(
    self, loads: list[list[load_balancing.LayerLoad | None]]
  ) -> load_balancing.LoadsByPath:
    """Returns the routers' loads in the form of `load_balancing.loads`."""
    result = {}
    for t, name in enumerate(self._slots):
      layers = getattr(self._trained, name).layers
      unit_SN = self._plan.placement.unit_SN[t]
      for i, load in enumerate(loads[t]):
        if load is None:
          continue
        num = weights.num_units(layers, i)
        route = weights.Route(None, (), unit_SN, num)
        whole = jax.tree.map(route.give_back, load)
        if self._manual:
          whole = jax.lax.psum(whole, self._manual)
        group, last = weights.split_units(whole, layers, i)
        path = f'{name}.layers'
        if group is not None:
          result[f'{path}.group.{i}.mlp'] = group
        if last is not None:
          result[f'{path}.remainder.{i}.mlp'] = last
    return result


def _rows(num: int) -> int:
  """Returns the number of rows of a buffer that needs at least `num`.

  A buffer of one row gets a second one. Otherwise the compiler knows which row
  is read, and moves the work of W on it out of the loop and into every tick.
  """
  return 2 if num == 1 else num


def _filled(grads: buffers.Sums, tree: Any) -> Any:
  """Returns gradients in the structure of `tree`, with zeros for None."""
  leaves, treedef = jax.tree.flatten(tree)
  return treedef.unflatten(
    [jnp.zeros_like(a) if g is None else g for a, g in zip(leaves, grads)]
  )


def _map_leaves(
  fn: Callable[[weights.Route, jax.Array], jax.Array],
  routes: Sequence[weights.Route],
  tree: Any,
) -> Any:
  leaves, treedef = jax.tree.flatten(tree)
  return treedef.unflatten([fn(r, a) for r, a in zip(routes, leaves)])

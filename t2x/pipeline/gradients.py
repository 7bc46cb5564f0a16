"""Gradients and evaluation of a model whose layers are spread over stages.

Shape suffixes: M microbatches, B rows, N slots of a device, U units.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from t2x import balance
from t2x import loss as loss_lib
from t2x import sharding
from t2x.pipeline import executor as executor_lib
from t2x.pipeline import pieces as pieces_lib
from t2x.pipeline import plan as plan_lib
from t2x.pipeline import weights

PIPE = weights.PIPE
Combine = Callable[[Any, Any], Any]


def run(
  trained: Any,
  rest: Any,
  batch: dict[str, jax.Array],
  key: jax.Array | None,
  plan: plan_lib.Plan,
  *,
  loss: loss_lib.LossConfig,
  combine: Combine,
  accumulate: int = 1,
  manual: tuple[str, ...] = (),
) -> tuple[Any, dict[str, Any]]:
  """Returns gradients (None for a table of forwards) and sums of a batch.

  Args:
    trained: the part of the model that gradients are wanted of.
    rest: the others.
    batch: its `weights` are over those of the whole batch.
    key: of dropout, or None.
    plan: what is run.
    loss: how tokens make the loss.
    combine: puts a trained and another part together.
    accumulate: times that the table is run, each with its share of the rows.
    manual: mesh axes over which gradients are reduced once, after all.
  """
  layouts = tuple(_Layout.of(tree, plan) for tree in (trained, rest))

  def run_stage(*args):
    stage = _Stage(plan, layouts, loss, combine, manual, *args)
    return stage.run(accumulate)

  batch_spec = jax.tree.map(lambda _: P(manual or None), batch)
  specs = [layout.specs for layout in layouts]
  grads = specs[0] if plan.table.training else None
  return jax.shard_map(
    run_stage,
    in_specs=(*specs, batch_spec, P()),
    out_specs=(grads, P()),
    axis_names={PIPE, *manual},
    check_vma=False,
  )(trained, rest, batch, key)


@dataclasses.dataclass(frozen=True)
class _Layout:
  """How the parameters of a model, or of a part of one, reach the stages.

  Attributes:
    specs: of every leaf, along `pipe`.
    routes: for each tower and layer of a unit, of its leaves.
  """

  specs: Any
  routes: dict[str, list[list[weights.Route]]]

  @classmethod
  def of(cls, tree: Any, plan: plan_lib.Plan) -> '_Layout':
    rules = sharding.active_rules()
    layers = PIPE if plan.place.is_contiguous else None
    rules = dataclasses.replace(rules, layers=layers)
    sizes = jax.sharding.get_abstract_mesh().shape
    names = _layer_paths(tree)

    def spec(path, x):
      if not _has_value(x):
        return x
      if not sharding.path_name(path).startswith(names):
        return x.replace(P())  # Gathered by whoever calls.
      dim = sharding.pipe_dim(x, rules, sizes)
      return x.replace(P() if dim is None else P(*[None] * dim, PIPE))

    specs = jax.tree_util.tree_map_with_path(
      spec, tree, is_leaf=sharding.is_variable
    )
    routes = {}
    for t, name in enumerate(tree.towers):
      layers = getattr(tree, name).layers
      members = [*layers.group] or [*layers.remainder]
      routes[name] = [
        [_route(x, rules, sizes, plan.place.unit_SN[t], num) for x in leaves]
        for num, leaves in (
          (weights.num_units(layers, i), _variables(m))
          for i, m in enumerate(members)
        )
      ]
    return cls(specs, routes)


def _route(x, rules, sizes, unit_SN, num_units) -> weights.Route:
  axes = tuple(x.get_metadata('axes'))
  dim = sharding.pipe_dim(x, rules, sizes)
  if dim is not None and len(x.shape) == len(axes):  # Of the remainder.
    dim += 1
  return weights.Route(dim, axes, unit_SN, num_units)


def _has_value(x) -> bool:
  return sharding.is_variable(x) and hasattr(x.get_value(), 'shape')


def _variables(tree) -> list[nnx.Variable]:
  leaves = jax.tree.leaves(tree, is_leaf=sharding.is_variable)
  return [x for x in leaves if _has_value(x)]


def _layer_paths(model: Any) -> tuple[str, ...]:
  return tuple(f'{name}.layers.' for name in model.towers)


def _outside_layers(model: Any) -> Any:
  names = _layer_paths(model)

  def leaf(path, x):
    return None if sharding.path_name(path).startswith(names) else x

  return jax.tree_util.tree_map_with_path(leaf, model)


class _Stage:
  """What one stage does, inside the `shard_map`."""

  def __init__(
    self, plan, layouts, loss, combine, manual, trained, rest, batch, key
  ):
    self._plan, self._layouts, self._combine = plan, layouts, combine
    self._loss, self._manual = loss, manual
    self._trained, self._batch, self._key = trained, batch, key
    self._shared = _outside_layers(trained)
    self._shared_frozen = _outside_layers(rest)
    self._slots = self._fetched(trained, layouts[0])
    self._slots_frozen = self._fetched(rest, layouts[1])

  def _fetched(self, tree, layout):
    """Returns what this stage's slots hold, for each tower and layer."""
    result = {}
    for name in tree.towers:
      stacks = weights.joined(getattr(tree, name).layers)
      result[name] = [
        _map_leaves(lambda r, a: r.fetch(a), routes, stack)
        for routes, stack in zip(layout.routes[name], stacks)
      ]
    return result

  def run(self, accumulate: int):
    plan = self._plan
    num = accumulate * plan.table.num_microbatches

    def split(a):
      a = jnp.moveaxis(a.reshape(-1, num, *a.shape[1:]), 1, 0)
      return a.reshape(accumulate, -1, *a.shape[1:])

    batches = jax.tree.map(split, self._batch)
    pieces = self._pieces(batches)
    executor = executor_lib.Executor(
      pieces,
      plan.told,
      towers=tuple(t.name for t in plan.place.towers),
      num_layers=tuple(t.num_layers for t in plan.place.towers),
      units=plan.place.most_units,
      recompute=plan.table.recompute,
      training=plan.table.training,
      uniform=plan.config.uniform,
    )
    values = self._values(pieces)
    step = lambda carry, rows: (
      executor.run(values, rows, self._key, carry),
      None,
    )
    end = jax.lax.scan(step, self._start(pieces), batches)[0]
    sums = jax.lax.psum(end.sums, (PIPE, *self._manual))
    sums['loads'] = self._loads(end.loads)
    grads = self._grads(end) if plan.table.training else None
    return grads, sums

  def _pieces(self, batches) -> pieces_lib.Pieces:
    one = lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype)
    units = {
      name: [
        jax.tree.map(one, (own, self._slots_frozen[name][i]))
        for i, own in enumerate(members)
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

  def _values(self, pieces) -> executor_lib.Values:
    shared = (self._shared, self._shared_frozen)
    layers = []
    for t, (name, members) in enumerate(self._slots.items()):
      layers.append([])
      for i, slots in enumerate(members):
        piece = pieces.layers[t][i]
        own = jax.vmap(piece.slot_values)(slots, self._slots_frozen[name][i])
        layers[-1].append(
          (
            self._placed(own, piece.origins, self._axes(name, i)),
            piece.shared_values(*shared),
          )
        )
    return executor_lib.Values(
      enter=[piece.shared_values(*shared) for piece in pieces.enter],
      layers=layers,
      leave=pieces.leave.shared_values(*shared),
    )

  def _axes(self, name: str, i: int) -> list[tuple[str | None, ...]]:
    routes = (layout.routes[name][i] for layout in self._layouts)
    return [r.axes for part in routes for r in part]

  def _placed(self, values, origins, axes):
    """Gathers what `fsdp` splits, here and not in every tick."""
    once = self._plan.config.gather == 'once'

    def place(value, origin):
      if origin is None:
        return value
      names = (
        'act_embed' if once and a == 'embed' else a for a in axes[origin]
      )
      return sharding.constrain(value, None, *names)

    return [place(v, o) for v, o in zip(values, origins)]

  def _start(self, pieces) -> executor_lib.Carry:
    told, place = self._plan.told, self._plan.place
    zeros, training = executor_lib.zeros, self._plan.table.training
    used = set()
    for piece in (*pieces.enter, pieces.leave):
      used |= {*piece.early, *piece.late}
    grads, loads, stored, crossing = [], [], [], []
    for t, (name, members) in enumerate(self._slots.items()):
      all_pieces = pieces.layers[t]
      num, most = place.unit_SN[t].shape[1], place.most_units[t]
      grads.append([])
      for i, slots in enumerate(members):
        leaves = jax.tree.leaves(slots)
        mine = {*all_pieces[i].early, *all_pieces[i].late}
        used |= {index - len(leaves) for index in mine if index >= len(leaves)}
        grads[t].append(
          [
            self._zeros(a, axes) if k in mine and training else None
            for k, (a, axes) in enumerate(zip(leaves, self._axes(name, i)))
          ]
        )
      load_of = lambda p: p.other and p.other[1]
      loads.append([zeros(load_of(p), num) for p in all_pieces])
      stored.append(
        [
          [zeros(s, _rows(n * most)) for s, n in zip(p.stored, told.stored[t])]
          for p in all_pieces
        ]
      )
      rows = _rows(told.crossing[t] * most)
      left = [zeros(p.crossing, rows) for p in all_pieces]
      crossing.append(left)
    shared = [
      jnp.zeros_like(a) if k in used and training else None
      for k, a in enumerate(jax.tree.leaves(self._shared))
    ]
    return executor_lib.Carry(
      inbox=zeros(pieces.state, told.inbox + 1),
      stored=stored,
      crossing=crossing,
      grads=grads,
      shared=shared,
      sums=self._no_sums(pieces),
      loads=loads,
    )

  def _zeros(self, slots, axes):
    return sharding.constrain(jnp.zeros_like(slots), None, *axes)

  def _no_sums(self, pieces) -> dict[str, jax.Array]:
    names = {'loss', *pieces.leave.other}
    for piece in sum(pieces.layers, ()):
      names |= {*piece.other[0]} if piece.other else set()
    return {name: jnp.float32(0.0) for name in sorted(names)}

  def _grads(self, end: executor_lib.Carry) -> Any:
    """Returns gradients where and as the parameters are kept."""
    end_grads, shared = end.grads, end.shared
    if self._manual:
      end_grads, shared = jax.lax.psum((end_grads, shared), self._manual)
    shared = jax.lax.psum(shared, PIPE)
    leaves, treedef = jax.tree.flatten(self._shared)
    grads = treedef.unflatten(
      [jnp.zeros_like(a) if g is None else g for a, g in zip(leaves, shared)]
    )
    for t, (name, members) in enumerate(self._slots.items()):
      stacks = []
      for i, slots in enumerate(members):
        leaves, treedef = jax.tree.flatten(slots)
        filled = [
          jnp.zeros_like(a) if g is None else g
          for a, g in zip(leaves, end_grads[t][i])
        ]
        routes = self._layouts[0].routes[name][i]
        back = [r.give_back(g) for r, g in zip(routes, filled)]
        stacks.append(treedef.unflatten(back))
      layers = getattr(self._trained, name).layers
      grads = _with_stack(grads, self._trained, name, layers, stacks)
    return grads

  def _loads(self, loads) -> balance.LoadsByPath:
    """Returns the routers' loads, as `balance.loads` does."""
    result = {}
    axes = (PIPE, *self._manual)
    for t, name in enumerate(self._slots):
      layers = getattr(self._trained, name).layers
      unit_SN = self._plan.place.unit_SN[t]
      for i, load in enumerate(loads[t]):
        if load is None:
          continue
        num = weights.num_units(layers, i)
        route = weights.Route(None, (), unit_SN, num)
        whole = jax.tree.map(route.give_back, load)
        if axes[1:]:
          whole = jax.lax.psum(whole, axes[1:])
        group, last = weights.parted(whole, layers, i)
        path = f'{name}.layers'
        if group is not None:
          result[f'{path}.group.{i}.mlp'] = group
        if last is not None:
          result[f'{path}.remainder.{i}.mlp'] = last
    return result


def _rows(num: int) -> int:
  """Returns the rows of a buffer for so many.

  Of one row, the compiler would know which is read: it would move what W makes
  of it out of the loop and into every tick.
  """
  return 2 if num == 1 else num


def _map_leaves(fn, routes, tree):
  leaves, treedef = jax.tree.flatten(tree)
  return treedef.unflatten([fn(r, a) for r, a in zip(routes, leaves)])


def _with_stack(grads, trained, name, layers, stacks):
  """Puts the gradients of a tower's layers into those of a model."""
  by_path = {}
  for i, whole in enumerate(stacks):
    group, last = weights.parted(whole, layers, i)
    for kind, part in (('group', group), ('remainder', last)):
      prefix = f'{name}.layers.{kind}.{i}.'
      flat = jax.tree_util.tree_leaves_with_path(part)
      by_path |= {prefix + sharding.path_name(p): a for p, a in flat}

  def leaf(path, _):
    path_name = sharding.path_name(path)
    return by_path.get(path_name, known.get(path_name))

  flat = jax.tree_util.tree_leaves_with_path(grads)
  known = {sharding.path_name(p): a for p, a in flat}
  return jax.tree_util.tree_map_with_path(leaf, trained)

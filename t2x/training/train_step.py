"""The pure function that advances the state of training.

Shape suffixes: B batch, M microbatch.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import optax

from t2x.layers import dropout
from t2x.layers import linear
from t2x.layers import moe
from t2x.layers import param
from t2x.losses import cross_entropy
from t2x.losses import load_balancing
from t2x.losses import loss_based_masking
from t2x.losses import task_weighting
from t2x.models import forward
from t2x.models import loss_terms
from t2x.models import segment_memory
from t2x.objectives import batch_keys
from t2x.parallel import sharding
from t2x.pipeline import gradients as pipeline
from t2x.training import optim
from t2x.training import optim_state
from t2x.training import scheduled_sampling
from t2x.training import train_state

Batch = dict[str, jax.Array]


def train_step(
  state: train_state.TrainState,
  batch: Batch,
  key: jax.Array,
  *,
  tx: optax.GradientTransformation,
  config: train_state.StepConfig,
) -> tuple[train_state.TrainState, dict[str, jax.Array]]:
  """Returns the next state and float32 metrics of one update.

  The loss is the sum of the tokens' losses over the weight of the whole
  batch, so neither accumulation nor packing nor the layout changes it. A
  non-finite loss or gradient leaves model and optimizer as they were. The
  metric `num_updates` counts the updates before, which the learning rate
  goes by.
  """
  grads, sums = gradients_at(state, batch, key, config)
  return apply_gradients(state, grads, sums, tx=tx, config=config)


def gradients_at(
  state: train_state.TrainState,
  batch: Batch,
  key: jax.Array,
  config: train_state.StepConfig,
) -> tuple[Any, dict[str, Any]]:
  """Returns the gradients and summed metrics of a state's next update."""
  trained, rest = train_state.partition(state.model, config.trainable)
  if config.masking is not None:
    losses_V = state.carried[loss_based_masking.NAME]
    batch = loss_based_masking.masked(config.masking, batch, losses_V, key)
  key = jax.random.fold_in(key, state.step)
  if config.tasks is not None:
    batch = task_weighting.with_factors(config.tasks, batch, state.carried)
  if config.sampling is not None:
    share = config.sampling.share_at(state.step)
    rows = batch['inputs'].shape[:1]
    batch = {**batch, 'sampled_share': jnp.broadcast_to(share, rows)}
  if config.memory is not None:
    batch = {**batch, segment_memory.NAME: state.carried[segment_memory.NAME]}
  grads, sums = gradients(trained, rest, batch, key, config)
  if config.tasks is not None:
    num = len(config.tasks.names)
    sums = {**sums, task_weighting.ROWS: task_weighting.rates(batch, num)}
  return grads, sums


@jax.named_scope('optimizer')
def apply_gradients(
  state: train_state.TrainState,
  grads: Any,
  sums: dict[str, Any],
  *,
  tx: optax.GradientTransformation,
  config: train_state.StepConfig,
) -> tuple[train_state.TrainState, dict[str, jax.Array]]:
  """Returns the next state and metrics, of what `gradients_at` returned."""
  trained, rest = train_state.partition(state.model, config.trainable)
  loads = sums['loads']
  grad_norm = optax.tree.norm(grads)
  finite = jnp.isfinite(sums['loss']) & jnp.isfinite(grad_norm)
  keep = functools.partial(jax.tree.map, lambda a, b: jnp.where(finite, a, b))
  if config.offload == 'optimizer':
    new_trained, opt_state = optim_state.update_offloaded(
      tx, grads, state.opt_state, trained, norm=grad_norm, finite=finite
    )
  else:
    updates, opt_state = tx.update(grads, state.opt_state, trained)
    opt_state = keep(opt_state, state.opt_state)
    new_trained = keep(optax.apply_updates(trained, updates), trained)
  ema = state.ema
  if config.ema_decay is not None:
    d = config.ema_decay
    mix = lambda e, p: jnp.where(finite, d * e + (1.0 - d) * p, e)
    ema = jax.tree.map(mix, state.ema, new_trained)
  carried, sums = _carried(state, sums, config)
  carried = keep(carried, state.carried)
  if config.memory is not None:  # What stayed is not of the row before.
    shown = segment_memory.hidden_unless(finite, carried[segment_memory.NAME])
    carried = {**carried, segment_memory.NAME: shown}
  num_skipped = jnp.where(finite, 0, state.num_skipped + 1)
  new_state = train_state.TrainState(
    step=state.step + 1,
    model=train_state.combine(
      new_trained, keep(_updated(rest, loads, state.step + 1), rest)
    ),
    opt_state=opt_state,
    ema=ema,
    num_skipped=num_skipped,
    carried=carried,
  )
  sums = {name: value for name, value in sums.items() if name != 'loads'}
  metrics = {**sums, 'grad_norm': grad_norm, 'num_skipped': num_skipped}
  metrics['num_updates'] = optim.num_updates(state.opt_state)
  return new_state, metrics | load_balancing.metrics(loads)


def _carried(
  state: train_state.TrainState,
  sums: dict[str, Any],
  config: train_state.StepConfig,
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Returns `carried` after a step, and the metrics of the sums."""
  carried, name = state.carried, loss_based_masking.NAME
  by_task = {
    n: s for n, s in sums.items() if n.endswith(task_weighting.BY_TASK)
  }
  own = {name, segment_memory.NAME, *by_task}
  rest = {n: s for n, s in sums.items() if n not in own}
  if config.masking is not None:
    moved_V = loss_based_masking.update(
      config.masking, carried[name], sums[name]
    )
    carried = {**carried, name: moved_V}
  if config.memory is not None:
    carried = {**carried, segment_memory.NAME: sums[segment_memory.NAME]}
  if config.tasks is not None:
    factors_K = task_weighting.factors(config.tasks, carried)
    rest |= task_weighting.metrics(config.tasks, by_task, factors_K)
    carried = task_weighting.update(config.tasks, carried, by_task)
  return carried, rest


def measure(config: train_state.StepConfig) -> Callable[..., Any]:
  """Returns `cross_entropy.of_terms` with the settings of a step."""
  return functools.partial(
    cross_entropy.of_terms,
    config=config.loss,
    by_token=config.masking is not None,
    num_tasks=0 if config.tasks is None else len(config.tasks.names),
  )


def _updated(rest: Any, loads: Any, step: jax.Array) -> Any:
  """Returns the part without gradients after a step, by rules of its own."""
  return linear.redraw(load_balancing.update(rest, loads), step)


def eval_step(
  model: Any,
  batch: Batch,
  memory: dict[str, Any] | None = None,
  *,
  config: train_state.StepConfig,
) -> dict[str, Any]:
  """Returns the sums of nll (nats), accuracy and weight over a batch.

  Of other terms than the main one as NAME_nll, NAME_accuracy, NAME_weight. In
  the chunks of training, so that what trains can be evaluated. With `memory`,
  of the batch before, also the `memory` for the next.
  """
  weights = {
    name.removesuffix('s'): batch[name].sum()
    for name in loss_terms.weight_names(batch)
  }
  if config.pipeline is not None:
    nothing = jax.tree.map(lambda _: None, model)
    _, sums = pipeline.run(
      nothing,
      model,
      loss_terms.with_row_shares(batch),
      None,
      config.pipeline.for_evaluation(),
      loss=functools.partial(cross_entropy.of_terms, config=config.loss),
      combine=train_state.combine,
    )
    measured = ('_nll', '_accuracy')
    sums = {n: s for n, s in sums.items() if f'_{n}'.endswith(measured)}
    return sums | weights
  x_BTD, _, memory = _run(model, batch, memory, None, config)
  terms = model.terms(x_BTD, batch, None, config.execution.zigzag)
  return cross_entropy.of_terms(terms, config.loss)[1] | weights | memory


def _run(
  model: forward.Model,
  batch: Batch,
  memory: dict[str, Any] | None,
  keys_B: jax.Array | None,
  config: train_state.StepConfig,
) -> tuple[jax.Array, dict[str, moe.Stats], dict[str, Any]]:
  """Returns the last layer's output, routers' figures, and a new memory.

  The memory stands under its name, in a dict that is empty without one.
  """
  more = {'keys_B': keys_B, 'execution': config.execution}
  if config.memory is None:
    return *forward.run(model, batch, **more), {}
  assert memory is not None, 'a model that remembers is given a memory'
  x_BTD, stats, memory = forward.recall(model, batch, memory, **more)
  return x_BTD, stats, {segment_memory.NAME: memory}


def gradients(
  trained: Any,
  rest: Any,
  batch: Batch,
  key: jax.Array,
  config: train_state.StepConfig,
) -> tuple[Any, dict[str, Any]]:
  """Returns gradients and summed metrics of a whole batch.

  Microbatch m holds the rows m, m + M, m + 2 M, ... of each device's share,
  so that no row moves between devices. Gradients are summed over the loop on
  each device of the `data` axis and reduced over it once, after the loop.
  """
  share = lambda a: a / jnp.maximum(a.sum(), 1e-9)
  batch = {
    **batch,
    **{name: share(batch[name]) for name in loss_terms.weight_names(batch)},
    'rows': jnp.arange(batch['weights'].shape[0]),
  }
  batch = loss_terms.with_row_shares(batch)
  manual = _manual_axes(config)
  if config.pipeline is not None:
    return pipeline.run(
      trained,
      rest,
      batch,
      key,
      config.pipeline,
      loss=measure(config),
      combine=train_state.combine,
      accumulate=config.accumulate,
      manual=manual,
    )
  fn = functools.partial(_accumulate, config=config)
  if not manual:
    return fn(trained, rest, batch, key)

  def reduced(*args: Any) -> Any:
    return jax.lax.psum(fn(*args), manual)

  batch_spec = jax.tree.map(lambda _: P(manual), batch)
  return jax.shard_map(
    reduced,
    in_specs=(P(), P(), batch_spec, P()),
    out_specs=P(),
    axis_names=set(manual),
    # Varying axes would be tracked and gradients reduced inside the loop.
    check_vma=False,
  )(trained, rest, batch, key)


def axes_by_hand(
  config: train_state.StepConfig, staged: bool
) -> tuple[str, ...]:
  """Mesh axes over which gradients are reduced by hand, after the loop.

  Args:
    config: the settings of the step.
    staged: whether there is a pipeline, whose ticks are such a loop.
  """
  if config.accumulate == 1 and not staged:
    return ()
  return ('data', 'fsdp') if config.accumulate_whole else ('data',)


def _manual_axes(config: train_state.StepConfig) -> tuple[str, ...]:
  """Those of `axes_by_hand` that split something on the active mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return ()
  staged = config.pipeline is not None
  return tuple(a for a in axes_by_hand(config, staged) if mesh.shape[a] > 1)


def _accumulate(
  trained: Any,
  rest: Any,
  batch: Batch,
  key: jax.Array,
  config: train_state.StepConfig,
) -> tuple[Any, dict[str, Any]]:
  probes_K = None
  if config.tasks is not None and config.tasks.probes:
    probes_K = jnp.zeros(len(config.tasks.names))
  grad_fn = jax.value_and_grad(_loss, (0, 1), has_aux=True)

  def micro(part: Batch) -> tuple[Any, dict[str, Any]]:
    fn = grad_fn(trained, probes_K, rest, part, key, config)
    (_, sums), (grads, squares_K) = fn
    if squares_K is not None:
      sums[task_weighting.SQUARES] = squares_K
    return grads, sums

  num = config.accumulate
  if num == 1:
    return micro(batch)
  split = lambda a: jnp.moveaxis(a.reshape(-1, num, *a.shape[1:]), 1, 0)
  parts = jax.tree.map(split, batch)
  zeros = jax.tree.map(
    lambda a: jnp.zeros(a.shape, jnp.float32),
    jax.eval_shape(micro, jax.tree.map(lambda a: a[0], parts)),
  )

  def add(sums: Any, part: Batch) -> tuple[Any, None]:
    # A TPU's compiler would take reductions of bfloat16 out of the loop, and
    # fails where they are converted before they are added (libtpu 0.0.42).
    new = jax.lax.optimization_barrier(micro(part))
    return jax.tree.map(jnp.add, sums, new), None

  return jax.lax.scan(add, zeros, parts)[0]


def _loss(
  trained: Any,
  probes_K: jax.Array | None,
  rest: Any,
  batch: Batch,
  key: jax.Array,
  config: train_state.StepConfig,
) -> tuple[jax.Array, dict[str, Any]]:
  """Returns the share of the loss that these rows make, and metrics."""
  model = train_state.combine(trained, rest)
  if not sharding.reduces_in_float32():
    model = param.weights_in(model, model.config.dtype)
  keys_B = dropout.row_keys(key, batch['rows'])
  execution = config.execution
  if config.sampling is not None:
    inputs = scheduled_sampling.mix_in_predictions(
      config.sampling, model, batch, keys_B, execution
    )
    batch = {**batch, 'inputs': inputs}
  memory: Any = batch.get(segment_memory.NAME)
  x_BTD, stats, memory = _run(model, batch, memory, keys_B, config)
  if probes_K is not None:
    numbers_B = batch[batch_keys.TASKS][:, 0]
    x_BTD = task_weighting.with_probes(x_BTD, probes_K, numbers_B)
  terms = model.terms(x_BTD, batch, keys_B, execution.zigzag)
  loss, sums = measure(config)(terms, batch=batch)
  router_losses = load_balancing.losses(stats, batch[loss_terms.ROW_SHARES])
  loss = loss + sum(router_losses.values())
  return loss, {
    'loss': loss,
    **sums,
    **memory,
    **router_losses,
    'loads': load_balancing.loads(stats),
  }

"""The state of training: what a checkpoint holds, and which part is trained."""

import dataclasses
import functools
import re
from typing import Any
from typing import Literal

from flax import nnx
import jax
import jax.numpy as jnp
import optax

from t2x.layers import stack
from t2x.losses import cross_entropy
from t2x.losses import loss_based_masking
from t2x.losses import task_weighting
from t2x.models import segment_memory
from t2x.objectives import masking as masking_lib
from t2x.parallel import sharding
from t2x.pipeline import plan as plan_lib
from t2x.training import optim_state
from t2x.training import scheduled_sampling


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Everything that a checkpoint must hold to go on.

  Attributes:
    step: updates so far, skipped ones included.
    model: float32 parameters.
    opt_state: the optimizer's state, of the trainable parameters.
    ema: moving average of the trainable parameters, or None.
    num_skipped: updates skipped in a row because of a non-finite value.
    carried: other values that a step hands to the next, by name.
  """

  step: jax.Array
  model: Any
  opt_state: Any
  ema: Any
  num_skipped: jax.Array
  carried: dict[str, Any] = dataclasses.field(default_factory=dict)


def of_model(model: Any) -> TrainState:
  """Returns the part of a state that using a model needs."""
  none: Any = None
  return TrainState(
    step=none, model=model, opt_state=none, ema=none, num_skipped=none
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepConfig:
  """Settings of one update; `t2x.config.experiment.TrainConfig` says more.

  Attributes:
    masking: masks that each step draws by itself, if it does.
    memory: rows and tokens of what a model remembers, None if it does not.
    tasks: the tasks of a mixture; None where there is one.
    sampling: the rule by which a decoder reads its own predictions; None where
      it reads the targets alone.
    pipeline: the plan of the stages, on a mesh that has them.
  """

  accumulate: int = 1
  accumulate_whole: bool = False
  offload: Literal['none', 'optimizer'] = 'none'
  ema_decay: float | None = None
  trainable: str = '.*'
  loss: cross_entropy.LossConfig = cross_entropy.LossConfig()
  execution: stack.Execution = stack.Execution()
  masking: masking_lib.ByLoss | None = None
  memory: tuple[int, int] | None = None
  tasks: task_weighting.Tasks | None = None
  sampling: scheduled_sampling.ScheduledSampling | None = None
  pipeline: plan_lib.PipelinePlan | None = None


def partition(model: Any, pattern: str) -> tuple[Any, Any]:
  """Splits a model into the part that is trained and the rest.

  Args:
    model: a module.
    pattern: a regular expression that the dotted path of a trained parameter
      matches in full. Integers and variables that are no `nnx.Param` are
      never trained.

  Returns:
    Two modules of one structure; each leaf is None in one of them.

  Raises:
    ValueError: nothing matches; some paths are listed.
  """
  expression = re.compile(pattern)
  paths = []

  def chosen(path: jax.tree_util.KeyPath, x: Any) -> Any:
    name = sharding.path_name(path).removesuffix('.value')
    paths.append(name)
    # Other variables (a router's balancing bias) have rules of their own.
    ours = not sharding.is_variable(x) or isinstance(x, nnx.Param)
    ours = ours and expression.fullmatch(name) is not None
    floating = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.floating)
    return jax.tree.map(lambda leaf: ours and floating(leaf), x)

  mask = jax.tree_util.tree_map_with_path(
    chosen, model, is_leaf=sharding.is_variable
  )
  if not any(jax.tree.leaves(mask)):
    raise ValueError(
      f'train.trainable={pattern!r} matches no parameter. Paths look like '
      f'{", ".join(paths[:4])}.'
    )
  trained = jax.tree.map(lambda m, leaf: leaf if m else None, mask, model)
  rest = jax.tree.map(lambda m, leaf: None if m else leaf, mask, model)
  return trained, rest


def combine(first: Any, second: Any) -> Any:
  """Inverse of `partition`."""
  return jax.tree.map(
    lambda a, b: b if a is None else a,
    first,
    second,
    is_leaf=lambda x: x is None,
  )


def averaged_model(state: TrainState, config: StepConfig) -> Any:
  """Returns the model to use: the moving average where there is one."""
  if state.ema is None:
    return state.model
  _, rest = partition(state.model, config.trainable)
  return combine(state.ema, rest)


def init_state(
  model: Any, tx: optax.GradientTransformation, config: StepConfig
) -> TrainState:
  """Returns the state before the first step."""
  trained, _ = partition(model, config.trainable)
  # A copy: donation must not see one buffer twice.
  copy = functools.partial(jax.tree.map, lambda x: x + 0)
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    model=model,
    opt_state=tx.init(trained),
    ema=copy(trained) if config.ema_decay is not None else None,
    num_skipped=jnp.zeros((), jnp.int32),
    carried=_carried(model, config),
  )


def _carried(model: Any, config: StepConfig) -> dict[str, Any]:
  carried: dict[str, Any] = {}
  if config.masking is not None:
    rows = len(model.head.table_VD)
    carried[loss_based_masking.NAME] = loss_based_masking.start(rows)
  if config.tasks is not None:
    carried |= task_weighting.start(config.tasks)
  if config.memory is not None:
    carried[segment_memory.NAME] = segment_memory.empty(model, *config.memory)
  return carried


def state_shardings(
  state: TrainState,
  mesh: sharding.AnyMesh,
  rules: sharding.Rules,
  config: StepConfig,
) -> TrainState:
  """Returns the sharding of every leaf of a state.

  Args:
    state: shapes of the state.
    mesh: the mesh of devices, or of sizes alone.
    rules: the mesh axes of each logical axis.
    config: the settings of a step, whose memory and offload count.
  """
  trained, _ = partition(state.model, config.trainable)
  rest = dataclasses.replace(state, opt_state=None)
  rest = sharding.shardings(rest, mesh, rules)
  if config.memory is not None:
    name = segment_memory.NAME
    memory = segment_memory.shardings(state.carried[name], mesh, rules)
    rest = dataclasses.replace(rest, carried={**rest.carried, name: memory})
  return dataclasses.replace(
    rest,
    opt_state=optim_state.shardings(
      state.opt_state,
      trained,
      mesh,
      rules,
      offload=config.offload == 'optimizer',
    ),
  )

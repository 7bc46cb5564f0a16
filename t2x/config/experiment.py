"""An experiment as one value: the tree that the command line sets."""

from collections.abc import Sequence
import dataclasses
import re
from typing import Literal

import optax

from t2x import field_checks
from t2x.data import config as data_config
from t2x.data import history
from t2x.layers import stack
from t2x.losses import cross_entropy
from t2x.losses import task_weighting
from t2x.models import decoder
from t2x.models import model as model_lib
from t2x.objectives import masking
from t2x.parallel import mesh as mesh_lib
from t2x.parallel import sharding
from t2x.pipeline import config as pipeline_config
from t2x.tracking import trackers
from t2x.training import optim as optim_lib
from t2x.training import rate_scaling
from t2x.training import scheduled_sampling
from t2x.training import train_state


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
  """How long, how often, and how each step is computed.

  Attributes:
    num_steps: updates in all; or None, with one of the next two.
    num_tokens: tokens in all, rounded up to steps: rows x length a step, and
      where rows are padded, as many as they hold on average.
    num_epochs: passes over the training split, rounded up to steps.
    seed: the seed of the weights, the order of the data, masks and dropout.
    log_every: steps between rows of metrics.jsonl.
    eval_every: steps between evaluations; 0 evaluates at the end alone.
    eval_batches: batches of an evaluation; None is the whole split.
    checkpoint_every: steps between checkpoints; 0 saves at the end alone.
    keep_last: newest checkpoints that are kept.
    keep_every: checkpoints at multiples of this are kept for good.
    remat: activations that the backward pass recomputes: none, full, dots
      (all but products), save:NAMES (all but these),
      offload:NAMES (kept by the hosts).
    scan_layers: run layers as a scan, which compiles once, or unrolled.
    accumulate: microbatches a step; gradients are reduced over `data` once.
    accumulate_whole: keep whole gradients while accumulating (one reduction
      over `fsdp` too, more memory), instead of a reduce-scatter a microbatch.
    offload: state that lies in the hosts' memory between steps: none, or
      optimizer (its moments).
    ema_decay: decay of a moving average of the weights, which is then
      evaluated; None for no average.
    trainable: regular expression on the dotted paths of trained parameters.
    max_skipped: updates in a row that a non-finite value may skip.
    loss: smoothing, z-loss, chunks.
    sampling: rule by which the decoder of an encoder-decoder reads its own
      predictions in place of some targets; None for none of them.
    trackers: experiment trackers that get each row too: wandb, mlflow, trackio.
    tracker_project: project (MLflow: experiment) of the run in these.
  """

  num_steps: int | None = 1000
  num_tokens: int | None = None
  num_epochs: float | None = None
  seed: int = 0
  log_every: int = 1
  eval_every: int = 100
  eval_batches: int | None = None
  checkpoint_every: int = 100
  keep_last: int = 3
  keep_every: int | None = None
  remat: str = 'none'
  scan_layers: bool = True
  accumulate: int = 1
  accumulate_whole: bool = False
  offload: Literal['none', 'optimizer'] = 'none'
  ema_decay: float | None = None
  trainable: str = '.*'
  max_skipped: int = 10
  loss: cross_entropy.LossConfig = cross_entropy.LossConfig()
  sampling: scheduled_sampling.ScheduledSampling | None = None
  trackers: tuple[str, ...] = ()
  tracker_project: str = 't2x'

  def __post_init__(self) -> None:
    lengths = (self.num_steps, self.num_tokens, self.num_epochs)
    if sum(length is not None for length in lengths) != 1:
      raise ValueError(
        f'train.num_steps={self.num_steps}, num_tokens={self.num_tokens}, '
        f'num_epochs={self.num_epochs}: exactly one says how long the run '
        'is; set the others to none.'
      )
    field_checks.least(
      self,
      'train.',
      num_steps=1,
      num_tokens=1,
      eval_batches=1,
      keep_every=1,
      log_every=1,
      accumulate=1,
      max_skipped=1,
      keep_last=1,
      eval_every=0,
      checkpoint_every=0,
    )
    field_checks.positive(self, 'train.', 'num_epochs')
    if self.ema_decay is not None and not 0.0 < self.ema_decay < 1.0:
      raise ValueError(f'train.ema_decay={self.ema_decay}; it is in (0, 1).')
    try:
      re.compile(self.trainable)
    except re.error as error:
      raise ValueError(
        f'train.trainable={self.trainable!r} is no regular expression: {error}.'
      ) from error
    trackers.check_names(self.trackers, 'train.trackers')
    if not self.tracker_project.strip():
      raise ValueError(
        f'train.tracker_project={self.tracker_project!r}; it needs a name, '
        "such as 't2x'."
      )
    assert self.execution  # Its construction checks `remat`.

  @property
  def execution(self) -> stack.Execution:
    """How layers run: scanned or unrolled, with which recomputation."""
    return stack.Execution(scan=self.scan_layers, remat=self.remat)

  @property
  def step_config(self) -> train_state.StepConfig:
    """The part of these settings that a step needs."""
    return train_state.StepConfig(
      accumulate=self.accumulate,
      accumulate_whole=self.accumulate_whole,
      offload=self.offload,
      ema_decay=self.ema_decay,
      trainable=self.trainable,
      loss=self.loss,
      execution=self.execution,
      sampling=self.sampling,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
  """What is computed, from what, where, and for how long.

  Attributes:
    model: architecture, and the sizes and kinds of its parts.
    data: text, tokenizer, batches and objective.
    optim: optimizer and learning rate.
    train: length of the run, evaluation, checkpoints, and how a step is
      computed.
    mesh: number of devices along each mesh axis.
    rules: mesh axes of each logical axis.
    pipeline: schedule of a pipeline, where `mesh.pipe` is more than 1.
    compiler_options: changes to those of `machines.compiler_options`:
      `xla_NAME=VALUE` adds or replaces one, `xla_NAME=` takes it away.
  """

  model: model_lib.ModelConfig = decoder.DecoderConfig()
  data: data_config.DataConfig = data_config.DataConfig()
  optim: optim_lib.OptimConfig = optim_lib.AdamW()
  train: TrainConfig = TrainConfig()
  mesh: mesh_lib.MeshConfig = mesh_lib.MeshConfig()
  rules: sharding.Rules = sharding.Rules()
  pipeline: pipeline_config.PipelineConfig = pipeline_config.PipelineConfig()
  compiler_options: tuple[str, ...] = ()

  @property
  def step_config(self) -> train_state.StepConfig:
    """What a step does, on no mesh in particular."""
    objective = self.data.objective
    chosen = objective.token_masking
    by_loss = chosen if isinstance(chosen, masking.ByLoss) else None
    tasks = task_weighting.tasks_of(objective)
    step = self.train.step_config
    length = self.model.memory
    memory = (self.data.batch_size, length) if length else None
    return dataclasses.replace(
      step, masking=by_loss, tasks=tasks, memory=memory
    )


def optimizer(
  config: Experiment, num_steps: int, numbers: optim_lib.Numbers | None = None
) -> optax.GradientTransformation:
  """Returns the optimizer of an experiment.

  Args:
    config: the experiment.
    num_steps: updates of the run.
    numbers: numbers that replace those of `config.optim`; see `optim.make`.
  """
  model, scaling = config.model, None
  if model.mup is not None:
    depth = {name: model.mup.depth_rate(n) for name, n in model.depths.items()}
    scaling = rate_scaling.RateScaling(width=model.width_factor, depth=depth)
  return optim_lib.make(config.optim, num_steps, numbers, scaling)


def num_steps(
  config: Experiment, segments: Sequence[history.Segment] = ()
) -> int | None:
  """Returns a run's steps; None where they depend on the corpus.

  Args:
    config: the experiment of the run.
    segments: the parts of a run that has read a corpus, whose length is then
      known.
  """
  train = config.train
  if train.num_steps is not None:
    return train.num_steps
  if segments:
    return history.num_steps(
      segments, epochs=train.num_epochs, tokens=train.num_tokens
    )
  if train.num_tokens is None or not data_config.is_full(config.data):
    return None
  return -(-train.num_tokens // (config.data.batch_size * config.data.length))


# Where and how the same numbers are computed: what a layout may say. A name
# that ends with a dot stands for all that begin so.
LAYOUT_SETTINGS = (
  'mesh.',
  'rules.',
  'pipeline.',
  'compiler_options',
  'train.remat',
  'train.scan_layers',
  'train.accumulate',
  'train.accumulate_whole',
  'train.offload',
  'train.loss.vocab_chunks',
  'train.loss.token_chunks',
  'model.attention.block',
  'model.attention.kernel',
)

# When, and with what help, a run is looked at: no program changes by it.
OUTER_SETTINGS = (
  'train.checkpoint_every',
  'train.keep_last',
  'train.keep_every',
  'train.log_every',
  'train.eval_every',
  'train.eval_batches',
  'train.max_skipped',
  'train.trackers',
  'train.tracker_project',
  'data.eval_splits',
  'data.data_dir',
  'data.num_threads',
  'data.num_workers',
)

# Settings that may differ between a run and its continuation: those, and how
# long it is.
MAY_CHANGE = (
  *LAYOUT_SETTINGS,
  'train.num_steps',
  'train.num_tokens',
  'train.num_epochs',
  *OUTER_SETTINGS,
)

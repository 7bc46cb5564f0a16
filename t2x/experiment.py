"""An experiment as one value: the tree that the command line sets.

`check` finds what single configs cannot see: fields that must fit each other
or the devices. It runs before anything is built or compiled.
"""

from collections.abc import Mapping
import dataclasses
import math
import re

from t2x import checks
from t2x import loss as loss_lib
from t2x import machines
from t2x import mesh as mesh_lib
from t2x import optim as optim_lib
from t2x import sharding
from t2x import stack
from t2x import train_step
from t2x.attention import all_to_all
from t2x.data import config as data_config
from t2x.data import pipeline as data_pipeline
from t2x.layers import embed
from t2x.models import decoder
from t2x.models import encoder
from t2x.models import encoder_decoder
from t2x.models import model as model_lib
from t2x.objectives import causal_lm
from t2x.objectives import masked_lm


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
  """How long, how often, and how each step is computed.

  Attributes:
    num_steps: updates in all; or None, with one of the next two.
    num_tokens: tokens in all (rows x length a step), rounded up to steps.
    num_epochs: passes over the training split, rounded up to steps.
    seed: of the weights, the order of the data, masks and dropout.
    log_every: steps between rows of metrics.jsonl.
    eval_every: steps between evaluations; 0 evaluates at the end alone.
    eval_batches: batches of an evaluation; None is the whole split.
    checkpoint_every: steps between checkpoints; 0 saves at the end alone.
    keep_last: newest checkpoints that are kept.
    keep_every: checkpoints at multiples of this are kept for good.
    remat: what the backward pass recomputes: none, full, dots, save:NAMES.
    scan_layers: run layers as a scan, which compiles once, or unrolled.
    accumulate: microbatches a step; gradients are reduced over `data` once.
    accumulate_whole: keep whole gradients while accumulating (one reduction
      over `fsdp` too, more memory), instead of a reduce-scatter a microbatch.
    ema_decay: of a moving average of the weights, which is then evaluated.
    trainable: regular expression on the dotted paths of trained parameters.
    max_skipped: updates in a row that a non-finite value may skip.
    loss: smoothing, z-loss, chunks.
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
  ema_decay: float | None = None
  trainable: str = '.*'
  max_skipped: int = 10
  loss: loss_lib.LossConfig = loss_lib.LossConfig()

  def __post_init__(self):
    lengths = (self.num_steps, self.num_tokens, self.num_epochs)
    if sum(length is not None for length in lengths) != 1:
      raise ValueError(
        f'train.num_steps={self.num_steps}, num_tokens={self.num_tokens}, '
        f'num_epochs={self.num_epochs}: exactly one says how long the run '
        'is; set the others to none.'
      )
    checks.least(
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
    checks.positive(self, 'train.', 'num_epochs')
    if self.ema_decay is not None and not 0.0 < self.ema_decay < 1.0:
      raise ValueError(f'train.ema_decay={self.ema_decay}; it is in (0, 1).')
    try:
      re.compile(self.trainable)
    except re.error as error:
      raise ValueError(
        f'train.trainable={self.trainable!r} is no regular expression: {error}.'
      ) from error
    assert self.execution  # Its construction checks `remat`.

  @property
  def execution(self) -> stack.Execution:
    return stack.Execution(scan=self.scan_layers, remat=self.remat)

  @property
  def step_config(self) -> train_step.StepConfig:
    return train_step.StepConfig(
      accumulate=self.accumulate,
      accumulate_whole=self.accumulate_whole,
      ema_decay=self.ema_decay,
      trainable=self.trainable,
      loss=self.loss,
      execution=self.execution,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
  """What is computed, from what, where, and for how long.

  Attributes:
    compiler_options: changes to those of `machines.compiler_options`:
      `xla_NAME=VALUE` adds or replaces one, `xla_NAME=` takes it away.
  """

  model: model_lib.ModelConfig = decoder.DecoderConfig()
  data: data_config.DataConfig = data_config.DataConfig()
  optim: optim_lib.OptimConfig = optim_lib.AdamW()
  train: TrainConfig = TrainConfig()
  mesh: mesh_lib.MeshConfig = mesh_lib.MeshConfig()
  rules: sharding.Rules = sharding.Rules()
  pipeline: None = None  # Holds the place of pipeline schedules.
  compiler_options: tuple[str, ...] = ()


# Settings that may differ between a run and its continuation: they change
# where and how fast the same numbers are computed, or when they are looked at.
MAY_CHANGE = (
  'mesh.',
  'rules.',
  'pipeline',
  'compiler_options',
  'train.remat',
  'train.scan_layers',
  'train.accumulate',
  'train.accumulate_whole',
  'train.loss.vocab_chunks',
  'train.loss.token_chunks',
  'train.num_steps',
  'train.num_tokens',
  'train.num_epochs',
  'train.checkpoint_every',
  'train.keep_last',
  'train.keep_every',
  'train.log_every',
  'train.eval_every',
  'train.eval_batches',
  'train.max_skipped',
  'data.eval_splits',
  'data.data_dir',
  'data.num_threads',
  'data.num_workers',
  'model.attention.block',
)


def check(config: Experiment, num_devices: int) -> None:
  """Raises ValueError for parts that do not fit each other or the devices."""
  data_pipeline.check(config.data)
  machines.check_overrides(config.compiler_options)
  sizes = mesh_lib.sizes(config.mesh, num_devices)
  if sizes['pipe'] > 1:
    raise ValueError(
      f'mesh.pipe={sizes["pipe"]}: nothing is split over this axis yet. '
      'Use data, fsdp, tensor, context or expert.'
    )
  _check_rows(config, sizes)
  _check_context(config, sizes)
  _check_objective(config)
  _check_lengths(config)
  _check_chunks(config, sizes)


def _check_rows(config: Experiment, sizes: dict[str, int]) -> None:
  rows = config.data.batch_size
  need = rows_multiple(config, sizes)
  if rows % need:
    axes = _row_axes(config)
    by = ' x '.join(f'mesh.{a}={sizes[a]}' for a in axes if sizes.get(a, 1) > 1)
    raise ValueError(
      f'data.batch_size={rows} rows cannot be dealt to {by or "one device"} '
      f'in train.accumulate={config.train.accumulate} microbatches: it must '
      f'be a multiple of {need}. Set it to {-(-rows // need) * need}, or '
      'change the mesh.'
    )


def rows_multiple(config: Experiment, sizes: Mapping[str, int]) -> int:
  """Returns what the rows of a batch must be a multiple of."""
  parts = math.prod(sizes.get(axis, 1) for axis in _row_axes(config))
  return parts * config.train.accumulate


def _row_axes(config: Experiment) -> list[str]:
  by_hand = train_step.axes_by_hand(config.train.step_config)
  return sorted({*sharding.mesh_axes(config.rules.batch), *by_hand})


def zigzag(config: Experiment, sizes: Mapping[str, int]) -> int:
  """Returns over how many devices causal rows are dealt in zigzag order.

  Args:
    config: the experiment.
    sizes: of the mesh axes.
  """
  rules = config.rules
  balanced = rules.context_attention == 'ring' and rules.balance_context
  if not balanced or isinstance(config.model, encoder.EncoderConfig):
    return 1
  return context_size(config, sizes)


def context_size(config: Experiment, sizes: Mapping[str, int]) -> int:
  """Returns over how many devices a row is split."""
  return math.prod(sizes[a] for a in sharding.mesh_axes(config.rules.length))


def _source_parts(config: Experiment, sizes: Mapping[str, int]) -> int:
  """Returns what the tokens of a row must be a multiple of, in an encoder."""
  fine = {*sharding.mesh_axes(config.rules.norm_length)}
  fine -= {*sharding.mesh_axes(config.rules.length)}
  return context_size(config, sizes) * math.prod(sizes[a] for a in fine)


def target_parts(config: Experiment, sizes: Mapping[str, int]) -> int:
  """Returns what the targets of a row are padded to a multiple of."""
  pieces = 1 if zigzag(config, sizes) == 1 else 2 * context_size(config, sizes)
  return math.lcm(_source_parts(config, sizes), pieces)


def _check_context(config: Experiment, sizes: dict[str, int]) -> None:
  has_encoder = config.data.objective.has_encoder
  parts_of = _source_parts if has_encoder else target_parts
  parts = parts_of(config, sizes)
  rules = config.rules
  axes = {*sharding.mesh_axes(rules.length)}
  axes |= {*sharding.mesh_axes(rules.norm_length)}
  named = ' x '.join(f'mesh.{a}={sizes[a]}' for a in sorted(axes))
  for length in data_config.buckets(config.data):
    if length % parts:
      raise ValueError(
        f'data.length: a row of {length} tokens cannot be split over {named} '
        f'(rules.length, rules.norm_length): it must be a multiple of {parts}. '
        f'Set it to {-(-length // parts) * parts}, or change the mesh.'
      )
  devices = context_size(config, sizes)
  if devices > 1 and config.rules.context_attention == 'all_to_all':
    split = sharding.mesh_axes(config.rules.kv_heads)
    parts = math.prod(sizes[a] for a in split)
    for kind in config.model.kinds:
      all_to_all.repeats(kind.num_heads, kind.kv_heads, devices, parts)


def _check_objective(config: Experiment) -> None:
  objective, model = config.data.objective, config.model
  encdec = isinstance(model, encoder_decoder.EncoderDecoderConfig)
  fits = {
    decoder.DecoderConfig: isinstance(objective, causal_lm.CausalLM),
    encoder.EncoderConfig: isinstance(objective, masked_lm.MaskedLM),
    encoder_decoder.EncoderDecoderConfig: objective.has_encoder,
  }[type(model)]
  if not fits:
    kinds = (
      'span_corruption or source_target'
      if encdec
      else (
        'causal_lm' if isinstance(model, decoder.DecoderConfig) else 'masked_lm'
      )
    )
    raise ValueError(
      f'data.objective={objective.kind} does not train a model of kind '
      f'{model.kind}. Set data.objective to {kinds}, or another model.'
    )


def _check_chunks(config: Experiment, sizes: dict[str, int]) -> None:
  loss, model = config.train.loss, config.model
  rows = embed.padded(model.vocab_size, model.vocab_multiple)
  if rows % loss.vocab_chunks:
    raise ValueError(
      f'train.loss.vocab_chunks={loss.vocab_chunks} does not divide the {rows} '
      'rows of the vocabulary table. Choose a divisor, or another '
      'model.vocab_multiple.'
    )
  for bucket in data_config.buckets(config.data):
    length = config.data.objective.target_length(bucket)
    parts = target_parts(config, sizes)
    length = -(-length // parts) * parts // context_size(config, sizes)
    if length % loss.token_chunks:
      raise ValueError(
        f'train.loss.token_chunks={loss.token_chunks} does not divide the '
        f'{length} targets of a row on each device. Choose a divisor, or '
        'another data.length.'
      )


def _check_lengths(config: Experiment) -> None:
  limit = config.model.max_length
  if limit is not None and config.data.length > limit:
    raise ValueError(
      f'data.length={config.data.length} is more than the '
      f'model.position.max_length={limit} positions of the model. Set them '
      'to fit.'
    )


def check_vocabulary(config: Experiment, vocab_size: int) -> None:
  """Raises ValueError if the tokenizer has ids that the model has not."""
  if vocab_size > config.model.vocab_size:
    raise ValueError(
      f'The tokenizer has {vocab_size} ids and model.vocab_size='
      f'{config.model.vocab_size}. Set model.vocab_size={vocab_size} or '
      'more, or a smaller data.tokenizer.vocab_size.'
    )

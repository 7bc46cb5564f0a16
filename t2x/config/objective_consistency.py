"""Whether what is predicted fits the model, the step and the mesh."""

import dataclasses

from t2x.config import experiment
from t2x.config import partitioning
from t2x.data import config as data_config
from t2x.models import decoder
from t2x.models import encoder
from t2x.models import encoder_decoder
from t2x.objectives import causal_lm
from t2x.objectives import classification
from t2x.objectives import masked_lm
from t2x.objectives import mixture
from t2x.objectives import next_sentence
from t2x.objectives import permutation
from t2x.objectives import prefix_lm
from t2x.parallel import sharding

Experiment = experiment.Experiment
Partitioning = partitioning.Partitioning


def check(partitioned: Partitioning) -> None:
  """Raises ValueError for objectives that cannot be trained so.

  Args:
    partitioned: the experiment on its mesh axes.

  Raises:
    ValueError: the objective fits neither the model nor the step.
    ShardingError: it does not fit the mesh.
  """
  _check_memory(partitioned)
  _check_weighting(partitioned)
  _check_sampling(partitioned)
  config, devices = partitioned.config, partitioned.context_size
  for data in data_config.parts(config.data).values():
    own = dataclasses.replace(config, data=data)
    _check_model(own)
    _check_heads(own)
    if devices > 1:
      _check_whole(own, devices)


def _check_model(config: Experiment) -> None:
  """The objective is one of the model's."""
  objective, model = config.data.objective, config.model
  encdec = isinstance(model, encoder_decoder.EncoderDecoderConfig)
  fits = {
    decoder.DecoderConfig: isinstance(
      objective, causal_lm.CausalLM | prefix_lm.PrefixLM
    ),
    encoder.EncoderConfig: isinstance(
      objective,
      masked_lm.MaskedLM
      | next_sentence.NextSentence
      | permutation.Permutation
      | classification.Classification,
    ),
    encoder_decoder.EncoderDecoderConfig: objective.has_encoder,
  }[type(model)]
  if not fits:
    kinds = (
      'span_corruption, denoising, ul2 or source_target'
      if encdec
      else (
        'causal_lm or prefix_lm'
        if isinstance(model, decoder.DecoderConfig)
        else 'masked_lm, next_sentence, permutation or classification'
      )
    )
    raise ValueError(
      f'data.objective={objective.kind} does not train a model of kind '
      f'{model.kind}. Set data.objective to {kinds}, or another model.'
    )


def _check_heads(config: Experiment) -> None:
  """The model has what the objective's targets are for."""
  objective, model = config.data.objective, config.model
  assert isinstance(objective, mixture.Single)  # Of one task.
  ahead = model.num_ahead
  if ahead != objective.num_ahead:
    raise ValueError(
      f'model.ahead has {ahead} heads, and the targets of data.objective='
      f'{objective.kind} are for {objective.num_ahead}. Set '
      f'data.objective=causal_lm and data.objective.ahead={ahead}, or '
      'model.ahead to a weight for each (model.ahead=0.3).'
    )
  if isinstance(objective, classification.Classification):
    classes = model.head_classes
    own = classes[objective.head] if objective.head < len(classes) else 0
    if own != objective.num_classes:
      raise ValueError(
        f'data.objective=classification tells {objective.num_classes} classes '
        f'apart by head {objective.head} of model.classes={classes}. Set that '
        f'one to {objective.num_classes}, and model.pooler=true.'
      )
  permuted = isinstance(objective, permutation.Permutation)
  if permuted != model.is_two_stream:
    raise ValueError(
      f'data.objective={objective.kind} and model.two_stream='
      f'{str(not permuted).lower()}: the second stream asks for the tokens of '
      'data.objective=permutation, and of no other. Set both or neither.'
    )
  dropped = objective.drops_tokens
  if dropped != bool(model.num_query_layers):
    raise ValueError(
      f'data.objective.dropped={str(dropped).lower()} and model.query_layers='
      f'{model.num_query_layers}: tokens that are dropped from the '
      'encoder are asked for by query layers. Set dropped=true and '
      'query_layers to 1 or more, or false and 0.'
    )
  if dropped and isinstance(objective, next_sentence.NextSentence):
    raise ValueError(
      'data.objective=next_sentence reads whole rows: set data.objective.masked'
      '.dropped=false.'
    )
  if isinstance(objective, next_sentence.NextSentence):
    if not (isinstance(model, encoder.EncoderConfig) and model.next_sentence):
      raise ValueError(
        'data.objective=next_sentence needs a head that says whether B follows '
        'A: set model.next_sentence=true and model.pooler=true (and model.'
        'num_token_types=2, or attention.num_token_types=2 of transformer_xl, '
        'so that A and B look different).'
      )
    if model.num_token_types == 1:
      raise ValueError(
        'model.num_token_types=1: A and B of data.objective=next_sentence '
        'would look alike. Set it to 2, or to 0.'
      )


def _check_memory(partitioned: Partitioning) -> None:
  config, sizes = partitioned.config, partitioned.sizes
  model, data = config.model, config.data
  if not model.memory:
    return
  fits = causal_lm.CausalLM | permutation.Permutation
  if not isinstance(data.objective, fits):
    raise ValueError(
      f'model.memory={model.memory} is for data.objective=causal_lm or '
      f'permutation, and it is {data.objective.kind}. Set memory to 0.'
    )
  if not isinstance(data.batching, data_config.Stream):
    raise ValueError(
      f'model.memory={model.memory} is of the rows before, and data.batching='
      f'{data.batching.kind} shuffles rows. Set data.batching=stream.'
    )
  if isinstance(model, decoder.DecoderConfig) and model.ahead:
    raise ValueError(
      f'model.memory={model.memory} and model.ahead={model.ahead}: the heads '
      'for further tokens have no memory. Set memory to 0, or ahead to ().'
    )
  fine = partitioned.fine_axes
  split = partitioned.context_size > 1
  split |= any(sizes.get(axis, 1) > 1 for axis in fine)
  if split or partitioned.has_stages or config.train.accumulate > 1:
    raise sharding.ShardingError(
      f'model.memory={model.memory} is of whole rows of a whole batch, and '
      f'mesh.context={sizes.get("context", 1)}, mesh.pipe='
      f'{sizes.get(sharding.PIPE, 1)}, train.accumulate='
      f'{config.train.accumulate}, rules.norm_length='
      f'{config.rules.norm_length}. Set those to 1 (norm_length to context), '
      'or memory to 0.'
    )


def _check_weighting(partitioned: Partitioning) -> None:
  config, sizes = partitioned.config, partitioned.sizes
  tasks = config.step_config.tasks
  if tasks is not None and tasks.probes and partitioned.has_stages:
    raise partitioning.PipelineError(
      'data.objective.weighting=grad_norm asks for the gradients of each task, '
      'which the stages of a pipeline do not tell apart (mesh.pipe='
      f'{sizes[sharding.PIPE]}). Set weighting to fixed or uncertainty, or '
      'mesh.pipe=1.'
    )


def _check_sampling(partitioned: Partitioning) -> None:
  config, sizes = partitioned.config, partitioned.sizes
  if config.train.sampling is None:
    return
  if not config.data.objective.has_encoder:
    raise ValueError(
      f'train.sampling: data.objective={config.data.objective.kind} has no '
      'decoder that reads targets beside an encoder. Set train.sampling=none, '
      'or train an encoder_decoder.'
    )
  if partitioned.has_stages:
    raise partitioning.PipelineError(
      'train.sampling reads predictions of a first pass, which the stages of a '
      f'pipeline do not have (mesh.pipe={sizes[sharding.PIPE]}). Set '
      'train.sampling=none, or mesh.pipe=1.'
    )


def _check_whole(config: Experiment, devices: int) -> None:
  """Raises ShardingError for objectives whose rows cannot be split."""
  objective, what = config.data.objective, None
  if isinstance(objective, masked_lm.MaskedLM) and objective.dropped:
    what = 'data.objective.dropped=true leaves rows of which places are missing'
  if isinstance(objective, permutation.Permutation):
    what = 'data.objective=permutation puts two streams into a row'
  if what is not None:
    raise sharding.ShardingError(
      f'{what}, and mesh.context={devices} splits rows. Set mesh.context=1, or '
      'another objective.'
    )

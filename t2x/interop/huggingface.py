"""Reads and writes whole checkpoints of Hugging Face.

A checkpoint is a directory of a config, weights and a tokenizer.

checkpoint = huggingface.read('path/of/gpt2')
huggingface.write('path/of/mine', checkpoint.model, checkpoint.tokenizer)
"""

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import functools
import logging
import os
from typing import Any

from etils import epath
import numpy as np

from t2x.config import experiment
from t2x.data import config as data_config
from t2x.data import pretrained
from t2x.data import tokenizer_files
from t2x.data import tokenizer_loading
from t2x.data import tokenizers
from t2x.interop import checkpoint_dir
from t2x.interop import configs
from t2x.interop import exported
from t2x.interop import framing
from t2x.interop import generation_config
from t2x.interop import labels as labels_lib
from t2x.interop import names
from t2x.interop import tokenizer_file
from t2x.models import encoder
from t2x.models import encoder_decoder
from t2x.models import model as model_lib
from t2x.objectives import causal_lm
from t2x.objectives import denoising
from t2x.objectives import masked_lm
from t2x.objectives import span_corruption

_log = logging.getLogger(__name__)

is_checkpoint = checkpoint_dir.is_checkpoint


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
  """A checkpoint of Hugging Face.

  Attributes:
    family: naming scheme of the weights, a key of `tables.FAMILIES`.
    hf: parsed config.json.
    config: config of the model in t2x.
    tensors: weights by name, which are read lazily.
    tokenizer: tokenizer of the checkpoint.
    generation: settings of text generation.
    own_generation: parsed generation_config.json; None if there is no such
      file.
    labels: labels of the classification head, by the name of the head's term.
  """

  family: str
  hf: dict[str, Any]
  config: model_lib.ModelConfig
  tensors: checkpoint_dir.Tensors
  tokenizer: tokenizers.Tokenizer
  generation: generation_config.GenerationConfig
  own_generation: dict[str, Any] | None
  labels: dict[str, list[str]]

  @functools.cached_property
  def model(self) -> model_lib.Transformer:
    """The model, float32, on one device."""
    return self.build(self.config)

  def build(self, config: model_lib.ModelConfig) -> model_lib.Transformer:
    """Returns the model, float32, on one device.

    Args:
      config: the checkpoint's config, with changes such as another dtype.

    Raises:
      ValueError: the weights do not fit the config.
    """
    return names.to_t2x(self.family, config, self.tensors)


def read(directory: str) -> Checkpoint:
  """Reads a checkpoint of one of the families of `configs`.

  Args:
    directory: path of config.json, safetensors and the tokenizer's files.

  Raises:
    ValueError: a file is missing or damaged, or weights, config and tokenizer
      do not fit each other; see `checkpoint_dir`, `configs` and `names`.
  """
  hf = checkpoint_dir.read_config(directory)
  try:
    family, config = configs.to_t2x(hf)
  except ValueError as error:
    raise ValueError(f'{directory}/{checkpoint_dir.CONFIG}: {error}') from None
  own = checkpoint_dir.read_optional(directory, generation_config.FILE)
  generation = generation_of(config, hf, own, directory)
  tokenizer = tokenizer_loading.read(
    tokenizers.Pretrained(directory=str(directory), start=generation.start)
  )
  _check_sizes(tokenizer, config.vocab_size, directory)
  tensors = checkpoint_dir.read_tensors(directory)
  labels = labels_lib.read(hf, config)
  labels_lib.check(labels, tensors)
  return Checkpoint(
    family=family,
    hf=hf,
    config=configs.with_parts(config, tensors),
    tensors=tensors,
    tokenizer=tokenizer,
    generation=generation,
    own_generation=own,
    labels=labels,
  )


def _check_sizes(
  tokenizer: tokenizers.Tokenizer, size: int, directory: str
) -> None:
  """Warns of added tokens that are not in the model's vocabulary.

  Raises:
    ValueError: the tokenizer's vocabulary without added tokens is larger than
      the model's.
  """
  assert isinstance(tokenizer, pretrained.PretrainedTokenizer)
  if tokenizer.learnt_past(size):
    raise ValueError(
      f'{directory}: the tokenizer has {tokenizer.vocab_size} ids, and the '
      f'model {size}. They are of different checkpoints.'
    )
  if tokenizer.vocab_size > size:
    _log.warning(
      '%s: the tokenizer has %d added tokens that the model has no rows for '
      '(vocab_size=%d): texts with them are refused.',
      directory,
      tokenizer.vocab_size - size,
      size,
    )


def generation_of(
  config: model_lib.ModelConfig,
  hf: Mapping[str, Any],
  own: Mapping[str, Any] | None,
  directory: str,
) -> generation_config.GenerationConfig:
  """Returns the generation settings of a checkpoint.

  Args:
    config: config of the model; an encoder gets the defaults.
    hf: parsed config.json.
    own: parsed generation_config.json; None if there is no such file.
    directory: directory of the files, for messages.

  Raises:
    ValueError: a value is invalid.
  """
  if isinstance(config, encoder.EncoderConfig):
    return generation_config.GenerationConfig()
  answers = isinstance(config, encoder_decoder.EncoderDecoderConfig)
  size = config.vocab_size
  try:
    return generation_config.read(own, hf, vocab_size=size, answers=answers)
  except ValueError as error:
    raise ValueError(f'{directory}/{error}') from None


def write(
  directory: str,
  model: model_lib.Transformer,
  tokenizer: tokenizers.Tokenizer | None = None,
  *,
  hf: Mapping[str, Any] | None = None,
  generation: generation_config.GenerationConfig | None = None,
  labels: Mapping[str, Sequence[str]] | None = None,
  problem: str = labels_lib.SINGLE,
  shard_bytes: int | None = None,
) -> str:
  """Writes a model as a checkpoint that `transformers` loads.

  Args:
    directory: directory to write, new or empty.
    model: model that one of the families can compute.
    tokenizer: tokenizer of the model; None writes none.
    hf: config.json of the checkpoint that the model was read from, which is
      kept if it still describes the model; None writes a new one.
    generation: generation settings of that checkpoint; None for the tokenizer's
      special tokens alone.
    labels: labels of the classification head, in order, by the name of the
      head's term.
    problem: meaning of the head's outputs; see `labels.problem`.
    shard_bytes: greatest size of a file of weights; None for 5 GB.

  Returns:
    The family.

  Raises:
    ValueError: no family computes the model, its tokenizer cannot be written,
      or the directory is not empty.
  """
  checkpoint_dir.check_new(directory)
  config = model.config
  source = {} if generation is None else dict(generation.source)
  ids = {} if tokenizer is None else _ids(tokenizer)
  answers = isinstance(config, encoder_decoder.EncoderDecoderConfig)
  if answers and tokenizer is not None:
    ids['decoder_start_token_id'] = tokenizer.vocab.start
  unused = 0
  as_it_came = hf is not None and exported.same(config, hf)
  if hf is not None and as_it_came:
    family = configs.to_t2x(hf)[0]
  else:
    family, made = exported.from_t2x(config)
    unused = _unused_positions(made, tokenizer)
    kept = {name: source[name] for name in ids if name in source}
    hf = {**made, **ids, **kept}
  if not isinstance(config, encoder.EncoderConfig):
    source = {name: hf[name] for name in ids if name in hf} | source
  hf = labels_lib.with_labels(hf, config, labels or {}, problem)
  # Everything that may fail comes before the weights are written.
  write_tokenizer = tokenizer and tokenizer_file.make_writer(
    tokenizer, framing.of(config, tokenizer), as_it_came=as_it_came
  )
  tensors = names.from_t2x(family, config, model, copies=False)
  if unused:
    length = hf['max_position_embeddings'] - unused
    hf = {**hf, 'max_position_embeddings': length}
    (name,) = (n for n in tensors if n.endswith('position_embeddings.weight'))
    tensors[name] = _without_rows(tensors[name], unused)
  limit: dict[str, Any] = (
    {} if shard_bytes is None else {'shard_bytes': shard_bytes}
  )
  if source:
    limit['beside'] = {generation_config.FILE: source}
  checkpoint_dir.write(directory, hf, tensors, **limit)
  if write_tokenizer:
    write_tokenizer(directory)
  return family


def experiment_of(
  checkpoint: Checkpoint, tokenizer_directory: epath.PathLike
) -> experiment.Experiment:
  """Returns the config of a run on the data that a checkpoint is made for.

  Args:
    checkpoint: checkpoint that the run begins with.
    tokenizer_directory: local directory of the tokenizer's files.
  """
  config = checkpoint.config
  objective: Any = causal_lm.CausalLM()
  if isinstance(config, encoder.EncoderConfig):
    objective = masked_lm.MaskedLM()
  elif isinstance(config, encoder_decoder.EncoderDecoderConfig):
    objective = span_corruption.SpanCorruption()
    if not checkpoint.tokenizer.sentinel_ids:
      objective = denoising.Denoising()
  keys = ('max_position_embeddings', 'n_positions')
  lengths = [checkpoint.hf[key] for key in keys if checkpoint.hf.get(key)]
  return experiment.Experiment(
    model=config,
    data=data_config.DataConfig(
      tokenizer=tokenizers.Pretrained(
        directory=os.path.abspath(tokenizer_directory),
        start=checkpoint.generation.start,
      ),
      length=config.max_length or min(lengths, default=512),
      objective=objective,
    ),
  )


def _unused_positions(
  hf: Mapping[str, Any], tokenizer: tokenizers.Tokenizer | None
) -> int:
  """Returns the number of position rows to drop; below 0, to add.

  RoBERTa's positions start at the row after that of the tokenizer's padding id.

  Raises:
    ValueError: the padding id begins or ends texts too.
  """
  if hf['model_type'] != 'roberta' or tokenizer is None:
    return 0
  if hf['pad_token_id'] == tokenizer.pad_id:
    return 0
  if tokenizer.pad_id in (tokenizer.bos_id, tokenizer.eos_id):
    raise ValueError(
      f'The tokenizer pads with {tokenizer.pad_id}, which begins or ends its '
      'texts too, and RoBERTa gives no position to padding. Name a pad_token '
      f'of its own in its {tokenizer_files.TOKENIZER_CONFIG}, or set '
      'model.position.offset=0, which makes it a BERT.'
    )
  return hf['pad_token_id'] - tokenizer.pad_id


def _without_rows(table: np.ndarray, num: int) -> np.ndarray:
  """Returns a table without its first `num` rows; below 0, with zeros added."""
  return np.pad(table, ((max(-num, 0), 0), (0, 0)))[max(num, 0) :]


def _ids(tokenizer: tokenizers.Tokenizer) -> dict[str, int]:
  return {
    'bos_token_id': tokenizer.bos_id,
    'eos_token_id': tokenizer.eos_id,
    'pad_token_id': tokenizer.pad_id,
  }

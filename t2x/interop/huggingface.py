"""Whole checkpoints of Hugging Face: config, weights and tokenizer.

found = huggingface.read('path/of/gpt2')
huggingface.write('path/of/mine', found.model, found.tokenizer)
"""

from collections.abc import Mapping
import dataclasses
import functools
import os
from typing import Any

from t2x import experiment
from t2x.data import config as data_config
from t2x.data import pretrained
from t2x.data import tokenizers
from t2x.interop import checkpoint_dir
from t2x.interop import configs
from t2x.interop import exported
from t2x.interop import names
from t2x.interop import tokenizer_file
from t2x.models import encoder
from t2x.models import encoder_decoder
from t2x.models import model as model_lib
from t2x.objectives import causal_lm
from t2x.objectives import masked_lm
from t2x.objectives import span_corruption

is_one = checkpoint_dir.is_one


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
  """What a directory holds.

  Attributes:
    family: how its weights are named, a key of `tables.FAMILIES`.
    hf: its config.json.
    config: of the model.
    tensors: its weights, read when they are asked for.
    tokenizer: its own.
  """

  family: str
  hf: dict[str, Any]
  config: model_lib.ModelConfig
  tensors: checkpoint_dir.Tensors
  tokenizer: tokenizers.Tokenizer

  @functools.cached_property
  def model(self) -> model_lib.Model:
    """The model, float32, on one device."""
    return self.build(self.config)

  def build(self, config: model_lib.ModelConfig) -> model_lib.Model:
    """Returns the model of a config that says more, such as another dtype.

    Raises:
      ValueError: the weights do not fit it.
    """
    return names.to_t2x(self.family, config, self.tensors)


def read(directory: str) -> Checkpoint:
  """Reads a checkpoint of a family that `configs` reads.

  Args:
    directory: with config.json, safetensors and the tokenizer's files.

  Raises:
    ValueError: a file is missing or damaged, or weights, config and tokenizer
      do not fit each other; see `checkpoint_dir`, `configs` and `names`.
  """
  hf = checkpoint_dir.read_config(directory)
  try:
    family, config = configs.to_t2x(hf)
  except KeyError as error:
    raise ValueError(
      f'{directory}/config.json lacks {error.args[0]!r}. Copy it again.'
    ) from None
  tokenizer = tokenizers.read(tokenizers.Pretrained(directory=str(directory)))
  if tokenizer.vocab_size > config.vocab_size:
    raise ValueError(
      f'{directory}: the tokenizer has {tokenizer.vocab_size} ids, and the '
      f'model {config.vocab_size}. They are of different checkpoints.'
    )
  tensors = checkpoint_dir.read_tensors(directory)
  return Checkpoint(
    family=family,
    hf=hf,
    config=configs.with_parts(config, tensors),
    tensors=tensors,
    tokenizer=tokenizer,
  )


def write(
  directory: str,
  model: model_lib.Model,
  tokenizer: tokenizers.Tokenizer | None = None,
  *,
  hf: Mapping[str, Any] | None = None,
  shard_bytes: int | None = None,
) -> str:
  """Writes a model as `transformers` loads it.

  Args:
    directory: new, or empty.
    model: of a config that one of the families computes.
    tokenizer: written beside it.
    hf: the config.json that the model came with; it is kept where it still
      describes the model.
    shard_bytes: the most of a file of weights; default 5 GB.

  Returns:
    The family.

  Raises:
    ValueError: no family computes the model, or the directory is not empty.
  """
  checkpoint_dir.check_new(directory)
  config = model.config
  if hf is not None and exported.same(config, hf):
    family = configs.to_t2x(hf)[0]
  else:
    family, made = exported.from_t2x(config)
    hf = {**made, **({} if tokenizer is None else _ids(tokenizer))}
  is_own = not isinstance(tokenizer, pretrained.PretrainedTokenizer)
  # Whatever may fail comes before the weights are written.
  file = tokenizer_file.make(tokenizer) if tokenizer and is_own else None
  tensors = names.from_t2x(family, config, model, copies=False)
  limit = {} if shard_bytes is None else {'shard_bytes': shard_bytes}
  checkpoint_dir.write(directory, hf, tensors, **limit)
  if isinstance(tokenizer, pretrained.PretrainedTokenizer):
    tokenizer.export(directory)
  elif file is not None:
    tokenizer_file.write(directory, file)
  return family


def experiment_of(
  found: Checkpoint, tokenizer_directory: Any
) -> experiment.Experiment:
  """Returns the settings of a run that would have made a checkpoint."""
  config = found.config
  objective: Any = causal_lm.CausalLM()
  if isinstance(config, encoder.EncoderConfig):
    objective = masked_lm.MaskedLM()
  elif isinstance(config, encoder_decoder.EncoderDecoderConfig):
    objective = span_corruption.SpanCorruption()
  own = ('max_position_embeddings', 'n_positions')
  lengths = [found.hf[name] for name in own if found.hf.get(name)]
  return experiment.Experiment(
    model=config,
    data=data_config.DataConfig(
      tokenizer=tokenizers.Pretrained(
        directory=os.path.abspath(tokenizer_directory)
      ),
      length=config.max_length or min(lengths, default=512),
      objective=objective,
    ),
  )


def ends(hf: Mapping[str, Any]) -> tuple[int, ...]:
  """Returns the tokens that end a text, where a config.json names several.

  Llama 3 has one for a text and one for a turn.
  """
  given = hf.get('eos_token_id')
  return tuple(given) if isinstance(given, list) else ()


def _ids(tokenizer: tokenizers.Tokenizer) -> dict[str, int]:
  return {
    'bos_token_id': tokenizer.bos_id,
    'eos_token_id': tokenizer.eos_id,
    'pad_token_id': tokenizer.pad_id,
  }

"""Exports a model as compiled programs that run without t2x.

An artefact is a directory of two programs that JAX has serialised
(`jax.export`), one for prefill and one for decoding; the weights, which are
arguments of the programs; the tokenizer; and run.py, which needs no packages
but jax, numpy and flatbuffers. JAX loads programs of releases up to half a year
older.

Shape suffixes: B rows, S capacity or source, N new token, E ends.
"""

from collections.abc import Sequence
import dataclasses
from importlib import resources
import importlib.util
import json
import logging
import math
from typing import Any

from etils import epath
import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from t2x import files
from t2x.decode import decode_loop
from t2x.decode import prefill
from t2x.decode import prompts as prompts_lib
from t2x.decode import sampling as sampling_lib
from t2x.inference import trained_model
from t2x.interop import tokenizer_file
from t2x.layers import dropout
from t2x.models import encoder_decoder

_LOG = logging.getLogger(__name__)
_NUM_ENDS = 4
_PLATFORMS = ('cpu', 'cuda', 'rocm', 'tpu')
MANIFEST = 'artefact.json'


def write(
  trained: trained_model.Trained,
  directory: str,
  *,
  rows: int = 4,
  max_length: int | None = None,
  chunk: int = 64,
  platforms: Sequence[str] = (),
) -> None:
  """Writes the artefact of a run.

  Args:
    trained: a decoder or an encoder-decoder, on one device.
    directory: directory to write, new or empty.
    rows: number of prompts that the programs take at a time.
    max_length: greatest number of tokens of a row, prompt and new ones; None
      for the length that the model was trained on.
    chunk: number of positions that prefill runs at a time.
    platforms: platforms that the programs run on, of cpu, cuda, rocm and tpu;
      empty for that of this process.

  Raises:
    ValueError: the model cannot generate or is on several devices, the
      directory is not empty, or a platform is unknown.
  """
  prefill.check_model(trained.model)
  if importlib.util.find_spec('flatbuffers') is None:
    raise ValueError(
      'JAX writes programs with the package flatbuffers, which is not '
      "installed: pip install '.[export]'."
    )
  platforms = tuple(platforms) or (_platform(),)
  for name in platforms:
    if name not in _PLATFORMS:
      raise ValueError(
        f'platform {name!r}; it is one of {", ".join(_PLATFORMS)}.'
      )
  if trained.mesh.size > 1:
    raise ValueError(
      f'The model lies on {trained.mesh.size} devices, and an artefact is for '
      'one. Load it without settings of the mesh.'
    )
  counts = {'rows': rows, 'max_length': max_length, 'chunk': chunk}
  prompts_lib.check_settings(counts, vocab_size=0, ids={})
  target = files.path(directory)
  if target.exists() and any(target.iterdir()):
    raise ValueError(f'{directory} is not empty. Name a new directory.')
  # `decoding_model` holds each layer's weights apart, which is faster on CPUs
  # alone.
  model = trained.decoding_model if platforms == ('cpu',) else trained.model
  positions = trained.config.model.max_length
  wanted = max_length or trained.config.data.length
  length = min(wanted, positions or wanted)
  capacity = -(-length // chunk) * chunk
  # An encoder takes no more positions than it has, padding or not.
  answers = isinstance(model, encoder_decoder.EncoderDecoder)
  read = min(capacity, positions or capacity)
  shapes = _Shapes(
    rows=rows,
    capacity=capacity,
    num_read=read if answers else capacity,
    chunk=chunk,
  )
  num_ends = max(_NUM_ENDS, prompts_lib.power_of_two(len(trained.end_ids)))
  _warn_of_defaults(trained)
  fixed = _fixed(trained, rows)
  with trained.decoding():
    programs, weights = _programs(model, shapes, platforms, num_ends, fixed)
  target.mkdir(parents=True, exist_ok=True)
  for name, program in programs.items():
    (target / f'{name}.jax').write_bytes(bytes(program))
  _write_weights(target, weights)
  manifest = {
    'platforms': platforms,
    'rows': rows,
    'num_read': shapes.num_read,
    'max_length': length,
    'num_ends': num_ends,
    'vocab_size': trained.config.model.vocab_size,
    'pad_id': trained.pad_id,
    'ends': trained.end_ids,
    **reading(trained),
    'start': trained.start_id,
    'calibration': trained.temperature,
  }
  (target / MANIFEST).write_text(json.dumps(manifest, indent=2) + '\n')
  _write_tokenizer(trained, target)
  code = resources.files('t2x.inference') / 'exported_runtime.py'
  (target / 'run.py').write_text(code.read_text())


def reading(trained: trained_model.Trained) -> dict[str, Any]:
  """Returns the manifest's entries on how texts become token ids and back."""
  tokenizer, frame = trained.tokenizer, trained.frame
  return {
    'before': frame.before,
    'after': frame.after,
    'answers': frame.reads_sentinels,
    'sentinels': tokenizer.sentinel_ids,
    # Whether the names of special tokens are ordinary text within texts.
    'split': getattr(tokenizer, 'splits_names', True),
  }


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Shapes:
  """Sizes of the programs' arguments.

  Attributes:
    rows: number of prompts.
    capacity: positions of the cache, a multiple of `chunk`.
    num_read: positions of the prompts or sources that prefill takes.
    chunk: number of positions that prefill runs at a time.
  """

  rows: int
  capacity: int
  num_read: int
  chunk: int


def _platform() -> str:
  return {'gpu': 'cuda'}.get(jax.default_backend(), jax.default_backend())


def _fixed(trained: trained_model.Trained, rows: int) -> sampling_lib.Rows:
  """Returns the sampling settings of a checkpoint that no call can change."""
  config = trained.calibrated(sampling_lib.SamplingConfig())
  single = {word[0]: -math.inf for word in config.banned if len(word) == 1}
  longer = [word for word in config.banned if len(word) > 1]
  if longer:
    _LOG.warning(
      'The artefact does not honour %d of bad_words_ids, those of several '
      'tokens.',
      len(longer),
    )
  bias = {**config.bias, **single}
  config = dataclasses.replace(config, bias=bias, banned=())
  return sampling_lib.rows([config], rows, trained.config.model.vocab_size)


def _warn_of_defaults(trained: trained_model.Trained) -> None:
  """Warns of a checkpoint's sampling settings that the artefact leaves out."""
  defaults = trained.generation.sampling
  if defaults:
    _LOG.warning(
      "The artefact does not take its checkpoint's %s: each call says how "
      'tokens are drawn.',
      ', '.join(f'{name}={value}' for name, value in defaults.items()),
    )


def _programs(
  model: decode_loop.Model,
  shapes: _Shapes,
  platforms: Sequence[str],
  num_ends: int,
  fixed: sampling_lib.Rows,
) -> tuple[dict[str, bytearray], list[jax.Array]]:
  """Returns the serialised programs by name, and the weights that they take.

  The programs take and return lists of arrays, since the classes of t2x's own
  trees are unknown where they run.

  Args:
    model: model to export.
    shapes: sizes of the programs' arguments.
    platforms: platforms that the programs run on.
    num_ends: number of end tokens of each row.
    fixed: sampling settings that no call can change.
  """
  weights, model_def = jax.tree.flatten(model)
  B, S, R = shapes.rows, shapes.capacity, shapes.num_read
  ids = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
  answers = isinstance(model, encoder_decoder.EncoderDecoder)

  def segments(count_B: jax.Array) -> jax.Array:
    return (jnp.arange(R)[None] < count_B[:, None]).astype(jnp.int32)

  def caches_of(
    weights: list[jax.Array], tokens_BS: jax.Array, count_B: jax.Array
  ) -> Any:
    model = model_def.unflatten(weights)
    if answers:
      segments_BS = segments(count_B)
      return decode_loop.encode(model, tokens_BS, segments_BS, capacity=S)
    return decode_loop.prefill(
      model, tokens_BS, count_B - 1, chunk=shapes.chunk
    )

  def read(
    weights: list[jax.Array], tokens_BS: jax.Array, count_B: jax.Array
  ) -> list[jax.Array]:
    return jax.tree.leaves(caches_of(weights, tokens_BS, count_B))

  like = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, w.dtype), weights)
  caches, caches_def = jax.tree.flatten(
    jax.eval_shape(caches_of, like, ids(B, R), ids(B))
  )

  def write(
    weights: list[jax.Array],
    caches: list[jax.Array],
    token_B: jax.Array,
    index_B: jax.Array,
    is_real_B: jax.Array,
    sources_B: jax.Array,
    drawn: dict[str, jax.Array],
  ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    model = model_def.unflatten(weights)
    settings = dataclasses.replace(
      fixed,
      temperature_B=drawn['temperature_B'],
      top_k_B=drawn['top_k_B'],
      top_p_B=drawn['top_p_B'],
      calibration_B=drawn['calibration_B'],
    )
    keys_B = dropout.row_keys(jax.random.key(drawn['seed']), jnp.arange(B))
    state = decode_loop.decode(
      model,
      caches_def.unflatten(caches),
      token_B=token_B,
      index_B=index_B,
      ended_B=~is_real_B,
      keys_B=keys_B,
      num_tokens=drawn['num_tokens'],
      ends_BE=drawn['ends_BE'],
      pad_id=jnp.int32(0),
      capacity=S,
      settings=settings,
      history=sampling_lib.History(),
      source_segments_BS=segments(sources_B) if answers else None,
    )
    return state.tokens_BN, state.log_probs_BN, state.count_B, state.ended_B

  real = lambda: jax.ShapeDtypeStruct((B,), jnp.float32)
  drawn = {
    'temperature_B': real(),
    'top_k_B': ids(B),
    'top_p_B': real(),
    'calibration_B': real(),
    'seed': jax.ShapeDtypeStruct((), jnp.uint32),
    'num_tokens': ids(),
    'ends_BE': ids(B, num_ends),
  }
  is_real_B = jax.ShapeDtypeStruct((B,), jnp.bool_)
  export = lambda fn: jax.export.export(jax.jit(fn), platforms=platforms)
  programs = {
    'read': export(read)(like, ids(B, R), ids(B)),
    'write': export(write)(
      like, caches, ids(B), ids(B), is_real_B, ids(B), drawn
    ),
  }
  return {k: p.serialize() for k, p in programs.items()}, weights


def _write_tokenizer(
  trained: trained_model.Trained, target: epath.Path
) -> None:
  try:
    tokenizer_file.make_writer(trained.tokenizer, trained.frame)(target)
  except ValueError as error:  # Prompts of token ids need no tokenizer.
    _LOG.warning('The artefact takes token ids alone. %s', error)


def _write_weights(target: epath.Path, weights: Sequence[jax.Array]) -> None:
  """Writes arrays one after the other, and an index of their places."""
  index, offset = [], 0
  with (target / 'weights.bin').open('wb') as file:
    for weight in weights:
      data = np.asarray(weight)
      file.write(np.ascontiguousarray(data).tobytes())
      index.append(
        {'shape': data.shape, 'dtype': str(data.dtype), 'offset': offset}
      )
      offset += data.nbytes
  (target / 'weights.json').write_text(json.dumps(index) + '\n')

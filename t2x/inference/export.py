"""A model as compiled programs, which run without t2x.

A directory of: programs that JAX has serialised (`jax.export`), one that reads
prompts and one that writes; the weights, which are their arguments; the
tokenizer; and run.py, which needs jax, numpy and flatbuffers alone. JAX reads
programs of releases up to half a year older.

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
  """Writes an artefact of a run.

  Args:
    trained: what `loading.load` returned, on one device.
    directory: new or empty.
    rows: prompts that the programs take at a time.
    max_length: positions of a row; default the length of training.
    chunk: tokens of the prompts that run at a time.
    platforms: that the programs run on, of cpu, cuda, rocm and tpu; default
      the one that is here.

  Raises:
    ValueError: the model cannot generate or lies on several devices, the
      directory holds something, or a platform is unknown.
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
  # In layers apart where they are faster, which is on CPUs.
  model = trained.writer if platforms == ('cpu',) else trained.model
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
  _tell_defaults(trained)
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
  """Returns what the manifest says of texts."""
  tokenizer, frame = trained.tokenizer, trained.frame
  return {
    'before': frame.before,
    'after': frame.after,
    'answers': frame.marks,
    'sentinels': tokenizer.sentinel_ids,
    # Whether the names of special tokens in texts are text.
    'split': getattr(tokenizer, 'splits_names', True),
  }


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Shapes:
  rows: int
  capacity: int
  num_read: int
  chunk: int


def _platform() -> str:
  return {'gpu': 'cuda'}.get(jax.default_backend(), jax.default_backend())


def _fixed(trained: trained_model.Trained, rows: int) -> sampling_lib.Rows:
  """Returns what a checkpoint forbids, which no call can change."""
  own = trained.calibrated(sampling_lib.SamplingConfig())
  single = {word[0]: -math.inf for word in own.banned if len(word) == 1}
  longer = [word for word in own.banned if len(word) > 1]
  if longer:
    _LOG.warning(
      'The artefact does not honour %d of bad_words_ids, those of several '
      'tokens.',
      len(longer),
    )
  own = dataclasses.replace(own, bias={**own.bias, **single}, banned=())
  return sampling_lib.rows([own], rows, trained.config.model.vocab_size)


def _tell_defaults(trained: trained_model.Trained) -> None:
  """Names the settings of a checkpoint that its artefact leaves to calls."""
  defaults = trained.generation.sampling
  if defaults:
    _LOG.warning(
      "The artefact does not take its checkpoint's %s: each call says how "
      'tokens are drawn.',
      ', '.join(f'{name}={value}' for name, value in defaults.items()),
    )


def _programs(model, shapes: _Shapes, platforms, num_ends: int, fixed):
  """Returns serialised programs by name, and the weights that they take.

  They take and give lists of arrays, as t2x's own trees are unknown elsewhere.
  """
  weights, model_def = jax.tree.flatten(model)
  B, S, R = shapes.rows, shapes.capacity, shapes.num_read
  ids = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
  answers = isinstance(model, encoder_decoder.EncoderDecoder)

  def segments(count_B):
    return (jnp.arange(R)[None] < count_B[:, None]).astype(jnp.int32)

  def caches_of(weights, tokens_BS, count_B):
    model = model_def.unflatten(weights)
    if answers:
      segments_BS = segments(count_B)
      return decode_loop.encode(model, tokens_BS, segments_BS, capacity=S)
    return decode_loop.prefill(
      model, tokens_BS, count_B - 1, chunk=shapes.chunk
    )

  def read(*args):
    return jax.tree.leaves(caches_of(*args))

  like = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, w.dtype), weights)
  caches, caches_def = jax.tree.flatten(
    jax.eval_shape(caches_of, like, ids(B, R), ids(B))
  )

  def write(weights, caches, token_B, index_B, is_real_B, sources_B, drawn):
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
    tokenizer_file.writer(trained.tokenizer, trained.frame)(target)
  except ValueError as error:  # Token ids do without.
    _LOG.warning('The artefact takes token ids alone. %s', error)


def _write_weights(target: epath.Path, weights: Sequence[jax.Array]) -> None:
  """Writes arrays one after the other, and where each of them is."""
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

"""Converts parameters from and to the names and layouts of Hugging Face.

tables.py has the table of each family; this file applies it in both directions.
It converts arrays, and reads and writes no files.

  >>> from t2x.interop import configs
  >>> family, config = configs.to_t2x({
  ...     'model_type': 'gpt2', 'vocab_size': 9, 'n_embd': 8, 'n_layer': 1,
  ...     'n_head': 2, 'n_positions': 4})
  >>> model = model_lib.make(config, rngs=nnx.Rngs(0))
  >>> from_t2x(family, config, model)['transformer.wte.weight'].shape
  (9, 8)
"""

from collections.abc import Collection
from collections.abc import Mapping
import dataclasses
import re
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from t2x.interop import released
from t2x.interop import tables
from t2x.models import encoder
from t2x.models import encoder_decoder
from t2x.models import model as model_lib

# Weights by name: objects with a shape that NumPy converts to arrays.
Tensors = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class _Slot:
  """One leaf of a model: a parameter, or one stacked over layers.

  Attributes:
    row: row of the table for this leaf.
    names: names in Hugging Face; one for each layer if the leaf is stacked.
    shape: shape in t2x, without a dimension of layers.
    stacked: whether the leaf has a leading dimension of layers.
  """

  row: tables.ParameterRow
  names: tuple[str, ...]
  shape: tuple[int, ...]
  stacked: bool


def to_t2x(
  family: str, config: model_lib.ModelConfig, tensors: Tensors
) -> model_lib.Transformer:
  """Builds the model of `config` from Hugging Face's parameters.

  Args:
    family: naming scheme, a key of `tables.FAMILIES`.
    config: config of the model; `configs.to_t2x` reads it from a config.json.
    tensors: arrays by name, with or without the family's prefix, and with or
      without copies of tied weights.

  Returns:
    The model, float32; rows that pad the vocabulary are zero.

  Raises:
    ValueError: names are missing or unexpected, arrays have another shape, or
      tied copies differ; the message lists all of them.
  """
  table = _family(family)
  slots, treedef = _slots(table, config)
  arrays = _canonical(table, released.merge_weights(tensors))
  cuts = _cuts(slots, config.vocab_size)
  expected = _expected_shapes(slots, cuts, config.vocab_size)
  copies = _copies(table, config, expected)
  # A checkpoint may hold a tied weight under its copy's name only.
  arrays |= {
    name: arrays[copy]
    for copy, name in copies.items()
    if copy in arrays and name not in arrays
  }
  problems = _problems(expected, copies, arrays)
  if problems:
    raise ValueError(
      f'The parameters do not fit the {family} model of the config:\n  '
      + '\n  '.join(problems)
      + '\nCheck that the config is that of the checkpoint (layers, sizes, '
      'pooler, heads, tied_head).'
    )
  return treedef.unflatten([_gather(slot, cuts, arrays) for slot in slots])


def from_t2x(
  family: str,
  config: model_lib.ModelConfig,
  model: model_lib.Transformer,
  *,
  bare: bool = False,
  copies: bool = True,
) -> dict[str, np.ndarray]:
  """Returns the model's parameters under Hugging Face's names.

  Args:
    family: naming scheme, a key of `tables.FAMILIES`.
    config: config of the model.
    model: model whose parameters are converted.
    bare: whether to leave out the heads and the prefix, as the classes without
      a head (BertModel, GPT2Model, LlamaModel) do.
    copies: whether to add the copies of tied weights, which files leave out.

  Returns:
    Float32 arrays by name.
  """
  table = _family(family)
  slots, _ = _slots(table, config)
  pieces: dict[str, dict[int, np.ndarray]] = {}
  dims = {name: slot.row.part[2] for slot in slots for name in slot.names}
  for slot, leaf in zip(slots, jax.tree.leaves(model)):
    layers = np.asarray(leaf) if slot.stacked else [np.asarray(leaf)]
    for name, array in zip(slot.names, layers):
      part = _from_layout(slot.row, array, config.vocab_size)
      pieces.setdefault(name, {})[slot.row.part[0]] = part
  tensors = {
    name: np.concatenate([parts[i] for i in sorted(parts)], dims[name])
    for name, parts in pieces.items()
  }
  if copies:
    tied = _copies(table, config, tensors)
    tensors |= {copy: tensors[name] for copy, name in tied.items()}
  if not bare:
    return tensors
  return {
    name.removeprefix(table.prefix): array
    for name, array in tensors.items()
    if name.startswith(table.prefix)
  }


def _family(family: str) -> tables.Family:
  if family not in tables.FAMILIES:
    raise ValueError(
      f'Unknown family {family!r}; known: {", ".join(tables.FAMILIES)}.'
    )
  return tables.FAMILIES[family]


def _slots(
  table: tables.Family, config: model_lib.ModelConfig
) -> tuple[list[_Slot], Any]:
  """Returns the slots of a model's leaves in order, and its `PyTreeDef`."""
  rows = {row.path: row for row in table.rows}
  shapes = jax.eval_shape(lambda: model_lib.make(config, rngs=nnx.Rngs(0)))
  leaves, treedef = jax.tree_util.tree_flatten_with_path(shapes)
  slots, unknown = [], []
  for path, leaf in leaves:
    name = jax.tree_util.keystr(path, simple=True, separator='.')
    name = name.removesuffix('.value')
    name, layers, stacked = _layers(name, config)
    if name not in rows:
      unknown.append(name)
      continue
    slots.append(
      _Slot(
        row=rows[name],
        names=tuple(rows[name].name.format(layer=i) for i in layers),
        shape=leaf.shape[1:] if stacked else leaf.shape,
        stacked=stacked,
      )
    )
  if unknown:
    raise ValueError(
      'The model has parameters that this family does not know: '
      f'{", ".join(unknown)}. Export it as another family, or build it with '
      'the config of one.'
    )
  return slots, treedef


def _layers(
  path: str, config: model_lib.ModelConfig
) -> tuple[str, tuple[int, ...], bool]:
  """Returns a path with `*` for the layer, its layers, whether it is stacked.

  A parameter outside the layers has the path unchanged and the layers (0,).
  """
  match = re.fullmatch(r'(.*layers)\.(group|remainder)\.(\d+)\.(.*)', path)
  if not match:
    return path, (0,), False
  before, place, member, after = match.groups()
  size, member = len(config.group), int(member)
  num_layers = config.num_layers
  if before.startswith('encoder'):
    assert isinstance(config, encoder_decoder.EncoderDecoderConfig)
    num_layers = config.num_encoder_layers or num_layers
  whole = num_layers // size * size
  stacked = place == 'group'
  numbers = range(member, whole, size) if stacked else (whole + member,)
  return f'{before}.*.{after}', tuple(numbers), stacked


def _canonical(table: tables.Family, tensors: Tensors) -> dict[str, Any]:
  """Adds the prefix to names that lack it, and drops buffers."""
  # The pattern of a name without its layer tells whether the family has it.
  pattern = lambda name: re.sub(r'\d+|{layer}', '#', name)
  known = {pattern(row.name) for row in table.rows}
  result = {}
  for name, tensor in tensors.items():
    if re.fullmatch(table.ignored, name):
      continue
    # BERT's first checkpoints have TensorFlow's names of a norm's parameters.
    name = re.sub(r'\.gamma$', '.weight', re.sub(r'\.beta$', '.bias', name))
    full = table.prefix + name
    result[full if pattern(full) in known else name] = tensor
  return result


def _problems(
  expected: Mapping[str, tuple[int, ...]],
  copies: Mapping[str, str],
  arrays: Tensors,
) -> list[str]:
  """Returns a line for each kind of mismatch, which lists the parameters.

  Args:
    expected: shape of each parameter of the family.
    copies: name of a tied copy -> name of the parameter.
    arrays: arrays of the checkpoint.
  """
  missing = [name for name in expected if name not in arrays]
  unexpected = [n for n in arrays if n not in expected and n not in copies]
  shapes = [
    f'{name} has {arrays[name].shape}, not {shape}'
    for name, shape in expected.items()
    if name in arrays and tuple(arrays[name].shape) != shape
  ]
  untied = [
    f'{copy} and {name}'
    for copy, name in copies.items()
    if copy in arrays and not np.array_equal(arrays[copy], arrays[name])
  ]
  kinds = {
    'Missing': missing,
    'Unexpected': unexpected,
    'Of another shape': shapes,
    'Tied in the config, but different': untied,
  }
  return [f'{kind}: {", ".join(x)}.' for kind, x in kinds.items() if x]


def _copies(
  table: tables.Family,
  config: model_lib.ModelConfig,
  tensors: Collection[str],
) -> dict[str, str]:
  """Returns the tied copies of a model: name of the copy -> of the parameter.

  Args:
    table: table of the family.
    config: config of the model.
    tensors: names of the model's parameters.
  """
  is_encoder = isinstance(config, encoder.EncoderConfig)
  headless = is_encoder and not config.masked_head
  return {
    copy: name
    for copy, name in table.copies.items()
    if copy not in tensors
    and name in tensors
    and not (headless and not copy.startswith(table.prefix))
  }


def _gather(
  slot: _Slot, cuts: Mapping[str, list[int]], arrays: Tensors
) -> jax.Array:
  """Returns a leaf: its layers converted, padded and stacked."""
  layers = [
    _to_layout(slot, cuts[name], np.asarray(arrays[name]))
    for name in slot.names
  ]
  layers = [
    np.pad(x, [(0, n - m) for m, n in zip(x.shape, slot.shape)]) for x in layers
  ]
  return jnp.asarray(np.stack(layers) if slot.stacked else layers[0])


def _part_shape(slot: _Slot, vocab_size: int) -> list[int]:
  """Returns the shape of a slot's part of an array of Hugging Face."""
  sizes = dict(zip(slot.row.letters, slot.shape), V=vocab_size)
  return [int(np.prod([sizes[x] for x in group])) for group in slot.row.groups]


def _cuts(slots: list[_Slot], vocab_size: int) -> dict[str, list[int]]:
  """Returns the sizes of the parts of each array of Hugging Face, by name."""
  cuts: dict[str, list[int]] = {}
  for slot in slots:
    index, num, dim = slot.row.part
    for name in slot.names:
      sizes = cuts.setdefault(name, [0] * num)
      sizes[index] = _part_shape(slot, vocab_size)[dim]
  return cuts


def _expected_shapes(
  slots: list[_Slot], cuts: Mapping[str, list[int]], vocab_size: int
) -> dict[str, tuple[int, ...]]:
  """Returns the shape of each array of Hugging Face."""
  shapes = {}
  for slot in slots:
    shape, dim = _part_shape(slot, vocab_size), slot.row.part[2]
    for name in slot.names:
      shapes[name] = (*shape[:dim], sum(cuts[name]), *shape[dim:][1:])
  return shapes


def _to_layout(slot: _Slot, cuts: list[int], array: np.ndarray) -> np.ndarray:
  """Converts one array of Hugging Face to t2x's order of dimensions."""
  row = slot.row
  index, _, dim = row.part
  ends = np.cumsum(cuts)[:-1]
  array = np.split(array.astype(np.float32), ends, dim)[index]
  order = ''.join(row.groups)
  sizes = dict(zip(row.letters, slot.shape))
  # The vocabulary is not merged with anything, so its size is the array's.
  shape = [-1 if letter == 'V' else sizes[letter] for letter in order]
  return array.reshape(shape).transpose([order.index(x) for x in row.letters])


def _from_layout(
  row: tables.ParameterRow, array: np.ndarray, vocab_size: int
) -> np.ndarray:
  """Inverts `_to_layout`, without the rows that pad the vocabulary."""
  sizes = dict(zip(row.letters, array.shape))
  if 'V' in sizes:
    array = np.take(array, np.arange(vocab_size), row.letters.index('V'))
    sizes['V'] = vocab_size
  groups = row.groups
  array = array.transpose([row.letters.index(x) for x in ''.join(groups)])
  return array.reshape([int(np.prod([sizes[x] for x in g])) for g in groups])

"""Parameters from and to the names and layouts of Hugging Face.

The table of each family is in tables.py; here it is applied, both ways. Only
arrays pass through: read a checkpoint with safetensors or torch.

  >>> from t2x.interop import configs
  >>> family, config = configs.to_t2x({
  ...     'model_type': 'gpt2', 'vocab_size': 9, 'n_embd': 8, 'n_layer': 1,
  ...     'n_head': 2, 'n_positions': 4})
  >>> model = model_lib.make(config, rngs=nnx.Rngs(0))
  >>> from_t2x(family, config, model)['transformer.wte.weight'].shape
  (9, 8)
"""

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
from t2x.models import model as model_lib

Tensors = Mapping[str, Any]  # Of what has a shape and becomes an array.


@dataclasses.dataclass(frozen=True)
class _Slot:
  """One leaf of a model: a parameter, or one stacked over layers.

  Attributes:
    row: the leaf's row of the table.
    names: its names, one for each layer if it is stacked.
    shape: in t2x, without the stacking.
    stacked: whether the leaf has a leading layer dimension.
  """

  row: tables.Row
  names: tuple[str, ...]
  shape: tuple[int, ...]
  stacked: bool


def to_t2x(
  family: str, config: model_lib.ModelConfig, tensors: Tensors
) -> model_lib.Transformer:
  """Builds the model of `config` from Hugging Face's parameters.

  Args:
    family: a key of `tables.FAMILIES`.
    config: the model; `configs.to_t2x` reads it from a config.json.
    tensors: name -> array; with or without the family's prefix, with or
      without copies of tied weights.

  Returns:
    The model, float32; rows that pad the vocabulary are zero.

  Raises:
    ValueError: names that are missing or unexpected, arrays of another shape,
      tied copies that differ; all of them in one message.
  """
  table = _family(family)
  slots, treedef = _slots(table, config)
  found = _canonical(table, released.merged(tensors))
  cuts = _cuts(slots, config.vocab_size)
  expected = _expected_shapes(slots, cuts, config.vocab_size)
  copies = _copies(table, config, expected)
  # A checkpoint may hold a tied weight under its copy's name only.
  found |= {
    name: found[copy]
    for copy, name in copies.items()
    if copy in found and name not in found
  }
  problems = _problems(expected, copies, found)
  if problems:
    raise ValueError(
      f'The parameters do not fit the {family} model of the config:\n  '
      + '\n  '.join(problems)
      + '\nCheck that the config is that of the checkpoint (layers, sizes, '
      'pooler, heads, tied_head).'
    )
  return treedef.unflatten([_gather(slot, cuts, found) for slot in slots])


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
    family: a key of `tables.FAMILIES`.
    config: the model's config.
    model: the model.
    bare: leave out the heads and the prefix, as the classes without a head
      (BertModel, GPT2Model, LlamaModel) have it.
    copies: with the copies of tied weights, which files leave out.

  Returns:
    Name -> float32 array.
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


def _slots(table: tables.Family, config: model_lib.ModelConfig):
  """Returns the slots of a model's leaves in order, and its tree structure."""
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


def _layers(path: str, config: Any) -> tuple[str, tuple[int, ...], bool]:
  """Returns the path with `*`, its layers' numbers, whether it is stacked.

  A parameter that belongs to no layer counts as one of layer 0.
  """
  match = re.fullmatch(r'(.*layers)\.(group|remainder)\.(\d+)\.(.*)', path)
  if not match:
    return path, (0,), False
  before, place, member, after = match.groups()
  size, member = len(config.group), int(member)
  num_layers = config.num_layers
  if before.startswith('encoder'):
    num_layers = config.num_encoder_layers or num_layers
  whole = num_layers // size * size
  stacked = place == 'group'
  numbers = range(member, whole, size) if stacked else (whole + member,)
  return f'{before}.*.{after}', tuple(numbers), stacked


def _canonical(table: tables.Family, tensors: Tensors) -> dict[str, Any]:
  """Renames to names with the prefix, and drops buffers."""
  # Enough to tell whether a name is the family's: the layer does not matter.
  pattern = lambda name: re.sub(r'\d+|{layer}', '#', name)
  known = {pattern(row.name) for row in table.rows}
  found = {}
  for name, tensor in tensors.items():
    if re.fullmatch(table.ignored, name):
      continue
    # BERT's first checkpoints have TensorFlow's names of a norm's vectors.
    name = re.sub(r'\.gamma$', '.weight', re.sub(r'\.beta$', '.bias', name))
    full = table.prefix + name
    found[full if pattern(full) in known else name] = tensor
  return found


def _problems(expected, copies, found) -> list[str]:
  """Returns a line for each kind of mismatch; each names the parameters."""
  missing = [name for name in expected if name not in found]
  unexpected = [n for n in found if n not in expected and n not in copies]
  shapes = [
    f'{name} has {found[name].shape}, not {shape}'
    for name, shape in expected.items()
    if name in found and tuple(found[name].shape) != shape
  ]
  untied = [
    f'{copy} and {name}'
    for copy, name in copies.items()
    if copy in found and not np.array_equal(found[copy], found.get(name))
  ]
  kinds = {
    'Missing': missing,
    'Unexpected': unexpected,
    'Of another shape': shapes,
    'Tied in the config, but different': untied,
  }
  return [f'{kind}: {", ".join(x)}.' for kind, x in kinds.items() if x]


def _copies(table, config, tensors) -> dict[str, str]:
  """Returns the tied copies that a model of this config has."""
  is_encoder = isinstance(config, encoder.EncoderConfig)
  headless = is_encoder and not config.masked_head
  return {
    copy: name
    for copy, name in table.copies.items()
    if copy not in tensors
    and name in tensors
    and not (headless and not copy.startswith(table.prefix))
  }


def _gather(slot: _Slot, cuts, found) -> jax.Array:
  """Returns a leaf: its layers converted, padded and stacked."""
  layers = [
    _to_layout(slot, cuts[name], np.asarray(found[name])) for name in slot.names
  ]
  layers = [
    np.pad(x, [(0, n - m) for m, n in zip(x.shape, slot.shape)]) for x in layers
  ]
  return jnp.asarray(np.stack(layers) if slot.stacked else layers[0])


def _part_shape(slot: _Slot, vocab_size: int) -> list[int]:
  """Returns the shape of a slot's part of the other array."""
  sizes = dict(zip(slot.row.letters, slot.shape), V=vocab_size)
  return [int(np.prod([sizes[x] for x in group])) for group in slot.row.groups]


def _cuts(slots: list[_Slot], vocab_size: int) -> dict[str, list[int]]:
  """Returns the sizes of the parts of each array, in order, by its name."""
  cuts: dict[str, list[int]] = {}
  for slot in slots:
    index, num, dim = slot.row.part
    for name in slot.names:
      sizes = cuts.setdefault(name, [0] * num)
      sizes[index] = _part_shape(slot, vocab_size)[dim]
  return cuts


def _expected_shapes(slots, cuts, vocab_size: int) -> dict[str, tuple]:
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
  row: tables.Row, array: np.ndarray, vocab_size: int
) -> np.ndarray:
  """The inverse of `_to_layout`, without the rows that pad the vocabulary."""
  sizes = dict(zip(row.letters, array.shape))
  if 'V' in sizes:
    array = np.take(array, np.arange(vocab_size), row.letters.index('V'))
    sizes['V'] = vocab_size
  groups = row.groups
  array = array.transpose([row.letters.index(x) for x in ''.join(groups)])
  return array.reshape([int(np.prod([sizes[x] for x in g])) for g in groups])

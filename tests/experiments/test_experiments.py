"""Every experiment builds, fits together, and shapes out on its mesh."""

import dataclasses
import glob
import importlib
import math
import os

import jax
import pytest

from t2x.config import abstract_state
from t2x.config import consistency
from t2x.parallel import mesh

_DIRECTORY = os.path.join(os.path.dirname(__file__), '..', '..', 'experiments')
_NAMES = sorted(
  os.path.basename(path).removesuffix('.py')
  for path in glob.glob(os.path.join(_DIRECTORY, '*.py'))
)
_TINY = ('quickstart', 'gpt2_tiny', 'bert_tiny', 't5_tiny', 'moe_tiny')
_TOOLS = ('generate', 'evaluate', 'embed', 'classify', 'serve')


def get_config(name):
  return importlib.import_module(name).get_config()


def test_the_list_is_complete():
  real = {'llama2_7b', 'llama_1b', 'mixtral_8x7b', 'gpt3_175b', 'gpt2_small'}
  real |= {'t5_base', 't5_11b', 'bert_base'}
  assert {*_TINY, *_TOOLS, *real} <= set(_NAMES)


@pytest.mark.parametrize('name', [n for n in _NAMES if n not in _TOOLS])
def test_shapes_and_shardings(name):
  config = get_config(name)
  consistency.check(config, jax.device_count())
  the_mesh = mesh.make(config.mesh)
  shapes, _ = abstract_state.shapes_of(config, the_mesh)
  parameters = jax.tree.leaves(shapes.model)
  assert all(leaf.sharding.mesh == the_mesh for leaf in parameters)
  if config.mesh.fsdp != 1:
    whole = sum(p.size for p in parameters)
    local = sum(math.prod(p.sharding.shard_shape(p.shape)) for p in parameters)
    assert local < whole


@pytest.mark.parametrize('name', _TINY)
@pytest.mark.parametrize('tensor', [1, 2, 4, 8])
def test_tiny_experiments_split_in_any_way(name, tensor):
  config = get_config(name)
  model = config.model
  assert model.attention.num_heads == model.attention.kv_heads == 8
  assert model.num_layers % 4 == 0
  assert config.data.length % 64 == 0
  assert config.data.batch_size == 32
  assert config.train.log_every == 1
  assert config.mesh == mesh.MeshConfig(data=-1)
  split = mesh.MeshConfig(fsdp=8 // tensor, data=1, tensor=tensor)
  shapes, _ = abstract_state.shapes_of(
    dataclasses.replace(config, mesh=split), mesh.make(split)
  )
  leaves = jax.tree.leaves(shapes.model)
  assert any(p.sharding.shard_shape(p.shape) != p.shape for p in leaves)


@pytest.mark.parametrize('name', [n for n in _NAMES if n not in _TOOLS])
def test_docstrings_give_the_command(name):
  text = importlib.import_module(name).__doc__
  assert f'python experiments/{name}.py --workdir=' in text
  assert ('Expected:' in text) or ('Not trained here' in text)

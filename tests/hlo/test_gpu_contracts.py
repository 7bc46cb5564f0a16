"""Steps compiled for GPUs: what is counted in them against the theory.

All of them: `pip install '.[plan-gpu]'`.
"""

import functools

import gpu
import pytest

from t2x.compilation import lowering
from t2x.config import experiment
from t2x.cost_model import communication_bounds
from t2x.data import config as data
from t2x.data import tokenizers
from t2x.hardware import machines
from t2x.hardware import target_devices
from t2x.hlo import collectives
from t2x.hlo import matmul_flops
from t2x.layers import attention_config
from t2x.layers import mlp
from t2x.layers import norm
from t2x.layers import position
from t2x.models import decoder
from t2x.models import flops
from t2x.parallel import mesh as mesh_lib

pytestmark = pytest.mark.slow  # Each step compiles for seconds.

# LLVM's optimisations cost a third of the time and change no collective.
FAST = {'xla_backend_optimization_level': 0}
V, D = 512, 128
near = functools.partial(pytest.approx, rel=0.01)


def step_of(num_nodes=1, **sizes):
  """Returns the config, the mesh's sizes, the collectives and the FLOPs."""
  config = experiment.Experiment(
    model=decoder.DecoderConfig(
      vocab_size=V,
      num_layers=4,
      embed_dim=D,
      attention=attention_config.Dense(
        num_heads=8, head_dim=D // 8, kernel='blocks'
      ),
      mlp=mlp.MlpConfig(hidden=256, bias=False),
      norm=norm.RMSNorm(),
      position=position.Rotary(),
      tied_head='untied',
      dtype='bfloat16',
    ),
    data=data.DataConfig(
      length=64, batch_size=16, tokenizer=tokenizers.Bytes()
    ),
    mesh=mesh_lib.MeshConfig(**sizes),
  )
  mesh = gpu.mesh('h100:8', num_nodes, **sizes)
  options = machines.options_of([*mesh.devices.flat]) | FAST
  compiled = target_devices.compile(lowering.lower_step(config, mesh), options)
  text = compiled.as_text()
  assert text and '"__cublas$lt$matmul"' in text
  stats = compiled.memory_analysis()
  assert stats.argument_size_in_bytes > 0 and stats.temp_size_in_bytes > 0
  found = collectives.collectives(text, mesh)
  model = flops.forward_parts(
    config.model, flops.BatchShape(16, 64), skip_masked=False
  )
  # All is split over all devices.
  assert matmul_flops.matrix_flops(text) * mesh.size == 3 * sum(model.values())
  return communication_bounds.bytes_sent(config, mesh.shape), found


def test_fsdp_within_nodes_and_data_between():
  want, found = step_of(2, data=2, fsdp=8)
  # The table of token vectors is gathered in float32, by XLA's own choice.
  assert collectives.total(found) == near(want + 2 * V * D)
  assert collectives.total(found, 'all-gather', 'data') == 0


def test_tensor_parallel_within_data():
  want, found = step_of(data=2, tensor=4)
  assert collectives.total(found) == near(want)
  assert {c.kind for c in found} == {'all-reduce'}

"""Machines: options that compilers know, and layouts that fit."""

import dataclasses
import functools
import importlib
import importlib.metadata
import json
import math
import re

from absl import flags
import commands
import extras
import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import llama2_7b
import lowered
import pytest
import tiny
import tpu

from t2x import main
from t2x.compilation import program
from t2x.config import abstract_state
from t2x.config import layout_advice
from t2x.config import overrides as overrides_lib
from t2x.hardware import compiler_options
from t2x.hardware import machines
from t2x.hlo import collectives
from t2x.hlo import module as module_lib
from t2x.layers import attention_config
from t2x.layers import mlp
from t2x.models import decoder
from t2x.parallel import mesh as mesh_lib
from t2x.parallel import sharding
from t2x.training import train_state

_TOPOLOGIES = {
  'v4': 'v4:2x2x1',
  'v5e': 'v5e:2x2',
  'v5p': 'v5p:2x2x1',
  'v6e': 'v6e:2x2',
  '7x': 'tpu7x:2x2x1',
}


@dataclasses.dataclass(frozen=True)
class Device:
  """A device as far as machines look at it."""

  device_kind: str
  slice_index: int = 0


# --- Which chip, which options. ---


@pytest.mark.parametrize(
  'kind, chip',
  [
    ('TPU v4', 'v4'),
    ('TPU v4 lite', None),
    ('TPU v5 lite', 'v5e'),
    ('TPU v5', 'v5p'),
    ('TPU v5p', 'v5p'),
    ('TPU v6 lite', 'v6e'),
    ('TPU7x', '7x'),
    ('NVIDIA A100-SXM4-40GB', 'a100-40'),
    ('NVIDIA A100-SXM4-80GB', 'a100'),
    ('NVIDIA H100 80GB HBM3', 'h100'),
    ('NVIDIA H200', 'h200'),
    ('NVIDIA B200', 'b200'),
    ('cpu', None),
    ('TPU v3', None),
    ('Radeon', None),
  ],
)
def test_chips_are_told_by_their_kind(kind, chip):
  assert machines.chip_of(kind) == chip
  known = chip is not None or kind == 'cpu'
  assert bool(machines.compiler_options(kind)) == known


@pytest.mark.parametrize('chip', _TOPOLOGIES)
def test_devices_of_topologies_are_known(chip):
  kind = tpu.devices(_TOPOLOGIES[chip])[0].device_kind
  assert machines.chip_of(kind) == chip


@pytest.mark.parametrize('kind', ['TPU v5 lite', 'TPU7x'])
def test_the_network_between_slices_has_options_of_its_own(kind):
  one = machines.compiler_options(kind)
  two = machines.compiler_options(kind, 2)
  assert {**one, **two} == two
  assert 'xla_tpu_enable_data_parallel_all_reduce_opt' in two.keys() - one


def test_nodes_of_gpus_reduce_more_at_once():
  name = 'xla_gpu_all_reduce_combine_threshold_bytes'
  one = machines.compiler_options('NVIDIA H100 80GB HBM3')
  two = machines.compiler_options('NVIDIA H100 80GB HBM3', 2)
  assert one.keys() == two.keys()
  assert two[name] > one[name]


def test_each_option_has_a_line_on_what_it_does():
  with open(compiler_options.__file__) as file:
    lines = file.read().splitlines()
  options = [i for i, line in enumerate(lines) if re.match(r"\s+'xla_", line)]
  assert len(options) > 25
  for i in options:
    assert lines[i - 1].lstrip().startswith('# '), lines[i]


def test_overrides():
  devices = [Device('TPU v5 lite', i // 2) for i in range(4)]
  base = machines.options_of(devices)
  assert base == machines.compiler_options('TPU v5 lite', 2)
  scheduler = 'xla_tpu_enable_latency_hiding_scheduler'
  own = machines.options_of(
    devices,
    (f'{scheduler}=', 'xla_new=3', 'xla_max_concurrent_x=', 'xla_a=b=c'),
  )
  del base[scheduler]
  assert own == {**base, 'xla_new': '3', 'xla_a': 'b=c'}
  # A caller's change stays the caller's.
  assert scheduler in machines.options_of(devices)


def test_overrides_are_set_by_name_and_checked(tmp_path):
  config = overrides_lib.override(
    tiny.experiment_of(tmp_path), {'compiler_options': 'xla_a=1,xla_b='}
  )
  assert config.compiler_options == ('xla_a=1', 'xla_b=')
  config = dataclasses.replace(config, compiler_options=('xla_a',))
  message = r"compiler_options='xla_a'; an option is xla_NAME=VALUE, or xla_NA"
  with pytest.raises(ValueError, match=message):
    layout_advice.check(config, 8)


# --- Compilers know the options. ---


@functools.cache
def product_on(chip, num_slices):
  """A product whose weight is split over a slice, lowered."""
  devices = tpu.devices(_TOPOLOGIES[chip], num_slices)
  config = mesh_lib.MeshConfig(data=num_slices, fsdp=-1)
  mesh = mesh_lib.make(config, devices)
  shape = lambda *axes: jax.ShapeDtypeStruct(
    (128, 128), jnp.bfloat16, sharding=NamedSharding(mesh, P(*axes))
  )
  loss = lambda w, x: jnp.sum(jnp.tanh(x @ w).astype(jnp.float32))
  split = shape('fsdp')
  step = jax.jit(jax.grad(loss), out_shardings=split.sharding)
  return step.lower(split, shape(('data', 'fsdp')))


@pytest.mark.parametrize('num_slices', [1, 2])
@pytest.mark.parametrize('chip', _TOPOLOGIES)
def test_tpu_options_are_known_to_the_compiler(chip, num_slices):
  options = machines.CHIPS[chip].options(num_slices)
  assert len(options) >= 5
  options |= compiler_options.DIVERGE_TPU if num_slices == 1 else {}
  assert tpu.compile_text(product_on(chip, num_slices), **options)


@pytest.mark.parametrize('chip', _TOPOLOGIES)
def test_exchanges_of_every_chip_are_counted(chip):
  """Those of SparseCores (v6e, 7x) stand in computations of their own."""
  devices = tpu.devices(_TOPOLOGIES[chip])
  mesh = mesh_lib.make(mesh_lib.MeshConfig(data=1, fsdp=-1), devices)
  text = tpu.compile_text(product_on(chip, 1), **machines.options_of(devices))
  found = collectives.collectives(text, mesh)
  size = 2 * 128 * 128
  gathers = [c.bytes for c in found if c.kind == 'all-gather']
  sums = [c.bytes for c in found if c.kind in ('all-reduce', 'reduce-scatter')]
  assert gathers == [size] and sums == [size]


@pytest.mark.parametrize('fsdp', [4, 8])
def test_a_product_needs_no_permute_where_devices_diverge(fsdp):
  """A ring of permutes beside it, or a shift of rows after it."""
  config = mesh_lib.MeshConfig(pipe=2, data=1, fsdp=fsdp)
  mesh = mesh_lib.make(config, tpu.devices(f'v5e:{fsdp // 2}x4'))
  split = NamedSharding(mesh, P('fsdp'))
  x, y = (
    jax.ShapeDtypeStruct((16, 2048, size), jnp.bfloat16, sharding=split)
    for size in (2048, 7168)
  )
  fn = lambda x, y: jnp.einsum('BTD,BTE->DE', x, y)
  lowered = jax.jit(fn, out_shardings=split).lower(x, y)
  permutes = {}
  for diverge in (False, True):
    options = machines.options_of([*mesh.devices.flat], diverge=diverge)
    text = tpu.compile_text(lowered, **options)
    permutes[diverge] = 'collective-permute' in text
  assert permutes == {False: True, True: False}


@pytest.mark.parametrize(
  'option, message',
  [
    ({'xla_tpu_enable_no_such_thing': True}, 'No such compile option'),
    ({'xla_tpu_spmd_threshold_for_allgather_cse': 'far'}, 'far'),
    ({'xla_tpu_all_gather_collective_matmul_mode': 'sometimes'}, 'sometimes'),
  ],
)
def test_the_tpu_compiler_knows_what_is_no_option(option, message):
  with pytest.raises(jax.errors.JaxRuntimeError, match=message):
    tpu.compile_text(product_on('v5e', 1), **option)


def test_gpu_options_are_known_to_xla():
  """Any of XLA's compilers reads them all; the CPU's has no use for them."""
  program = jax.jit(lambda x: x + 1).lower(1.0)
  for slices in (1, 2):
    options = machines.compiler_options('NVIDIA H100 80GB HBM3', slices)
    program.compile(compiler_options=dict(options))
  for option in ({'xla_gpu_no_such': True}, {'xla_tpu_rwb_fusion': True}):
    with pytest.raises(jax.errors.JaxRuntimeError, match='No such compile opt'):
      program.compile(compiler_options={**options, **option})
  wrong = {'xla_gpu_all_reduce_combine_threshold_bytes': 'much'}
  with pytest.raises(jax.errors.JaxRuntimeError, match="'much' is not a valid"):
    program.compile(compiler_options=wrong)


# --- What shows in a program. ---

MODEL = decoder.DecoderConfig(
  vocab_size=512,
  num_layers=2,
  embed_dim=512,
  attention=attention_config.Dense(num_heads=4, head_dim=128),
  mlp=mlp.MlpConfig(hidden=2048, bias=False),
  dtype='bfloat16',
)
# All of them: a name that is not among a chip's options is passed over.
_NO_ASYNC = [
  f'{name}='
  for name in compiler_options.ASYNC_GATHER | compiler_options.ASYNC_REDUCE
]


def text_of(chip, overrides=(), **sizes):
  mesh = tpu.mesh(_TOPOLOGIES[chip], **sizes)
  config = train_state.StepConfig()
  return tpu.compile_text(
    lowered.lower(mesh, MODEL, config, rows=8, overrides=overrides)
  )


def asynchronous_gathers(chip, overrides=()):
  """How many all-gathers of an FSDP step run beside something else."""
  module = module_lib.parse(text_of(chip, overrides, data=1, fsdp=4))
  instructions = [
    i for c in module.computations.values() for i in c.instructions.values()
  ]
  assert any(i.op.startswith('all-gather') for i in instructions)
  # Apart, or piece by piece in fusions.
  return sum(
    i.op == 'all-gather-start' or '"AsyncCollectiveStart"' in i.attributes
    for i in instructions
  )


@pytest.mark.slow
def test_gathers_run_beside_computation():
  assert asynchronous_gathers('v4', _NO_ASYNC) == 0
  assert asynchronous_gathers('v4') > 4


@pytest.mark.slow
def test_other_cores_gather():
  of_sparse = lambda text: len(re.findall('[Ss]parse_?[Cc]ore', text))
  off = [f'{name}=' for name in compiler_options.SPARSE_GATHER]
  assert of_sparse(text_of('v6e', off, data=1, fsdp=4)) == 0
  assert of_sparse(text_of('v6e', data=1, fsdp=4)) > 4


@pytest.mark.slow
def test_v5e_gathers_so_by_itself():
  assert asynchronous_gathers('v5e', _NO_ASYNC) > 4
  off = 'xla_tpu_enable_async_collective_fusion=false'
  assert asynchronous_gathers('v5e', [off]) == 0


@pytest.mark.slow
def test_the_scheduler_may_move_reductions():
  """It says so of those that it left in place, too: all of these."""
  extras.need('libtpu', extra='plan')
  if importlib.metadata.version('libtpu') >= '0.0.50':
    pytest.skip('newer libtpu leaves out what was considered and not done')
  moved = 'async_collective_name="all-reduce-start'
  assert moved not in text_of('v5e', _NO_ASYNC, data=4)
  assert moved in text_of('v5e', data=4)


# --- A program has them. ---


def test_a_program_compiles_with_them(tmp_path, monkeypatch):
  """The CPU's, and what is added, reach the programs."""
  given = []
  jit = jax.jit
  monkeypatch.setattr(
    jax, 'jit', lambda *a, **k: (given.append(k), jit(*a, **k))[1]
  )
  config = tiny.experiment_of(tmp_path)
  mesh = mesh_lib.make(config.mesh)
  program.Program(config, mesh, num_steps=2)
  options = [k['compiler_options'] for k in given if 'compiler_options' in k]
  assert options and all(o == compiler_options.CPU for o in options)
  config = dataclasses.replace(
    config, compiler_options=('xla_cpu_no_such=true',)
  )
  made = program.Program(config, mesh, num_steps=2)
  with sharding.use(mesh, config.rules):
    with pytest.raises(
      jax.errors.JaxRuntimeError, match="No such.*'xla_cpu_no_such'"
    ):
      made.init_state()


# --- The tables of experiments. ---

_LLAMA = llama2_7b.get_machines()


def state_bytes(config, num_devices):
  """Of parameters and optimizer on one device."""
  sizes = mesh_lib.sizes(config.mesh, num_devices)
  mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
  shapes, _ = abstract_state.shapes_of(config, mesh)
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(shapes)
    if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
  )


def on_machine(name):
  settings = overrides_lib.parse_settings(_LLAMA[name].settings)
  return overrides_lib.override(llama2_7b.get_config(), settings)


def test_the_table_has_what_is_rented():
  assert {'v5e-256', '2xv5e-256', 'v5p-64', 'v6e-256', '8xh100-8'} <= set(
    _LLAMA
  )


@pytest.mark.parametrize('name', _LLAMA)
def test_every_machine_has_a_layout_that_works(name):
  """And room for the state in half its memory; activations are not counted."""
  machine = _LLAMA[name]
  config = on_machine(name)
  layout_advice.check(
    config, machine.num_devices, num_slices=machine.num_slices
  )
  # Else a run would not go on elsewhere.
  assert config.data.batch_size == 1024
  used = state_bytes(config, machine.num_devices)
  parameters = 6.74e9
  fsdp = mesh_lib.sizes(config.mesh, machine.num_devices)['fsdp']
  # Weights and two moments in float32.
  assert used == pytest.approx(12 * parameters / fsdp, rel=0.01)
  assert used < machines.CHIPS[machine.chip].memory / 2


def test_one_chip_has_no_room_for_it():
  """Or the figures above would say nothing."""
  config = llama2_7b.get_config()
  assert state_bytes(config, 1) > machines.CHIPS['v5e'].memory
  assert state_bytes(config, 1) > machines.CHIPS['h100'].memory


def test_only_experiments_that_list_machines_have_them():
  for name in ('gpt2_tiny', 'llama2_7b'):
    module = importlib.import_module(name)
    assert hasattr(module, 'get_machines') == (name == 'llama2_7b')


# --- The flag. ---


@pytest.fixture
def values():
  """absl's flags, as main.run defines them."""
  names = {'machine': None, 'set': [], 'config': None, 'print_config': False}
  return lambda **given: type('Flags', (), {**names, **given})


def test_set_wins_over_the_machine(monkeypatch, values):
  monkeypatch.setattr(
    flags, 'FLAGS', values(set=['train.remat=none', 'mesh.fsdp=16'])
  )
  config = main.resolve(llama2_7b.get_config, _LLAMA['v5p-64'])
  assert config.data.batch_size == 1024
  assert config.train.accumulate == 8
  assert (config.train.remat, config.mesh.fsdp) == ('none', 16)


def test_an_unknown_machine_is_answered_with_the_closest(monkeypatch, values):
  with pytest.raises(
    ValueError,
    match=r'--machine=v5e-265 is not one of this experiment\. Did you mean '
    r'v5e-256 or .*\? It has v5e-256, 2xv5e-256, ',
  ):
    machines.find(_LLAMA, 'v5e-265')
  monkeypatch.setattr(flags, 'FLAGS', values(machine='v5e-256'))
  with pytest.raises(ValueError, match='this experiment lists no machines'):
    main._train(llama2_7b.get_config, {})


def test_another_machine_is_refused():
  machine = _LLAMA['2xv5e-256']
  here = [Device('TPU v5 lite', i // 256) for i in range(512)]
  machines.check('2xv5e-256', machine, here)
  start = (
    r"--machine=2xv5e-256 is 512 devices in 2 slices of kind 'TPU v5 lite' or "
    r"'TPU v5e', and this process sees "
  )
  for devices, seen in (
    (here[:256], r"256 devices in 1 slice of kind 'TPU v5 lite'\. Name the ma"),
    (here[:1], '1 device in 1 slice of kind'),
    (
      [Device('TPU v5', d.slice_index) for d in here],
      "512 devices in 2 slices of kind 'TPU v5'",
    ),
    ([Device('TPU v5 lite')] * 512, '512 devices in 1 slice of kind'),
  ):
    with pytest.raises(ValueError, match=start + seen):
      machines.check('2xv5e-256', machine, devices)


def llama(*arguments):
  return commands.run(llama2_7b.__file__, *arguments)


@pytest.mark.slow
def test_the_flag_from_the_command_line(tmp_path):
  done = llama('--machine=v6e-256', '--print_config')
  assert done.returncode == 0, done.stderr
  assert json.loads(done.stdout)['data']['batch_size'] == 1024
  done = llama('--machine=v6e-256', f'--workdir={tmp_path}/run')
  assert done.returncode == 1
  assert done.stderr.strip().startswith(
    'error: --machine=v6e-256 is 256 devices in 1 slice of kind'
  )
  assert "of kind 'cpu'" in done.stderr and 'Traceback' not in done.stderr
  assert not (tmp_path / 'run').exists()
  done = llama('--machine=v6-256', '--print_config')
  assert 'Did you mean v6e-256' in done.stderr


def test_a_machine_that_cannot_be():
  with pytest.raises(ValueError, match=r"chip='v9'\); it is one of v4, v5e, "):
    machines.Machine(chip='v9', num_devices=4)
  with pytest.raises(ValueError, match='4 devices cannot lie in 3 slices of'):
    machines.Machine(chip='v4', num_devices=4, num_slices=3)
  with pytest.raises(ValueError, match='has 0 devices in 1 slices; there is'):
    machines.Machine(chip='v4', num_devices=0)

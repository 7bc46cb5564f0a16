"""Memory of one device in a compiled program, by argument and by module."""

from collections.abc import Mapping
import dataclasses
import re
from typing import Any

import jax

from t2x.config import experiment
from t2x.hardware import machines
from t2x.hlo import liveness
from t2x.pipeline import tick
from t2x.planning import sharding_table

# Scopes of the model's code; other parts of an operation's path are JAX's.
_SCOPES = (
  'attention',
  'balance',
  'cross',
  'decoder',
  'embeddings',
  'encoder',
  'head',
  'messages',
  'mlp',
  'optimizer',
  'router',
  'scores',
  'tower',
  'weights',
)
# Contents of the buffers that the loops of a stage's tick fill, outside any
# module.
_LOOP_BUFFERS = {
  'forward': 'kept by forward passes',
  'recompute': 'kept by recomputation',
  'backward': 'kept by backward passes',
  'weight': 'gradients of weights',
}
_LOOP = re.compile(tick.LOOP + r'([a-z]+)_')
_GIB = 2**30
ON_HOSTS = ', on the hosts'
_UNITS = {'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceMemory:
  """Memory of one device in a step, in bytes.

  Attributes:
    arguments: bytes of the parameters, the optimizer state and the batch.
    temporaries: bytes that the compiler reserves for temporary buffers.
    peak: most bytes in use at one time; of a program that did not fit, the
      bytes that the compiler asked for.
    host: bytes of arguments and temporaries in the memory of the hosts.
    limit: bytes of memory that a device has; None if unknown.
    state: bytes of the train state, by its part and then by module.
    activations: bytes of the buffers live at the peak, by the module and the
      pass that computed them. Their sum is near `temporaries` (`liveness`).
  """

  arguments: float
  temporaries: float
  peak: float
  host: float = 0.0
  limit: float | None
  state: Mapping[str, Mapping[str, float]]
  activations: Mapping[str, float] = dataclasses.field(default_factory=dict)

  @property
  def fits(self) -> bool | None:
    """Whether the peak is within the limit; None if that is unknown."""
    return None if self.limit is None else self.peak <= self.limit


def of_compiled(
  config: experiment.Experiment,
  mesh: jax.sharding.Mesh,
  chip: str | None,
  analysis: Any,
  text: str,
) -> DeviceMemory:
  """Returns the memory of a program by the compiler's own figures.

  Args:
    config: the experiment.
    mesh: the mesh that it was compiled for.
    chip: a name of `machines.CHIPS`; None for simulated devices.
    analysis: the compiler's figures, from `compiled.memory_analysis()`.
    text: the program, from `compiled.as_text()`.
  """
  activations: dict[str, float] = {}
  for buffer in liveness.at_peak(text):
    name = source(buffer.op_name)
    activations[name] = activations.get(name, 0.0) + buffer.bytes
  host = sum(
    getattr(analysis, f'host_{part}_size_in_bytes', 0)
    for part in ('argument', 'temp')
  )
  return DeviceMemory(
    arguments=analysis.argument_size_in_bytes,
    temporaries=analysis.temp_size_in_bytes,
    peak=analysis.peak_memory_in_bytes,
    host=host,
    limit=limit_of(chip),
    state=_state(config, mesh.size),
    activations=_largest_first(activations),
  )


def of_refused(
  config: experiment.Experiment,
  mesh: jax.sharding.Mesh,
  chip: str | None,
  message: str,
) -> DeviceMemory:
  """Returns the memory of a program that the compiler refused as too large.

  Args:
    config: the experiment.
    mesh: the mesh that it was compiled for.
    chip: a name of `machines.CHIPS`; None for simulated devices.
    message: the compiler's message; the largest size in it is the peak.
  """
  state = _state(config, mesh.size)
  sizes = [
    float(number) * _UNITS[unit]
    for number, unit in re.findall(r'([\d.]+)([KMGT])\b', message)
  ]
  arguments = sum(on_device(state).values())
  needed = max(sizes, default=arguments)
  return DeviceMemory(
    arguments=arguments,
    temporaries=max(needed - arguments, 0.0),
    peak=needed,
    limit=limit_of(chip),
    state=state,
  )


# Bytes that programs can use, where it is less than the chip's memory: of 16
# GiB they have 15.75 on v5e.
_USABLE = {'v5e': 15.75 * _GIB}


def on_device(state: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
  """Returns the bytes on devices of each part of `DeviceMemory.state`."""
  return {
    group: sum(modules.values())
    for group, modules in state.items()
    if not group.endswith(ON_HOSTS)
  }


def limit_of(chip: str | None) -> float | None:
  """Returns the bytes of a device's memory that programs can use.

  Args:
    chip: a name of `machines.CHIPS`; None, whose memory is unknown, gives None.
  """
  if chip is None:
    return None
  return _USABLE.get(chip, machines.CHIPS[chip].memory)


def _state(
  config: experiment.Experiment, num_devices: int
) -> dict[str, dict[str, float]]:
  """Returns `DeviceMemory.state`."""
  table = sharding_table.make(config, num_devices)
  result: dict[str, dict[str, float]] = {}
  offloaded = config.train.offload == 'optimizer'
  for group, rows in table.groups.items():
    if offloaded and group == 'optimizer state':
      group += ON_HOSTS
    sums: dict[str, float] = {}
    for row in rows:
      name = module_of(row.path)
      sums[name] = sums.get(name, 0.0) + row.bytes_per_device
    result[group] = _largest_first(sums)
  return result


def _largest_first(sums: dict[str, float]) -> dict[str, float]:
  return dict(sorted(sums.items(), key=lambda item: -item[1]))


def module_of(path: str) -> str:
  """Returns the module of an array of a train state, by its dotted path.

  >>> module_of('tower.layers.group.0.attention.q_DNH')
  'tower attention'
  >>> module_of('1.mu.embeddings.tokens.table_VD')
  'embeddings'
  """
  skipped = ('mu', 'nu', 'layers', 'group', 'remainder')
  parts = [p for p in re.split(r'[.\[\]]+', path) if p and not p.isdigit()]
  *modules, name = [p for p in parts if p not in (*skipped, 'value')]
  return (
    ' '.join(modules[:2] if modules[:1] != ['embeddings'] else modules[:1])
    or name
  )


def source(op_name: str) -> str:
  """Returns the module of the model and the pass that an operation is from.

  >>> source('jit(train_step)/jvp(decoder)/while/body/mlp/BTD,DF->BTF/dot')
  'decoder mlp'
  >>> source('jit(train_step)/transpose(jvp(decoder))/while/body/mlp/mul')
  'decoder mlp, gradient'
  >>> source('jit(train_step)/while/body/pipeline_loop_weight_tower/while/dus')
  'gradients of weights'
  """
  parts = re.findall(r'[a-z_]+', op_name)
  scopes = dict.fromkeys(part for part in parts if part in _SCOPES)
  loop = _LOOP.search(op_name)
  outside = _LOOP_BUFFERS.get(loop[1], 'elsewhere') if loop else 'elsewhere'
  name = ' '.join(scopes) or outside
  again = 'rematted_computation' in op_name
  backward = 'transpose(' in op_name and not again
  return name + (', gradient' if backward else ', again' if again else '')

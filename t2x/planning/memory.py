"""Where the bytes of a device go: arguments, temporaries, and by module."""

from collections.abc import Mapping
import dataclasses
import re
from typing import Any

from t2x.config import experiment
from t2x.hardware import machines
from t2x.hlo import liveness
from t2x.pipeline import tick
from t2x.planning import sharding_table

# Scopes of the model's code; what else is in an operation's path is JAX's.
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
# What the loops of a stage's tick fill, beside what is a module's.
_FILLED = {
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
class Memory:
  """Bytes on one device.

  Attributes:
    arguments: parameters, optimizer state and batch.
    temporaries: the largest that exists at a time, beside them.
    peak: of all at a time; what the compiler asked for, where it refused.
    host: bytes of them in the memory of the hosts.
    limit: what a device has; None where it is not known.
    state: part of the train state -> module -> bytes.
    activations: what is there at the fullest moment, by what made it; the sum
      is near the temporaries (`liveness`).
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
    return None if self.limit is None else self.peak <= self.limit


def of_compiled(
  config: experiment.Experiment,
  mesh: Any,
  chip: str | None,
  analysis: Any,
  text: str,
) -> Memory:
  """Returns the compiler's figures of a program.

  Args:
    config: of the run.
    mesh: that it was compiled for.
    chip: a name of `machines.CHIPS`, or None.
    analysis: `compiled.memory_analysis()`.
    text: `compiled.as_text()`.
  """
  activations: dict[str, float] = {}
  for buffer in liveness.at_peak(text):
    name = source(buffer.op_name)
    activations[name] = activations.get(name, 0.0) + buffer.bytes
  host = sum(
    getattr(analysis, f'host_{part}_size_in_bytes', 0)
    for part in ('argument', 'temp')
  )
  return Memory(
    arguments=analysis.argument_size_in_bytes,
    temporaries=analysis.temp_size_in_bytes,
    peak=analysis.peak_memory_in_bytes,
    host=host,
    limit=limit_of(chip),
    state=_state(config, mesh.size),
    activations=_largest_first(activations),
  )


def of_refused(
  config: experiment.Experiment, mesh: Any, chip: str | None, message: str
) -> Memory:
  """Returns what is known of a program for which memory was not enough.

  Args:
    config: of the run.
    mesh: that it was compiled for.
    chip: a name of `machines.CHIPS`, or None.
    message: the compiler's, of which sizes are read.
  """
  state = _state(config, mesh.size)
  sizes = [
    float(number) * _UNITS[unit]
    for number, unit in re.findall(r'([\d.]+)([KMGT])\b', message)
  ]
  arguments = sum(on_device(state).values())
  needed = max(sizes, default=arguments)
  return Memory(
    arguments=arguments,
    temporaries=max(needed - arguments, 0.0),
    peak=needed,
    limit=limit_of(chip),
    state=state,
  )


# TPUs keep a part for themselves: of 16 GiB programs have 15.75 on v5e.
_USABLE = {'v5e': 15.75 * _GIB}


def on_device(state: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
  """Returns the sum of each part of `Memory.state` that devices hold."""
  return {
    group: sum(modules.values())
    for group, modules in state.items()
    if not group.endswith(ON_HOSTS)
  }


def limit_of(chip: str | None) -> float | None:
  """Returns the bytes that programs may use of a device, where known."""
  if chip is None:
    return None
  return _USABLE.get(chip, machines.CHIPS[chip].memory)


def _state(config, num_devices: int) -> dict[str, dict[str, float]]:
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
  """Returns where in the model an operation was written, and in which pass.

  >>> source('jit(train_step)/jvp(decoder)/while/body/mlp/BTD,DF->BTF/dot')
  'decoder mlp'
  >>> source('jit(train_step)/transpose(jvp(decoder))/while/body/mlp/mul')
  'decoder mlp, gradient'
  >>> source('jit(train_step)/while/body/pipeline_loop_weight_tower/while/dus')
  'gradients of weights'
  """
  found = re.findall(r'[a-z_]+', op_name)
  scopes = dict.fromkeys(part for part in found if part in _SCOPES)
  loop = _LOOP.search(op_name)
  filled = _FILLED.get(loop[1], 'elsewhere') if loop else 'elsewhere'
  name = ' '.join(scopes) or filled
  again = 'rematted_computation' in op_name
  backward = 'transpose(' in op_name and not again
  return name + (', gradient' if backward else ', again' if again else '')

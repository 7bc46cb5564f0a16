r"""Compiles what a run compiles, for devices that need not be here.

python scripts/compile_step.py --experiment=llama2_7b --topology=v5e:16x16 \
    --layout=fsdp=256 --out=runs/step.t2x [--set NAME=VALUE ...]

The file holds the first weights' program, the train step and the evaluation;
`experiments/NAME.py --executable=FILE` with the same settings runs them, so
that no pod waits for a compiler. What the file was made for is written in it,
and a run that is another is refused with what differs; `unzip -p FILE
manifest.json` shows it.

--topology is kind and shape of a slice, as in v5e:4x4 or v5p:2x2x4, of which
there are --num_slices; --host=2x4 is for hosts with other than 2x2 of its
chips, as single hosts of eight v5e have. `cpu:8` stands for eight devices that
this machine simulates, to try it out. Without --layout the experiment's own
mesh is taken. Versions of jax, jaxlib and libtpu must be the pod's.
"""

import os

from absl import flags
import jax

from t2x import absent
from t2x import catalog
from t2x import executables
from t2x import experiment
from t2x import layout_text
from t2x import layouts
from t2x import main as main_lib
from t2x import mesh as mesh_lib
from t2x import program
from t2x import train

_COUNT = '--xla_force_host_platform_device_count'


def main() -> None:
  flags.DEFINE_string('experiment', None, 'Its name, or a path.')
  flags.DEFINE_string('config', None, 'A saved config.json instead.')
  flags.DEFINE_string('topology', None, 'Kind and shape: v5e:4x4, or cpu:8.')
  flags.DEFINE_integer('num_slices', 1, 'How many of them.', lower_bound=1)
  flags.DEFINE_string('host', None, 'Shape of the chips of a host: 2x4.')
  flags.DEFINE_string('layout', None, 'Sizes: data=2,fsdp=2,tensor=2.')
  flags.DEFINE_string('out', None, 'File to write.')
  main_lib.define_set_flag()
  main_lib.app_run(_main)


def _main() -> None:
  values = flags.FLAGS
  for name, example in (('topology', 'v5e:4x4'), ('out', 'runs/step.t2x')):
    if not values[name].value:
      raise ValueError(f'--{name} is missing; give it, as in {example}.')
  config = main_lib.resolve(lambda: catalog.load(values.experiment))
  devices = _devices(values.topology, values.num_slices, values.host)
  if values.layout is not None:
    own, layout = config, layout_text.parse(values.layout)
    config = layout.applied(config)
    layout.check(config, len(devices), own=own)
  else:
    slices = mesh_lib.num_slices(devices)
    layouts.check(config, len(devices), num_slices=slices)
  made = program.Program(
    config,
    mesh_lib.make(config.mesh, devices),
    num_steps=_num_steps(config),
  )
  manifest = executables.save(values.out, made, say=_say)
  sizes = manifest['programs']['step']['memory_bytes']
  parts = ', '.join(f'{kind} {size:,}' for kind, size in sizes.items())
  _say(f'Bytes of a step on a device: {parts}.')
  _say(
    f'Written to {values.out}. A run of {len(devices)} x '
    f'{devices[0].device_kind} takes it with the same settings and '
    f'--executable={values.out}'
  )


def _devices(topology: str, num_slices: int, host: str | None):
  kind, _, shape = topology.partition(':')
  # This machine's own accelerators are left alone.
  jax.config.update('jax_platforms', 'cpu')
  if kind != 'cpu':
    return absent.devices(topology, num_slices, host)
  if not shape.isdigit() or int(shape) < 1 or num_slices > 1 or host:
    raise ValueError(
      f'--topology={topology}: devices that are simulated lie in one slice on '
      'one host and have a number alone, as in cpu:8.'
    )
  given = os.environ.get('XLA_FLAGS', '')
  if _COUNT not in given:  # Read when the first is touched.
    os.environ['XLA_FLAGS'] = f'{given} {_COUNT}={shape}'.strip()
  devices = jax.devices()
  if len(devices) != int(shape):
    raise ValueError(
      f'--topology={topology}, and XLA_FLAGS={given} simulates '
      f'{len(devices)}. Take {_COUNT} out of XLA_FLAGS.'
    )
  return devices


def _num_steps(config: experiment.Experiment) -> int:
  if config.train.num_epochs is not None:
    raise ValueError(
      f'train.num_epochs={config.train.num_epochs}: the steps of an epoch are '
      'known once the corpus is read, and a schedule is part of the program. '
      'Give --set train.num_epochs=none --set train.num_steps=N.'
    )
  return train.resolve_num_steps(config, None)


def _say(text: str) -> None:
  print(text, flush=True)


if __name__ == '__main__':
  main()

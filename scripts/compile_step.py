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

# This machine's own accelerators are left alone.
os.environ['JAX_PLATFORMS'] = 'cpu'

from absl import flags

from t2x import absent
from t2x import catalog
from t2x import executables
from t2x import layout_text
from t2x import layouts
from t2x import main as main_lib
from t2x import mesh as mesh_lib


def main() -> None:
  flags.DEFINE_string('experiment', None, 'Its name, or a path.')
  flags.DEFINE_string('config', None, 'A saved config.json instead.')
  flags.DEFINE_string('topology', None, 'Kind and shape: v5e:4x4, or cpu:8.')
  flags.DEFINE_integer('num_slices', 1, 'How many of them.', lower_bound=1)
  flags.DEFINE_string('host', None, 'Shape of the chips of a host: 2x4.')
  flags.DEFINE_string('layout', None, 'Sizes: data=2,fsdp=2,tensor=2.')
  flags.DEFINE_string('out', None, 'File to write.')
  main_lib.define_set_flag()
  flags.mark_flags_as_required(['topology', 'out'])
  main_lib.app_run(_main)


def _main() -> None:
  values = flags.FLAGS
  config = main_lib.resolve(lambda: catalog.load(values.experiment))
  devices = absent.devices(values.topology, values.num_slices, values.host)
  if values.layout is not None:
    own, layout = config, layout_text.parse(values.layout)
    config = layout.applied(config)
    layout.check(config, len(devices), own=own)
  else:
    slices = mesh_lib.num_slices(devices)
    layouts.check(config, len(devices), num_slices=slices)
  manifest = executables.save(
    values.out, config, mesh_lib.make(config.mesh, devices), say=_say
  )
  sizes = manifest['programs']['step']['memory_bytes']
  parts = ', '.join(f'{kind} {size:,}' for kind, size in sizes.items())
  _say(f'Bytes of a step on a device: {parts}.')
  _say(
    f'Written to {values.out}. A run of {len(devices)} x '
    f'{devices[0].device_kind} takes it with the same settings and '
    f'--executable={values.out}'
  )


def _say(text: str) -> None:
  print(text, flush=True)


if __name__ == '__main__':
  main()

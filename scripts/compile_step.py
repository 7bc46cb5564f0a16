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
import sys

# This machine's own accelerators are left alone.
os.environ['JAX_PLATFORMS'] = 'cpu'

from absl import flags

from t2x import main as main_lib
from t2x.compilation import executables
from t2x.parallel import mesh as mesh_lib
from t2x.planning import target_flags


def main() -> None:
  target_flags.define()
  flags.DEFINE_string('host', None, 'Shape of the chips of a host: 2x4.')
  flags.DEFINE_string('out', None, 'File to write.')
  main_lib.app_run(_main)


def _main() -> None:
  values = flags.FLAGS
  if not values.out:
    sys.exit('error: --out=FILE is missing: where the programs are written.')
  _, config = target_flags.experiment_of()
  devices = target_flags.devices(values.host)
  config = target_flags.laid_out(config, devices)
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

r"""Where a layout puts each parameter: a table, and a page with drawings.

python scripts/show_sharding.py --experiment=llama2_7b \
    --layout=fsdp=64,tensor=4 [--html=FILE] [--json] [--set NAME=VALUE ...]

Prints for every parameter its shape, logical axes, PartitionSpec, bytes on a
device, and the replicated share (1 - 1 / copies: of the bytes that all devices
hold of it, those beyond one copy), and the totals with those of the optimizer's
state. Nothing is allocated or compiled and no device is needed, so 7B weights
on 256 devices take as long as small ones. A layout that cannot be is answered
with the nearest that can.

--layout gives the sizes of mesh axes (others are 1, and one may be -1 with
--num_devices) and settings, as in fsdp=4,rules.vocab=none; without it the
experiment's own mesh is shown. --experiment is
the name of a file in experiments/, or a path. --html writes the page, --json
prints one JSON object instead of the table.
"""

import dataclasses
import json
import os
import pathlib
import shlex

# Nothing here touches a device; a TPU or GPU in use elsewhere does not matter.
os.environ['JAX_PLATFORMS'] = 'cpu'

from absl import flags

from t2x import main
from t2x.config import catalog
from t2x.config import experiment
from t2x.config import layout_advice
from t2x.config import layout_flag
from t2x.config import overrides
from t2x.config import partitioning
from t2x.parallel import mesh
from t2x.planning import sharding_page
from t2x.planning import sharding_table

_EXPERIMENT = flags.DEFINE_string('experiment', None, 'Its name, or a path.')
_LAYOUT = flags.DEFINE_string('layout', None, 'Sizes: data=2,fsdp=2,tensor=2.')
_DEVICES = flags.DEFINE_integer(
  'num_devices', None, 'Default: what the sizes multiply to.', lower_bound=1
)
_HTML = flags.DEFINE_string('html', None, 'File to write the page to.')
_JSON = flags.DEFINE_bool('json', False, 'Print one JSON object.')
main.define_set_flag()


def show() -> None:
  config = catalog.load(_EXPERIMENT.value)
  settings = flags.FLAGS.set
  config = overrides.override(config, overrides.parse_settings(settings))
  layout = layout_flag.of_mesh(config.mesh)
  if _LAYOUT.value is not None:
    layout = layout_flag.parse(_LAYOUT.value)
    config = layout.applied(config)
  num_devices = _DEVICES.value or layout.num_devices
  own = config
  config, note = with_rows(config, num_devices)
  if _LAYOUT.value is not None:
    layout.check(config, _DEVICES.value, own=own)
  else:
    layout_advice.check(config, num_devices, own=own)
  table = sharding_table.make(config, num_devices)
  if _HTML.value:
    page = sharding_page.page(
      table,
      title=f'Sharding of {pathlib.Path(_EXPERIMENT.value or "").stem}',
      notes=[' '.join(f'--set {shlex.quote(s)}' for s in settings)],
    )
    file = pathlib.Path(_HTML.value)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(page, encoding='utf-8')
  if _JSON.value:
    print(json.dumps(sharding_table.to_json(table)))
    return
  print(sharding_table.text(table))
  for line in (note, _HTML.value and f'The page is {_HTML.value}'):
    if line:
      print(line)


def with_rows(config: experiment.Experiment, num_devices: int):
  """Returns the config with rows for all devices, and a note where changed.

  Parameters lie the same whatever the batch, so it refuses no layout here.
  """
  try:
    sizes = mesh.sizes(config.mesh, num_devices)
  except ValueError:  # `layout_advice.check` says it, with what to do.
    return config, None
  multiple = partitioning.of(config, sizes).rows_multiple
  rows = config.data.batch_size
  if rows % multiple == 0:
    return config, None
  need = -(-rows // multiple) * multiple
  data = dataclasses.replace(config.data, batch_size=need)
  note = (
    f'To train so, --set data.batch_size={need}: its {rows} rows cannot be '
    'dealt to this layout.'
  )
  return dataclasses.replace(config, data=data), note


if __name__ == '__main__':
  main.app_run(show)

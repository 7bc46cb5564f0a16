r"""Checks that activations do not depend on the width: a table and a picture.

python scripts/coordinate_check.py --experiment=gpt2_tiny \
    --widths=64,128,256,512 --set model.mup=mup --set model.mup.base_width=64 \
    [--steps=5] [--output=FILE.png]

Trains a few steps at each width and prints, for each place in the model, how
the size of its activations and their change since the first step go with the
width: the slope of their logarithms. With rates that hold at every width
(model.mup) they are flat. The exit status is 1 if one is not.
"""

import os
import pathlib
import sys

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

from absl import flags

from t2x import main as main_lib
from t2x.config import catalog
from t2x.tracking import text_table


def main() -> None:
  flags.DEFINE_string('experiment', None, 'Its name, or a path.')
  flags.DEFINE_string('config', None, 'A saved config.json instead.')
  flags.DEFINE_list('widths', ['64', '128', '256', '512'], 'At least two.')
  flags.DEFINE_integer('steps', 5, 'Updates at each width.', lower_bound=1)
  flags.DEFINE_string('output', None, 'File for a picture, .png or .svg.')
  main_lib.define_set_flag()
  main_lib.app_run(_main)


def _main() -> None:
  from t2x.sweeps import coordinates
  from t2x.sweeps import coordinates_picture

  values = flags.FLAGS
  config = main_lib.resolve(lambda: catalog.load(values.experiment))
  given = ','.join(values.widths)
  try:
    widths = sorted({int(width) for width in values.widths})
  except ValueError:
    widths = []
  if len(widths) < max(2, len(values.widths)) or widths[0] < 1:
    sys.exit(
      f'error: --widths={given}: two different widths or more, as in '
      '--widths=64,128,256.'
    )
  if values.output:
    folder = pathlib.Path(values.output).absolute().parent
    if pathlib.Path(values.output).suffix not in ('.png', '.svg', '.pdf'):
      sys.exit(f'error: --output={values.output}: a .png, .svg or .pdf file.')
    folder.mkdir(parents=True, exist_ok=True)
  main_lib.use_compilation_cache()
  found = coordinates.measure(config, widths, values.steps)
  slopes = coordinates.slopes(found)
  print('\n'.join(text_table.aligned(coordinates_picture.rows(found, slopes))))
  if values.output:
    coordinates_picture.write(found, values.output)
    print(f'The picture is {values.output}')
  wrong = [s.place for s in slopes if s.grows or s.vanishes]
  if wrong:
    sys.exit(
      f'error: not flat over widths: {", ".join(wrong)}. Rates of one width do '
      'not hold at others; see model.mup.'
    )
  print('Flat over all widths.')


if __name__ == '__main__':
  main()

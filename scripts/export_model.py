r"""A run as compiled programs, which run without t2x.

python scripts/export_model.py --workdir=RUN --to=DIR [--platforms=cpu,cuda,tpu]
python DIR/run.py --prompt='The function returns' --num_tokens=32

DIR then holds programs of `jax.export`, the weights, the tokenizer, and run.py,
which needs jax, numpy and flatbuffers alone (and `tokenizers` for text). RUN
may also be the directory of a checkpoint of Hugging Face.
"""

import sys

from absl import flags

from t2x import main

_TO = flags.DEFINE_string('to', None, 'What is made, new or empty.')
_ROWS = flags.DEFINE_integer('rows', 4, 'Prompts at a time.')
_MAX_LENGTH = flags.DEFINE_integer(
  'max_length', None, 'Positions of a row; default as in training.'
)
_PLATFORMS = flags.DEFINE_list(
  'platforms', [], 'Of cpu, cuda, rocm, tpu; default the one that is here.'
)
main.define_trained_flags()


def export() -> None:
  from t2x.inference import export as export_lib
  from t2x.inference import loading

  if not _TO.value:
    sys.exit('error: --to is missing: name a directory for what is made.')
  trained = loading.load(**main.load_arguments())
  export_lib.write(
    trained,
    _TO.value,
    rows=_ROWS.value,
    max_length=_MAX_LENGTH.value,
    platforms=_PLATFORMS.value,
  )
  print(f'{_TO.value} holds the model: python {_TO.value}/run.py --help')


if __name__ == '__main__':
  main.app_run(export)

r"""Checkpoints of Hugging Face to runs, and back.

python scripts/convert_hf.py --from=DIR --to=WORKDIR

DIR holds config.json, safetensors and a tokenizer of one of the families that
docs/inference.md lists (BERT, GPT-2, T5, Llama and those like it, ...). WORKDIR
is then as a run leaves it: experiments/generate.py, embed.py, classify.py and
evaluate.py take it. The way back, for such a run and for any other whose model
one of the families computes:

python scripts/convert_hf.py --from=WORKDIR --to=DIR
"""

import sys

from absl import flags

from t2x import main

_FROM = flags.DEFINE_string('from', None, 'What there is: DIR or WORKDIR.')
_TO = flags.DEFINE_string('to', None, 'What is made, new or empty.')
_STEP = flags.DEFINE_integer(
  'step', None, "A run's checkpoint; default the newest."
)


def convert() -> None:
  from t2x.inference import hf_conversion

  source, target = _FROM.value, _TO.value
  if not source or not target:
    sys.exit(
      'error: --from=DIR and --to=DIR are needed: what there is, and what is '
      'made.'
    )
  if hf_conversion.is_run(source):
    family = hf_conversion.from_run(source, target, _STEP.value)
    print(f'{target} holds a {family} with its tokenizer.')
  else:
    number = hf_conversion.to_run(source, target)
    print(f'{target} holds a run of {number:,} parameters, at its step 0.')


if __name__ == '__main__':
  main.app_run(convert)

r"""A vector for each text, from an encoder: one line of JSON.

python experiments/embed.py --workdir=RUN --text='One text.' --text='Another.'

RUN is a run, or the directory of a BERT, RoBERTa or T5 of Hugging Face. Each
vector is the mean of the encoder's output over the text's tokens, and has the
length 1: a dot product of two is their cosine. --text_file=FILE reads one text
a line.
"""

import json

from absl import flags

from t2x import main

_TEXT = flags.DEFINE_multi_string('text', [], 'A text; may repeat.')
_TEXT_FILE = flags.DEFINE_string('text_file', None, 'One text a line.')
_STEP = flags.DEFINE_integer('step', None, 'Checkpoint; default the newest.')
flags.DEFINE_string('workdir', None, 'The run.')
main.define_set_flag()


def embed() -> None:
  from t2x.inference import embeddings
  from t2x.inference import loading

  texts = main.read_lines(_TEXT.value, _TEXT_FILE.value, 'text')
  main.use_compilation_cache()
  trained = loading.load(
    main.workdir(), step=_STEP.value, settings=flags.FLAGS.set
  )
  vectors = embeddings.embed(trained, texts)
  print(json.dumps([[float(f'{x:.7g}') for x in v] for v in vectors]))


if __name__ == '__main__':
  main.app_run(embed)

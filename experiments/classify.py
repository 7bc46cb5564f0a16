r"""The labels of texts, from an encoder with a head of classes: a line of JSON.

python experiments/classify.py --workdir=RUN --text='Well done.' --text='No.'

RUN is a run of data.objective=classification, or the directory of a BERT or
RoBERTa of Hugging Face for the classes of texts or of tokens. Of a text there
is the probability of each label (the value, of a regression), of a token its
place, text, likeliest label and probability. --text_file=FILE reads one text a
line; --second=TEXT, for each text one, makes pairs.
"""

import json

from absl import flags

from t2x import main

_TEXT = flags.DEFINE_multi_string('text', [], 'A text; may repeat.')
_TEXT_FILE = flags.DEFINE_string('text_file', None, 'One text a line.')
_SECOND = flags.DEFINE_multi_string(
  'second', [], 'What goes with a text, for each in their order.'
)
_STEP = flags.DEFINE_integer('step', None, 'Checkpoint; default the newest.')
flags.DEFINE_string('workdir', None, 'The run.')
main.define_set_flag()


def classify() -> None:
  from t2x.inference import embeddings
  from t2x.inference import loading

  texts = main.read_lines(_TEXT.value, _TEXT_FILE.value, 'text')
  main.use_compilation_cache()
  trained = loading.load(
    main.workdir(), step=_STEP.value, settings=flags.FLAGS.set
  )
  print(json.dumps(embeddings.labelled(trained, texts, _SECOND.value)))


if __name__ == '__main__':
  main.app_run(classify)

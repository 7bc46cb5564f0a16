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

_SECOND = flags.DEFINE_multi_string(
  'second', [], 'What goes with a text, for each in their order.'
)
main.define_trained_flags()
main.define_text_flags()


def classify() -> None:
  from t2x.inference import embeddings
  from t2x.inference import loading

  texts = main.texts()
  main.use_compilation_cache()
  trained = loading.load(**main.load_arguments())
  print(json.dumps(embeddings.labelled(trained, texts, _SECOND.value)))


if __name__ == '__main__':
  main.app_run(classify)

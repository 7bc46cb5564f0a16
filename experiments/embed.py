r"""A vector for each text, from an encoder: one line of JSON.

python experiments/embed.py --workdir=RUN --text='One text.' --text='Another.'

RUN is a run, or the directory of a BERT, RoBERTa or T5 of Hugging Face. Each
vector is the mean of the encoder's output over the text's tokens, and has the
length 1: a dot product of two is their cosine. --text_file=FILE reads one text
a line.
"""

import json

from t2x import main

main.define_trained_flags()
main.define_text_flags()


def embed() -> None:
  from t2x.inference import embeddings
  from t2x.inference import loading

  texts = main.texts()
  main.use_compilation_cache()
  trained = loading.load(**main.load_arguments())
  vectors = embeddings.embed(trained, texts)
  print(json.dumps([[float(f'{x:.7g}') for x in v] for v in vectors]))


if __name__ == '__main__':
  main.app_run(embed)

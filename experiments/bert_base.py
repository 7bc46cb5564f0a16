r"""BERT base (110M), masked language modelling on 512 tokens a row.

python experiments/bert_base.py --workdir=DIR --set data.source=TFDS_NAME

Devlin et al., 2019, appendix A.2: 256 rows a step, one million steps, Adam
with linear decay. Not trained here; a test builds its shapes and shardings.
"""

import dataclasses

from t2x import main
from t2x.config import experiment
from t2x.data import config as data
from t2x.data import tokenizers
from t2x.models import presets
from t2x.objectives import masked_lm
from t2x.training import optim


def get_config() -> experiment.Experiment:
  return experiment.Experiment(
    model=dataclasses.replace(presets.bert_base(), dtype='bfloat16'),
    data=data.DataConfig(
      length=512,
      batch_size=256,
      tokenizer=tokenizers.SentencePiece(vocab_size=30522),
      objective=masked_lm.MaskedLM(rate=0.15),
    ),
    optim=optim.AdamW(
      learning_rate=1e-4,
      weight_decay=0.01,
      b2=0.999,
      eps=1e-6,
      schedule=optim.Schedule(shape='linear', warmup_steps=10_000, final=0.0),
    ),
    train=experiment.TrainConfig(
      num_steps=1_000_000,
      eval_every=5000,
      eval_batches=64,
      checkpoint_every=5000,
      log_every=10,
    ),
  )


if __name__ == '__main__':
  main.run(get_config)

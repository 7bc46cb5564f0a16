r"""T5 1.1 base (248M), span corruption on 512 tokens a row.

python experiments/t5_base.py --workdir=DIR --set data.source=TFDS_NAME

Raffel et al., 2020, section 3.1: Adafactor, inverse square root schedule with
10,000 warmup steps. Not trained here; a test builds its shapes and shardings.
"""

import dataclasses

from t2x import main
from t2x.config import experiment
from t2x.data import config as data
from t2x.data import tokenizers
from t2x.models import presets
from t2x.objectives import span_corruption
from t2x.training import optim


def get_config() -> experiment.Experiment:
  return experiment.Experiment(
    model=dataclasses.replace(presets.t5_v1_1_base(), dtype='bfloat16'),
    data=data.DataConfig(
      length=512,
      batch_size=128,
      tokenizer=tokenizers.SentencePiece(vocab_size=32000),
      objective=span_corruption.SpanCorruption(),
    ),
    optim=optim.Adafactor(
      learning_rate=1e-2,
      clip_norm=None,
      schedule=optim.Schedule(shape='inverse_sqrt', warmup_steps=10_000),
    ),
    train=experiment.TrainConfig(
      num_steps=524_288,
      eval_every=5000,
      eval_batches=64,
      checkpoint_every=5000,
      log_every=10,
    ),
  )


if __name__ == '__main__':
  main.run(get_config)

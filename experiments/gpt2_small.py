r"""GPT-2 small (124M) as published: 1,024 tokens a row, 512 rows a step.

python experiments/gpt2_small.py --workdir=DIR --set data.source=TFDS_NAME

Not trained here; a test builds its shapes and shardings.
"""

import dataclasses

from t2x import main
from t2x.config import experiment
from t2x.data import config as data
from t2x.data import tokenizers
from t2x.models import presets
from t2x.training import optim


def get_config() -> experiment.Experiment:
  return experiment.Experiment(
    model=dataclasses.replace(presets.gpt2_small(), dtype='bfloat16'),
    data=data.DataConfig(
      length=1024,
      batch_size=512,
      tokenizer=tokenizers.SentencePiece(vocab_size=50257),
    ),
    optim=optim.AdamW(
      learning_rate=6e-4, schedule=optim.Schedule(warmup_steps=2000)
    ),
    train=experiment.TrainConfig(
      num_steps=100_000,
      eval_every=1000,
      eval_batches=64,
      checkpoint_every=1000,
      log_every=10,
      remat='dots',
    ),
  )


if __name__ == '__main__':
  main.run(get_config)

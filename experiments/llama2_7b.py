r"""Llama 2 7B on 16 accelerators, fully sharded (FSDP).

python experiments/llama2_7b.py --workdir=gs://BUCKET/DIR \
    --set data.source=TFDS_NAME

The batch is one sequence of 2,048 tokens a device; activations are bfloat16
and recomputed in the backward pass. Not trained here; a test builds its
shapes and shardings.
"""

import dataclasses

from t2x import experiment
from t2x import loss as loss_lib
from t2x import main
from t2x import mesh
from t2x import optim
from t2x.data import config as data
from t2x.data import tokenizers
from t2x.models import presets


def get_config() -> experiment.Experiment:
  return experiment.Experiment(
    model=dataclasses.replace(presets.llama2_7b(), dtype='bfloat16'),
    data=data.DataConfig(
      length=2048,
      batch_size=16,
      tokenizer=tokenizers.SentencePiece(vocab_size=32000),
    ),
    optim=optim.AdamW(
      learning_rate=3e-4,
      schedule=optim.Schedule(warmup_steps=2000),
    ),
    train=experiment.TrainConfig(
      num_steps=500_000,
      eval_every=1000,
      eval_batches=64,
      checkpoint_every=1000,
      log_every=10,
      remat='full',
      loss=loss_lib.LossConfig(vocab_chunks=8),
    ),
    mesh=mesh.MeshConfig(data=1, fsdp=-1),
  )


if __name__ == '__main__':
  main.run(get_config)

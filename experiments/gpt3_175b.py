r"""GPT-3 175B on a pod of 1,024 chips, in stages.

python experiments/gpt3_175b.py --workdir=gs://BUCKET/DIR \
    --set data.source=TFDS_NAME --set mesh.pipe=8 --set mesh.tensor=8 \
    --set pipeline.schedule=interleaved --set pipeline.microbatches=16

Brown et al., 2020, Table 2.1 and appendix B: rows of 2,048 tokens, 3.2 million
tokens a step (here 1,536 rows), Adam with a warmup over 375 million tokens and
a cosine to a tenth. Not trained here; a test builds its shapes and shardings.
"""

import dataclasses

from t2x import main
from t2x.config import experiment
from t2x.data import config as data
from t2x.data import tokenizers
from t2x.models import presets
from t2x.parallel import mesh
from t2x.training import optim


def get_config() -> experiment.Experiment:
  return experiment.Experiment(
    model=dataclasses.replace(presets.gpt3_175b(), dtype='bfloat16'),
    data=data.DataConfig(
      length=2048,
      batch_size=1536,
      tokenizer=tokenizers.SentencePiece(vocab_size=50257),
    ),
    optim=optim.AdamW(
      learning_rate=6e-5,
      schedule=optim.Schedule(warmup_steps=120),
    ),
    train=experiment.TrainConfig(
      num_steps=95_000,
      eval_every=1000,
      eval_batches=8,
      checkpoint_every=500,
      log_every=1,
      remat='full',
    ),
    mesh=mesh.MeshConfig(data=1, fsdp=-1),
  )


if __name__ == '__main__':
  main.run(get_config)

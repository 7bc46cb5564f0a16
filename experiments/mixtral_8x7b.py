r"""Mixtral 8x7B (46.7 billion, 12.9 at work on a token), its experts split.

python experiments/mixtral_8x7b.py --workdir=gs://BUCKET/DIR \
    --set data.source=TFDS_NAME --set mesh.expert=8

Jiang et al., 2024. Rows of 4,096 tokens; experts take up to 1.25 of their even
share of a row's tokens, since slots travel less far than dropless exchanges.
Optimizer and schedule are those of `llama2_7b`. Not trained here; a test builds
its shapes and shardings.
"""

import dataclasses

import llama2_7b

from t2x import main
from t2x.config import experiment
from t2x.layers import moe
from t2x.models import presets


def get_config() -> experiment.Experiment:
  base = llama2_7b.get_config()
  model = presets.mixtral_8x7b()
  assert isinstance(model.mlp, moe.MoeConfig)
  router = dataclasses.replace(model.mlp.router, capacity=1.25)
  mlp = dataclasses.replace(model.mlp, router=router)
  return dataclasses.replace(
    base,
    model=dataclasses.replace(model, mlp=mlp, dtype='bfloat16'),
    data=dataclasses.replace(base.data, length=4096, batch_size=128),
  )


if __name__ == '__main__':
  main.run(get_config)

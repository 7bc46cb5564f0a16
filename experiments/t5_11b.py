r"""T5 11B (11.3 billion), span corruption on 512 tokens a row.

python experiments/t5_11b.py --workdir=gs://BUCKET/DIR \
    --set data.source=TFDS_NAME --set mesh.fsdp=32 --set mesh.tensor=8

Raffel et al., 2020, section 3.1, as `t5_base`, with the larger model and full
recomputation. Not trained here; a test builds its shapes and shardings.
"""

import dataclasses

import t5_base

from t2x import main
from t2x.config import experiment
from t2x.models import presets
from t2x.parallel import mesh


def get_config() -> experiment.Experiment:
  base = t5_base.get_config()
  return dataclasses.replace(
    base,
    model=dataclasses.replace(presets.t5_11b(), dtype='bfloat16'),
    train=dataclasses.replace(base.train, remat='full'),
    mesh=mesh.MeshConfig(data=1, fsdp=-1),
  )


if __name__ == '__main__':
  main.run(get_config)

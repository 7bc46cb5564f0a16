r"""A Llama of 1.1 billion parameters on 16 accelerators, fully sharded (FSDP).

python experiments/llama_1b.py --workdir=gs://BUCKET/DIR \
    --set data.source=TFDS_NAME

16 layers, 2,048 wide, 16 heads of 128, feed-forward 7,168 gated: the shape in
which t2x is compared with other libraries by the compiler's figures. The batch
is four sequences of 2,048 tokens on each of 16 devices. Not trained here.
"""

import dataclasses

import llama2_7b

from t2x import main
from t2x.config import experiment
from t2x.layers import attention_config


def get_config() -> experiment.Experiment:
  base = llama2_7b.get_config()
  model = dataclasses.replace(
    base.model,
    num_layers=16,
    embed_dim=2048,
    attention=attention_config.Dense(num_heads=16, head_dim=128),
    mlp=dataclasses.replace(base.model.mlp, hidden=7168),
  )
  data = dataclasses.replace(base.data, batch_size=64)
  return dataclasses.replace(base, model=model, data=data)


if __name__ == '__main__':
  main.run(get_config)

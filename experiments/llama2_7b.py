r"""Llama 2 7B on 16 accelerators, fully sharded (FSDP), or on a named machine.

python experiments/llama2_7b.py --workdir=gs://BUCKET/DIR \
    --set data.source=TFDS_NAME --machine=v5e-256

Without --machine the batch is one sequence of 2,048 tokens on each of 16
devices; activations are bfloat16 and recomputed in the backward pass.
Not trained here; tests build its shapes and shardings, on each machine too.
"""

import dataclasses

from t2x import main
from t2x.config import experiment
from t2x.data import config as data
from t2x.data import tokenizers
from t2x.hardware import machines
from t2x.models import presets
from t2x.parallel import mesh
from t2x.training import optim


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
    ),
    mesh=mesh.MeshConfig(data=1, fsdp=-1),
  )


def get_machines() -> dict[str, machines.Machine]:
  """Returns where it runs: 1,024 rows (2M tokens) a step on all of them.

  So that a run goes on from its checkpoint on another machine as it is. Rows
  on a device, microbatches and remat differ with memory and number.
  """

  def machine(chip, num_devices, *settings, num_slices=1):
    settings = ('data.batch_size=1024', *settings)
    return machines.Machine(
      chip=chip,
      num_devices=num_devices,
      num_slices=num_slices,
      settings=settings,
    )

  fsdp = ('mesh.data=1', 'mesh.fsdp=-1')
  # Weights are split within a slice or node, and copied between them.
  within = lambda slices: (f'mesh.data={slices}', 'mesh.fsdp=-1')
  # v4 and v5p are rented by the core, of which a chip has two.
  return {
    # 4 rows on each device, one at a time.
    'v5e-256': machine('v5e', 256, *fsdp, 'train.accumulate=4'),
    '2xv5e-256': machine(
      'v5e', 512, *within(2), 'train.accumulate=2', num_slices=2
    ),
    # 16 rows, two at a time.
    'v4-128': machine('v4', 64, *fsdp, 'train.accumulate=8'),
    # 32 rows, four at a time, and room for the results of products.
    'v5p-64': machine(
      'v5p', 32, *fsdp, 'train.accumulate=8', 'train.remat=dots'
    ),
    # 4 rows at once.
    'v6e-256': machine('v6e', 256, *fsdp),
    # 16 rows, two at a time.
    '8xh100-8': machine(
      'h100',
      64,
      *within(8),
      'train.accumulate=8',
      'train.remat=dots',
      num_slices=8,
    ),
  }


if __name__ == '__main__':
  main.run(get_config, get_machines())

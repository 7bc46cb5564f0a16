import dataclasses

from t2x.compilation import lowering
from t2x.config import experiment
from t2x.data import config as data_config
from t2x.hlo import jaxpr_costs
from t2x.models import presets


def test_a_7b_step_with_full_remat_has_the_known_products():
  """101.8 TFLOP a row of 2,048 without attention (see plan/theory.py)."""
  config = experiment.Experiment(
    model=dataclasses.replace(presets.llama2_7b(), dtype='bfloat16'),
    data=data_config.DataConfig(length=2048, batch_size=16),
    train=experiment.TrainConfig(num_steps=1, remat='full'),
  )
  counted = jaxpr_costs.count(lowering.step(config))
  scores = counted.sources['tower/attention/scores'].flops
  weights = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
  down, head = 32 * 4096 * 11008, 32000 * 4096
  products = 8 * weights - 2 * down + 6 * head
  assert counted.total.flops - scores == 16 * 2048 * products
  assert f'{2048 * products / 1e12:.1f}' == '101.8'
  # Adam reads and writes weights and two moments, and reads gradients.
  least = (3 * 2 + 1) * 4 * (weights + 2 * head)
  assert counted.sources['optimizer'].bytes > least
  assert counted.total.bytes > counted.total.product_bytes > 0

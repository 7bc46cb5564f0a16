r"""A decoder of 4 layers, 256 wide, every second one of 8 experts.

python experiments/moe_tiny.py --workdir=DIR

A token has 2 of the 8 experts. `--set mesh.expert=4` puts them on 4 devices;
`--set model.mlp_pattern.1.router.capacity=none` drops no token, which on CPUs
takes three times as long.

Expected: losses of 8.383, 8.353, 8.276 and 8.124 in its first four steps. All
300 were not trained here yet.
"""

from t2x import main
from t2x.config import experiment
from t2x.data import config as data
from t2x.data import tokenizers
from t2x.layers import attention_config
from t2x.layers import mlp
from t2x.layers import moe
from t2x.layers import norm
from t2x.layers import param as param_lib
from t2x.layers import position
from t2x.layers import routing
from t2x.models import decoder
from t2x.training import optim


def get_config() -> experiment.Experiment:
  shape = {'hidden': 512, 'activation': 'silu', 'gated': True, 'bias': False}
  experts = moe.MoeConfig(
    **shape,
    num_experts=8,
    router=routing.TokenChoice(top_k=2, capacity=1.25, bias_rate=1e-3),
  )
  return experiment.Experiment(
    model=decoder.DecoderConfig(
      vocab_size=4096,
      num_layers=4,
      embed_dim=256,
      attention=attention_config.Dense(num_heads=8, head_dim=32),
      mlp_pattern=(mlp.MlpConfig(**shape), experts),
      norm=norm.RMSNorm(),
      position=position.Rotary(style='half'),
      init=param_lib.Init(std=0.02, depth_scaled=True),
    ),
    data=data.DataConfig(
      length=128,
      batch_size=32,
      tokenizer=tokenizers.SentencePiece(vocab_size=4096),
    ),
    optim=optim.Muon(
      learning_rate=1e-2, schedule=optim.Schedule(warmup_steps=20)
    ),
    train=experiment.TrainConfig(
      num_steps=300, eval_every=75, checkpoint_every=150
    ),
  )


if __name__ == '__main__':
  main.run(get_config)

r"""A small decoder on the documentation inside this Python installation.

python experiments/quickstart.py --workdir=DIR

Expected: after its 250 steps of 4,096 tokens (about three minutes on two CPU
cores) a held-out loss near 4.7 nats a token and text that looks like English.
`scripts/quickstart.sh` runs it on eight simulated devices.
"""

from t2x import main
from t2x.config import experiment
from t2x.data import config as data
from t2x.data import tokenizers
from t2x.layers import attention_config
from t2x.layers import mlp
from t2x.layers import norm
from t2x.layers import position
from t2x.models import decoder
from t2x.training import optim


def get_config() -> experiment.Experiment:
  return experiment.Experiment(
    model=decoder.DecoderConfig(
      vocab_size=4096,
      num_layers=4,
      embed_dim=128,
      attention=attention_config.Dense(num_heads=8, head_dim=16),
      mlp=mlp.MlpConfig(hidden=512, activation='silu', bias=False),
      norm=norm.RMSNorm(),
      position=position.Rotary(),
    ),
    data=data.DataConfig(
      length=128,
      batch_size=32,
      tokenizer=tokenizers.SentencePiece(vocab_size=4096),
    ),
    optim=optim.Muon(
      learning_rate=1e-2, schedule=optim.Schedule(warmup_steps=10)
    ),
    train=experiment.TrainConfig(
      num_steps=250, eval_every=125, checkpoint_every=125
    ),
  )


if __name__ == '__main__':
  main.run(get_config)

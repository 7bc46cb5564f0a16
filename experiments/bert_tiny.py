r"""A BERT of 4 layers, 128 wide: masked tokens of the installed documentation.

python experiments/bert_tiny.py --workdir=DIR

Expected: in its 300 steps (three to five minutes on two CPU cores) it learns
little more than how frequent tokens are, a held-out loss near 6.5 nats a masked
token; masked prediction needs some thousand steps to take off.
"""

from t2x import experiment
from t2x import main
from t2x import optim
from t2x.data import config as data
from t2x.data import tokenizers
from t2x.layers import attention
from t2x.layers import mlp
from t2x.layers import norm
from t2x.layers import param as param_lib
from t2x.layers import position
from t2x.models import encoder
from t2x.objectives import masked_lm


def get_config() -> experiment.Experiment:
  return experiment.Experiment(
    model=encoder.EncoderConfig(
      vocab_size=4096,
      num_layers=4,
      embed_dim=128,
      attention=attention.Dense(num_heads=8, head_dim=16, bias=True),
      mlp=mlp.MlpConfig(hidden=512, activation='gelu'),
      norm=norm.LayerNorm(eps=1e-12),
      residual='post_norm',
      position=position.Learned(max_length=128),
      init=param_lib.Init(distribution='truncated_normal'),
      embed_norm=True,
    ),
    data=data.DataConfig(
      length=128,
      batch_size=32,
      tokenizer=tokenizers.SentencePiece(vocab_size=4096),
      objective=masked_lm.MaskedLM(rate=0.15),
    ),
    optim=optim.Muon(
      learning_rate=1e-2, schedule=optim.Schedule(warmup_steps=20)
    ),
    train=experiment.TrainConfig(
      num_steps=300, eval_every=100, checkpoint_every=100
    ),
  )


if __name__ == '__main__':
  main.run(get_config)

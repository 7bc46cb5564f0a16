r"""A GPT-2 of 4 layers, 256 wide, on the installed documentation.

python experiments/gpt2_tiny.py --workdir=DIR

Expected: after its 300 steps of 4,096 tokens (about five minutes on two CPU
cores) 1.92 held-out bits a byte, where a bigram model of the same tokens
(scripts/bigram_baseline.py) needs 2.21.
"""

from t2x import main
from t2x.config import experiment
from t2x.data import config as data
from t2x.data import tokenizers
from t2x.layers import attention_config
from t2x.layers import mlp
from t2x.layers import param as param_lib
from t2x.layers import position
from t2x.models import decoder
from t2x.training import optim


def get_config() -> experiment.Experiment:
  return experiment.Experiment(
    model=decoder.DecoderConfig(
      vocab_size=4096,
      num_layers=4,
      embed_dim=256,
      attention=attention_config.Dense(num_heads=8, head_dim=32, bias=True),
      mlp=mlp.MlpConfig(hidden=1024, activation='gelu_tanh'),
      position=position.Learned(max_length=128, std=0.01),
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

"""Configurations over which an estimate is checked against a compiler.

Every second one, by its place in this list and before any was looked at, is
held out: constants of the model may be found on the others alone.
"""

import dataclasses

from t2x.config import catalog
from t2x.config import experiment
from t2x.config import layout_flag
from t2x.config import overrides
from t2x.data import tokenizers
from t2x.layers import attention_config
from t2x.layers import moe
from t2x.layers import routing
from t2x.models import presets

FINE = 'rules.norm_length=context,tensor'
EXCHANGED = 'rules.context_attention=all_to_all'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """One configuration.

  Attributes:
    model: of `model_of`.
    rows: of a batch.
    layout: as `layout_flag` reads it.
    held_out: whether nothing was fitted on it.
  """

  model: str
  rows: int
  layout: str
  held_out: bool = False

  @property
  def name(self) -> str:
    return f'{self.model} {self.rows} {self.layout}'

  @property
  def topology(self) -> str:
    num = layout_flag.parse(self.layout).num_devices
    return {4: 'v5e:2x2', 8: 'v5e:2x4', 16: 'v5e:4x4'}[num]


_GIVEN = (
  ('llama', 64, 'fsdp=16,train.remat=full'),
  ('llama', 16, 'fsdp=16,train.remat=none'),
  ('gpt2_xl', 32, 'fsdp=16,train.remat=full'),
  ('gpt2_xl', 32, 'data=2,fsdp=8,train.remat=dots'),
  ('t5', 64, 'data=8,train.remat=none'),
  ('t5', 128, 'fsdp=8,train.remat=full'),
  ('moe', 32, 'expert=8,train.remat=full'),
  ('moe', 32, 'fsdp=8,train.remat=full'),
  ('llama', 32, 'pipe=4,fsdp=4,train.remat=full'),
  ('llama', 32, 'pipe=4,fsdp=4,pipeline.schedule=interleaved,train.remat=full'),
  ('llama', 32, 'fsdp=4,tensor=4,train.remat=full'),
  ('llama', 32, f'fsdp=4,tensor=4,{FINE},train.remat=full'),
  ('llama', 32, 'data=4,fsdp=4,train.remat=dots'),
  ('llama', 16, 'data=2,fsdp=4,tensor=2,train.remat=none'),
  ('gpt2_large', 32, 'data=4,tensor=4,train.remat=full'),
  ('gpt2_large', 16, 'fsdp=4,tensor=4,train.remat=none'),
  ('bert', 64, 'fsdp=8,train.remat=none'),
  ('bert', 128, 'data=4,tensor=2,train.remat=full'),
  ('llama', 64, 'fsdp=16,train.accumulate=4,train.remat=full'),
  (
    'llama',
    32,
    'data=4,fsdp=4,train.accumulate=2,train.loss.token_chunks=8,'
    'train.remat=full',
  ),
  ('moe', 32, 'fsdp=2,expert=4,train.remat=none'),
  ('moe', 32, 'expert=4,tensor=2,train.remat=full'),
  ('llama', 32, 'pipe=4,data=4,train.remat=none'),
  (
    'llama',
    16,
    'pipe=2,fsdp=4,tensor=2,pipeline.schedule=gpipe,pipeline.microbatches=4,'
    'train.remat=none',
  ),
  ('llama', 16, 'fsdp=4,context=4,train.remat=full'),
  ('llama', 32, f'fsdp=4,context=4,{EXCHANGED},train.remat=dots'),
  ('gqa', 16, 'fsdp=8,train.loss.vocab_chunks=4,train.remat=full'),
  ('gqa', 16, 'fsdp=2,tensor=4,train.remat=dots'),
  ('t5', 64, 'data=2,tensor=4,train.remat=none'),
  ('t5', 64, 'fsdp=4,tensor=2,train.remat=dots'),
  ('llama', 32, 'fsdp=16,train.remat=save:attention,mlp_up,mlp_gate'),
  ('gqa', 32, 'fsdp=8,train.remat=save:query,key,value,attention'),
  (
    'gpt2_large',
    32,
    'pipe=4,fsdp=4,pipeline.microbatches=4,train.remat=full',
  ),
  ('llama', 64, 'pipe=2,fsdp=8,pipeline.gather=tick,train.remat=full'),
  ('gpt2_xl', 64, 'fsdp=16,train.accumulate=2,train.remat=full'),
  ('gqa', 16, 'data=2,fsdp=2,tensor=2,train.accumulate=2,train.remat=full'),
  (
    'gqa',
    16,
    'pipe=4,fsdp=2,pipeline.schedule=zb_h1,train.remat=none',
  ),
  ('t5', 64, 'pipe=4,data=2,pipeline.microbatches=8,train.remat=full'),
  # Held out at first, until its FLOPs were found to be wrong.
  ('t5', 64, 'pipe=2,data=4,pipeline.microbatches=4,train.remat=none'),
  ('bert', 64, 'pipe=2,fsdp=4,pipeline.schedule=interleaved,train.remat=none'),
)
CASES = tuple(
  Case(model=model, rows=rows, layout=layout, held_out=bool(i % 2))
  for i, (model, rows, layout) in enumerate(_GIVEN)
)


def config_of(case: Case) -> experiment.Experiment:
  """Returns an experiment; nothing is read to build it."""
  config = _EXPERIMENTS[case.model]()
  data = dataclasses.replace(
    config.data, batch_size=case.rows, tokenizer=tokenizers.Bytes()
  )
  config = dataclasses.replace(config, data=data)
  layout = layout_flag.parse(case.layout)
  config = layout.applied(config)
  layout.check(config)
  return config


def _llama() -> experiment.Experiment:
  return catalog.load('llama_1b')


def _gqa() -> experiment.Experiment:
  """Half as deep, with four key/value heads."""
  return overrides.override(
    _llama(),
    {'model.num_layers': '8', 'model.attention.num_kv_heads': '4'},
  )


def _gpt2(preset) -> experiment.Experiment:
  """Without dropout, so that attention runs in kernels."""
  base = catalog.load('gpt2_small')
  model = dataclasses.replace(preset(), dtype='bfloat16', dropout=0.0)
  model = dataclasses.replace(
    model, attention=dataclasses.replace(model.attention, dropout=0.0)
  )
  return dataclasses.replace(base, model=model)


def _bert() -> experiment.Experiment:
  base = catalog.load('bert_base')
  kind = dataclasses.replace(base.model.attention, dropout=0.0)
  model = dataclasses.replace(base.model, dropout=0.0, attention=kind)
  return dataclasses.replace(base, model=model)


def _moe() -> experiment.Experiment:
  """Mixtral's layers, eight of them and a fourth as wide."""
  base = catalog.load('llama2_7b')
  mixtral = presets.mixtral_8x7b()
  assert isinstance(mixtral.mlp, moe.MoeConfig)
  experts = dataclasses.replace(
    mixtral.mlp,
    hidden=3584,
    router=routing.TokenChoice(top_k=2, balance_loss=0.02, capacity=1.25),
  )
  model = dataclasses.replace(
    mixtral,
    num_layers=8,
    embed_dim=1024,
    attention=attention_config.Dense(num_heads=8, num_kv_heads=4, head_dim=128),
    mlp=experts,
    dtype='bfloat16',
  )
  data = dataclasses.replace(base.data, length=1024)
  return dataclasses.replace(base, model=model, data=data)


_EXPERIMENTS = {
  'llama': _llama,
  'gqa': _gqa,
  'gpt2_large': lambda: _gpt2(presets.gpt2_large),
  'gpt2_xl': lambda: _gpt2(presets.gpt2_xl),
  't5': lambda: catalog.load('t5_base'),
  'bert': _bert,
  'moe': _moe,
}

"""The engine: each text is what `generate` writes for it alone."""

import dataclasses
import functools

from flax import nnx
import jax
import numpy as np
import pytest
import test_generate

from t2x.decode import decoding_weights
from t2x.decode import engine as engine_lib
from t2x.decode import engine_programs
from t2x.decode import generate
from t2x.decode import sampling
from t2x.layers import attention_config
from t2x.layers import linear
from t2x.layers import transformer_xl
from t2x.models import decoder
from t2x.models import encoder
from t2x.parallel import mesh as mesh_lib
from t2x.parallel import sharding

VOCAB = test_generate.VOCAB
SMALL = engine_lib.EngineConfig(
  num_slots=4, page_size=4, max_length=96, chunks=(8, 16), read=16
)
Sampling = sampling.SamplingConfig
SETTINGS = [
  Sampling(temperature=0),
  Sampling(),
  Sampling(temperature=0.7, top_p=0.9),
  Sampling(top_k=5, min_p=0.01),
  Sampling(repetition_penalty=1.3, frequency_penalty=0.2, min_tokens=6),
  Sampling(bias={7: 3.0}, typical_p=0.8, presence_penalty=0.5),
  Sampling(banned=[(5,), (3, 4)], top_k=30),
]
MODELS = {
  name: test_generate.DECODERS[name]
  for name in (
    'learned',
    'rotary_half',
    'relative',
    'alibi',
    'grouped_query',
    'dense_and_local',
    'parallel',
    'sandwich',
  )
} | {
  'transformer_xl': {
    'attention': transformer_xl.TransformerXL(num_heads=4, head_dim=8),
    'position': None,
  },
  'soft_cap': {
    'attention': attention_config.Dense(num_heads=4, head_dim=8, soft_cap=2.0)
  },
}


def make(name='learned'):
  config = decoder.DecoderConfig(**test_generate.SHARED | MODELS[name])
  return decoder.Decoder(config, rngs=nnx.Rngs(0))


def requests(num, seed=0, longest=40, settings=SETTINGS, **options):
  """Some begin alike; lengths and settings are mixed."""
  rng = np.random.default_rng(seed)
  common = rng.integers(1, VOCAB, 21).tolist()
  result = []
  for number in range(num):
    own = rng.integers(1, VOCAB, rng.integers(1, longest)).tolist()
    result.append(
      engine_lib.Request(
        prompt=common + own if number % 3 == 0 else own,
        num_tokens=int(rng.integers(1, 25)),
        sampling=settings[number % len(settings)],
        seed=number,
        row=number % 2,
        ends=(9,),
        **options,
      )
    )
  return result


def run(engine, wanted):
  texts = [engine.add(request) for request in wanted]
  while engine.is_busy:
    engine.step()
  return texts


def alone(model, request, **options):
  keys_B = generate.row_keys(None, request.seed, 4, 4)[request.row][None]
  return generate.generate(
    model,
    [request.prompt],
    num_tokens=request.num_tokens,
    sampling=request.sampling,
    keys_B=keys_B,
    eos_id=list(request.ends),
    capacity=128,
    **options,
  )


def check(model, texts, atol=2e-4, **options):
  for text in texts:
    found = alone(model, text.request, **options)
    assert text.tokens == found.tokens[0]
    np.testing.assert_allclose(
      text.log_probs, found.log_probs[0], atol=atol, rtol=1e-4
    )
    assert text.reason == ('stop' if found.ended[0] else 'length')


_exhaustive = functools.partial(pytest.param, marks=pytest.mark.exhaustive)


# A position of each kind, and a cache of each.
_CHOSEN = (
  'relative',
  'alibi',
  'grouped_query',
  'dense_and_local',
  'transformer_xl',
  'soft_cap',
)


@pytest.mark.parametrize(
  ('name', 'settings'),
  [
    # All settings with one model; others greedy and drawn.
    ('learned', SETTINGS),
    *((name, SETTINGS[:2]) for name in _CHOSEN),
    *(
      _exhaustive(name, SETTINGS[:2]) for name in MODELS if name not in _CHOSEN
    ),
    *(_exhaustive(name, SETTINGS) for name in MODELS if name != 'learned'),
  ],
)
def test_texts_are_those_of_generate(name, settings):
  model = make(name)
  engine = engine_lib.Engine(model, SMALL)
  texts = run(engine, requests(7, settings=settings))
  assert engine.pages.num_used == 0
  assert engine.counts['shared_tokens'] > 0
  check(model, texts)


def test_a_model_whose_layers_lie_apart_writes_the_same():
  model = make('dense_and_local')
  engine = engine_lib.Engine(decoding_weights.prepare(model), SMALL)
  check(model, run(engine, requests(7)))


def test_cached_int8_is_that_of_generate():
  model = make()
  config = dataclasses.replace(SMALL, cache_dtype='int8')
  greedy = [
    dataclasses.replace(request, sampling=SETTINGS[0])
    for request in requests(6)
  ]
  texts = run(engine_lib.Engine(model, config), greedy)
  # What is rounded to 8 bits may have been rounded differently before.
  check(model, texts, atol=3e-3, cache_dtype='int8')


def test_few_programs_serve_whatever_comes():
  """Lengths, who is there and when they come: none of it compiles anew."""
  model = make()
  config = dataclasses.replace(SMALL, num_pages=40)
  engine = engine_lib.Engine(model, config)
  programs = (
    engine_programs.prefill_step,
    engine_programs.decode_step,
    engine_programs.choose,
  )
  before = [program._cache_size() for program in programs]
  for seed in range(6):
    run(engine, requests(14, seed=seed))
  read, write, choose = (
    program._cache_size() - size for program, size in zip(programs, before)
  )
  assert read <= 2 and write <= 2  # Two sizes of a chunk; 4 rows and 1.
  assert choose <= 2 * 10 * 2  # Ten forms, with and without banned words.


def test_many_texts_through_few_pages():
  """They wait for pages; none is dropped, and each is right."""
  model = make()
  config = dataclasses.replace(SMALL, num_pages=26)
  engine = engine_lib.Engine(model, config)
  texts = run(engine, requests(20))
  check(model, texts)
  assert engine.pages.num_used == 0


def test_what_is_shared_is_read_once():
  """Of prompts that begin alike, also those that come together."""
  engine = engine_lib.Engine(make(), SMALL)
  prompt = list(range(1, 34))
  texts = run(
    engine,
    [
      engine_lib.Request(
        prompt=prompt, num_tokens=4, sampling=SETTINGS[0], row=row
      )
      for row in range(4)
    ],
  )
  assert [text.num_shared for text in texts] == [0, 32, 32, 32]
  assert len({tuple(text.tokens) for text in texts}) == 1
  # A conversation goes on with what was written.
  longer = [*prompt, *texts[0].tokens, 5]
  (text,) = run(engine, [engine_lib.Request(prompt=longer, num_tokens=2)])
  assert text.num_shared == 36
  check(make(), [text])


def test_a_cancelled_text_harms_no_other():
  model = make()
  engine = engine_lib.Engine(model, SMALL)
  texts = [engine.add(request) for request in requests(8)]
  engine.step()
  for text in (texts[0], texts[1], texts[-1]):  # Writing, reading, waiting.
    engine.cancel(text)
    assert text.reason == 'cancelled'
  while engine.is_busy:
    engine.step()
  check(model, texts[2:-1])
  assert engine.pages.num_used == 0
  engine.cancel(texts[3])  # It is over.
  assert texts[3].reason != 'cancelled'


def test_the_likeliest_tokens_are_told():
  model = make()
  engine = engine_lib.Engine(model, SMALL)
  wanted = engine_lib.Request(
    prompt=[3, 4, 5], num_tokens=6, sampling=SETTINGS[0], num_top=3
  )
  (text,) = run(engine, [wanted])
  logits = model(np.array([[*wanted.prompt, *text.tokens]]))[0]
  log_probs = jax.nn.log_softmax(logits)[2:-1]
  for row_V, top in zip(np.asarray(log_probs), text.top, strict=True):
    best = np.argsort(-row_V)[:3]
    assert [token for token, _ in top] == best.tolist()
    np.testing.assert_allclose([p for _, p in top], row_V[best], atol=1e-4)


class Even:
  """Even tokens alone, and three of them."""

  def __init__(self):
    self.tokens = []

  def allowed(self):
    return np.full(-(-VOCAB // 32), 0x55555555, np.uint32)

  def raised(self):
    return {}

  def advance(self, token):
    self.tokens.append(token)

  def copy(self):
    result = Even()
    result.tokens = list(self.tokens)
    return result

  @property
  def is_done(self):
    return len(self.tokens) == 3


def test_a_control_says_what_may_come():
  model = make()
  engine = engine_lib.Engine(model, SMALL)
  free = requests(3)
  texts = run(
    engine,
    [
      free[0],
      engine_lib.Request(prompt=[1], num_tokens=9, control=Even()),
      *free[1:],
    ],
  )
  held = texts.pop(1)
  assert len(held.tokens) == 3 and held.reason == 'stop'
  assert all(token % 2 == 0 for token in held.tokens)
  check(model, texts)
  # Its log-probabilities are the model's own, of all tokens.
  logits = model(np.array([[1, *held.tokens]]))[0]
  expected = jax.nn.log_softmax(logits)[np.arange(3), np.array(held.tokens)]
  np.testing.assert_allclose(held.log_probs, expected, atol=1e-4)


@pytest.mark.parametrize(
  'axes', [_exhaustive({'tensor': 2}), {'data': 2, 'tensor': 2}]
)
def test_on_a_mesh(axes):
  model = make('grouped_query')
  wanted = requests(6)
  size = int(np.prod(list(axes.values())))
  mesh = mesh_lib.make(mesh_lib.MeshConfig(**axes), jax.devices()[:size])
  with sharding.use(mesh, sharding.Rules()):
    placed = jax.device_put(model, jax.sharding.NamedSharding(mesh, jax.P()))
    engine = engine_lib.Engine(placed, SMALL)
    texts = run(engine, wanted)
    before = (
      engine_programs.decode_step._cache_size(),
      engine_programs.prefill_step._cache_size(),
    )
    run(engine, wanted)
    assert (
      engine_programs.decode_step._cache_size(),
      engine_programs.prefill_step._cache_size(),
    ) == before
    k = jax.tree.leaves(engine._decoder._caches)[0]
    assert k.sharding.shard_shape(k.shape)[2] == k.shape[2] // 2
  check(model, texts)


@pytest.mark.parametrize('name', ['relative', 'dense_and_local'])
def test_prompts_are_scored(name):
  """Beside those that are read, shared and written; as the whole model does."""
  model = make(name)
  engine = engine_lib.Engine(model, SMALL)
  own = Sampling(calibration=1.5)
  scored = lambda prompt, **options: engine_lib.Request(
    prompt=prompt, num_top=3, scores_prompt=True, sampling=own, **options
  )
  others = requests(4)
  long = others[0].prompt[:21] + [5, 6]
  wanted = [
    others[0],
    scored(long, num_tokens=0),
    scored([7], num_tokens=0),
    *others[1:],
    scored(long, num_tokens=3),
    engine_lib.Request(prompt=long, num_tokens=0),
  ]
  texts = run(engine, wanted)
  run(engine, [scored(long, num_tokens=0)])  # Of pages that hold it all.
  assert engine.pages.num_used == 0
  for text in texts:
    if not text.request.num_tokens:
      assert text.tokens == [] and text.reason == 'length'
    if not text.request.scores_prompt:
      assert text.prompt_scores.log_probs == []
      continue
    ids = np.array(text.request.prompt)
    log_probs_TV = jax.nn.log_softmax(model(ids[None])[0] / 1.5)[:-1]
    own_T = np.asarray(log_probs_TV)[np.arange(len(ids) - 1), ids[1:]]
    np.testing.assert_allclose(text.prompt_scores.log_probs, own_T, atol=1e-4)
    best_TK = -np.sort(-np.asarray(log_probs_TV))[:, :3]
    values = [[value for _, value in top] for top in text.prompt_scores.top]
    np.testing.assert_allclose(
      np.reshape(values, best_TK.shape), best_TK, atol=1e-4
    )


def test_what_cannot_be_met_is_refused():
  engine = engine_lib.Engine(
    make(), dataclasses.replace(SMALL, max_waiting=2, max_length=20)
  )
  good = engine_lib.Request(prompt=[1, 2], num_tokens=3)
  wrong = [
    ({'prompt': []}, 'is empty'),
    ({'prompt': [VOCAB]}, f'token id {VOCAB}'),
    ({'prompt': [1] * 18}, 'lower num_tokens to at most 2'),
    ({'num_tokens': -1}, 'num_tokens=-1'),
    ({'ends': (77,)}, r'ends\[0\]=77'),
    ({'num_top': 21}, 'num_top=21'),
    ({'sampling': Sampling(bias={99: 1.0})}, 'token id 99'),
  ]
  for change, message in wrong:
    with pytest.raises(ValueError, match=message):
      engine.add(dataclasses.replace(good, **change))
  for _ in range(6):
    engine.add(good)
  with pytest.raises(engine_lib.Overloaded, match='no more than 6 are taken'):
    engine.add(good)
  while engine.is_busy:
    engine.step()
  engine.add(good)


@pytest.mark.parametrize(
  ('kind', 'message'),
  [
    (linear.Linear(num_heads=4, head_dim=8), 'kind=linear keeps a state'),
    (attention_config.Dense(num_heads=4, head_dim=8), 'give max_length'),
  ],
)
def test_models_that_cannot_be_served(kind, message):
  config = decoder.DecoderConfig(
    **test_generate.SHARED | {'attention': kind, 'position': None}
  )
  model = decoder.Decoder(config, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match=message):
    engine_lib.Engine(model)


def test_an_encoder_is_not_served():
  config = encoder.EncoderConfig(vocab_size=20, num_layers=1, embed_dim=8)
  with pytest.raises(ValueError, match='need a decoder'):
    engine_lib.Engine(encoder.Encoder(config, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'num_slots': 0}, 'num_slots=0'),
    ({'page_size': 12}, 'power of two'),
    ({'chunks': ()}, 'chunks='),
    ({'cache_dtype': 'int4'}, 'cache_dtype'),
  ],
)
def test_sizes_that_cannot_be(change, message):
  with pytest.raises(ValueError, match=message):
    engine_lib.EngineConfig(**change)


def test_too_few_pages():
  with pytest.raises(ValueError, match='needs 24'):
    engine_lib.Engine(make(), dataclasses.replace(SMALL, num_pages=5))

"""Settings of a checkpoint's texts: as `transformers` has them, or named."""

import json
import logging
import math
import pathlib

import commands
import extras
from flax import nnx
import hf_files
import jax
import numpy as np
import pytest

from t2x.data import tokenizers
from t2x.decode import beams as beams_lib
from t2x.decode import drafts
from t2x.decode import engine
from t2x.decode import generate
from t2x.decode import sampling as sampling_lib
from t2x.decode import speculative
from t2x.inference import generation
from t2x.inference import hf_conversion
from t2x.inference import loading
from t2x.interop import generation_config
from t2x.interop import huggingface
from t2x.layers import attention_config
from t2x.layers import mlp
from t2x.layers import norm
from t2x.layers import position
from t2x.models import encoder_decoder
from t2x.objectives import rows as rows_lib
from t2x.objectives import source_target

torch = extras.need('torch', extra='reference')
transformers = extras.need('transformers', extra='reference')

pytestmark = pytest.mark.reference

GREEDY = sampling_lib.SamplingConfig(temperature=0)
NUM = 12
SIZE = 528
PROMPTS = ['A text.', 'the other of them']


def t5():
  config = transformers.T5Config(
    vocab_size=SIZE, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=2,
    decoder_start_token_id=0, dropout_rate=0.0,
  )  # fmt: skip
  return transformers.T5ForConditionalGeneration(config)


def gpt2():
  config = transformers.GPT2Config(
    vocab_size=SIZE, n_embd=16, n_layer=1, n_head=2, n_positions=64,
    bos_token_id=0, eos_token_id=0,
  )  # fmt: skip
  return transformers.GPT2LMHeadModel(config)


@pytest.fixture(scope='module')
def checkpoints(tmp_path_factory):
  """Name -> directory of a model with weights that are not near 0."""
  root, found = tmp_path_factory.mktemp('generation'), {}
  for name, maker in (('t5', t5), ('gpt2', gpt2)):
    hf_files.MAKERS[name](root / name)
    torch.manual_seed(1)
    model = maker().eval()
    with torch.no_grad():
      for parameter in model.parameters():
        parameter.add_(0.4 * torch.randn_like(parameter))
    model.save_pretrained(root / name)
    found[name] = root / name
  return found


@pytest.fixture(scope='module')
def plain(checkpoints):
  """Name -> what a checkpoint writes without settings."""
  return {name: ours(path)[1] for name, path in checkpoints.items()}


@pytest.fixture
def copy(checkpoints, tmp_path):
  """Returns a copy of a checkpoint with settings in one of its files."""

  def make(name, settings, file='generation_config.json', whole=True):
    target = tmp_path / f'{name}-{len(list(tmp_path.iterdir()))}'
    target.mkdir()
    for one in checkpoints[name].iterdir():
      (target / one.name).write_bytes(one.read_bytes())
    path = target / file
    old = json.loads(path.read_text()) if path.exists() and whole else {}
    path.write_text(json.dumps({**old, **settings}))
    return target

  return make


def theirs(directory, ids, **options):
  """Returns what `transformers` writes after or of each prompt, to its end."""
  loader = transformers.AutoModelForCausalLM
  answers = json.loads((directory / 'config.json').read_text())
  answers = answers.get('is_encoder_decoder', False)
  if answers:
    loader = transformers.AutoModelForSeq2SeqLM
  model = loader.from_pretrained(directory).eval()
  ends = model.generation_config.eos_token_id
  ends = ends if isinstance(ends, list) else [ends]
  found = []
  for prompt in ids:
    with torch.no_grad():
      out = model.generate(
        torch.tensor([prompt]), max_new_tokens=NUM, do_sample=False, **options
      )[0].tolist()
    new = out[1 if answers else len(prompt) :]
    cut = [i for i, token in enumerate(new) if token in ends]
    found.append(new[: cut[0]] if cut else new)
  return found


def ours(directory, num_beams=1):
  trained = loading.load(str(directory))
  ids = trained.prompt_ids(PROMPTS)
  if num_beams == 1:
    greedy = {**trained.generation.sampling, 'temperature': 0.0}
    result = generation.generation(
      trained,
      PROMPTS,
      num_tokens=NUM,
      sampling=sampling_lib.SamplingConfig(**greedy),
    )
    return ids, result.tokens

  own = trained.generation
  with trained.decoding():
    result = generate.beam_search(
      trained.decoding_model,
      ids,
      num_tokens=NUM,
      beams=beams_lib.BeamConfig(num_beams=num_beams, **own.search),
      sampling=trained.calibrated(sampling_lib.SamplingConfig(**own.searching)),
      **trained.decode_options(),
    )
  return ids, [texts[0] for texts in result.tokens]


def settings_of(kind, written):
  """Returns settings that matter for what was written without them."""
  a, b = written[0][3], written[1][2]
  first = written[0][0]
  return {
    'ends': {'eos_token_id': [b, a]},
    'end': {'eos_token_id': a},
    'start': {'decoder_start_token_id': 9},
    'bos': {'decoder_start_token_id': None, 'bos_token_id': 11},
    'suppressed': {'suppress_tokens': [a, b]},
    'not_first': {'begin_suppress_tokens': [first, written[1][0]]},
    'words': {'bad_words_ids': [[a], written[1][1:3], written[0][:3]]},
    'first': {'forced_bos_token_id': 77, 'begin_suppress_tokens': [first]},
    'least': {'min_new_tokens': 6, 'eos_token_id': [a, b]},
    'repetition': {'repetition_penalty': 1.7},
    'search': {'length_penalty': 2.5, 'early_stopping': True,
               'eos_token_id': [a, b]},
  }[kind]  # fmt: skip


KINDS = ('ends', 'end', 'suppressed', 'not_first', 'words', 'least')
KINDS += ('repetition',)
CASES = [('gpt2', kind) for kind in KINDS]
CASES += [('t5', kind) for kind in (*KINDS, 'start', 'bos', 'first')]


@pytest.mark.slow
@pytest.mark.parametrize('name, kind', CASES)
def test_texts_are_those_of_transformers(plain, copy, name, kind):
  directory = copy(name, settings_of(kind, plain[name]))
  ids, got = ours(directory)
  assert got == theirs(directory, ids)
  assert got != plain[name], 'The setting does nothing.'


@pytest.mark.slow
@pytest.mark.parametrize(
  'name, kinds',
  [
    ('gpt2', ('search', 'repetition', 'words')),
    ('gpt2', ('search', 'not_first')),
    ('t5', ('search', 'start', 'suppressed')),
    ('t5', ('search', 'least', 'first')),
  ],
)
def test_beams_are_those_of_transformers(plain, copy, name, kinds):
  settings = {}
  for kind in kinds:
    settings |= settings_of(kind, plain[name])
  directory = copy(name, settings)
  ids, got = ours(directory, 3)
  assert got == theirs(directory, ids, num_beams=3)


def test_settings_stay_with_a_run_and_with_its_export(plain, copy, tmp_path):
  """Also where the run's model is no longer that of the config.json."""
  settings = {}
  for kind in ('ends', 'suppressed', 'words', 'start', 'least'):
    settings |= settings_of(kind, plain['t5'])
  source = copy('t5', settings | {'no_repeat_ngram_size': 2})
  run, back, other = (tmp_path / name for name in ('run', 'back', 'other'))
  hf_conversion.to_run(str(source), str(run))
  ids, want = ours(source)
  assert ours(run) == (ids, want)
  read = lambda path: json.loads((path / generation_config.FILE).read_text())
  hf_conversion.from_run(str(run), str(back))
  for name, value in read(source).items():
    assert read(back)[name] == value
  assert ours(back) == (ids, want) == (ids, theirs_plain(back, ids))
  trained = loading.load(str(run))
  assert trained.config.data.tokenizer.start == 9
  huggingface.write(
    str(other), trained.model, trained.tokenizer, generation=trained.generation
  )
  config = json.loads((other / 'config.json').read_text())
  assert config['eos_token_id'] == settings['eos_token_id']
  assert config['decoder_start_token_id'] == 9
  assert ours(other) == (ids, want)


def theirs_plain(directory, ids):
  """As `theirs`; t2x does not honour one setting of the file."""
  return theirs(directory, ids, no_repeat_ngram_size=0)


def test_a_run_of_ones_own_says_how_its_texts_end(tmp_path):
  tokenizer = tokenizers.BytesTokenizer(tokenizers.Bytes())
  config = encoder_decoder.EncoderDecoderConfig(
    vocab_size=384,
    num_layers=1,
    embed_dim=8,
    attention=attention_config.Dense(num_heads=2, head_dim=4, scale=1.0),
    mlp=mlp.MlpConfig(
      hidden=12, activation='gelu_tanh', gated=True, bias=False
    ),
    norm=norm.RMSNorm(),
    position=position.RelativeBuckets(),
    tied_head='tied',
  )
  model = encoder_decoder.EncoderDecoder(config, rngs=nnx.Rngs(0))
  directory = tmp_path / 'own'
  huggingface.write(str(directory), model, tokenizer)
  other = transformers.AutoModelForSeq2SeqLM.from_pretrained(directory)
  found = other.generation_config
  assert found.eos_token_id == tokenizer.eos_id
  assert found.decoder_start_token_id == found.pad_token_id == 0
  ids = np.arange(5, 14)[None]
  with torch.no_grad():
    want = other.eval()(
      input_ids=torch.tensor(ids), decoder_input_ids=torch.tensor(ids)
    ).logits
  got = jax.jit(lambda model: model(ids, encoder_inputs=ids))(model)
  np.testing.assert_allclose(got, want, atol=1e-4)


def test_training_goes_on_from_the_same_token(checkpoints, copy):
  """What a decoder reads is what `transformers` makes of the labels."""
  directory = copy('t5', {'decoder_start_token_id': 9})
  config = json.loads((directory / 'config.json').read_text())
  config['decoder_start_token_id'] = 9
  (directory / 'config.json').write_text(json.dumps(config))
  tokenizer = loading.load(str(directory)).tokenizer
  target = np.array([[20, 21, 22, 1], [30, 31, 1, 0]], np.int32)
  rows = rows_lib.Rows(target, (target != 0).astype(np.int32))
  batch = source_target.SourceTarget().examples(
    rows, rows, keys=np.zeros(2), vocab=tokenizer.vocab, length=4
  )
  other = transformers.AutoModelForSeq2SeqLM.from_pretrained(directory)
  want = other._shift_right(torch.tensor(target)).numpy()
  where = target != 0
  np.testing.assert_array_equal(batch['inputs'][where], want[where])
  assert (batch['inputs'][:, 0] == 9).all()


def test_every_way_of_writing_ends_alike(plain, copy):
  written = plain['gpt2']
  settings = settings_of('ends', written) | settings_of('suppressed', written)
  settings['eos_token_id'].append(written[0][2])
  settings['suppress_tokens'] = [written[0][0]]
  trained = loading.load(str(copy('gpt2', settings)))
  ids = trained.prompt_ids(PROMPTS)
  sampling, options = trained.calibrated(GREEDY), trained.decode_options()
  want = generation.generation(
    trained, PROMPTS, num_tokens=NUM, sampling=GREEDY
  ).tokens
  assert want != plain['gpt2'] and any(len(tokens) < NUM for tokens in want)
  common = {'num_tokens': NUM, 'sampling': sampling, **options}
  drafted = speculative.speculate(
    trained.model, ids, draft=drafts.LookupDraft(), **common
  )
  assert drafted.tokens == want
  served = requests(trained, temperature=0, max_tokens=NUM)
  assert [served[0].ends, served[0].sampling.bias] == [
    trained.end_ids,
    {written[0][0]: -math.inf},
  ]
  assert written_by_engine(trained, served) == want


def requests(trained, **body):
  """Returns what a server asks its engine for."""

  for name in ('pydantic', 'jinja2'):
    extras.need(name, extra='serve')
  from t2x.serving import chat
  from t2x.serving import protocol
  from t2x.serving import request_translation

  made = request_translation.RequestTranslator(
    trained, 'name', chat=chat.Chat(trained.tokenizer, None), max_length=64
  )
  return made.job(protocol.CompletionBody(prompt=PROMPTS, **body)).requests


def written_by_engine(trained, requests):

  config = engine.EngineConfig(num_slots=2, max_length=64)
  with trained.decoding():
    made = engine.Engine(trained.model, config)
    texts = [made.add(request) for request in requests]
    while made.is_busy:
      made.step()
  return [text.tokens for text in texts]


def test_an_engine_begins_texts_as_asked(plain, copy):
  directory = copy('gpt2', settings_of('not_first', plain['gpt2']))
  trained = loading.load(str(directory))
  got = written_by_engine(
    trained, requests(trained, temperature=0, max_tokens=NUM)
  )
  assert got == ours(directory)[1] != plain['gpt2']


def test_defaults_of_drawing_hold_where_nothing_is_given(copy):
  given = {'do_sample': True, 'temperature': 0.6, 'top_p': 0.9, 'top_k': 7}
  trained = loading.load(str(copy('gpt2', given)))
  drawn = trained.calibrated()
  assert (drawn.temperature, drawn.top_p, drawn.top_k) == (0.6, 0.9, 7)
  assert trained.calibrated(GREEDY).top_p is None
  one = requests(trained)[0].sampling
  assert (one.temperature, one.top_p, one.top_k) == (0.6, 0.9, 7)
  one = requests(trained, temperature=1.0, top_k=0)[0].sampling
  assert (one.temperature, one.top_p, one.top_k) == (1.0, 0.9, None)
  generation.search_text(trained, PROMPTS[:1], num_tokens=2)


def test_what_is_not_honoured_is_told_in_one_line(copy, caplog):
  directory = copy('gpt2', {'num_beams': 4, 'no_repeat_ngram_size': 3})
  with caplog.at_level(logging.WARNING):
    loading.load(str(directory))
  told = [r.getMessage() for r in caplog.records if 'not honoured' in r.msg]
  assert len(told) == 1
  assert told[0].endswith('num_beams=4, no_repeat_ngram_size=3.')


def test_config_json_speaks_where_the_other_file_does_not(checkpoints, copy):
  directory = copy('gpt2', {'eos_token_id': 41}, 'config.json')
  (directory / generation_config.FILE).unlink()
  assert loading.load(str(directory)).end_ids == (41,)
  own = copy('gpt2', {'eos_token_id': [41, 42], 'suppress_tokens': [5]})
  (own / 'config.json').write_text((directory / 'config.json').read_text())
  assert loading.load(str(own)).end_ids == (41, 42)
  partial = copy('gpt2', {'suppress_tokens': [5]}, whole=False)
  (partial / 'config.json').write_text((directory / 'config.json').read_text())
  found = loading.load(str(partial)).generation
  assert found.ends == (41,) and found.suppressed == (5,)


@pytest.mark.slow
def test_the_script_takes_what_the_files_say(plain, copy, tmp_path):
  settings = {'do_sample': False, 'num_beams': 4, 'suppress_tokens': [7]}
  settings |= settings_of('ends', plain['gpt2'])
  directory = copy('gpt2', settings)
  script = pathlib.Path(__file__).parents[2] / 'experiments' / 'generate.py'
  out = tmp_path / 'texts.json'
  done = commands.run(
    script, f'--workdir={directory}', f'--prompt={PROMPTS[0]}',
    f'--num_tokens={NUM}', f'--output={out}',
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  trained = loading.load(str(directory))
  ids, _ = ours(directory)
  want = trained.detokenize(
    PROMPTS[:1], theirs(directory, ids[:1], num_beams=1)
  )
  assert [one['text'] for one in json.loads(out.read_text())] == want
  assert done.stderr.count('not honoured: num_beams=4.') == 1

"""Artefacts, run where there is neither t2x nor flax."""

import dataclasses
import json
import subprocess
import sys

import extras
from flax import nnx
import jax
import nasty
import numpy as np
import pytest
import tiny

from t2x.data import tokenizers
from t2x.inference import export
from t2x.inference import exported_runtime
from t2x.inference import generation as generation_lib
from t2x.inference import text_stream
from t2x.inference import trained_model
from t2x.interop import generation_config
from t2x.interop import tokenizer_file
from t2x.layers import attention_config
from t2x.layers import position
from t2x.models import decoder
from t2x.models import encoder
from t2x.models import encoder_decoder
from t2x.models import model as model_lib
from t2x.parallel import mesh as mesh_lib

PROMPTS = ['the run', 'goes on from where', 'a']
# Stands for a machine that has jax alone.
ALONE = """
import json, sys
for name in ('t2x', 'flax', 'optax', 'orbax'):
  sys.modules[name] = None
sys.path.insert(0, sys.argv[1])
import run
made = run.Artefact(sys.argv[1])
print(json.dumps([made.write(**call) for call in json.loads(sys.argv[2])]))
"""


def trained_of(directory, name):
  config = tiny.experiment_of(directory, data__length=64)
  shared = dict(
    vocab_size=384, num_layers=2, embed_dim=16,
    attention=attention_config.Dense(num_heads=4, head_dim=4),
  )  # fmt: skip
  model = {
    'decoder': config.model,
    'window': decoder.DecoderConfig(
      **shared
      | {
        'attention': attention_config.Local(num_heads=4, head_dim=4, window=5)
      },
      position=position.Rotary(),
      dtype='bfloat16',
    ),
    'encoder_decoder': encoder_decoder.EncoderDecoderConfig(
      **shared, position=position.RelativeBuckets()
    ),
    'few_positions': encoder_decoder.EncoderDecoderConfig(
      **shared, position=position.Learned(max_length=50)
    ),
    'encoder': encoder.EncoderConfig(**shared),
  }[name]
  mesh = mesh_lib.make(mesh_lib.MeshConfig(data=1), jax.devices()[:1])
  return trained_model.Trained(
    config=config.__class__(**{**vars(config), 'model': model}),
    model=model_lib.make(model, rngs=nnx.Rngs(0)),
    tokenizer=tokenizers.BytesTokenizer(config.data.tokenizer),
    step=0,
    mesh=mesh,
    labels={},
    temperature=1.2,
  )


def run_alone(directory, calls):
  command = [sys.executable, '-c', ALONE, str(directory), json.dumps(calls)]
  env = {'JAX_PLATFORMS': 'cpu', 'PATH': ''}
  out = subprocess.run(command, env=env, capture_output=True, text=True)
  assert out.returncode == 0, out.stderr
  return json.loads(out.stdout)


@pytest.mark.parametrize(
  'name', ['decoder', 'window', 'encoder_decoder', 'few_positions']
)
def test_it_writes_what_the_run_writes(tmp_path, name):
  trained = trained_of(tmp_path, name)
  export.write(
    trained, str(tmp_path / 'made'), chunk=64 if name == 'few_positions' else 16
  )
  prompts = trained.prompt_ids(PROMPTS)
  settings = [
    {'temperature': 0.0},
    {'temperature': 0.8, 'top_k': 30, 'top_p': 0.9, 'seed': 5},
  ]
  found = run_alone(
    tmp_path / 'made',
    [{'prompts': prompts, 'num_tokens': 12, **own} for own in settings],
  )
  for own, (tokens, log_probs) in zip(settings, found):
    own = dict(own)
    seed = own.pop('seed', 0)
    expected = generation_lib.generation(
      trained,
      PROMPTS,
      num_tokens=12,
      sampling=generation_lib.Sampling(**own),
      seed=seed,
    )
    assert tokens == expected.tokens
    for a, b in zip(log_probs, expected.log_probs):
      assert a == pytest.approx(b, abs=2e-2 if name == 'window' else 1e-4)


def test_what_a_checkpoint_forbids(tmp_path, caplog):
  """Is in no text; that its defaults of drawing are left out is told."""
  trained = trained_of(tmp_path, 'encoder_decoder')
  greedy = generation_lib.Sampling(temperature=0)
  texts = lambda trained: (
    generation_lib.generation(
      trained, PROMPTS, num_tokens=12, sampling=greedy
    ).tokens
  )
  plain = texts(trained)
  own = generation_config.GenerationConfig(
    ends=(plain[0][6], 2),
    first=plain[1][3],
    not_first=(plain[0][0],),
    suppressed=(plain[1][1],),
    banned=((plain[2][2],), (5, 6)),
    sampling={'temperature': 0.0, 'repetition_penalty': 1.5},
  )
  trained = dataclasses.replace(trained, generation=own)
  export.write(trained, str(tmp_path / 'made'), chunk=16)
  made = exported_runtime.Artefact(str(tmp_path / 'made'))
  prompts = trained.prompt_ids(PROMPTS)
  found, _ = made.write(prompts, num_tokens=12, temperature=0.0)
  assert found == texts(trained) != plain
  told = [record.getMessage() for record in caplog.records]
  assert any("checkpoint's temperature=0.0, repetition" in one for one in told)
  assert any('honour 1 of bad_words_ids' in one for one in told)


def test_as_a_command_and_for_other_platforms(tmp_path):
  """A program for TPUs and GPUs is made here; the one for CPUs is run."""
  trained = trained_of(tmp_path, 'decoder')
  made = tmp_path / 'made'
  export.write(trained, str(made), platforms=('cpu', 'cuda', 'tpu'))
  expected = generation_lib.generate_text(
    trained,
    ['the run'],
    num_tokens=9,
    sampling=generation_lib.Sampling(temperature=0),
  )
  ask = lambda *flags: subprocess.run(
    [sys.executable, str(made / 'run.py'), *flags],
    env={'JAX_PLATFORMS': 'cpu', 'PATH': ''},
    capture_output=True,
    text=True,
  )
  out = ask('--prompt=the run', '--num_tokens=9', '--temperature=0')
  assert out.stdout == f'--- the run\n{expected[0]}\n\n'
  out = ask('--ids=500')
  assert out.returncode == 1 and 'error: Prompt 0 has a token' in out.stderr
  for flags in (
    ['--ids=a,b'],
    ['--ids='],
    ['--ids=5', '--top_p=0'],
    ['--ids=5', '--temperature=nan'],
    ['--ids=5', '--top_k=-3'],
  ):
    out = ask(*flags)
    assert out.returncode == 1 and out.stderr.startswith('error: ')
  out = ask('--ids=5', '--num_tokens=64')
  assert out.returncode == 1 and 'there are 64 positions' in out.stderr


def test_what_cannot_be_written_is_refused(tmp_path):
  with pytest.raises(ValueError, match='cannot generate'):
    export.write(trained_of(tmp_path, 'encoder'), str(tmp_path / 'made'))
  trained = trained_of(tmp_path, 'decoder')
  with pytest.raises(ValueError, match="platform 'gpu'"):
    export.write(trained, str(tmp_path / 'made'), platforms=('gpu',))
  assert not (tmp_path / 'made').exists()
  (tmp_path / 'full').mkdir()
  (tmp_path / 'full' / 'file').touch()
  with pytest.raises(ValueError, match='is not empty'):
    export.write(trained, str(tmp_path / 'full'))


@pytest.mark.parametrize('name', ['decoder', 'encoder_decoder'])
def test_its_texts_are_those_of_the_run(tmp_path, name):
  """Any prompt has the run's ids, and any ids its text."""
  extras.need('tokenizers', extra='huggingface')
  trained = trained_of(tmp_path, name)
  info = json.loads(json.dumps(export.reading(trained)))
  write = tokenizer_file.make_writer(trained.tokenizer, trained.frame)
  write(tmp_path / 'made')
  read = lambda: exported_runtime.read_tokenizer(
    str(tmp_path / 'made' / 'tokenizer.json'), info
  )
  draw = np.random.default_rng(0)
  for text in nasty.texts(200):
    found = exported_runtime.ids_of(read(), info, text)
    assert [found] == trained.prompt_ids([text])
    ids = draw.integers(0, 361, 6).tolist()
    wrote = exported_runtime.text_of(read(), info, found, ids)
    assert [wrote] == trained.detokenize([text], [ids])


def test_a_character_that_a_prompt_begins_is_told_whole(tmp_path):
  """As the run tells it: not what it looked like before its end came."""
  extras.need('tokenizers', extra='huggingface')
  trained = trained_of(tmp_path, 'decoder')
  info = json.loads(json.dumps(export.reading(trained)))
  tokenizer_file.make_writer(trained.tokenizer, trained.frame)(
    tmp_path / 'made'
  )
  tokenizer = exported_runtime.read_tokenizer(
    str(tmp_path / 'made' / 'tokenizer.json'), info
  )
  *begun, last = trained.tokenizer.encode('a \u00e9')
  rest = [last, *trained.tokenizer.encode(' b')]
  told = exported_runtime.text_of(tokenizer, info, begun, rest)
  assert (
    told
    == text_stream.continuation(trained.tokenizer, begun, rest)
    == '\u00e9 b'
  )

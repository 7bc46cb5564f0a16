"""What an export writes is what the run writes, here and in `transformers`."""

import dataclasses

import extras
import hf_files
import jax
import numpy as np
import pytest
import tiny

from t2x.data import tokenizer_loading
from t2x.data import tokenizers
from t2x.inference import embeddings
from t2x.inference import generation
from t2x.inference import hf_conversion
from t2x.inference import loading
from t2x.inference import trained_model
from t2x.interop import configs
from t2x.interop import huggingface
from t2x.models import model as model_lib
from t2x.parallel import mesh as mesh_lib

torch = extras.need('torch', extra='reference')
transformers = extras.need('transformers', extra='reference')

pytestmark = pytest.mark.reference

PROMPTS = [
  's',
  '<s> A text</s>',
  '',
  ' \u2581 <pad>\n',
  'A longer text: <mask>',
]
GREEDY = generation.Sampling(temperature=0.0)
SMALL = dict(
  num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
  hidden_size=16, max_position_embeddings=64,
)  # fmt: skip
CONFIGS = {
  'gpt2': dict(
    model_type='gpt2', n_embd=16, n_layer=1, n_head=2, n_positions=64
  ),
  'llama': dict(model_type='llama', **SMALL),
  't5': dict(
    model_type='t5', d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2
  ),
  'bert': dict(model_type='bert', **SMALL),
  'roberta': dict(
    model_type='roberta', type_vocab_size=1, pad_token_id=1, **SMALL
  ),
}


def tokenizer_of(name, tmp_path):
  if name == 'sentencepiece':
    config = tokenizers.SentencePiece(vocab_size=600)
    return tokenizer_loading.train(config, hf_files.TEXTS)
  if name == 'bytes':
    return tokenizer_loading.train(tokenizers.Bytes(), [])
  directory = hf_files.MAKERS[name](tmp_path / 'tokenizer')
  return tokenizer_loading.read(tokenizers.Pretrained(directory=str(directory)))


def trained_of(family, tokenizer, tmp_path):
  """Returns a run that has drawn its weights, and has not trained."""
  from flax import nnx

  hf = {'vocab_size': tokenizer.vocab_size + 3, **CONFIGS[family]}
  _, config = configs.to_t2x(hf)
  own = tiny.experiment_of(tmp_path, data__length=64)
  model = model_lib.make(config, rngs=nnx.Rngs(3))
  # So far from 0 that texts differ.
  model = jax.tree.map(lambda x: x + 0.3 * np.sign(x) + 2 * x, model)
  return trained_model.Trained(
    config=dataclasses.replace(own, model=config),
    model=model,
    tokenizer=tokenizer,
    step=0,
    mesh=mesh_lib.make(mesh_lib.MeshConfig(data=1), jax.devices()[:1]),
    labels={},
  )


@pytest.mark.parametrize(
  'family, name',
  [
    ('gpt2', 'sentencepiece'),
    ('llama', 'bytes'),
    ('t5', 'sentencepiece'),
    ('gpt2', 'gpt2'),
    ('t5', 'bert'),
  ],
)
@pytest.mark.slow
def test_greedy_texts(tmp_path, family, name):
  trained = trained_of(family, tokenizer_of(name, tmp_path), tmp_path)
  prompts = [*PROMPTS, 'a <extra_id_3> b']
  if name == 'gpt2':
    prompts.remove('')  # Nothing begins its texts, so there is nothing to read.
  # To a run, from that a checkpoint once more.
  first, run, second = (str(tmp_path / name) for name in ('a', 'run', 'b'))
  huggingface.write(first, trained.model, trained.tokenizer)
  hf_conversion.to_run(first, run)
  hf_conversion.from_run(run, second)
  loaded = [loading.load(directory) for directory in (first, run, second)]
  for one in loaded:
    assert one.prompt_ids(prompts) == trained.prompt_ids(prompts)
  texts, again = (
    generation.generate_text(one, prompts, num_tokens=8, sampling=GREEDY)
    for one in (trained, loaded[-1])
  )
  assert texts == again and len(set(texts)) > 1
  for directory in (first, second):
    check_transformers(directory, trained, prompts, texts)


def check_transformers(directory, trained, prompts, texts):
  auto = transformers.AutoTokenizer.from_pretrained(directory)
  model = transformers.AutoModelForSeq2SeqLM
  if trained.config.model.__class__.__name__ == 'DecoderConfig':
    model = transformers.AutoModelForCausalLM
  model = model.from_pretrained(directory).eval()
  tokenizer = trained.tokenizer
  config = model.generation_config
  assert config.eos_token_id == tokenizer.eos_id == auto.eos_token_id
  assert config.pad_token_id == tokenizer.pad_id == auto.pad_token_id
  assert config.bos_token_id == tokenizer.bos_id == auto.bos_token_id
  for prompt, text in zip(prompts, texts):
    batch = auto(prompt, return_tensors='pt')
    made = model.generate(**batch, do_sample=False, max_new_tokens=8)[0]
    start = 1 if model.config.is_encoder_decoder else batch.input_ids.shape[1]
    ids = [i for i in made[start:].tolist() if i < tokenizer.vocab_size]
    assert trained.detokenize([prompt], [ids]) == [text]


@pytest.mark.parametrize(
  'family, name',
  [('bert', 'sentencepiece'), ('roberta', 'bytes'), ('roberta', 'roberta')],
)
def test_vectors_of_encoders(tmp_path, family, name):
  """Of the export too, whose positions count from the padding's id."""
  trained = trained_of(family, tokenizer_of(name, tmp_path), tmp_path)
  directory = str(tmp_path / 'made')
  assert huggingface.write(directory, trained.model, trained.tokenizer) == (
    family
  )
  want = embeddings.embed(trained, PROMPTS)
  got = embeddings.embed(loading.load(directory), PROMPTS)
  np.testing.assert_allclose(got, want, atol=1e-5)
  auto = transformers.AutoTokenizer.from_pretrained(directory)
  model = transformers.AutoModel.from_pretrained(directory).eval()
  for prompt, vector in zip(PROMPTS, want):
    if name == 'roberta' and '<pad>' in prompt:
      continue  # Its own padding in a text: no position for it there.
    with torch.no_grad():
      states = model(**auto(prompt, return_tensors='pt')).last_hidden_state[0]
    mean = states.mean(0)
    np.testing.assert_allclose(vector, mean / mean.norm(), atol=1e-4)

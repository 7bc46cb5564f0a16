"""Whole checkpoints of others, in and out: files, tokenizers, numbers."""

import dataclasses
import functools
import json
import pathlib

import commands
import extras
import hf_files
import jax
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from t2x.data import letters
from t2x.data import tokenizer_loading
from t2x.data import tokenizers
from t2x.inference import embeddings
from t2x.inference import generation
from t2x.inference import hf_conversion
from t2x.inference import loading
from t2x.interop import checkpoint_dir
from t2x.interop import configs
from t2x.interop import exported
from t2x.interop import huggingface
from t2x.models import presets

torch = extras.need('torch', extra='reference')
transformers = extras.need('transformers', extra='reference')

pytestmark = pytest.mark.reference

ENCODER = dict(
  hidden_size=24,
  num_hidden_layers=2,
  num_attention_heads=3,
  intermediate_size=40,
  max_position_embeddings=34,
)


def make_model(name, size):
  t = transformers
  if name == 'bert':
    return t.BertForMaskedLM(t.BertConfig(vocab_size=size, **ENCODER))
  if name == 'roberta':
    config = t.RobertaConfig(vocab_size=size, type_vocab_size=1, **ENCODER)
    return t.RobertaForMaskedLM(config)
  if name == 'gpt2':
    config = t.GPT2Config(
      vocab_size=size, n_embd=24, n_layer=2, n_head=3, n_positions=32,
      bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return t.GPT2LMHeadModel(config)
  if name == 't5':
    config = t.T5Config(
      vocab_size=size + 28, d_model=24, d_kv=5, d_ff=40, num_layers=2,
      num_heads=3, relative_attention_num_buckets=8,
    )  # fmt: skip
    return t.T5ForConditionalGeneration(config)
  config = t.LlamaConfig(
    vocab_size=size, hidden_size=24, intermediate_size=40,
    num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=64,
  )  # fmt: skip
  return t.LlamaForCausalLM(config)


def make(name, directory):
  """Writes a checkpoint as `transformers` does; returns its model."""
  hf_files.MAKERS[name](directory)
  size = tokenizer_loading.read(
    tokenizers.Pretrained(directory=str(directory))
  ).vocab_size
  torch.manual_seed(0)
  model = make_model(name, size).eval()
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(0.2 * torch.randn_like(parameter))
  model.save_pretrained(directory)
  return model


@pytest.fixture(scope='module')
def checkpoints(tmp_path_factory):
  """Name -> (directory, the model of transformers)."""
  root = tmp_path_factory.mktemp('checkpoints')
  return {
    name: (root / name, make(name, root / name)) for name in hf_files.MAKERS
  }


def their_logits(model, ids):
  inputs = {'input_ids': torch.tensor(ids)}
  if model.config.is_encoder_decoder:
    inputs['decoder_input_ids'] = torch.tensor(ids[:, ::-1].copy())
  with torch.no_grad():
    return model(**inputs).logits.numpy()


def our_logits(model, ids):
  if hasattr(model, 'encoder'):
    return jax.jit(lambda m, x: m(x[:, ::-1], encoder_inputs=x))(model, ids)
  return jax.jit(lambda m, x: m(x))(model, ids)


def ids_for(name, size):
  return np.random.default_rng(0).integers(5, size, (2, 9))


@pytest.mark.parametrize('name', list(hf_files.MAKERS))
def test_there_and_back(checkpoints, tmp_path, name):
  """The run computes what the checkpoint does, and so does its export."""
  directory, theirs = checkpoints[name]
  workdir, back = str(tmp_path / 'run'), str(tmp_path / 'back')
  hf_conversion.to_run(str(directory), workdir)
  trained = loading.load(workdir)
  assert trained.step == 0
  assert trained.tokenizer.encode('A text.') == (
    loading.load(str(directory)).tokenizer.encode('A text.')
  )
  ids = ids_for(name, trained.tokenizer.vocab_size)
  want = their_logits(theirs, ids)
  assert np.abs(want).max() > 0.5
  np.testing.assert_allclose(
    our_logits(trained.model, ids), want, atol=1e-4, rtol=0
  )
  hf_conversion.from_run(workdir, back)
  again = transformers.AutoModel.from_pretrained(back)
  assert again.config.model_type == theirs.config.model_type
  again = type(theirs).from_pretrained(back).eval()
  np.testing.assert_array_equal(their_logits(again, ids), want)
  one, other = (
    transformers.AutoTokenizer.from_pretrained(d) for d in (directory, back)
  )
  assert one(hf_files.TEXTS[:20]) == other(hf_files.TEXTS[:20])


def test_the_command_and_what_it_says(checkpoints, tmp_path):
  directory, _ = checkpoints['gpt2']
  workdir, back = str(tmp_path / 'run'), str(tmp_path / 'back')
  script = pathlib.Path(__file__).parents[2] / 'scripts' / 'convert_hf.py'
  run = functools.partial(commands.run, script)
  there = run(f'--from={directory}', f'--to={workdir}')
  assert there.returncode == 0 and 'a run of ' in there.stdout, there.stderr
  back_again = run(f'--from={workdir}', f'--to={back}')
  assert 'holds a gpt2' in back_again.stdout, back_again.stderr
  assert checkpoint_dir.is_checkpoint(back)
  wrong = run(f'--from={workdir}', f'--to={back}')
  assert wrong.returncode == 1 and wrong.stderr.startswith('error: ')
  assert 'nothing is written over' in wrong.stderr
  text = generation.generate_text(
    loading.load(workdir), ['A text'], num_tokens=3
  )
  assert len(text) == 1


def test_shards_and_an_index(checkpoints, tmp_path):
  directory, theirs = checkpoints['llama']
  found = huggingface.read(str(directory))
  whole, cut = tmp_path / 'whole', tmp_path / 'cut'
  huggingface.write(str(whole), found.model, found.tokenizer)
  huggingface.write(str(cut), found.model, found.tokenizer, shard_bytes=20_000)
  assert len(list(cut.glob('*.safetensors'))) > 2
  again = huggingface.read(str(cut))
  jax.tree.map(np.testing.assert_array_equal, again.model, found.model)
  ids = ids_for('llama', 500)
  loaded = transformers.AutoModelForCausalLM.from_pretrained(cut).eval()
  want = their_logits(theirs, ids)
  np.testing.assert_array_equal(their_logits(loaded, ids), want)


def test_shards_of_transformers_and_half_precision(checkpoints, tmp_path):
  directory, theirs = checkpoints['gpt2']
  copy = tmp_path / 'copy'
  hf_files.MAKERS['gpt2'](copy)
  half = type(theirs).from_pretrained(directory, dtype=torch.bfloat16)
  half.save_pretrained(copy, max_shard_size='20KB')
  assert (copy / 'model.safetensors.index.json').exists()
  found = huggingface.read(str(copy))
  ids = ids_for('gpt2', 400)
  want = their_logits(half.float().eval(), ids)
  np.testing.assert_allclose(our_logits(found.model, ids), want, atol=1e-4)


def test_a_run_of_ones_own_loads_in_transformers(tmp_path):
  """Trained by t2x, with its own tokenizers."""
  from flax import nnx

  from t2x.layers import attention_config
  from t2x.layers import mlp
  from t2x.models import decoder

  tokenizer = tokenizer_loading.train(
    tokenizers.SentencePiece(vocab_size=500), hf_files.TEXTS
  )
  config = decoder.DecoderConfig(
    vocab_size=500,
    num_layers=2,
    embed_dim=32,
    attention=attention_config.Dense(num_heads=4, head_dim=8, bias=True),
    mlp=mlp.MlpConfig(hidden=48, activation='gelu'),
  )
  model = decoder.Decoder(config, rngs=nnx.Rngs(0))
  assert huggingface.write(str(tmp_path / 'own'), model, tokenizer) == 'gpt2'
  theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'own')
  ids = ids_for('own', 500)
  np.testing.assert_allclose(
    their_logits(theirs.eval(), ids), our_logits(model, ids), atol=1e-4
  )
  other = transformers.AutoTokenizer.from_pretrained(tmp_path / 'own')
  texts = [*hf_files.TEXTS, *hf_files.PROBES]
  want = tokenizer.encode_batch(texts)
  assert [
    other(t, add_special_tokens=False)['input_ids'] for t in texts
  ] == want
  assert other.eos_token_id == tokenizer.eos_id
  for ids, text in zip(want, texts):
    assert other.decode(ids) == text


@pytest.mark.parametrize(
  'name',
  ['bert_large', 'roberta_base', 'gpt2_xl', 't5_3b', 't5_v1_1_base',
   'llama2_70b', 'mixtral_8x7b'],
)  # fmt: skip
def test_configs_of_presets_translate_both_ways(name):
  config = getattr(presets, name)()
  family, hf = exported.from_t2x(config)
  assert name.startswith(family if family != 't5' else 't5_')
  # Where it is drawn otherwise the numbers of a trained model are the same.
  again = configs.to_t2x(hf)[1]
  assert again.num_layers == config.num_layers
  assert again.attention == dataclasses.replace(
    config.attention, dropout=again.attention.dropout
  )


def test_embeddings(checkpoints):
  """Mean pooling as sentence-transformers has it, by torch."""
  directory, theirs = checkpoints['bert']
  tokenizer = transformers.BertTokenizer(str(directory / 'vocab.txt'))
  texts = ['A short one.', 'Another text, and it is a longer one: ' * 2, 'word']
  got = embeddings.embed(loading.load(str(directory)), texts)
  np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1.0, rtol=1e-6)
  for text, vector in zip(texts, got):
    batch = tokenizer(text, return_tensors='pt', truncation=True, max_length=34)
    with torch.no_grad():
      states = theirs.bert(**batch).last_hidden_state[0]
    want = states.mean(0)
    np.testing.assert_allclose(vector, want / want.norm(), atol=1e-4)


def test_a_headless_body_without_prefix(checkpoints, tmp_path):
  _, theirs = checkpoints['bert']
  hf_files.MAKERS['bert'](tmp_path / 'body')
  theirs.bert.save_pretrained(tmp_path / 'body')
  names = safetensors_numpy.load_file(tmp_path / 'body/model.safetensors')
  assert not any(name.startswith('bert.') for name in names)
  # The body of a masked model has no pooler; a BertModel has.
  full = transformers.BertModel(theirs.bert.config).eval()
  full.load_state_dict(theirs.bert.state_dict(), strict=False)
  full.save_pretrained(tmp_path / 'body')
  trained = loading.load(str(tmp_path / 'body'))
  ids = ids_for('bert', 400)
  with torch.no_grad():
    want = full(torch.tensor(ids)).last_hidden_state.numpy()
  np.testing.assert_allclose(trained.model.encode(ids), want, atol=1e-4)


# --- What is wrong is said, and nothing is left behind. ---


@pytest.fixture
def gpt2(checkpoints, tmp_path):
  """A copy of a checkpoint, to spoil."""
  found = huggingface.read(str(checkpoints['gpt2'][0]))
  directory = tmp_path / 'gpt2'
  huggingface.write(
    str(directory), found.model, found.tokenizer, shard_bytes=20_000
  )
  return directory


def edit(file, change):
  data = json.loads(file.read_text())
  change(data)
  file.write_text(json.dumps(data))


def spoil_shape(d):
  edit(d / 'config.json', lambda c: c.update(n_inner=7))


def spoil_vocabulary(d):
  edit(d / 'config.json', lambda c: c.update(vocab_size=77))


def spoil_field(d):
  edit(d / 'config.json', lambda c: c.pop('n_head'))


def spoil_kind(d):
  edit(d / 'config.json', lambda c: c.update(model_type='mamba'))


def spoil_shard(d):
  sorted(d.glob('*.safetensors'))[1].unlink()


def spoil_bytes(d):
  file = sorted(d.glob('*.safetensors'))[0]
  file.write_bytes(b'no safetensors at all')


def spoil_cut(d):
  file = sorted(d.glob('*.safetensors'))[0]
  file.write_bytes(file.read_bytes()[:-100])


def spoil_escape(d):
  index = d / 'model.safetensors.index.json'

  def change(data):
    name = next(iter(data['weight_map']))
    data['weight_map'][name] = '../secret/model.safetensors'

  edit(index, change)


def spoil_index(d):
  index = d / 'model.safetensors.index.json'
  edit(index, lambda data: data['weight_map'].update(more=sorted(
    data['weight_map'].values())[0]))  # fmt: skip


def spoil_missing(d):
  index = d / 'model.safetensors.index.json'
  edit(index, lambda data: data['weight_map'].pop('transformer.ln_f.weight'))


def only_pickle(d):
  for file in [*d.glob('*.safetensors'), d / 'model.safetensors.index.json']:
    file.unlink()

  class Evil:
    def __reduce__(self):
      return (pathlib.Path.touch, (d / 'it_ran',))

  torch.save({'weight': Evil()}, d / 'pytorch_model.bin')


def no_weights(d):
  for file in [*d.glob('*.safetensors'), d / 'model.safetensors.index.json']:
    file.unlink()


def no_tokenizer(d):
  (d / 'tokenizer.json').unlink()


def integers(d):
  name = json.loads((d / 'model.safetensors.index.json').read_text())
  file = d / name['weight_map']['transformer.ln_f.weight']
  arrays = safetensors_numpy.load_file(file)
  arrays['transformer.ln_f.weight'] = arrays['transformer.ln_f.weight'].astype(
    np.int8
  )
  safetensors_numpy.save_file(arrays, file, {'format': 'pt'})


@pytest.mark.parametrize(
  'spoil, message',
  [
    (spoil_shape, r'Of another shape: .*transformer\.h\.0\.mlp\.c_fc\.weight'),
    (spoil_vocabulary, r'the tokenizer has \d+ ids, and the model 77'),
    (spoil_field, r"config.json lacks 'n_head'"),
    (spoil_kind, r"model_type='mamba'; t2x reads bert, roberta, gpt2"),
    (spoil_shard, r'lacks 1 of its \d+ files: model-00002-of'),
    (spoil_bytes, r'is damaged, or no safetensors file'),
    (spoil_cut, r'is damaged, or no safetensors file'),
    (
      spoil_escape,
      r"'\.\./secret/model\.safetensors', which is not one of its",
    ),
    (spoil_index, r'promises weights that its files do not hold: more'),
    (spoil_missing, r'Missing: transformer\.ln_f\.weight'),
    (only_pickle, r'pytorch_model\.bin alone.*can run any code'),
    (no_weights, r'has no weights: neither model\.safetensors'),
    (no_tokenizer, r'No tokenizer in'),
    (integers, r'transformer\.ln_f\.weight in .* is of type I8'),
  ],
)
def test_what_is_wrong_is_said_and_nothing_written(
  gpt2, tmp_path, spoil, message
):
  spoil(gpt2)
  with pytest.raises(ValueError, match=message):
    hf_conversion.to_run(str(gpt2), str(tmp_path / 'run'))
  assert not (tmp_path / 'run').exists()
  assert not (gpt2 / 'it_ran').exists()


def test_nothing_is_written_over(gpt2, tmp_path):
  (tmp_path / 'full').mkdir()
  (tmp_path / 'full' / 'a').write_text('')
  with pytest.raises(ValueError, match='nothing is written over'):
    hf_conversion.to_run(str(gpt2), str(tmp_path / 'full'))
  hf_conversion.to_run(str(gpt2), str(tmp_path / 'run'))
  with pytest.raises(ValueError, match='nothing is written over'):
    hf_conversion.from_run(str(tmp_path / 'run'), str(tmp_path / 'full'))
  with pytest.raises(ValueError, match='there is no such directory'):
    hf_conversion.to_run(str(tmp_path / 'none'), str(tmp_path / 'other'))
  with pytest.raises(ValueError, match='gs://a/b is remote'):
    huggingface.read('gs://a/b')


def test_a_model_that_no_class_computes(tmp_path):
  from flax import nnx

  from t2x.layers import position
  from t2x.models import decoder

  config = decoder.DecoderConfig(
    vocab_size=50, num_layers=1, position=position.Alibi()
  )
  model = decoder.Decoder(config, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match='(?s)nearest is gpt2.*position.*alibi'):
    huggingface.write(str(tmp_path / 'own'), model)
  assert not (tmp_path / 'own').exists()


def test_a_released_file_holds_more_than_its_class(checkpoints, tmp_path):
  """bert-base-uncased names BertForMaskedLM, and has all of pretraining."""
  _, theirs = checkpoints['bert']
  torch.manual_seed(1)
  full = transformers.BertForPreTraining(theirs.config).eval()
  hf_files.MAKERS['bert'](tmp_path / 'full')
  full.save_pretrained(tmp_path / 'full')
  config = tmp_path / 'full' / 'config.json'
  edit(config, lambda c: c.update(architectures=['BertForMaskedLM']))
  trained = loading.load(str(tmp_path / 'full'))
  assert trained.config.model.next_sentence and trained.config.model.pooler
  huggingface.write(str(tmp_path / 'back'), trained.model, trained.tokenizer)
  again = transformers.BertForPreTraining.from_pretrained(tmp_path / 'back')
  for key, value in full.state_dict().items():
    torch.testing.assert_close(again.state_dict()[key], value, rtol=0, atol=0)


def test_a_run_stays_whole_when_its_source_is_gone(checkpoints, tmp_path):
  import shutil

  source = shutil.copytree(checkpoints['t5'][0], tmp_path / 'source')
  hf_conversion.to_run(str(source), str(tmp_path / 'run'))
  shutil.rmtree(source)
  trained = loading.load(str(tmp_path / 'run'))
  texts = generation.generate_text(trained, ['A text.'], num_tokens=3)
  assert len(texts) == 1


def test_settings_of_the_model_apply_to_a_directory(checkpoints):
  directory, theirs = checkpoints['llama']
  settings = ['model.dtype=bfloat16', 'model.vocab_multiple=256']
  trained = loading.load(str(directory), settings=settings)
  assert trained.model.config.dtype == 'bfloat16'
  assert trained.model.embeddings.tokens.table_VD.shape[0] % 256 == 0
  ids = ids_for('llama', 400)
  got = our_logits(trained.model, ids)
  np.testing.assert_allclose(got, their_logits(theirs, ids), atol=0.3)
  with pytest.raises(ValueError, match='do not fit the llama model'):
    loading.load(str(directory), settings=['model.num_layers=3'])


def test_buffers_of_integers_are_ignored(checkpoints, tmp_path):
  found = huggingface.read(str(checkpoints['bert'][0]))
  copy = tmp_path / 'copy'
  huggingface.write(str(copy), found.model, found.tokenizer)
  arrays = safetensors_numpy.load_file(copy / 'model.safetensors')
  arrays['bert.embeddings.position_ids'] = np.arange(34)[None]
  safetensors_numpy.save_file(arrays, copy / 'model.safetensors')
  again = huggingface.read(str(copy))
  jax.tree.map(np.testing.assert_array_equal, again.model, found.model)


def test_a_tokenizer_that_cannot_be_written_leaves_nothing(
  checkpoints, tmp_path, monkeypatch
):

  found = huggingface.read(str(checkpoints['gpt2'][0]))
  own = tokenizers.BytesTokenizer(tokenizers.Bytes())
  monkeypatch.setattr(
    letters, 'byte_letters', lambda: list(map(chr, range(300, 556)))
  )
  with pytest.raises(ValueError, match='cannot be written as tokenizer.json'):
    huggingface.write(str(tmp_path / 'out'), found.model, own)
  assert not (tmp_path / 'out').exists()


def test_several_tokens_may_end_a_text(checkpoints, tmp_path):
  import shutil

  copy = shutil.copytree(checkpoints['llama'][0], tmp_path / 'copy')
  file = 'generation_config.json'
  edit(copy / file, lambda c: c.update(eos_token_id=[2, 41]))
  hf_conversion.to_run(str(copy), str(tmp_path / 'run'))
  for directory in (copy, tmp_path / 'run'):
    trained = loading.load(str(directory))
    assert trained.end_ids == (2, 41)
    assert trained.decode_options()['eos_id'] == (2, 41)
  hf_conversion.from_run(str(tmp_path / 'run'), str(tmp_path / 'back'))
  config = json.loads((tmp_path / 'back' / file).read_text())
  assert config['eos_token_id'] == [2, 41]
  assert loading.load(str(checkpoints['gpt2'][0])).end_ids == (0,)

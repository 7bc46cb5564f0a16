"""Heads of classes of BERT and RoBERTa: logits, labels, in and out."""

import json
import pathlib

import commands
import extras
from flax import nnx
import hf_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2x.config import overrides
from t2x.data import tokenizer_loading
from t2x.data import tokenizers
from t2x.inference import embeddings
from t2x.inference import hf_conversion
from t2x.inference import loading
from t2x.interop import huggingface
from t2x.layers import attention_config
from t2x.layers import mlp
from t2x.layers import norm
from t2x.layers import position
from t2x.models import encoder
from t2x.trainer import train
from t2x.trainer import workdir

torch = extras.need('torch', extra='reference')
transformers = extras.need('transformers', extra='reference')

pytestmark = pytest.mark.reference

NAMES = ['awful', 'so-so', 'good', 'O']
SIZES = dict(
  hidden_size=24,
  num_hidden_layers=2,
  num_attention_heads=4,
  intermediate_size=40,
  max_position_embeddings=34,
)
TEXTS = [
  'A short one.',
  'Two  words \u2014 d\u00e9j\u00e0 vu, and it is a longer one: 12,345!',
  'word',
]
LONG = 'It goes on and on, ' * 20


def make(family, head, directory, **settings):
  """Writes a checkpoint as `transformers` does; returns its model."""
  hf_files.MAKERS[family](directory)
  read = tokenizer_loading.read(tokenizers.Pretrained(directory=str(directory)))
  kind = 'Bert' if family == 'bert' else 'Roberta'
  types = 2 if family == 'bert' else 1
  config = getattr(transformers, f'{kind}Config')(
    **SIZES | {'vocab_size': read.vocab_size, 'type_vocab_size': types},
    **{'id2label': dict(enumerate(NAMES))} | settings,
  )
  torch.manual_seed(0)
  model = getattr(transformers, f'{kind}For{head}Classification')(config).eval()
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(0.2 * torch.randn_like(parameter))
  model.save_pretrained(directory)
  return model


@pytest.fixture(scope='module')
def checkpoints(tmp_path_factory):
  """(family, head) -> (directory, the model of transformers)."""
  root = tmp_path_factory.mktemp('heads')
  pairs = [(f, h) for f in ('bert', 'roberta') for h in ('Sequence', 'Token')]
  return {
    pair: (root / '_'.join(pair), make(*pair, root / '_'.join(pair)))
    for pair in pairs
  }


def asked(directory, model, texts, **options):
  """Their tokenizer and model, on a padded batch; returns both."""
  tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
  length = 34 if model.config.model_type == 'bert' else 32
  batch = tokenizer(
    [t if isinstance(t, str) else t[0] for t in texts],
    None if isinstance(texts[0], str) else [t[1] for t in texts],
    padding=True, truncation=True, max_length=length, return_tensors='pt',
    **options,
  )  # fmt: skip
  own = ('input_ids', 'attention_mask', 'token_type_ids')
  given = {name: batch[name] for name in own if name in batch}
  with torch.no_grad():
    return batch, model(**given).logits.numpy()


def softmax(logits):
  weights = np.exp(logits - logits.max(-1, keepdims=True))
  return weights / weights.sum(-1, keepdims=True)


def probabilities(found, names=None):
  for one in found:
    assert list(one) == (names or NAMES)
  return np.array([list(one.values()) for one in found])


@pytest.mark.parametrize('family', ['bert', 'roberta'])
@pytest.mark.parametrize(
  'texts',
  [[*TEXTS, LONG], [(TEXTS[0], TEXTS[1]), (TEXTS[2], LONG), (LONG, 'b')]],
  ids=['texts', 'pairs'],
)
def test_classes_of_texts(checkpoints, family, texts):
  directory, theirs = checkpoints[family, 'Sequence']
  trained = loading.load(str(directory))
  assert trained.labels == {'class0': NAMES}
  assert trained.config.model.classes == (4,)
  _, want = asked(directory, theirs, texts)
  assert np.ptp(want) > 0.5, 'The comparison would see nothing.'
  found = probabilities(embeddings.classify(trained, texts))
  np.testing.assert_allclose(found, softmax(want), atol=1e-4)
  logits = np.zeros_like(want)
  for part, own in embeddings._logits(trained, texts, 0):
    logits[part] = own
  np.testing.assert_allclose(logits, want, atol=1e-4)


@pytest.mark.parametrize('family', ['bert', 'roberta'])
def test_labels_of_tokens(checkpoints, family):
  texts = [TEXTS[0], 'd\u00e9j\u00e0  vu \u2014 ok', TEXTS[2]]
  directory, theirs = checkpoints[family, 'Token']
  trained = loading.load(str(directory))
  assert trained.labels == {'tokens': NAMES}
  batch, logits = asked(
    directory,
    theirs,
    texts,
    return_offsets_mapping=True,
    return_special_tokens_mask=True,
  )
  want = softmax(logits)
  for i, tags in enumerate(embeddings.tag(trained, texts)):
    spans = batch['offset_mapping'][i].tolist()
    kept = np.flatnonzero(batch['special_tokens_mask'][i] == 0)
    assert [[tag.start, tag.end] for tag in tags] == [spans[t] for t in kept]
    assert [tag.label for tag in tags] == [
      theirs.config.id2label[int(logits[i, t].argmax())] for t in kept
    ]
    np.testing.assert_allclose(
      [tag.probability for tag in tags], want[i, kept].max(-1), atol=1e-4
    )
    assert all(tag.text == texts[i][tag.start : tag.end] for tag in tags)
  with pytest.raises(ValueError, match='Text 1 has .* the model reads 3'):
    embeddings.tag(trained, ['a', LONG])


@pytest.mark.parametrize('layout', ['mesh.tensor=2', 'mesh.fsdp=2'])
def test_heads_under_layouts(checkpoints, layout):
  load = lambda family, head: loading.load(
    str(checkpoints[family, head][0]), settings=[layout]
  )
  _, want = asked(*checkpoints['roberta', 'Sequence'], TEXTS)
  found = embeddings.classify(load('roberta', 'Sequence'), TEXTS)
  np.testing.assert_allclose(probabilities(found), softmax(want), atol=1e-4)
  _, want = asked(*checkpoints['bert', 'Token'], TEXTS)
  tags = embeddings.tag(load('bert', 'Token'), TEXTS)[2]
  best = softmax(want)[2, 1 : 1 + len(tags)].max(-1)
  np.testing.assert_allclose([t.probability for t in tags], best, atol=1e-4)


def test_the_command(checkpoints):
  directory, theirs = checkpoints['bert', 'Sequence']
  script = pathlib.Path(__file__).parents[2] / 'experiments' / 'classify.py'
  workdir = f'--workdir={directory}'
  found = commands.run(script, workdir, '--text=One.', '--second=Two.')
  _, want = asked(directory, theirs, [('One.', 'Two.')])
  (row,) = json.loads(found.stdout)
  np.testing.assert_allclose([*row.values()], softmax(want)[0], atol=1e-4)
  trained = loading.load(str(checkpoints['bert', 'Token'][0]))
  (tokens,) = embeddings.labelled(trained, ['word'])
  assert tokens[0]['start'] == 0 and tokens[0]['label'] in NAMES
  with pytest.raises(ValueError, match='--second has 1 texts for 1, and tok'):
    embeddings.labelled(trained, ['word'], ['b'])


@pytest.mark.parametrize('head', ['Sequence', 'Token'])
@pytest.mark.parametrize('family', ['bert', 'roberta'])
def test_there_and_back(checkpoints, tmp_path, family, head):
  directory, theirs = checkpoints[family, head]
  hf_conversion.to_run(str(directory), str(tmp_path / 'run'))
  name = 'class0' if head == 'Sequence' else 'tokens'
  assert workdir.read_labels(str(tmp_path / 'run')) == {name: NAMES}
  hf_conversion.from_run(str(tmp_path / 'run'), str(tmp_path / 'back'))
  kind = getattr(transformers, f'AutoModelFor{head}Classification')
  again, info = kind.from_pretrained(
    tmp_path / 'back', output_loading_info=True
  )
  assert not info['missing_keys'] and not info['unexpected_keys']
  assert again.config.id2label == theirs.config.id2label
  assert again.config.label2id == {name: i for i, name in enumerate(NAMES)}
  _, want = asked(directory, theirs, TEXTS)
  _, got = asked(tmp_path / 'back', again.eval(), TEXTS)
  np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize(
  ('problem', 'names'),
  [
    ('multi_label_classification', NAMES),
    ('regression', ['score']),
    (None, ['score']),
  ],
)
def test_what_outputs_are(tmp_path, problem, names):
  labels = {'id2label': dict(enumerate(names)), 'problem_type': problem}
  theirs = make('bert', 'Sequence', tmp_path / 'bert', **labels)
  hf_conversion.to_run(str(tmp_path / 'bert'), str(tmp_path / 'run'))
  hf_conversion.from_run(str(tmp_path / 'run'), str(tmp_path / 'back'))
  _, logits = asked(tmp_path / 'bert', theirs, TEXTS)
  several = problem == 'multi_label_classification'
  want = 1 / (1 + np.exp(-logits)) if several else logits
  for place in ('bert', 'run', 'back'):
    trained = loading.load(str(tmp_path / place))
    found = probabilities(embeddings.classify(trained, TEXTS), names)
    np.testing.assert_allclose(found, want, atol=1e-4)


def test_labels_of_another_head_are_refused(checkpoints, tmp_path):
  directory, _ = checkpoints['roberta', 'Sequence']
  for file in directory.iterdir():
    (tmp_path / file.name).write_bytes(file.read_bytes())
  hf = json.loads((tmp_path / 'config.json').read_text())
  hf['id2label'] = {'0': 'a', '1': 'b', '2': 'c'}
  (tmp_path / 'config.json').write_text(json.dumps(hf))
  with pytest.raises(ValueError, match='3 labels .a, b, c., and .* 4 rows'):
    huggingface.read(str(tmp_path))


def test_weights_of_an_unknown_head_are_named(checkpoints, tmp_path):
  from safetensors import numpy as safetensors_numpy

  directory, _ = checkpoints['bert', 'Token']
  for file in directory.iterdir():
    (tmp_path / file.name).write_bytes(file.read_bytes())
  weights = safetensors_numpy.load_file(tmp_path / 'model.safetensors')
  weights['crf.transitions'] = np.zeros((4, 4), np.float32)
  safetensors_numpy.save_file(weights, tmp_path / 'model.safetensors')
  with pytest.raises(ValueError, match='Unexpected: crf.transitions'):
    loading.load(str(tmp_path))


def test_older_roberta_files_hold_a_pooler_that_no_class_reads(
  checkpoints, tmp_path
):
  from safetensors import numpy as safetensors_numpy

  directory, theirs = checkpoints['roberta', 'Sequence']
  for file in directory.iterdir():
    (tmp_path / file.name).write_bytes(file.read_bytes())
  weights = safetensors_numpy.load_file(tmp_path / 'model.safetensors')
  more = {'roberta.pooler.dense.weight': np.ones((24, 24), np.float32)}
  safetensors_numpy.save_file(weights | more, tmp_path / 'model.safetensors')
  found = embeddings.classify(loading.load(str(tmp_path)), TEXTS)
  _, want = asked(directory, theirs, TEXTS)
  np.testing.assert_allclose(probabilities(found), softmax(want), atol=1e-4)


def test_types_reach_the_model(checkpoints):
  """Of a pair, the second text is sentence B."""
  trained = loading.load(str(checkpoints['bert', 'Sequence'][0]))
  (row,) = trained.tokenizer.encode_whole([('a', 'b')], 32)
  ids, types = jnp.array([row.ids]), jnp.array([row.types])
  pool = lambda **more: trained.model.pool(trained.model.encode(ids, **more))
  assert set(row.types) == {0, 1}
  assert np.abs(pool(token_types=types) - pool()).max() > 1e-3


# --- A run that goes on, and one of its own. ---


def write_pairs(directory):
  directory.mkdir()
  lines = [
    json.dumps({'text': f'{i} is {("odd", "even")[i % 2]}.', 'sort': sort})
    for i in range(40)
    for sort in [NAMES[i % 2 * 2]]
  ]
  (directory / 'a.jsonl').write_text('\n'.join(lines) + '\n')
  return directory


def settings_of(directory):
  return {
    'data.source': 'text_files', 'data.files': f'{directory}/a.jsonl',
    'data.data_dir': f'{directory}/data', 'data.target_field': 'sort',
    'data.objective': 'classification', 'data.batching': 'pad',
    'data.batch_size': '8', 'data.eval_splits': '', 'train.eval_every': '0',
    'optim.learning_rate': '1e-2',
  }  # fmt: skip


@pytest.mark.slow
def test_a_run_with_labels_in_their_order_goes_out(checkpoints, tmp_path):
  """Its model is a BERT, and of its four classes the texts have two."""
  run = tmp_path / 'run'
  hf_conversion.to_run(str(checkpoints['bert', 'Sequence'][0]), str(run))
  settings = settings_of(write_pairs(tmp_path / 'texts'))
  settings |= {'data.objective.num_classes': '4', 'train.num_steps': '80'}
  change = lambda **more: overrides.override(
    workdir.read_config(str(run)), settings | more
  )
  own = tmp_path / 'own'
  with pytest.raises(ValueError, match='has 2 labels'):
    train.train(change(), own, show=False)
  few = {'data.objective.labels': 'awful,bad,so-so,O'}
  with pytest.raises(ValueError, match=r"lacks \['good'\] of the training"):
    train.train(change(**few), own, show=False)
  order = {'data.objective.labels': ','.join(NAMES)}
  train.train(change(**order), own, show=False)
  trained = loading.load(str(own))
  assert trained.labels == {'class0': NAMES}
  texts = ['6 is odd.', '7 is even.']
  found = embeddings.classify(trained, texts)
  best = [max(one, key=lambda name: one[name]) for one in found]
  assert best == [NAMES[0], NAMES[2]]
  hf_conversion.from_run(str(own), str(tmp_path / 'back'))
  kind = transformers.AutoModelForSequenceClassification
  again = kind.from_pretrained(tmp_path / 'back').eval()
  assert again.config.id2label == dict(enumerate(NAMES))
  _, logits = asked(tmp_path / 'back', again, texts)
  np.testing.assert_allclose(probabilities(found), softmax(logits), atol=1e-4)


def test_labels_in_another_order_than_those_of_a_run(tmp_path):
  workdir.write_labels(str(tmp_path), {'class0': ['b', 'a']})
  workdir.write_labels(str(tmp_path), {'class1': ['x', 'y']})
  with pytest.raises(ValueError, match='Set data.objective.labels=b,a'):
    workdir.write_labels(str(tmp_path), {'class0': ['a', 'b']})
  want = {'class0': ['b', 'a'], 'class1': ['x', 'y']}
  assert workdir.read_labels(str(tmp_path)) == want


@pytest.mark.parametrize('places', [0, 2])
def test_a_classifier_of_a_run_goes_out(tmp_path, places):
  """As BERT, and with places after the padding's as RoBERTa."""
  config = encoder.EncoderConfig(
    vocab_size=260, num_layers=1, embed_dim=24, dropout=0.0,
    attention=attention_config.Dense(num_heads=3, head_dim=8, bias=True),
    mlp=mlp.MlpConfig(hidden=40), residual='post_norm', embed_norm=True,
    norm=norm.LayerNorm(eps=1e-12), pooler=True, classes=(3,),
    num_token_types=2, position=position.Learned(max_length=20, offset=places),
  )  # fmt: skip
  model = encoder.Encoder(config, rngs=nnx.Rngs(0))
  shake = lambda x: x + 0.2 * np.random.default_rng(x.size).normal(size=x.shape)
  model = jax.tree.map(lambda x: jnp.asarray(shake(x), x.dtype), model)
  names = {'class0': ['x', 'y', 'z']}
  huggingface.write(str(tmp_path), model, labels=names)
  kind = transformers.AutoModelForSequenceClassification
  theirs = kind.from_pretrained(tmp_path).eval()
  assert theirs.config.id2label == {0: 'x', 1: 'y', 2: 'z'}
  tokens = np.random.default_rng(0).integers(5, 260, (2, 7))
  own = np.array([[1] * 7, [1] * 4 + [0] * 3])
  tokens = np.where(own, tokens, max(places - 1, 0))
  with torch.no_grad():
    want = theirs(torch.tensor(tokens), torch.tensor(own)).logits.numpy()
  pooled = model.pool(model.encode(tokens, segments=own))
  got = model.classes[0](pooled[:, None])[:, 0]
  np.testing.assert_allclose(got, want, atol=1e-4)

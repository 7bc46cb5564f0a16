import dataclasses
import doctest
import glob
import importlib
import itertools
import json
import os
import pkgutil
from typing import ClassVar
from typing import Literal

import pytest

import t2x
from t2x.config import experiment
from t2x.config import overrides
from t2x.data import tokenizers
from t2x.layers import attention_config
from t2x.layers import linear
from t2x.layers import norm
from t2x.models import decoder
from t2x.training import optim


@dataclasses.dataclass(frozen=True, kw_only=True)
class Square:
  kind: ClassVar[str] = 'square'
  size: int = 1
  name: str = 'shape'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Circle:
  kind: ClassVar[str] = 'circle'
  size: int = 2
  name: str = 'round'
  radius: float = 0.5

  def __post_init__(self):
    if self.radius > self.size:
      raise ValueError(f'radius={self.radius} is more than size={self.size}.')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tree:
  shape: Square | Circle = Square()
  maybe: Circle | None = None
  shapes: tuple[Square | Circle, ...] = ()
  counts: tuple[int, ...] = (1, 2)
  color: Literal['red', 'green'] = 'red'
  flag: bool = False
  limit: float | None = 1.5
  steps: int = 3
  where: str | tuple[str, ...] | None = None


def setting(**settings):
  names = {n.replace('__', '.'): v for n, v in settings.items()}
  return overrides.override(Tree(), names)


@pytest.mark.parametrize(
  'settings',
  list(
    itertools.permutations(
      ['shape.radius=5', 'shape.size=7', 'shape=circle', 'steps=4']
    )
  ),
)
def test_order_never_matters(settings):
  # size=7 alone lets radius=5 be, and only a circle has a radius.
  result = overrides.override(Tree(), overrides.parse_settings(settings))
  assert result == Tree(shape=Circle(size=7, radius=5.0, name='shape'), steps=4)


def test_a_later_setting_of_the_same_name_wins():
  assert overrides.parse_settings(['a=1', 'a=2', 'b = x=y ']) == {
    'a': '2',
    'b': 'x=y',
  }


def test_another_kind_keeps_the_fields_that_both_have():
  tree = Tree(shape=Square(size=9, name='mine'))
  by_value = overrides.override(tree, {'shape': 'circle'})
  by_kind = overrides.override(tree, {'shape.kind': 'circle'})
  assert by_value.shape == by_kind.shape == Circle(size=9, name='mine')
  same = overrides.override(tree, {'shape': 'square'})
  assert same == tree


def test_none_and_back():
  assert setting(limit='none').limit is None
  assert setting(maybe='circle', maybe__size='3').maybe == Circle(size=3)
  tree = Tree(maybe=Circle())
  assert overrides.override(tree, {'maybe': 'none'}).maybe is None
  assert overrides.override(tree, {'maybe.size': '4'}).maybe == Circle(size=4)
  assert tree == Tree(maybe=Circle())  # It is a value; nothing was set in it.


@pytest.mark.parametrize(
  ('name', 'text', 'value'),
  [
    ('counts', '4', (4,)),
    ('counts', '(4, 5)', (4, 5)),
    ('counts', '[4,5]', (4, 5)),
    ('counts', '', ()),
    ('counts', '()', ()),
    ('counts.1', '7', (1, 7)),
    ('shapes', 'circle,square', (Circle(), Square())),
    ('color', 'green', 'green'),
    ('flag', 'true', True),
    ('flag', 'False', False),
    ('flag', '1', True),
    ('limit', '3e-4', 3e-4),
    ('limit', '2', 2.0),
    ('steps', '1e3', 1000),
    ('steps', '1_000', 1000),
    ('steps', '-2', -2),
    ('where', 'none', None),
    ('where', 'data', 'data'),
    ('where', '(data)', ('data',)),
    ('where', 'data,fsdp', ('data', 'fsdp')),
  ],
)
def test_values(name, text, value):
  result = overrides.override(Tree(), {name: text})
  result = getattr(result, name.partition('.')[0])
  assert result == value
  assert type(result) is type(value)


def test_brackets_of_a_slice_belong_to_the_name():
  parse = overrides.parse
  assert parse('train[90%:]', tuple[str, ...]) == ('train[90%:]',)
  assert parse('a[:1],b[2:]', tuple[str, ...]) == ('a[:1]', 'b[2:]')
  assert parse('(a[:1],b[2:])', tuple[str, ...]) == ('a[:1]', 'b[2:]')


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'stepz': '1'}, r"'stepz': Tree has no 'stepz'. Did you mean 'steps'\?"),
    ({'qqq': '1'}, "Tree has no 'qqq'. It has shape, maybe"),
    ({'shape.radius': '1'}, "'shape.radius': Square has no 'radius'"),
    ({'shape': 'circel'}, "'shape': there is no kind 'circel'; the kinds are "),
    ({'shape': 'circel'}, r"Did you mean 'circle'\?"),
    ({'steps': 'many'}, "'steps': 'many' does not fit the type int"),
    ({'steps': '1.5'}, "'steps': '1.5' does not fit the type int"),
    ({'steps': '1e-1'}, "'steps': '1e-1' does not fit the type int"),
    ({'steps': '1e999'}, "'steps': '1e999' does not fit the type int"),
    ({'steps': 'none'}, "'steps': 'none' does not fit the type int"),
    ({'limit': 'x'}, "'limit': 'x' does not fit the type float or none"),
    ({'limit': 'nan'}, "'limit': 'nan' does not fit the type float or none"),
    ({'flag': 'yes'}, "'flag': 'yes' does not fit the type bool"),
    ({'color': 'blue'}, "'blue' does not fit the type one of 'red', 'green'"),
    ({'counts': '1,x'}, "'counts': '1,x' does not fit"),
    ({'counts.2': '1'}, "'counts.2': 'counts' has 2 items; .* 0 to 1"),
    ({'steps.a': '1'}, "'steps.a': 'steps' is 3 and has no fields"),
    ({'maybe.size': '1'}, 'choose what it is first, --set maybe=KIND'),
    ({'shape.radius': '9', 'shape': 'circle'}, 'radius=9.0 is more than size'),
    ({'shape.': '1'}, "'shape.' is no dotted name"),
    ({'.shape': '1'}, "'.shape' is no dotted name"),
  ],
)
def test_messages(settings, message):
  with pytest.raises(ValueError, match=message):
    overrides.override(Tree(), settings)


def test_a_group_takes_no_value():
  with pytest.raises(
    ValueError, match="'train' is a group of settings .* train.NAME=VALUE with"
  ):
    overrides.override(experiment.Experiment(), {'train': '5'})


def test_a_setting_needs_an_equals_sign():
  with pytest.raises(ValueError, match=r"--set 'a.b' is not of the form dotte"):
    overrides.parse_settings(['a.b'])


def test_an_experiment_takes_settings_at_any_depth():
  settings = [
    'model.attention.window=64',
    'model.attention=local',
    'model.norm=rmsnorm',
    'model.position=none',
    'data.tokenizer=bytes',
    'optim.kind=lion',
    'rules.mlp=data,tensor',
    'rules.embed=none',
    'train.loss.z_loss=1e-4',
    'data.eval_splits=train[90%:],validation',
  ]
  for order in (settings, settings[::-1]):
    result = overrides.override(
      experiment.Experiment(), overrides.parse_settings(order)
    )
    assert result.model.attention == attention_config.Local(window=64)
    assert isinstance(result.model.norm, norm.RMSNorm)
    assert result.model.position is None
    assert result.data.tokenizer == tokenizers.Bytes()
    assert isinstance(result.optim, optim.Lion)
    assert result.rules.mlp == ('data', 'tensor')
    assert result.rules.embed is None
    assert result.train.loss.z_loss == 1e-4
    assert result.data.eval_splits == ('train[90%:]', 'validation')
  old = dataclasses.replace(
    experiment.Experiment(),
    optim=optim.AdamW(learning_rate=0.5, b1=0.7, weight_decay=0.2),
  )
  new = overrides.override(old, {'optim': 'lion', 'optim.b2': '0.6'}).optim
  assert new == optim.Lion(learning_rate=0.5, b1=0.7, b2=0.6, weight_decay=0.2)


def test_a_setting_that_no_layer_would_read_is_refused():
  kinds = attention_config.Dense(), attention_config.Local(window=8)
  model = decoder.DecoderConfig(attention_pattern=kinds)
  old = experiment.Experiment(model=model)
  message = (
    "'model.attention' is set, and no layer would read it, since "
    "'model.attention_pattern' has 2 items. Set model.attention_pattern.0 to "
    r'model.attention_pattern.1, or model.attention_pattern=\(\).'
  )
  for settings in (
    {'model.attention': 'linear'},
    {'model.attention.kernel': 'blocks'},
    {'model.attention.window': '8'},  # Which its own kind has not.
    {'model.attention': 'local', 'model.attention_pattern.1.window': '4'},
  ):
    with pytest.raises(ValueError, match=message):
      overrides.override(old, settings)
  settings = {'model.attention': 'linear', 'model.attention_pattern': '()'}
  assert overrides.override(old, settings).model.kinds == (linear.Linear(),)
  settings = {'model.attention_pattern.1.window': '4'}
  assert overrides.override(old, settings).model.kinds[1].window == 4


def test_what_another_kind_has_no_field_for_is_told(caplog):
  model = decoder.DecoderConfig(attention=attention_config.Dense(dropout=0.1))
  old = experiment.Experiment(model=model)
  assert (
    overrides.override(old, {'model.attention': 'local'}) and not caplog.text
  )
  overrides.override(old, {'model.attention': 'linear'})
  assert 'model.attention=linear leaves out dropout=0.1.' in caplog.text


def _experiments():
  folder = os.path.join(os.path.dirname(__file__), '..', '..', 'experiments')
  names = glob.glob('*.py', root_dir=folder)
  tools = {
    'generate.py',
    'evaluate.py',
    'embed.py',
    'classify.py',
    'serve.py',
  }  # Their flags would clash.
  return sorted(n.removesuffix('.py') for n in names if n not in tools)


@pytest.mark.parametrize('name', _experiments())
def test_experiments_survive_json(name):
  tree = importlib.import_module(name).get_config()
  text = overrides.dumps(tree)
  again = overrides.from_json(experiment.Experiment, json.loads(text))
  assert again == tree
  assert overrides.dumps(again) == text
  assert not overrides.differences(json.loads(text), overrides.to_json(again))


def test_json_keeps_kinds_none_and_tuples():
  tree = Tree(
    shape=Circle(radius=0.25),
    shapes=(Circle(), Square(size=5)),
    limit=None,
    where=('a', 'b'),
  )
  data = json.loads(overrides.dumps(tree))
  assert data['shape'] == {
    'kind': 'circle',
    'size': 2,
    'name': 'round',
    'radius': 0.25,
  }
  assert overrides.from_json(Tree, data) == tree


@pytest.mark.parametrize(
  ('data', 'message'),
  [
    ({'stepz': 1}, r"Tree has no 'stepz'. Did you mean 'steps'\?"),
    ({'shape': {'kind': 'cube'}}, "'shape': there is no kind 'cube'"),
    ({'shape': {'kind': 'circle', 'r': 1}}, "'shape.r': Circle has no 'r'"),
    ({'steps': 'four'}, "'steps': 'four' does not fit the type int"),
    ({'steps': True}, "'steps': True does not fit the type int"),
    ({'steps': {'a': 1}}, "'steps': {'a': 1} does not fit the type int"),
    ({'steps': [1]}, r"'steps': \[1\] does not fit the type int"),
    ({'limit': '1'}, "'limit': '1' does not fit the type float or none"),
    ({'color': 'blue'}, "'color': 'blue' does not fit"),
    ({'counts': ['a']}, "'counts': 'a' does not fit the type int"),
    ({'flag': None}, "'flag': None does not fit the type bool"),
  ],
)
def test_a_saved_config_is_checked(data, message):
  with pytest.raises(ValueError, match=message):
    overrides.from_json(Tree, data)


def test_differences_name_every_leaf():
  old = overrides.to_json(Tree(shapes=(Square(),)))
  new = overrides.to_json(
    Tree(shape=Circle(), counts=(1, 3, 4), shapes=(Square(size=2),))
  )
  assert overrides.differences(old, new) == {
    'shape.kind': ('square', 'circle'),
    'shape.size': (1, 2),
    'shape.name': ('shape', 'round'),
    'shape.radius': ('(not set)', 0.5),
    'shapes.0.size': (1, 2),
    'counts.1': (2, 3),
    'counts.2': ('(not set)', 4),
  }


_BAD_TRAIN = [
  ({'num_tokens': 5}, 'num_steps=1000, num_tokens=5, .*exactly one says how'),
  ({'num_steps': None}, 'num_steps=None, num_tokens=None, .*exactly one'),
  ({'num_steps': 0}, 'train.num_steps=0; it is 1 or more'),
  ({'num_steps': None, 'num_epochs': 0.0}, 'train.num_epochs=0.0; it is above'),
  ({'log_every': 0}, 'train.log_every=0; it is 1 or more'),
  ({'keep_every': 0}, 'train.keep_every=0; it is 1 or more'),
  ({'eval_every': -1}, 'train.eval_every=-1; it is 0 or more'),
  ({'ema_decay': 1.0}, r'train.ema_decay=1.0; it is in \(0, 1\)'),
  ({'trainable': '('}, r"train.trainable='\(' is no regular expression: miss"),
  ({'remat': 'half'}, "remat='half'; it is none, full, dots, save:NAME"),
]


@pytest.mark.parametrize(('fields', 'message'), _BAD_TRAIN)
def test_the_train_config_checks_itself(fields, message):
  with pytest.raises(ValueError, match=message):
    experiment.TrainConfig(**fields)


def _modules():
  found = pkgutil.walk_packages(t2x.__path__, 't2x.')
  return sorted(m.name for m in found)


@pytest.mark.parametrize('name', _modules())
def test_the_examples_in_docstrings_run(name):
  module = importlib.import_module(name)
  failed, _ = doctest.testmod(module)
  assert not failed


def test_doctests_are_found():
  # Or the test above would pass by running nothing.
  runs = [
    doctest.DocTestFinder().find(importlib.import_module(n)) for n in _modules()
  ]
  examples = [e for run in runs for test in run for e in test.examples]
  assert len(examples) > 20

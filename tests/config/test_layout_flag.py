"""What the flag --layout may say, and its answer where it cannot be."""

import gpt2_tiny
import moe_tiny
import pytest

from t2x.config import layout_flag
from t2x.config import overrides


@pytest.mark.parametrize(
  'module, layout, message, expected',
  [
    (
      gpt2_tiny,
      'tensor=16,rules.norm_length=context,tensor',
      'keep it whole: --layout=tensor=16,rules.norm_length=context,tensor,'
      'rules.kv_heads=none. Layouts of 16 devices that work: ',
      [
        'data=2,tensor=8,rules.norm_length=context,tensor',
        'fsdp=2,tensor=8,rules.norm_length=context,tensor',
      ],
    ),
    (
      gpt2_tiny,
      'data=3',
      'Layouts that work: ',
      ['data=4 (4 devices)', 'data=2 (2 devices)'],
    ),
    (
      gpt2_tiny,
      'mesh.context=3',
      'Layouts that work: ',
      ['context=4 (4 devices)', 'context=2 (2 devices)'],
    ),
    (
      gpt2_tiny,
      'mesh.pipe=8',
      'Layouts of 8 devices that work: ',
      ['pipe=4,tensor=2'],
    ),
    (
      gpt2_tiny,
      'mesh.dcn.data=2,rules.vocab=none',
      'Change --layout=mesh.dcn.AXIS=SIZE (one may be -1). Layouts of 1 device '
      'that work: ',
      ['data=1,rules.vocab=none'],
    ),
    (
      moe_tiny,
      'data=2,expert=3',
      'Layouts that work: ',
      ['data=2,expert=4 (8 devices)', 'data=2,expert=2 (4 devices)'],
    ),
  ],
)
def test_advice_is_in_the_syntax_of_the_flag(module, layout, message, expected):
  settings = {'data.batch_size': '8'}
  config = overrides.override(module.get_config(), settings)
  parsed = layout_flag.parse(layout)
  with pytest.raises(ValueError) as caught:
    parsed.check(parsed.applied(config))
  start, found, said = str(caught.value).partition(message)
  assert start.startswith(f'--layout={layout}: ') and found, caught.value
  assert '--set' not in start and 'XLA_FLAGS' not in start
  advised = said.rstrip('.').split('; ')
  assert advised == [f'--layout={text}' for text in expected]
  for text in advised:  # As a user would.
    flag = text.removeprefix('--layout=').partition(' (')[0]
    parsed = layout_flag.parse(flag)
    parsed.check(parsed.applied(config))


@pytest.mark.parametrize(
  'layout, dcn, expected',
  [
    ('fsdp=4', 'data=3', ['data=2,fsdp=2,mesh.dcn.data=-1']),
    ('data=2,fsdp=2,mesh.dcn.data=3', 'data=-1', ['data=2,fsdp=2']),
    ('fsdp=4', 'data=-1', ['data=2,fsdp=2']),
  ],
)
def test_axes_between_slices_stay(layout, dcn, expected):
  """What --set says of them holds in a layout that says nothing."""
  name, _, size = dcn.partition('=')
  own = overrides.override(
    gpt2_tiny.get_config(),
    {'data.batch_size': '8', f'mesh.dcn.{name}': size},
  )
  parsed = layout_flag.parse(layout)
  with pytest.raises(ValueError) as caught:
    parsed.check(parsed.applied(own, 2), 4, num_slices=2, dcn=own.mesh.dcn)
  said = str(caught.value).partition('that work: ')[2]
  first = said.partition(';')[0].removeprefix('--layout=')
  assert [first] == expected, caught.value
  other = layout_flag.parse(first)
  other.check(other.applied(own, 2), 4, num_slices=2)


def test_fsdp_between_slices():
  own = overrides.override(
    gpt2_tiny.get_config(),
    {'data.batch_size': '8', 'mesh.dcn.fsdp': '2', 'mesh.dcn.data': '1'},
  )
  parsed = layout_flag.parse('fsdp=4')
  config = parsed.applied(own, num_slices=2)
  assert config.mesh.dcn.fsdp == 2
  parsed.check(config, 4, num_slices=2)
  with pytest.raises(ValueError, match='needs 2 slices and the devices lie in'):
    parsed.check(config, 4)
  parsed.check(parsed.applied(own), 4)  # Of one slice nothing lies between.
  wrong = layout_flag.parse('data=4,mesh.dcn.data=3')
  with pytest.raises(ValueError) as caught:
    wrong.check(wrong.applied(own, 2), 4, num_slices=2, dcn=own.mesh.dcn)
  _, _, said = str(caught.value).partition('that work: ')
  first = layout_flag.parse(said.partition(';')[0].removeprefix('--layout='))
  first.check(first.applied(own, 2), 4, num_slices=2)


def test_a_number_of_devices_that_is_given_stays():
  parsed = layout_flag.parse('data=3')
  config = parsed.applied(gpt2_tiny.get_config())
  message = (
    r'needs 3 devices and there are 4\. Change --layout or the number of '
    r'devices\. '
    r'Layouts of 4 devices that work: --layout=data=4; '
    r'--layout=data=2,fsdp=2\.$'
  )
  with pytest.raises(ValueError, match=message):
    parsed.check(config, 4)
  with pytest.raises(ValueError, match=r'a multiple of 3\..* mesh\.$'):
    parsed.check(parsed.applied(gpt2_tiny.get_config()), 3)


@pytest.mark.parametrize(
  'layout, message',
  [
    ('foo.bar=1', "no setting 'foo.bar'. A layout may have mesh.NAME, rules"),
    ('dcn.data=2', "no setting 'dcn.data'. Did you mean 'mesh.dcn.data'"),
    ('remat=full', "no mesh axis 'remat'; .* Did you mean 'train.remat'"),
    ('rules.vocb=none', "--layout=.*Rules has no 'vocb'. Did you mean 'vocab'"),
    ('data=2,train.num_steps=3', 'train.num_steps is no setting of one layout'),
    (
      'data.eval_splits=foo',
      '.* may have mesh.NAME, .* for all: --set data.ev',
    ),
    ('data=2,mesh.data=2', 'data is given twice'),
    ('data=-1,fsdp=-1', '--layout=.* a size, as in --layout=mesh.data=1'),
  ],
)
def test_names_and_settings_that_a_layout_cannot_have(layout, message):
  with pytest.raises(ValueError, match=message):
    layout_flag.parse(layout).applied(gpt2_tiny.get_config())


@pytest.mark.parametrize(
  'setting',
  [
    'mesh.fsdp=2',
    'mesh.dcn.data=1',
    'rules.norm_length=context,tensor',
    'pipeline.schedule=zb_h1',
    'compiler_options=xla_a=1,xla_b=',
    'train.remat=full',
    'train.scan_layers=false',
    'train.accumulate=2',
    'train.accumulate_whole=true',
    'train.loss.vocab_chunks=2',
    'train.loss.token_chunks=2',
    'model.attention.block=64',
  ],
)
def test_settings_that_a_layout_may_have(setting):
  config = gpt2_tiny.get_config()
  applied = layout_flag.parse(f'data=2,{setting}').applied(config)
  assert applied.mesh.data == 2
  if setting.startswith('compiler'):
    assert applied.compiler_options == ('xla_a=1', 'xla_b=')

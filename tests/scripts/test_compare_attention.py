"""The comparison of kinds and maskings, on a small text."""

import dataclasses
import json
import sys

import compare_attention
import pytest
import tiny

from t2x.data import tokenizers
from t2x.training import optim


@pytest.fixture
def small(tmp_path, monkeypatch):
  whole = compare_attention.config_of
  monkeypatch.setattr(compare_attention, 'LENGTH', 32)

  def config_of(*args):
    config = whole(*args)
    data = dataclasses.replace(
      config.data,
      source='text_files',
      files=tiny.write_corpus(tmp_path / 'corpus'),
      data_dir=str(tmp_path / 'data'),
      batch_size=4,
      eval_splits=('train',),
      tokenizer=tokenizers.Bytes(),
    )
    model = dataclasses.replace(config.model, num_layers=1, embed_dim=32)
    adam = optim.AdamW(learning_rate=1e-2)  # Compiles sooner than Muon.
    return dataclasses.replace(config, data=data, model=model, optim=adam)

  monkeypatch.setattr(compare_attention, 'config_of', config_of)
  monkeypatch.setattr(compare_attention, 'SPLIT', 'train')


def run(monkeypatch, capsys, *arguments):
  monkeypatch.setattr(sys, 'argv', ['compare_attention.py', *arguments])
  compare_attention.main()
  return capsys.readouterr().out


@pytest.mark.parametrize(
  'what, names',
  [('kinds', 'dense,convolution'), ('maskings', 'words,by_loss')],
)
def test_a_table_a_picture_and_an_object(
  small, monkeypatch, capsys, tmp_path, what, names
):
  plot = tmp_path / 'plot.png'
  arguments = (f'--what={what}', f'--only={names}', '--steps=20', '--json')
  out = run(monkeypatch, capsys, *arguments, f'--plot={plot}')
  found = json.loads(out.splitlines()[-1])
  assert found['steps'] == 20 and plot.stat().st_size > 10_000
  for name in names.split(','):
    own = found[what][name]
    assert f'{own["loss"]:.3f}' in out and len(own['losses']) == 20
    assert own['losses'][-1] < own['losses'][0] - 0.3
    assert own['seconds'] > 0 and own['temporaries_bytes'] > 2**16
    # Words are also asked for tokens; masks by loss are tokens.
    assert (own['tokens_loss'] != own['loss']) == (name == 'words')
  assert ('of tokens' in out) == (what == 'maskings')
  # The same rows and weights: kinds begin alike, and do not end so.
  one, other = (found[what][name]['losses'] for name in names.split(','))
  assert one[-1] != other[-1]
  if what == 'kinds':
    assert abs(one[0] - other[0]) < 0.2


def test_messages(monkeypatch, capsys):
  for argument, message in (
    ('--only=dens', 'no dens among the kinds'),
    ('--steps=3', 'means of 20 steps'),
  ):
    with pytest.raises(SystemExit):
      run(monkeypatch, capsys, argument)
    assert message in capsys.readouterr().err

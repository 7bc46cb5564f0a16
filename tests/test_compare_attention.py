"""The comparison of kinds and maskings, on a small text."""

import dataclasses
import importlib.util
import json
import pathlib
import sys

import pytest
import tiny

from t2x import optim
from t2x.data import tokenizers

_SCRIPT = pathlib.Path(__file__).parents[1] / 'scripts/compare_attention.py'


@pytest.fixture
def script(tmp_path, monkeypatch):
  spec = importlib.util.spec_from_file_location('compare_attention', _SCRIPT)
  assert spec and spec.loader
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  whole = module.config_of
  monkeypatch.setattr(module, 'LENGTH', 32)

  def small(*args):
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

  monkeypatch.setattr(module, 'config_of', small)
  monkeypatch.setattr(module, 'SPLIT', 'train')
  return module


def run(script, monkeypatch, capsys, *arguments):
  monkeypatch.setattr(sys, 'argv', [str(_SCRIPT), *arguments])
  script.main()
  return capsys.readouterr().out


@pytest.mark.parametrize(
  'what, names',
  [('kinds', 'dense,convolution'), ('maskings', 'words,by_loss')],
)
def test_a_table_a_picture_and_an_object(
  script, monkeypatch, capsys, tmp_path, what, names
):
  plot = tmp_path / 'plot.png'
  arguments = (f'--what={what}', f'--only={names}', '--steps=20', '--json')
  out = run(script, monkeypatch, capsys, *arguments, f'--plot={plot}')
  found = json.loads(out.splitlines()[-1])
  assert found['steps'] == 20 and plot.stat().st_size > 10_000
  for name in names.split(','):
    own = found[what][name]
    assert f'{own["loss"]:.3f}' in out and len(own['losses']) == 20
    assert own['losses'][-1] < own['losses'][0] - 0.3
    assert own['seconds'] > 0 and own['temporaries_bytes'] > 2**16
  # The same rows and weights: kinds begin alike, and do not end so.
  one, other = (found[what][name]['losses'] for name in names.split(','))
  assert one[-1] != other[-1]
  if what == 'kinds':
    assert abs(one[0] - other[0]) < 0.2


def test_messages(script, monkeypatch, capsys):
  for argument, message in (
    ('--only=dens', 'no dens among the kinds'),
    ('--steps=3', 'means of 20 steps'),
  ):
    with pytest.raises(SystemExit):
      run(script, monkeypatch, capsys, argument)
    assert message in capsys.readouterr().err

"""Calibration: errors and temperatures against plain numpy and known truths."""

import dataclasses
import json
import types

from flax import nnx
import jax
import numpy as np
import pytest
import tiny

from t2x.decode import generate
from t2x.decode import sampling
from t2x.inference import calibration
from t2x.inference import generation
from t2x.inference import loading
from t2x.layers import param
from t2x.models import decoder
from t2x.parallel import mesh as mesh_lib
from t2x.parallel import sharding
from t2x.tracking import run_report
from t2x.trainer import train

VOCAB = 12


@pytest.fixture(scope='module')
def model():
  config = decoder.DecoderConfig(
    vocab_size=VOCAB, num_layers=1, embed_dim=32, init=param.Init(std=0.4)
  )
  return decoder.Decoder(config, rngs=nnx.Rngs(0))


@pytest.fixture(scope='module')
def held(model):
  """The model, and batches whose targets follow its logits over 1.7."""
  rng = np.random.default_rng(0)
  batches = []
  for _ in range(4):
    inputs = rng.integers(0, VOCAB, (32, 64)).astype(np.int32)
    logits = np.asarray(jax.jit(lambda m, x: m(x))(model, inputs)) / 1.7
    noise = rng.gumbel(size=logits.shape)
    weights = (rng.random(inputs.shape) < 0.9).astype(np.float32)
    batches.append(
      {
        'inputs': inputs,
        'targets': (logits + noise).argmax(-1).astype(np.int32),
        'weights': weights,
      }
    )
  trained = types.SimpleNamespace(
    model=model,
    mesh=mesh_lib.make(mesh_lib.MeshConfig(data=1), jax.devices()[:1]),
    config=types.SimpleNamespace(rules=sharding.Rules()),
  )
  return trained, batches


def naive(model, batches, temperature):
  """Guo et al., 2017, equations 2 and 3, token by token."""
  bins = [[] for _ in range(calibration.NUM_BINS)]
  losses = []
  for batch in batches:
    logits = np.asarray(model(batch['inputs']), np.float64) / temperature
    probs = np.exp(logits - logits.max(-1, keepdims=True))
    probs /= probs.sum(-1, keepdims=True)
    for row, target, weight in zip(
      probs.reshape(-1, VOCAB),
      batch['targets'].ravel(),
      batch['weights'].ravel(),
    ):
      if weight:
        place = min(int(row.max() * len(bins)), len(bins) - 1)
        bins[place].append((row.max(), row.argmax() == target))
        losses.append(-np.log(row[target]))
  total = sum(map(len, bins))
  gaps = [abs(np.mean(b, axis=0) @ (1, -1)) * len(b) for b in bins if b]
  return sum(gaps) / total, np.mean(losses), [len(b) for b in bins]


@pytest.mark.parametrize('temperature', [1.0, 2.5])
def test_error_and_bins_are_those_of_plain_numpy(held, temperature):
  trained, batches = held
  sums = calibration._sums(trained, batches, temperature)
  found = calibration._reliability(sums, temperature)
  ece, nll, counts = naive(trained.model, batches, temperature)
  assert found.counts == counts
  np.testing.assert_allclose(found.ece, ece, atol=1e-6)
  np.testing.assert_allclose(found.nll, nll, atol=1e-5)


def test_the_temperature_that_made_the_data_is_found(held):
  trained, batches = held
  run = lambda value: calibration._sums(trained, batches, value)
  temperature = calibration._fit(run)
  assert abs(temperature - 1.7) < 0.05
  losses = [
    run(t)['nll'] for t in (temperature, 1.02 * temperature, 0.98 * temperature)
  ]
  assert losses[0] < min(losses[1:]), 'It has the least loss.'
  ece = lambda t: calibration._reliability(run(t), t).ece
  assert ece(1.0) > 0.1 and ece(temperature) < 0.02


def test_a_run_keeps_its_temperature_and_uses_it(tmp_path, monkeypatch):
  monkeypatch.setattr(run_report, 'write', lambda workdir: None)
  run = str(tmp_path / 'run')
  train.train(tiny.experiment_of(tmp_path), run, show=False)
  trained = loading.load(run)
  assert trained.temperature == 1.0
  found = calibration.calibrate(trained)
  assert found.before.num_tokens == found.after.num_tokens > 50
  assert (
    found.before.accuracy != [] and found.after.nll <= found.before.nll + 0.05
  )
  calibration.draw(found, str(tmp_path / 'a.png'))
  assert (tmp_path / 'a.png').stat().st_size > 5000
  found = dataclasses.replace(found, temperature=2.5)
  calibration.save(run, found)
  assert (
    json.loads((tmp_path / 'run/calibration.json').read_text())['temperature']
    == 2.5
  )
  again = loading.load(run)
  assert again.temperature == 2.5
  settings = again.calibrated(None)
  assert settings.calibration == 2.5
  (text,) = generation.generate_text(again, ['the run'], num_tokens=3)
  assert isinstance(text, str)


def test_reported_probabilities_are_the_calibrated_ones(model):
  config = sampling.SamplingConfig(temperature=0, calibration=2.0)
  prompt = [3, 4, 5]
  got = generate.generate(
    model, [prompt], num_tokens=4, sampling=config, chunk=16
  )
  row = np.array([[*prompt, *got.tokens[0]]])
  logits = model(row)[0, 2:-1] / 2.0
  want = jax.nn.log_softmax(logits)[np.arange(4), got.tokens[0]]
  np.testing.assert_allclose(got.log_probs[0], want, atol=1e-5)
  with pytest.raises(ValueError, match='calibration=0; it must be above 0'):
    sampling.SamplingConfig(calibration=0)

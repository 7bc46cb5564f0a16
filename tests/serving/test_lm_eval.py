"""lm_eval scores a served model as the model's own logits do."""

import dataclasses
import json
import math
import os
import pathlib
import re
import shlex
import subprocess
import sys

import extras
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import serving_run

from t2x.inference import hf_conversion
from t2x.inference import text_stream

extras.need('lm_eval', extra='reference')
transformers = extras.need('transformers', extra='reference')
pytestmark = [pytest.mark.reference, pytest.mark.slow]

_PAGE = pathlib.Path(__file__).parents[2] / 'docs' / 'serving.md'
_DOCS = [
  {
    'question': 'the run goes on from',
    'choices': ['where it stopped', 'no step', 'zebra'],
    'answer': 0,
  },
  {'question': 'no step is', 'choices': ['the run', 'lost'], 'answer': 1},
  {'question': 'Zebras, 12:', 'choices': ['é', 'lost and lost'], 'answer': 1},
]
_TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{text}"
{more}
metric_list: [{metrics}]
"""


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  """A run, and where it is exported to."""
  root = tmp_path_factory.mktemp('lm_eval')
  trained = serving_run.trained_of(
    root,
    train__num_steps=20,
    data__length=64,
    data__tokenizer='sentencepiece',
    data__tokenizer__vocab_size=320,
    data__tokenizer__num_sentinels=2,
    model__attention__bias=True,  # As GPT-2's.
  )
  hf_conversion.from_run(str(root / 'run'), str(root / 'exported'))
  return trained, str(root / 'exported')


def write_tasks(directory):
  """Writes a task of each kind of request, and their documents."""
  data = directory / 'docs.jsonl'
  data.write_text('\n'.join(json.dumps(doc) for doc in _DOCS) + '\n')
  question, answer = '{{question}}', '{{choices[answer]}}'
  kinds = {
    'choice': (
      'multiple_choice',
      question,
      'doc_to_choice: choices\ndoc_to_target: answer',
      '{metric: acc}, {metric: acc_norm}',
    ),
    'like': (
      'loglikelihood',
      question,
      f'doc_to_target: " {answer}"',
      '{metric: perplexity}, {metric: acc}',
    ),
    'rolling': (
      'loglikelihood_rolling',
      '',
      f'doc_to_target: "{question}"',
      '{metric: bits_per_byte}',
    ),
    'until': (
      'generate_until',
      question,
      f'doc_to_target: "{answer}"\n'
      'generation_kwargs: {until: ["\\n", " no"], max_gen_toks: 12}',
      '{metric: exact_match}',
    ),
  }
  for name, (kind, text, more, metrics) in kinds.items():
    (directory / f'{name}.yaml').write_text(
      _TASK.format(
        name=f'own_{name}', data=data, kind=kind, text=text, more=more,
        metrics=metrics,
      )
    )  # fmt: skip
  return ','.join(f'own_{name}' for name in kinds)


def documented(**changes) -> list[str]:
  """Returns the command of docs/serving.md with other values."""
  (line,) = re.findall(r'^lm_eval run .*', _PAGE.read_text(), re.M)
  for name, value in changes.items():
    line, count = re.subn(rf'\b({name}[= ])[^\s,]+', rf'\g<1>{value}', line)
    assert count == 1, name
  return [sys.executable, '-m', 'lm_eval', *shlex.split(line)[1:]]


def evaluated(url, exported, root):
  """Returns lm_eval's results, and its samples by task."""
  tasks = write_tasks(root)
  command = documented(
    tokenizer=exported, tasks=tasks, max_length=64, include_path=root,
    output_path=root / 'out', base_url=f'{url}/v1/completions',
  )  # fmt: skip
  env = {
    **os.environ, 'HF_HOME': str(root / 'hf'), 'HF_HUB_OFFLINE': '1',
    'HF_DATASETS_OFFLINE': '1', 'XLA_FLAGS': '',
  }  # fmt: skip
  done = subprocess.run(
    [*command, '--log_samples'],
    env=env,
    capture_output=True,
    text=True,
    timeout=240,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  (results,) = (root / 'out').rglob('results_*.json')
  samples = {
    file.name.split('_')[2]: [
      json.loads(line) for line in file.read_text().splitlines()
    ]
    for file in (root / 'out').rglob('samples_*.jsonl')
  }
  return json.loads(results.read_text())['results'], samples


@jax.jit
def logits(model, ids_T):
  return model(jnp.tile(ids_T, (8, 1)))[0]  # As many rows as devices.


def log_probs(trained, ids):
  """Returns what the whole model says after each token, (T, V)."""
  with trained.decoding():
    padded_T = jnp.asarray(ids + [0] * (64 - len(ids)))
    logits_TV = np.asarray(logits(trained.model, padded_T), np.float64)
  logits_TV = logits_TV[: len(ids)] / trained.temperature
  return logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))


def greedy(trained, ids, num):
  """Returns the likeliest tokens one by one, up to one that ends a text."""
  new = []
  while len(new) < num:
    token = int(log_probs(trained, ids + new)[-1].argmax())
    if token in trained.end_ids:
      break
    new.append(token)
  return new


def score(trained, encode, context, continuation):
  """Returns a continuation's log-probability, and whether it is greedy."""
  before, ids = encode(context), encode(context + continuation)
  log_probs_TV = log_probs(trained, ids)
  places = range(len(before), len(ids))
  return (
    sum(log_probs_TV[i - 1, ids[i]] for i in places),
    all(log_probs_TV[i - 1].argmax() == ids[i] for i in places),
  )


def test_scores_are_those_of_the_model(made, tmp_path):
  trained, exported = made
  tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
  encode = lambda text: tokenizer(text).input_ids
  # After one text its greedy token ends it: one that has no text of its own.
  ids = encode('no step is lost')
  end = int(log_probs(trained, ids)[-1].argmax())
  ends = trained.tokenizer.eos_id, end
  generation = dataclasses.replace(trained.generation, ends=ends)
  trained = dataclasses.replace(trained, generation=generation)
  with serving_run.served(trained, name='gpt2') as url:
    results, samples = evaluated(url, exported, tmp_path)
  direct = {
    doc['question']: [
      score(trained, encode, doc['question'], f' {choice}')
      for choice in doc['choices']
    ]
    for doc in _DOCS
  }
  hits = []
  for sample in samples['choice']:
    doc = sample['doc']
    expected = direct[doc['question']]
    found = [(float(a), b) for ((a, b),) in sample['resps']]
    check(found, expected)
    best = max(range(len(expected)), key=lambda i: expected[i][0])
    hits.append(best == doc['answer'])
  assert len(hits) == 3
  assert results['own_choice']['acc,none'] == np.mean(hits)
  docs = [sample['doc'] for sample in samples['like']]
  likes = [direct[doc['question']][doc['answer']] for doc in docs]
  check([sample['resps'][0][0] for sample in samples['like']], likes)
  assert results['own_like']['perplexity,none'] == pytest.approx(
    math.exp(-np.mean([own for own, _ in likes])), rel=1e-4
  )
  for sample in samples['rolling']:
    text = sample['doc']['question']
    own = [tokenizer.bos_token_id, *encode(text)]
    log_probs_TV = log_probs(trained, own)
    expected = sum(log_probs_TV[i - 1, own[i]] for i in range(1, len(own)))
    assert float(sample['resps'][0][0]) == pytest.approx(expected, abs=1e-3)
  for sample in samples['until']:
    ids = encode(sample['doc']['question'])
    text = text_stream.continuation(
      trained.tokenizer, ids, greedy(trained, ids, 12)
    )
    expected = re.split('\n| no', text)[0]
    assert sample['resps'][0][0] == expected


def check(found, expected):
  for (log_prob, is_greedy), (own, own_greedy) in zip(
    found, expected, strict=True
  ):
    assert float(log_prob) == pytest.approx(own, abs=1e-3)
    assert str(is_greedy) == str(own_greedy)

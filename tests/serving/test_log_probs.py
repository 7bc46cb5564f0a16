"""Log-probabilities that the server tells, of prompts and of new tokens.

Beside the model's own logits over the whole sequence, and offsets beside the
texts of all beginnings.
"""

import math
import os
import random

import httpx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import serving_run

from t2x.decode import engine as engine_lib
from t2x.serving import log_probs


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  return serving_run.shared(tmp_path_factory)


@pytest.fixture(scope='module')
def url(trained):
  # Few pages, so that prompts wait for one another.
  sizes = engine_lib.EngineConfig(
    num_slots=4, page_size=8, chunks=(8, 32), max_waiting=60, num_pages=20
  )
  with serving_run.served(trained, engine=sizes, name='tiny') as url:
    yield url


def ask(url, path='completions', **body):
  answer = httpx.post(f'{url}/v1/{path}', json=body, timeout=60)
  assert answer.status_code == 200, answer.text
  return answer.json()


def streamed(url, **body):
  """Returns the choices of a stream as one each."""
  choices: dict = {}
  with httpx.stream(
    'POST', f'{url}/v1/completions', json={**body, 'stream': True}, timeout=60
  ) as answer:
    for line in answer.iter_lines():
      if not line.startswith('data: {'):
        continue
      for part in httpx.Response(200, text=line[6:]).json()['choices']:
        own = choices.setdefault(part['index'], {'text': '', 'logprobs': {}})
        own['text'] += part['text']
        own['finish_reason'] = part['finish_reason']
        for name, values in (part['logprobs'] or {}).items():
          own['logprobs'].setdefault(name, []).extend(values or [])
  return [choices[index] for index in sorted(choices)]


def direct(trained, ids):
  """Returns log-probabilities (T, V) after each token, by one plain call."""
  with trained.decoding():
    rows = jnp.asarray([ids] * 8)  # As many as devices.
    logits_TV = jax.jit(lambda model, x: model(x))(trained.model, rows)[0]
  logits_TV = np.asarray(logits_TV, np.float64) / trained.temperature
  return logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))


def check_scores(trained, told, ids):
  """Checks the scores of tokens, the first of which has none."""
  log_probs_TV = direct(trained, ids)
  assert told['token_logprobs'][0] is None and told['top_logprobs'][0] is None
  expected = [log_probs_TV[i, token] for i, token in enumerate(ids[1:])]
  assert told['token_logprobs'][1:] == pytest.approx(expected, abs=1e-4)
  for log_probs_V, top in zip(log_probs_TV, told['top_logprobs'][1:]):
    best = np.sort(log_probs_V)[::-1][: len(top)]
    assert sorted(top.values(), reverse=True) == pytest.approx(best, abs=1e-4)


def naive_places(decode, ids, text):
  """Returns where tokens begin: how much of the text those before have."""
  result = []
  for number in range(len(ids)):
    start = len(os.path.commonprefix([decode(ids[:number]), text]))
    result.append(max([start, *result[-1:]]))
  return result


def test_the_scores_of_a_prompt(url, trained):
  for text in ('the run', 'a', 'no step is lost and the run goes on', ''):
    (ids,) = trained.prompt_ids([text])
    found = ask(url, prompt=text, max_tokens=0, echo=True, logprobs=5)
    (choice,) = found['choices']
    assert choice['text'] == text and choice['finish_reason'] == 'length'
    told = choice['logprobs']
    assert len(told['tokens']) == len(ids)
    assert all(len(top) == 5 for top in told['top_logprobs'][1:])
    check_scores(trained, told, ids)
    offsets = [0, *range(len(text))]  # The start token adds nothing.
    assert told['text_offset'] == offsets[: len(ids)]
    assert found['usage']['prompt_tokens'] == len(ids)
    assert found['usage']['completion_tokens'] == 0


def test_no_tokens_at_all(url):
  found = ask(url, prompt='the run', max_tokens=0)
  (choice,) = found['choices']
  assert choice['text'] == '' and choice['logprobs'] is None
  assert choice['finish_reason'] == 'length'
  (choice,) = ask(url, prompt='the run', max_tokens=0, logprobs=2)['choices']
  assert choice['logprobs']['tokens'] == []
  (choice,) = ask(url, prompt='the run', max_tokens=0, echo=True)['choices']
  assert choice['text'] == 'the run'
  assert streamed(url, prompt='a', max_tokens=0)[0]['text'] == ''


def test_scores_do_not_depend_on_what_others_read(url, trained):
  """Of prompts that begin alike, and of the same one again."""
  start = 'where it stopped and no step is lost'
  for text in (start, start, start + ' the run goes', start):
    ask(url, prompt=text, max_tokens=2)
    found = ask(url, prompt=text, max_tokens=0, echo=True, logprobs=1)
    told = found['choices'][0]['logprobs']
    check_scores(trained, told, trained.prompt_ids([text])[0])


def test_a_prompt_as_long_as_the_model_reads(url, trained):
  ids = [3, *random.Random(0).choices(range(104, 360), k=63)]
  found = ask(url, prompt=ids, max_tokens=0, echo=True, logprobs=20)
  told = found['choices'][0]['logprobs']
  check_scores(trained, told, ids)
  assert all(len(top) == 20 for top in told['top_logprobs'][1:])


def test_lists_choices_and_what_follows(url, trained):
  """Of prompt and new tokens, each choice its own; streams say the same."""
  prompts = [
    trained.prompt_ids([text])[0] for text in ('the run', 'it', 'and no step')
  ]
  body = {
    'prompt': prompts, 'n': 2, 'max_tokens': 5, 'echo': True, 'logprobs': 3,
    'seed': 4, 'ignore_eos': True,
  }  # fmt: skip
  found = ask(url, **body)
  parts = streamed(url, **body)
  assert found['usage']['prompt_tokens'] == 2 * sum(map(len, prompts)) / 2
  assert found['usage']['completion_tokens'] == 5 * 6
  for number, choice in enumerate(found['choices']):
    prompt, told = prompts[number // 2], choice['logprobs']
    assert len(told['tokens']) == len(prompt) + 5
    assert choice['text'].startswith(trained.tokenizer.decode(prompt))
    own = parts[number]['logprobs']
    assert parts[number]['text'] == choice['text']
    assert own['tokens'] == told['tokens']
    assert own['text_offset'] == told['text_offset']
    assert own['token_logprobs'][1:] == pytest.approx(
      told['token_logprobs'][1:], abs=1e-4
    )


def test_the_token_that_ends_a_text_is_told(url, trained):
  """As others count on it: one new token is one more entry."""
  end = trained.tokenizer.eos_id
  body = {'prompt': 'the run', 'max_tokens': 4, 'logprobs': 2, 'echo': True}
  found = ask(url, **body, logit_bias={str(end): 100})
  (choice,) = found['choices']
  assert choice['text'] == 'the run' and choice['finish_reason'] == 'stop'
  told = choice['logprobs']
  assert len(told['tokens']) == 8 + 1 and told['tokens'][-1] == ''
  check_scores(trained, told, [*trained.prompt_ids(['the run'])[0], end])
  assert told['text_offset'][-1] == len('the run')
  assert found['usage']['completion_tokens'] == 1
  chat = ask(
    url, 'chat/completions', messages=[{'role': 'user', 'content': 'a'}],
    logprobs=True, max_tokens=4, logit_bias={str(end): 100},
  )['choices'][0]  # fmt: skip
  assert chat['message']['content'] == ''
  assert chat['logprobs']['content'] == []


def test_offsets_of_any_bytes(url, trained):
  """Random ids in the prompt, random new ones, stop strings; also streamed."""
  rng = random.Random(1)
  tokenizer = trained.tokenizer
  marks = tokenizer.encode('\u6f22\U0001f642\u00e9')
  for case in range(12):
    pick = lambda k: [
      rng.choice([rng.randrange(384), rng.choice(marks)]) for _ in range(k)
    ]
    ids = [3, *pick(rng.randrange(1, 24))]
    body = {
      'prompt': ids, 'max_tokens': 12, 'echo': True, 'logprobs': 0,
      'temperature': 3.0, 'seed': case, 'ignore_eos': True,
      'logit_bias': {str(i): 4 for i in marks}, 'stop': ['e', '\U0001f642'],
    }  # fmt: skip
    choice = ask(url, **body)['choices'][0]
    text, told = choice['text'], choice['logprobs']
    part = streamed(url, **body)[0]
    assert (part['text'], part['logprobs']['text_offset']) == (
      text, told['text_offset'],
    )  # fmt: skip
    assert told['text_offset'] == sorted(told['text_offset'])
    assert max(told['text_offset']) <= len(text)
    decoded = tokenizer.decode(ids)
    assert decoded.rstrip('\ufffd') == text[: len(decoded.rstrip('\ufffd'))]
    known = naive_places(tokenizer.decode, ids, text)
    assert told['text_offset'][: len(ids)] == known


def test_a_text_that_tokens_share(url, trained):
  """None is lost; the likelier one has the name."""
  for path, extra in (
    ('completions', {'prompt': 'the run', 'logprobs': 20}),
    (
      'chat/completions',
      {
        'messages': [{'role': 'user', 'content': 'a'}],
        'logprobs': True,
        'top_logprobs': 20,
      },
    ),
  ):
    # The first 100 ids and more add nothing to a text: all have one name.
    found = ask(
      url, path, max_tokens=3, temperature=0, ignore_eos=True,
      logit_bias={str(i): 50 for i in range(10)}, **extra,
    )['choices'][0]['logprobs']  # fmt: skip
    if path == 'completions':
      for token, log_prob, top in zip(
        found['tokens'], found['token_logprobs'], found['top_logprobs']
      ):
        assert len(top) == 20 and sum(map(math.exp, top.values())) <= 1 + 1e-5
        assert top.get(token, log_prob) == pytest.approx(log_prob)
    else:
      assert all(len(one['top_logprobs']) == 20 for one in found['content'])


def test_a_letter_and_its_byte():
  """The likelier has the text; the other, and special ones, keep theirs."""
  told = log_probs.TokenScore(
    token=1, log_prob=-2.0, top=((0, -1.0), (1, -2.0), (3, -3.0), (2, -4.0))
  )
  rest = log_probs.TokenScore(token=1, log_prob=-9.0, top=((0, -1.0),), place=1)
  token_bytes = [b'a', b'a', b'\xff', b'']
  found = log_probs.completion([told, rest], token_bytes, True)
  assert found['top_logprobs'][0] == {
    'a': -1.0, 'token_id:1': -2.0, '': -3.0, 'bytes:\\xff': -4.0,
  }  # fmt: skip
  assert found['tokens'] == ['token_id:1', 'token_id:1']
  assert found['text_offset'] == [0, 1]

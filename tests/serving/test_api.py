"""The completion interface, by OpenAI's own client."""

import json
import math

import httpx
import openai
import pytest
import serving_run

from t2x.decode import sampling
from t2x.inference import generation
from t2x.serving import app as app_lib


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  return serving_run.shared(tmp_path_factory)


@pytest.fixture(scope='module')
def url(trained):
  with serving_run.served(trained, name='tiny') as url:
    yield url


@pytest.fixture(scope='module')
def client(url):
  key = {'api_key': 'none', 'max_retries': 0}
  with openai.OpenAI(base_url=f'{url}/v1', **key) as client:
    yield client


def greedy(trained, prompt, num):
  return generation.generate_text(
    trained,
    [prompt],
    num_tokens=num,
    sampling=sampling.SamplingConfig(temperature=0),
  )[0]


def test_a_completion_is_what_generate_writes(client, trained):
  found = client.completions.create(
    model='tiny', prompt='the run', max_tokens=12, temperature=0
  )
  (choice,) = found.choices
  assert choice.text == greedy(trained, 'the run', 12)
  assert choice.finish_reason == 'length'
  assert found.object == 'text_completion' and found.id.startswith('cmpl-')
  assert found.usage.completion_tokens == 12
  assert found.usage.prompt_tokens == len('the run') + 1  # And its start.
  assert found.usage.total_tokens == found.usage.prompt_tokens + 12


def test_a_seed_decides_what_is_drawn(client, trained):
  ask = lambda seed, **options: [
    choice.text
    for choice in client.completions.create(
      model='tiny', prompt='no step', max_tokens=16, seed=seed, **options
    ).choices
  ]
  assert ask(5) == ask(5) != ask(6)
  assert len(set(ask(5, n=3))) == 3
  expected = generation.generate_text(
    trained, ['no step'], num_tokens=16, seed=5
  )
  assert ask(5) == expected


def test_a_stream_joins_to_the_whole(client):
  ask = lambda **options: client.completions.create(
    model='tiny', prompt='the run', max_tokens=20, seed=1, n=2, **options
  )
  whole = ask()
  texts, reasons = ['', ''], [None, None]
  used = None
  for event in ask(stream=True, stream_options={'include_usage': True}):
    for choice in event.choices:
      texts[choice.index] += choice.text
      reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    used = event.usage or used
  assert texts == [choice.text for choice in whole.choices]
  assert reasons == [choice.finish_reason for choice in whole.choices]
  assert used.completion_tokens == whole.usage.completion_tokens


def test_several_prompts_and_tokens(client, trained):
  ids = trained.prompt_ids(['the run', 'it stopped'])
  ask = lambda prompt: [
    choice.text
    for choice in client.completions.create(
      model='tiny', prompt=prompt, max_tokens=8, temperature=0
    ).choices
  ]
  assert ask(ids) == ask(['the run', 'it stopped'])
  assert ask(ids[1]) == ask('it stopped')


def test_log_probabilities(client, trained):
  found = client.completions.create(
    model='tiny', prompt='the run', max_tokens=6, temperature=0, logprobs=3
  )
  told = found.choices[0].logprobs
  assert ''.join(told.tokens) == found.choices[0].text
  assert told.text_offset == list(range(6))
  for token, log_prob, top in zip(
    told.tokens, told.token_logprobs, told.top_logprobs, strict=True
  ):
    assert max(top, key=top.get) == token
    assert top[token] == pytest.approx(log_prob, abs=1e-5)
    assert len(top) == 3 and sum(map(math.exp, top.values())) <= 1 + 1e-5
  expected = generation.generation(
    trained,
    ['the run'],
    num_tokens=6,
    sampling=sampling.SamplingConfig(temperature=0),
  )
  assert told.token_logprobs == pytest.approx(expected.log_probs[0], abs=1e-4)


def test_a_stop_string_ends_a_text(client, trained):
  whole = greedy(trained, 'the run', 30)
  stop = whole[10:13]
  found = client.completions.create(
    model='tiny', prompt='the run', max_tokens=30, temperature=0, stop=stop
  )
  assert found.choices[0].text == whole[: whole.index(stop)]
  assert found.choices[0].finish_reason == 'stop'
  assert found.usage.completion_tokens < 30


def test_echo(client):
  found = client.completions.create(
    model='tiny', prompt='the run', max_tokens=2, temperature=0, echo=True
  )
  assert found.choices[0].text.startswith('the run')


def test_a_chat(client, trained):
  messages = [
    {'role': 'system', 'content': 'the run'},
    {'role': 'user', 'content': [{'type': 'text', 'text': 'goes on'}]},
  ]
  ask = lambda **options: client.chat.completions.create(
    model='tiny', messages=messages, max_tokens=9, temperature=0, **options
  )
  found = ask(logprobs=True, top_logprobs=2)
  (choice,) = found.choices
  prompt = 'system: the run\nuser: goes on\nassistant:'
  assert choice.message.content == greedy(trained, prompt, 9)
  assert choice.message.role == 'assistant'
  content = choice.logprobs.content
  assert bytes(b for one in content for b in one.bytes).decode() == (
    choice.message.content
  )
  assert all(len(one.top_logprobs) == 2 for one in content)
  parts = list(ask(stream=True))
  assert parts[0].choices[0].delta.role == 'assistant'
  joined = ''.join(part.choices[0].delta.content or '' for part in parts)
  assert joined == choice.message.content
  assert parts[-1].choices[0].finish_reason == 'length'


def test_rules(client):
  """Regular expressions, grammars and schemas, whatever the model thinks."""
  ask = lambda **options: client.completions.create(
    model='tiny', prompt='the run', max_tokens=30, seed=3, **options
  ).choices[0]
  choice = ask(extra_body={'regex': r'[0-9]{3}-[0-9]{2}'})
  assert len(choice.text) == 6 and choice.text[3] == '-'
  assert choice.finish_reason == 'stop'
  choice = ask(extra_body={'grammar': 'start: "(" start ")" | "x"'})
  assert choice.text.strip('()') in ('x', '')
  schema = {
    'type': 'object',
    'properties': {'kind': {'enum': ['run', 'step']}},
    'required': ['kind'],
    'additionalProperties': False,
  }
  found = client.chat.completions.create(
    model='tiny',
    messages=[{'role': 'user', 'content': 'the run'}],
    max_tokens=30,
    response_format={
      'type': 'json_schema',
      'json_schema': {'name': 'kinds', 'schema': schema},
    },
  )
  assert json.loads(found.choices[0].message.content)['kind'] in (
    'run',
    'step',
  )


def test_keywords(client):
  """They are in the text, however unlikely."""
  ask = lambda words, num: client.completions.create(
    model='tiny',
    prompt='the run',
    max_tokens=num,
    n=4,
    seed=2,
    extra_body={'keywords': words},
  )
  found = ask(['zebra', 'no step'], 24)
  assert all('zebra' in choice.text for choice in found.choices)
  assert all('no step' in choice.text for choice in found.choices)
  assert len({choice.text for choice in found.choices}) > 1
  with pytest.raises(openai.BadRequestError, match='6 tokens, and the text'):
    ask(['zebra'], 4)


def test_models_health_and_metrics(client, url):
  (model,) = client.models.list().data
  assert client.models.retrieve('tiny') == model
  with pytest.raises(openai.NotFoundError, match="no model 'other'"):
    client.models.retrieve('other')
  assert model.id == 'tiny'
  assert httpx.get(f'{url}/health').json() == {'status': 'ok'}
  before = serving_run.figures(url)
  client.completions.create(model='tiny', prompt='a', max_tokens=5)
  after = serving_run.figures(url)
  grown = lambda name: after[name] - before[name]
  assert grown('t2x_tokens_total') == 5
  assert grown('t2x_time_to_first_token_seconds_count') == 1
  assert grown('t2x_time_between_tokens_seconds_count') == 4
  name = 't2x_requests_total{path="/v1/completions",status="200"}'
  assert grown(name) == 1
  assert after['t2x_running'] == after['t2x_pages_used'] == 0


def test_what_texts_share_is_told(client):
  ask = lambda: client.completions.create(
    model='tiny', prompt='it stopped and no step is lost', max_tokens=2
  )
  ask()
  assert ask().usage.prompt_tokens_details.cached_tokens == 24


WRONG = {
  'no_prompt': ({}, 'prompt is missing'),
  'empty': ({'prompt': []}, 'prompt'),
  'type': ({'prompt': 'a', 'max_tokens': 'ten'}, 'max_tokens: '),
  'range': ({'prompt': 'a', 'temperature': -1}, 'temperature: '),
  'unknown': ({'prompt': 'a', 'functions': []}, "Unknown field 'functions'"),
  'too_long': ({'prompt': 'a' * 70}, 'Shorten the prompt.'),
  'too_many': ({'prompt': 'a', 'max_tokens': 999}, 'at most 62'),
  'no_token': ({'prompt': [1, 99999]}, 'token id 99999'),
  'negative': ({'prompt': [-1]}, 'token id -1'),
  'bias': ({'prompt': 'a', 'logit_bias': {'x': 1}}, 'logit_bias'),
  'bias_id': ({'prompt': 'a', 'logit_bias': {'99999': 1}}, '99999'),
  'regex': ({'prompt': 'a', 'regex': '(a'}, 'regular expression'),
  'impossible': ({'prompt': 'a', 'regex': r'[^\x00-\U0010FFFF]'}, 'meets it'),
  'two_rules': ({'prompt': 'a', 'regex': 'a', 'grammar': 'b'}, 'one rule'),
  'stop': ({'prompt': 'a', 'stop': ''}, 'stop: '),
  'choices': ({'prompt': ['a'] * 30, 'n': 5}, '150 texts'),
  'negative_tokens': ({'prompt': 'a', 'max_tokens': -1}, 'max_tokens: '),
  'no_room': ({'prompt': 'a' * 64, 'max_tokens': 0}, 'Shorten the prompt'),
  'min_of_none': (
    {'prompt': 'a', 'max_tokens': 0, 'min_tokens': 1},
    'min_tokens=1 is above the 0',
  ),
  'huge': ({'prompt': 'a', 'min_tokens': 2**40}, 'min_tokens: '),
  'huge_k': ({'prompt': 'a', 'top_k': 2**40}, 'top_k: '),
  'huge_bias': ({'prompt': 'a', 'logit_bias': {'5': 1e39}}, 'logit_bias: '),
  'nested': (
    {'prompt': 'a', 'stream_options': {'x': 1}},
    "Unknown field 'stream_options.x'",
  ),
  'float': ({'prompt': 'a', 'n': 1.5}, 'n: '),
  'seed': ({'prompt': 'a', 'seed': 'x'}, 'seed: '),
  'typo': ({'prompt': 'a', 'temprature': 1}, "Did you mean 'temperature'?"),
  'min_above': ({'prompt': 'a', 'min_tokens': 30}, 'min_tokens=30 is above'),
  'tools': ({'prompt': 'a', 'tools': [{}]}, 'send no tools'),
  'nothing': ('text', 'object'),
}


@pytest.mark.parametrize('name', WRONG)
def test_what_is_wrong_is_said(url, name):
  body, message = WRONG[name]
  answer = httpx.post(f'{url}/v1/completions', json=body)
  assert answer.status_code == 400
  error = answer.json()['error']
  assert message in error['message'] and error['message'].count('\n') == 0
  assert error['type'] == 'invalid_request_error'


@pytest.mark.parametrize(
  'data',
  [b'', b'{', b'\xff\xfe', b'[' * 100_000, b'{"prompt": "a", "prompt":'],
)
def test_bodies_that_are_no_json(url, data):
  headers = {'content-type': 'application/json'}
  answer = httpx.post(f'{url}/v1/completions', content=data, headers=headers)
  assert answer.status_code == 400
  assert 'Invalid JSON' in answer.json()['error']['message']


def test_other_status_codes(url, client):
  post = lambda path, **options: httpx.post(f'{url}{path}', **options)
  assert post('/v1/nothing', json={}).status_code == 404
  assert post('/v1/nothing', json={}).json()['error']['message']
  assert httpx.get(f'{url}/v1/completions').status_code == 405
  assert post('/v1/completions', content=b'a=1').status_code == 415
  big = {'prompt': 'a' * 2_000_000}
  assert post('/v1/completions', json=big).status_code == 413
  with pytest.raises(openai.NotFoundError, match="no model 'other'"):
    client.completions.create(model='other', prompt='a')
  with pytest.raises(openai.BadRequestError, match='temperature'):
    client.completions.create(model='tiny', prompt='a', temperature=-3)


NEUTRAL = {
  'max_tokens': None, 'echo': None, 'best_of': 1, 'suffix': None, 'tools': [],
  'store': False, 'stop': None, 'logprobs': None, 'n': None, 'seed': None,
  'stream_options': {'include_obfuscation': False}, 'user': 'me',
}  # fmt: skip


def test_what_asks_for_nothing_is_taken(url):
  post = lambda path, body: httpx.post(f'{url}/v1/{path}', json=body)
  answer = post('completions', {'prompt': 'a', **NEUTRAL})
  assert answer.status_code == 200, answer.text
  chat = {
    'messages': [
      {'role': 'user', 'content': 'a', 'name': 'me'},
      {'role': 'assistant', 'content': 'b', 'refusal': None},
      {'role': 'user', 'content': 'c'},
    ],
    'max_tokens': 2, 'logprobs': None, 'top_logprobs': None,
    'parallel_tool_calls': None,
  }  # fmt: skip
  assert post('chat/completions', chat).status_code == 200


def test_stop_strings_and_what_is_shared(client):
  """The count is told also where the text stops early."""
  ask = lambda: client.completions.create(
    model='tiny', prompt='where it stopped and goes on', max_tokens=12,
    temperature=0, stop=[' ', 'e', 't', 'o'],
  )  # fmt: skip
  ask()
  found = ask()
  assert found.choices[0].finish_reason == 'stop'
  assert found.usage.prompt_tokens_details.cached_tokens == 24


def test_a_prompt_that_ends_within_a_character(client, trained):
  start = trained.tokenizer.encode('\u00e9')
  found = client.completions.create(
    model='tiny', prompt=[3, *start[:1]], max_tokens=3,
    logit_bias={str(start[1]): 100},
  )  # fmt: skip
  assert found.choices[0].text.startswith('\u00e9')


def test_nothing_that_may_come_is_an_error(client):
  with pytest.raises(openai.BadRequestError, match='No token may come next'):
    client.completions.create(
      model='tiny', prompt='a', max_tokens=3,
      extra_body={'keywords': ['ox'], 'banned_words': ['ox']},
    )  # fmt: skip


def test_banned_words_are_in_no_text(client):
  """Letter by letter too, of which this tokenizer has one a token."""
  ask = lambda **extra: client.completions.create(
    model='tiny', prompt='the run', max_tokens=24, n=4, seed=1,
    logit_bias={'111': 4.0}, extra_body=extra,
  )  # fmt: skip
  texts = [choice.text for choice in ask().choices]
  words = sorted({text[i : i + 2] for text in texts for i in (0, 3, 9)})
  words = [word for word in words if word and '\ufffd' not in word]
  found = ask(banned_words=[*words, 'no step'], keywords=['step']).choices
  assert words and any(word in text for word in words for text in texts)
  assert not any(word in choice.text for word in words for choice in found)
  assert all('step' in choice.text for choice in found)
  with pytest.raises(openai.BadRequestError, match='stop|empty|at least 1'):
    ask(banned_words=[''])


def test_templates(trained):
  """As transformers renders them."""
  from t2x.serving import chat

  text = lambda template: chat.Chat(trained.tokenizer, template).text(
    [{'role': 'user', 'content': 'a<b'}]
  )
  assert text('{% if tools is not none %}x{% endif %}y') == 'y'
  assert text('{% generation %}z{% endgeneration %}') == 'z'
  assert text('{{ messages[0] | tojson }}') == (
    '{"role": "user", "content": "a<b"}'
  )
  for wrong in (
    '{{ 1 // (messages|length - 1) }}',
    "{{ raise_exception('no') }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
  ):
    with pytest.raises(ValueError, match='refuses these messages'):
      text(wrong)
  with pytest.raises(ValueError, match='cannot be read'):
    text('{% for %}')


def test_a_chat_needs_messages(url):
  post = lambda body: httpx.post(f'{url}/v1/chat/completions', json=body)
  wrong = [
    {'messages': []},
    {'messages': [{'role': 'wizard', 'content': 'a'}]},
    {'messages': [{'role': 'user'}]},
    {'messages': [{'role': 'user', 'content': 'a'}], 'top_logprobs': 2},
  ]
  for body in wrong:
    assert post(body).status_code == 400


def test_names_and_keys(trained):
  config = app_lib.AppConfig(api_key='secret', hosts=('127.0.0.1',))
  with serving_run.served(trained, app=config, name='tiny') as url:
    ask = lambda **headers: httpx.post(
      f'{url}/v1/completions',
      json={'prompt': 'a', 'max_tokens': 1},
      headers=headers,
    )
    assert ask().status_code == 401
    assert ask(authorization='Bearer wrong').status_code == 401
    assert ask(authorization='Bearer s\u00e9cret'.encode()).status_code == 401
    assert ask(authorization='Bearer secret').status_code == 200
    # A page elsewhere whose name was made to point here.
    other = ask(authorization='Bearer secret', host='evil.example')
    assert other.status_code == 400
    assert httpx.get(f'{url}/v1/models').status_code == 401
    assert httpx.get(f'{url}/health').status_code == 200
    with openai.OpenAI(base_url=f'{url}/v1', api_key='secret') as own:
      assert own.models.list().data[0].id == 'tiny'

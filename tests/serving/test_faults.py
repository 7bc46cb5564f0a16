"""Clients that go, dawdle and crowd; steps that fail. Others notice nothing."""

import concurrent.futures
import json
import socket
import threading
import time

import httpx
import openai
import pytest
import serving_run

from t2x.decode import engine as engine_lib
from t2x.decode import sampling
from t2x.inference import generation
from t2x.serving import app as app_lib

SLOW = 0.02  # Seconds that each step takes here, at least.


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  return serving_run.trained_of(
    tmp_path_factory.mktemp('run'),
    train__num_steps=2,
    model__position__max_length=512,
  )


@pytest.fixture(scope='module')
def app(trained):
  """Steps take long enough that texts are met while they are written."""
  sizes = dict(num_slots=4, page_size=8, chunks=(8, 32), max_waiting=8)
  made = serving_run.make(
    trained,
    engine=engine_lib.EngineConfig(max_length=512, **sizes),
    app=app_lib.AppConfig(body_seconds=0.5),
  )
  engine = made.state.runner.engine
  step = engine.step

  def slow():
    time.sleep(SLOW)
    return step()

  engine.step = slow
  return made


@pytest.fixture(scope='module')
def url(app):
  with serving_run.running(app) as url:
    yield url


@pytest.fixture(autouse=True)
def nothing_is_left(url):
  yield
  serving_run.wait_until(lambda: is_idle(url))


def is_idle(url):
  found = serving_run.figures(url)
  names = ('t2x_running', 't2x_pending', 't2x_pages_used')
  return all(found[name] == 0 for name in names)


def body(num=400, **options):
  return {'prompt': 'the run', 'max_tokens': num, 'ignore_eos': True, **options}


def connect(url, data=None, path='/v1/completions', length=None):
  """Returns a socket that has sent a request, or its beginning."""
  host, port = url.removeprefix('http://').split(':')
  made = socket.create_connection((host, int(port)), timeout=20)
  content = json.dumps(data).encode() if data else b''
  head = (
    f'POST {path} HTTP/1.1\r\nHost: {host}\r\n'
    'Content-Type: application/json\r\n'
    f'Content-Length: {length or len(content)}\r\n\r\n'
  )
  made.sendall(head.encode() + content)
  return made


def written(url):
  return serving_run.figures(url)['t2x_tokens_total']


@pytest.mark.parametrize('stream', [True, False])
def test_a_client_that_goes_frees_its_slot(url, stream):
  before = written(url)
  client = connect(url, body(n=2, stream=stream))
  serving_run.wait_until(lambda: written(url) > before + 6)
  client.close()
  serving_run.wait_until(lambda: is_idle(url))
  assert written(url) < before + 400  # 800 were asked for.


def test_one_that_waits_and_goes_leaves_the_queue(url):
  busy = connect(url, body(n=4, stream=True))
  serving_run.wait_until(lambda: serving_run.figures(url)['t2x_running'] == 4)
  waiting = connect(url, body(3))
  serving_run.wait_until(lambda: serving_run.figures(url)['t2x_pending'] == 5)
  waiting.close()
  serving_run.wait_until(lambda: serving_run.figures(url)['t2x_pending'] == 4)
  busy.close()


def test_too_many_are_told_to_come_back(url, trained):
  """They get 429; who was taken gets the right text."""
  prompts = [f'run {i}' for i in range(40)]
  client = openai.OpenAI(base_url=f'{url}/v1', api_key='no', max_retries=0)

  def ask(prompt):
    try:
      found = client.completions.create(
        model='model', prompt=prompt, max_tokens=20, temperature=0
      )
      return found.choices[0].text
    except openai.RateLimitError as error:
      assert error.response.headers['retry-after'] == '1'
      return None

  with client, concurrent.futures.ThreadPoolExecutor(40) as pool:
    found = list(pool.map(ask, prompts))
  taken = [i for i, text in enumerate(found) if text is not None]
  assert 12 <= len(taken) < 40
  expected = generation.generate_text(
    trained,
    [prompts[i] for i in taken],
    num_tokens=20,
    sampling=sampling.SamplingConfig(temperature=0),
  )
  assert [found[i] for i in taken] == expected


def test_a_body_that_never_comes(url):
  client = connect(url, length=100)
  assert client.recv(100).startswith(b'HTTP/1.1 408')
  client.close()


def test_a_client_that_does_not_read_holds_nobody_up(url):
  lazy = connect(url, body(60, stream=True, logprobs=5, n=2))
  start = time.monotonic()
  answer = httpx.post(f'{url}/v1/completions', json=body(10), timeout=20)
  assert answer.json()['usage']['completion_tokens'] == 10
  assert time.monotonic() - start < 10
  serving_run.wait_until(lambda: is_idle(url))
  lazy.close()


def test_a_thousand_connections(url):
  """That say nothing, or the half; one that speaks is answered."""
  host, port = url.removeprefix('http://').split(':')
  made = []
  try:
    for number in range(1000):
      one = socket.create_connection((host, int(port)), timeout=20)
      if number % 2:
        one.sendall(b'POST /v1/completions HTTP/1.1\r\nHost: 127.0')
      made.append(one)
    answer = httpx.post(f'{url}/v1/completions', json=body(5), timeout=20)
    assert answer.status_code == 200
  finally:
    for one in made:
      one.close()
  assert httpx.get(f'{url}/health').status_code == 200


def test_a_step_that_fails_ends_the_texts_that_it_wrote(url, app):
  engine = app.state.runner.engine
  step, failures = engine.step, []

  def broken():
    if engine._decoding and not failures:
      failures.append(1)
      raise RuntimeError('out of memory')
    return step()

  engine.step = broken
  try:
    answer = httpx.post(f'{url}/v1/completions', json=body(20), timeout=20)
    assert answer.status_code == 500
    # What failed is for those who run the server.
    assert 'the log of the server' in answer.json()['error']['message']
    with httpx.stream(
      'POST', f'{url}/v1/completions', json=body(5, stream=True)
    ) as stream:
      assert stream.read().endswith(b'[DONE]\n\n')
  finally:
    engine.step = step
  again = httpx.post(f'{url}/v1/completions', json=body(20), timeout=20)
  assert again.status_code == 200


def test_a_stream_that_fails_ends(url, app):
  """By an error of any kind: the client is told, and waits no longer."""
  from t2x.inference import text_stream

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(text_stream.TextStream, 'add', lambda *_: 1 / 0)
    answer = httpx.post(
      f'{url}/v1/completions', json=body(5, stream=True), timeout=20
    )
  assert 'The server failed' in answer.text
  found = serving_run.figures(url)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(text_stream.TextStream, 'add', lambda *_: 1 / 0)
    assert (
      httpx.post(f'{url}/v1/completions', json=body(5), timeout=20).status_code
      == 500
    )
  name = 't2x_requests_total{path="/v1/completions",status="500"}'
  assert serving_run.figures(url)[name] == found.get(name, 0) + 1


def test_an_engine_that_cannot_go_on(trained):
  """Everyone is told, those who come later too."""
  made = serving_run.make(trained)
  engine = made.state.runner.engine

  def broken():
    raise RuntimeError('the device is lost')

  engine.step = engine.restart = broken
  with serving_run.running(made) as url:
    ask = lambda: httpx.post(f'{url}/v1/completions', json=body(20), timeout=20)
    assert ask().status_code == 500
    serving_run.wait_until(
      lambda: httpx.get(f'{url}/health').status_code == 503
    )
    assert ask().status_code == 503


def test_keys_of_any_letters(trained):
  config = app_lib.AppConfig(api_key='cl\u00e9')
  with serving_run.served(trained, app=config) as url:
    headers = {'Authorization': 'Bearer cl\u00e9'.encode()}
    assert httpx.get(f'{url}/v1/models', headers=headers).status_code == 200


def test_memory_returns_to_where_it_was(url):
  """Texts, streams and threads of many requests are gone."""
  import gc

  from t2x.serving import engine_thread

  def ask(number):
    if number % 3 == 0:
      client = connect(url, body(50, stream=True))
      time.sleep(0.05)
      client.close()
    else:
      httpx.post(f'{url}/v1/completions', json=body(3), timeout=60)

  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    list(pool.map(ask, range(48)))
  serving_run.wait_until(lambda: is_idle(url))
  threads = threading.active_count()

  def num_left():
    gc.collect()
    kinds = (engine_lib.GeneratedSequence, engine_thread.SequenceStream)
    return sum(type(one) in kinds for one in gc.get_objects())

  # What the last step's settings hold on to, and no more.
  serving_run.wait_until(lambda: num_left() <= 2)
  assert threading.active_count() <= threads

"""The page that tries a model, in a browser where one is installed."""

import re
import shutil

import extras
import pytest
import serving_run

from t2x.inference import generation
from t2x.serving import app as app_lib

_BROWSER = shutil.which('chromium') or shutil.which('google-chrome')
playwright = extras.need('playwright.sync_api', extra='browser')
pytestmark = pytest.mark.skipif(not _BROWSER, reason='there is no Chromium')


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  return serving_run.shared(tmp_path_factory)


@pytest.fixture(scope='module')
def browser():
  with playwright.sync_playwright() as started:
    made = started.chromium.launch(
      executable_path=_BROWSER, args=['--no-sandbox']
    )
    yield made
    made.close()


@pytest.fixture
def page(browser):
  page = browser.new_page()
  page.problems = []
  page.on('pageerror', lambda error: page.problems.append(str(error)))
  page.on(
    'console',
    lambda message: (
      message.type == 'error' and page.problems.append(message.text)
    ),
  )
  yield page
  page.close()


def write(page, prompt='the run', **values):
  for name, value in {'max_tokens': 12, 'seed': 1, **values}.items():
    box = page.locator(f'#{name}')
    if box.get_attribute('type') == 'range':
      box.evaluate(
        '(e, v) => { e.value = v; e.dispatchEvent(new Event("input")); }',
        str(value),
      )
    else:
      if name in ('regex', 'stop', 'key'):
        page.locator('details').evaluate('e => { e.open = true; }')
      box.fill(str(value))
  page.fill('#prompt', prompt)
  page.click('#write')
  playwright.expect(page.locator('#write')).to_be_enabled()


def test_a_text_is_written_and_its_tokens_coloured(page, trained):
  with serving_run.served(trained, name='tiny') as url:
    page.goto(url)
    playwright.expect(page).to_have_title(re.compile('tiny'))
    write(page, temperature=0)
    expected = generation.generate_text(
      trained,
      ['the run'],
      num_tokens=12,
      sampling=generation.Sampling(temperature=0),
    )
    assert page.inner_text('#text') == 'the run' + expected[0]
    colours = page.eval_on_selector_all(
      '.new', 'all => all.map(e => getComputedStyle(e).backgroundColor)'
    )
    assert len(colours) == 12
    shares = page.eval_on_selector_all('.new', 'all => all.map(e => e.title)')
    assert all(re.fullmatch(r'\d+\.\d%', share) for share in shares)
    alpha = lambda c: float((re.findall(r'[\d.]+', c) + ['1'])[3])
    pairs = sorted(
      (float(share[:-1]), alpha(colour))
      for share, colour in zip(shares, colours)
    )
    # The unlikelier, the stronger.
    assert [a for _, a in pairs] == sorted((a for _, a in pairs), reverse=True)
    page.click('.new >> nth=2')
    assert page.locator('#token tr').count() == 5
    assert page.locator('#token tr.taken').count() == 1
    assert '12 tokens' in page.inner_text('#figures')
    assert not page.problems


def test_what_is_wrong_is_shown(page, trained):
  with serving_run.served(trained, name='tiny') as url:
    page.goto(url)
    write(page, regex='(a')
    assert 'regular expression' in page.inner_text('#error')
    write(page, regex='[0-9]{3}')
    assert re.fullmatch(r'the run\d{3}', page.inner_text('#text'))
    assert not page.is_visible('#error')


def test_markup_in_a_text_stays_text(page, trained):
  with serving_run.served(trained, name='tiny') as url:
    page.goto(url)
    write(page, prompt='<img src=x onerror=alert(1)>', max_tokens=2)
    assert page.locator('#text img').count() == 0
    assert page.inner_text('#text').startswith('<img src=x')
    assert not page.problems


def test_with_a_key_and_stopped(page, trained):
  config = app_lib.AppConfig(api_key='secret')
  made = serving_run.make(trained, app=config, name='tiny')
  engine = made.state.runner.engine
  with serving_run.running(made) as url:
    page.goto(url)
    page.locator('#key').wait_for()  # It is asked for at once.
    write(page)
    assert 'API key' in page.inner_text('#error')
    step = engine.step

    def slow():
      import time

      time.sleep(0.1)
      return step()

    engine.step = slow
    page.fill('#key', 'secret')
    page.locator('#max_tokens').evaluate(
      '(e) => { e.value = 50; e.dispatchEvent(new Event("input")); }'
    )
    page.click('#write')
    page.locator('.new').nth(2).wait_for()
    page.click('#halt')
    playwright.expect(page.locator('#write')).to_be_enabled()
    assert 'stopped by you' in page.inner_text('#figures')
    serving_run.wait_until(lambda: not engine.is_busy)
    assert engine.pages.num_used == 0

"""Metrics of the server, in the format of Prometheus."""

from collections.abc import Iterator

import prometheus_client
from prometheus_client import core
from prometheus_client import exposition

from t2x.serving import engine_thread

_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
  """Counters, gauges and histograms of a server.

  Those of the engine are read from it at each `text`.

  Attributes:
    requests: counter of requests by path and status.
  """

  def __init__(self):
    """Registers the metrics, without an engine: see `watch`."""
    self._registry = prometheus_client.CollectorRegistry()
    self._runner: engine_thread.Runner | None = None
    histogram = lambda name, text: prometheus_client.Histogram(
      name, text, buckets=_BUCKETS, registry=self._registry
    )
    self._times = {
      'first': histogram(
        't2x_time_to_first_token_seconds', 'From a request to its first token.'
      ),
      'between': histogram(
        't2x_time_between_tokens_seconds', 'From one token of a text on.'
      ),
    }
    self.requests = prometheus_client.Counter(
      't2x_requests',
      'Requests to /v1 by the status of their answer.',
      ['path', 'status'],
      registry=self._registry,
    )
    self._registry.register(self)

  def watch(self, runner: engine_thread.Runner) -> None:
    """Sets the runner whose engine is read."""
    self._runner = runner

  def observe(self, name: str, value: float) -> None:
    """Adds a value to a histogram.

    Args:
      name: `first` for the time to the first token of a text, `between` for
        that between two tokens.
      value: time in seconds.
    """
    self._times[name].observe(value)

  def text(self) -> tuple[bytes, str]:
    """Returns all metrics in the format of Prometheus, and the media type."""
    text = exposition.generate_latest(self._registry)
    return text, exposition.CONTENT_TYPE_LATEST

  def collect(self) -> Iterator[core.Metric]:
    """Yields the metrics of the engine; the registry calls it."""
    if self._runner is None:
      return
    engine = self._runner.engine
    counts = {
      'prompt_tokens': 'Tokens of prompts, shared ones included.',
      'shared_tokens': 'Tokens of prompts that another text had read.',
      'tokens': 'Tokens written.',
      'steps': 'Steps of the engine.',
    }
    for name, text in counts.items():
      value = engine.counts[name]
      yield core.CounterMetricFamily(f't2x_{name}', text, value=value)
    gauges = {
      'running': ('Texts that are read or written.', engine.num_running),
      'pending': ('Texts that are not over.', self._runner.num_pending),
      'pages_used': ('Pages that texts hold.', engine.pages.num_used),
      'pages': ('Pages of the pool.', engine.pages.num_pages),
    }
    for name, (text, value) in gauges.items():
      yield core.GaugeMetricFamily(f't2x_{name}', text, value=value)

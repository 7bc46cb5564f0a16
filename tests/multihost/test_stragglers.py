"""Which process is called slow, and when."""

import jax

from t2x.multihost import stragglers


def _warned(caplog, rounds, step_seconds=1.0):
  """Returns how many warnings come of the seconds of each process."""
  watched = stragglers.Stragglers(jax.make_mesh((8,), ('data',)), 1)
  caplog.clear()
  for i, seconds in enumerate(rounds):
    watched.compare(5 * i, dict(enumerate(seconds)), step_seconds)
  return caplog.messages


def test_the_slow_process_is_named_after_a_while(caplog):
  slow = [0.02, 0.01, 0.5, 0.01]
  assert not _warned(caplog, [slow])
  (message,) = _warned(caplog, [slow] * 19)
  assert 'Process 2 keeps the others waiting' in message
  assert 'took 0.500 s' in message and 'others is 0.010 s' in message
  assert len(_warned(caplog, [slow] * 25)) == 2


def test_what_is_not_slow(caplog):
  assert not _warned(caplog, [[0.5, 0.4, 0.4]] * 9)  # Less than 1.5 times.
  assert not _warned(caplog, [[0.05, 0.01, 0.01]] * 9)  # Of a second.
  assert _warned(caplog, [[0.05, 0.01, 0.01]] * 9, step_seconds=0.1)
  # Another each time: that is chance.
  assert not _warned(caplog, [[1.0, 0.1, 0.1], [0.1, 1.0, 0.1]] * 9)
  quick = [0.1, 0.1, 0.1]
  assert not _warned(caplog, [[1.0, 0.1, 0.1], quick] * 9)


def test_a_process_alone_compares_nothing(caplog):
  watched = stragglers.Stragglers(jax.make_mesh((8,), ('data',)), 1)
  for step in range(1, 50):
    watched.add(step, 10.0)
  assert not caplog.messages

"""Tests that take long run in turns: a share of them for each commit.

574 of 4,454 tests take 84% of the time of a cold run. `--turn=COMMIT` runs all
others and one share in `NUM_SHARES` of these; which one goes by the commit's
hash, so that each comes up as commits go by, and twice the same commit runs the
same tests. A test that is not known to take long runs always.
"""

from collections.abc import Iterable
from collections.abc import Mapping

NUM_SHARES = 8
# Tests that took as long or longer, in seconds from a cold cache, take turns.
LONG = 2.0


def deal(seconds: Mapping[str, float], num: int) -> dict[str, int]:
  """Deals tests to shares that take about as long as each other.

  Args:
    seconds: seconds of each test, by its id.
    num: number of shares.

  Returns:
    The share of each test, from 0 to `num - 1`.
  """
  shares, sums = {}, [0.0] * num
  for name, each in sorted(seconds.items(), key=lambda i: (-i[1], i[0])):
    shares[name] = min(range(num), key=sums.__getitem__)
    sums[shares[name]] += each
  return shares


def waiting(seconds: Mapping[str, float], commit: str) -> set[str]:
  """Returns the tests whose turn is at another commit.

  Args:
    seconds: seconds of each test that is known, by its id.
    commit: hash of the commit, in hexadecimal digits.

  Raises:
    ValueError: `commit` is no hash.
  """
  try:
    turn = int(commit, 16) % NUM_SHARES
  except ValueError:
    raise ValueError(
      f'--turn={commit} is no hash of a commit. Write '
      '--turn=$(git rev-parse HEAD).'
    ) from None
  long = {name: each for name, each in seconds.items() if each >= LONG}
  shares = deal(long, NUM_SHARES)
  return {name for name, share in shares.items() if share != turn}


def left(
  files: Mapping[str, float],
  tests: Mapping[str, float],
  waiting: Iterable[str],
) -> dict[str, float]:
  """Returns the seconds of each file without those of tests that wait.

  They are the same to the last bit in whatever order the tests are given: files
  are ordered by them, and pytest-xdist refuses workers that order differently.

  Args:
    files: seconds of all tests of each file.
    tests: seconds of each long test, by its id.
    waiting: ids of the tests that wait.
  """
  seconds = dict(files)
  for name in sorted(waiting):
    seconds[name.partition('::')[0]] -= tests[name]
  return seconds

"""A law of the loss by parameters and tokens, fitted and used.

L(N, D) = E + A / N^a + B / D^b (Hoffmann et al., 2022, equation 2). Of a budget
of C = 6 N D FLOPs, the loss is least where N and D grow as C^(b / (a + b)) and
C^(a / (a + b)) (their equation 4).
"""

from collections.abc import Sequence
import dataclasses
import itertools
import math

import numpy as np

_HUBER = 1e-3  # Hoffmann et al.: where the loss of log L becomes linear.
_MIN_POINTS = 6  # Five numbers are fitted.
_UNIT = 1e6  # Of the objective, so that its least changes are seen.
_NUM_STARTS = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
  """One run.

  Attributes:
    parameters: N, a sixth of the FLOPs of a training step for each token.
    tokens: D, tokens of training.
    loss: final loss, in nats.
  """

  parameters: float
  tokens: float
  loss: float

  @property
  def flops(self) -> float:
    """C, FLOPs of training."""
    return 6 * self.parameters * self.tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Law:
  """The numbers of the law.

  Attributes:
    floor: E, the loss that no size and no text goes below.
    a_scale: A.
    a: exponent of the parameters.
    b_scale: B.
    b: exponent of the tokens.
  """

  floor: float
  a_scale: float
  a: float
  b_scale: float
  b: float

  def loss(self, parameters: float, tokens: float) -> float:
    """Returns the loss that the law gives."""
    by_size = self.a_scale * parameters**-self.a
    return self.floor + by_size + self.b_scale * tokens**-self.b

  def best(self, flops: float) -> tuple[float, float]:
    """Returns the parameters and tokens with the least loss, for a budget."""
    sixth = flops / 6
    ratio = self.a * self.a_scale / (self.b * self.b_scale)
    parameters = ratio ** (1 / (self.a + self.b)) * sixth ** (
      self.b / (self.a + self.b)
    )
    return parameters, sixth / parameters

  @property
  def size_exponent(self) -> float:
    """The power of the budget by which the best number of parameters grows."""
    return self.b / (self.a + self.b)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fit:
  """A law with what is known of its numbers.

  Attributes:
    law: the law that fits best.
    samples: laws fitted to runs drawn again, with replacement.
    error: root mean square of log(loss / fitted loss).
  """

  law: Law
  samples: tuple[Law, ...]
  error: float

  def interval(self, name: str, share: float = 0.9) -> tuple[float, float]:
    """Returns the interval in which a share of the samples lies.

    Args:
      name: a field or property of `Law`.
      share: share of the samples.
    """
    return _interval([getattr(law, name) for law in self.samples], share)

  def prediction(
    self, parameters: float, tokens: float, share: float = 0.9
  ) -> tuple[float, float, float]:
    """Returns the predicted loss, and the interval of the samples' losses."""
    losses = [law.loss(parameters, tokens) for law in self.samples]
    return self.law.loss(parameters, tokens), *_interval(losses, share)


def fit(
  points: Sequence[Point], *, num_samples: int = 100, seed: int = 0
) -> Fit:
  """Fits the law by Huber loss of log L, from a grid of starts.

  Args:
    points: runs of several sizes and numbers of tokens.
    num_samples: number of bootstrap samples.
    seed: seed of what is drawn again.

  Raises:
    ValueError: there are too few runs, or all have one size or one number of
      tokens.
  """
  check([(p.parameters, p.tokens) for p in points])
  centre = np.mean(
    [[math.log(p.parameters), math.log(p.tokens)] for p in points], 0
  )
  values = _minimise(points, centre, _starts(points))
  generator = np.random.default_rng(seed)
  samples: list[Law] = []
  for _ in range(50 * num_samples):  # Some draws have one size alone.
    if len(samples) == num_samples:
      break
    drawn = [
      points[i] for i in generator.integers(len(points), size=len(points))
    ]
    if _is_enough([(p.parameters, p.tokens) for p in drawn]):
      own = _minimise(drawn, centre, np.stack([values, *_about(values)]))
      samples.append(_law(own, centre))
  law = _law(values, centre)
  logs = [math.log(p.loss / law.loss(p.parameters, p.tokens)) for p in points]
  return Fit(
    law=law,
    samples=tuple(samples),
    error=float(np.sqrt(np.mean(np.square(logs)))),
  )


def _about(values: np.ndarray) -> np.ndarray:
  """Returns starts (S, 5) with other floors and exponents than a fit's."""
  moves = np.array(
    [[-0.5, 0.7, 0.0, 1.4, 0.0], [-0.5, 1.4, 0.0, 0.7, 0.0], [-2, 1, 0, 1, 0]]
  )
  result = np.tile(values, (len(moves), 1))
  result[:, 0] += moves[:, 0]
  result[:, [1, 3]] *= moves[:, [1, 3]]
  return result


def check(sizes: Sequence[tuple[float, float]]) -> None:
  """Raises ValueError if a law cannot be fitted to runs.

  Args:
    sizes: parameters and tokens of each run.
  """
  if len(sizes) < _MIN_POINTS:
    raise ValueError(
      f'{len(sizes)} runs are too few for a law of five numbers; it needs '
      f'{_MIN_POINTS} or more.'
    )
  if not _is_enough(sizes):
    raise ValueError(
      'All runs have one size, or one number of tokens: the law needs several '
      'of both.'
    )


def _is_enough(sizes: Sequence[tuple[float, float]]) -> bool:
  return all(len(set(each)) > 1 for each in zip(*sizes))


def _starts(points: Sequence[Point]) -> np.ndarray:
  """Returns starts (S, 5): (log E, a, log A, b, log B) about the middle run.

  The three terms have shares of the mean loss, and the exponents what has been
  seen of language models.
  """
  mean = np.mean([p.loss for p in points])
  shares = (0.02, 0.1, 0.3, 0.6)
  exponents = (0.1, 0.3, 0.6, 1.0)
  return np.array(
    [
      [
        math.log(mean * max(1 - of_n - of_d, 0.02)),
        a,
        math.log(mean * of_n),
        b,
        math.log(mean * of_d),
      ]
      for of_n, of_d in itertools.product(shares, shares)
      for a, b in itertools.product(exponents, exponents)
    ]
  )


def _minimise(
  points: Sequence[Point], centre: np.ndarray, starts: np.ndarray
) -> np.ndarray:
  """Returns (log E, a, log A, b, log B) with the least Huber loss.

  Args:
    points: runs.
    centre: (log N, log D) about which A and B are given, so that steps suit any
      size.
    starts: (S, 5), of which the most promising are gone on from.
  """
  from scipy import optimize

  n, d = (
    np.log([getattr(p, name) for p in points]) - middle
    for name, middle in zip(('parameters', 'tokens'), centre)
  )
  log_l = np.log([p.loss for p in points])

  def objective(x: np.ndarray) -> tuple[float, np.ndarray]:
    e, a, log_a, b, log_b = x
    terms = np.exp(np.stack([e + 0 * n, log_a - a * n, log_b - b * d]))
    total = terms.sum(0)
    residual = np.log(total) - log_l
    slope = np.clip(residual, -_HUBER, _HUBER)
    _, by_n, by_d = of_terms = terms / total * slope
    sums = of_terms.sum(1)
    gradient = [sums[0], -(by_n * n).sum(), sums[1], -(by_d * d).sum(), sums[2]]
    small = np.abs(residual) <= _HUBER
    value = np.where(
      small, residual**2 / 2, _HUBER * (np.abs(residual) - _HUBER / 2)
    ).sum()
    return value * _UNIT, np.array(gradient) * _UNIT

  order = np.argsort([objective(start)[0] for start in starts])
  found = [
    optimize.minimize(
      objective,
      starts[i],
      jac=True,
      method='L-BFGS-B',
      bounds=[(-8, 8), (1e-3, 3), (-20, 20), (1e-3, 3), (-20, 20)],
      options={'maxiter': 2000, 'ftol': 1e-13, 'gtol': 1e-9},
    )
    for i in order[:_NUM_STARTS]
  ]
  return min(found, key=lambda result: result.fun).x


def _law(values: np.ndarray, centre: np.ndarray) -> Law:
  e, a, log_a, b, log_b = values.tolist()
  return Law(
    floor=math.exp(e),
    a_scale=math.exp(log_a + a * centre[0]),
    a=a,
    b_scale=math.exp(log_b + b * centre[1]),
    b=b,
  )


def _interval(values: Sequence[float], share: float) -> tuple[float, float]:
  rest = (1 - share) / 2
  low, high = np.quantile(values, [rest, 1 - rest])
  return float(low), float(high)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Valley:
  """The best size at one budget: a parabola of the loss over log N.

  Hoffmann et al., 2022, their second approach.

  Attributes:
    flops: the budget.
    parameters: N at the least loss.
    loss: the least loss.
    is_inside: whether N lies between the sizes that were tried.
  """

  flops: float
  parameters: float
  loss: float
  is_inside: bool


def valley(points: Sequence[Point]) -> Valley | None:
  """Returns the best size among runs of one budget; None if there is none.

  Args:
    points: three runs or more of about the same FLOPs.
  """
  if len({p.parameters for p in points}) < 3:
    return None
  logs = np.log([p.parameters for p in points])
  curve, slope, _ = fitted = np.polyfit(logs, [p.loss for p in points], 2)
  if curve <= 0:
    return None
  at = -slope / (2 * curve)
  return Valley(
    flops=float(np.mean([p.flops for p in points])),
    parameters=math.exp(at),
    loss=float(np.polyval(fitted, at)),
    is_inside=bool(logs.min() <= at <= logs.max()),
  )

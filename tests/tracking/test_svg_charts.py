import math

from t2x.tracking import svg_charts


def test_thinning_keeps_the_extremes():
  points = [(i, math.sin(i)) for i in range(10_000)]
  points[4321] = (4321, 99.0)
  points[8765] = (8765, -99.0)
  kept = svg_charts.thin(points)
  assert len(kept) <= 600
  assert {(4321, 99.0), (8765, -99.0)} <= set(kept)
  assert kept == sorted(kept)
  assert svg_charts.thin(points[:600]) == points[:600]


def test_smoothing_averages_both_sides():
  line = [(i, 3.0 * i) for i in range(20)]
  # A straight line stays: no lag.
  assert svg_charts.smooth(line, 4) == line[:18]
  assert svg_charts.smooth(line, 12) == line
  assert svg_charts.smooth([(0, 0.0), (1, 6.0), (2, 0.0)], 1) == [
    (0, 0.0),
    (1, 2.0),
    (2, 0.0),
  ]

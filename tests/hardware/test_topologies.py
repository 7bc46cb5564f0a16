"""Names of topologies: which there are, and what is said of others."""

import math

import pytest
import tpu

from t2x.hardware import machines
from t2x.hardware import topologies


@pytest.mark.parametrize(
  ('name', 'chip', 'shape'),
  [
    ('v5e:4x4', 'v5e', (4, 4)),
    ('V6E:16x8', 'v6e', (16, 8)),
    ('v5e:1x1', 'v5e', (1, 1)),
    ('v4:2x2x1', 'v4', (2, 2, 1)),
    ('v5p:8x4x4', 'v5p', (8, 4, 4)),
    ('v5p:16x16x24', 'v5p', (16, 16, 24)),
    ('tpu7x:2x2x1', '7x', (2, 2, 1)),
    ('7x:16x24x24', '7x', (16, 24, 24)),
    ('h100:8', 'h100', (8,)),
    ('a100-80:4', 'a100', (4,)),
    ('a100-40:16', 'a100-40', (16,)),
  ],
)
def test_names(name, chip, shape):
  found = topologies.parse(name)
  assert (found.chip, found.shape) == (chip, shape)
  assert found.is_gpu == (len(shape) == 1)
  assert topologies.parse(str(found)) == found


@pytest.mark.parametrize(
  ('name', 'expected'),
  [
    ('v5e:2x2', (256, 'v5e:16x16')),
    ('v5p:2x2x1', (8960, 'v5p:16x20x28')),
    ('h100:4', (8, 'h100:8')),
  ],
)
def test_the_largest_of_a_kind(name, expected):
  assert topologies.largest(name) == expected
  topologies.parse(expected[1])


def test_every_chip_has_topologies():
  kinds = {*topologies.TPUS, *topologies.gpu_targets.TARGETS}
  assert kinds == set(machines.CHIPS)


@pytest.mark.parametrize('chip', topologies.TPUS)
def test_listed_slices_are_known_to_the_compiler(chip):
  slices = topologies.TPUS[chip]
  shapes = [*slices.shapes, (4, 8, 8) if slices.cubes else (16, 8)]
  for shape in shapes:
    name = f'{chip}:{"x".join(map(str, shape))}'
    per_chip = 2 if chip == '7x' else 1
    found = tpu.devices(name)
    assert len(found) == per_chip * math.prod(shape)
    assert machines.chip_of(found[0].device_kind) == chip


@pytest.mark.parametrize(
  ('name', 'message'),
  [
    ('v7e:2x2', r"no kind 'v7e'\. Did you mean v6e or v5e\? A topology is a "),
    ('gh200:8', r"no kind 'gh200'\. Did you mean h200 or h100\?"),
    ('', r"'': there is no kind ''\. A topology .* kinds are v4, v5e, v5p,"),
    ('v5e', r"'v5e' needs the shape of a slice in chips: v5e:1x1, v5e:2x2"),
    ('v5e:16', r'a slice has 2 sides in chips, and this has 1\. Near are '
     r'v5e:4x4, '),
    ('v5e:4x4x4', r'has 2 sides .* this has 3\. Near are v5e:8x8, v5e:4x8\.'),
    ('v5p:4x8', r'has 3 sides .* this has 2\. Near are v5p:2x4x4, v5p:2x2x4'),
    ('v5e:6x6', r'there is no such slice\. Near are v5e:4x8, v5e:8x8\.'),
    ('v5p:4x4x6', r'Near are v5p:4x4x8, .* and sides of multiples of 4, up '
     r'to 8,960 chips\.'),
    ('v4:0x4x4', r'there is no such slice\. Near are v4:2x2x1'),
    ('v5e:32x16', r'the largest slice has 256 chips, this 512\. Near are '
     r'v5e:16x16'),
    ('v5p:24x24x24', r'has 8,960 chips, this 13,824\. Near are v5p:16x20x28'),
    ('h100', r"'h100' needs the number of GPUs in a node: h100:1, .* h100:8"),
    ('h100:x', r"'h100:x' needs the number of GPUs in a node"),
    ('h100:3', r'there is no such node\. There are .* h100:8\.$'),
    ('h100:0', r'there is no such node\. There are .* h100:8\.$'),
    ('h100:8x4', r'There are .*\. 4 nodes are h100:8 with num_slices=4\.'),
  ],
)  # fmt: skip
def test_names_of_nothing(name, message):
  with pytest.raises(ValueError, match=message):
    topologies.parse(name)

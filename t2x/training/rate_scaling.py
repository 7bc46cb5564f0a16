"""Learning rates of single parameters, by the width and depth of a model.

See `t2x.layers.mup` for the rule and its sources.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

from flax import nnx
import jax
import optax

from t2x.parallel import sharding

_MATRIX_OUT = {'heads', 'kv_heads', 'mlp'}


@dataclasses.dataclass(frozen=True, kw_only=True)
class WidthPowers:
  """Powers of the width, one for each class of parameters.

  Attributes:
    matrix: power for matrices whose inputs grow with the width.
    orthogonal: power for those of them that Muon orthogonalises; None for that
      of `matrix`.
  """

  matrix: float
  orthogonal: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class RateScaling:
  """Factors of learning rates.

  Attributes:
    width: width of the model as a multiple of the base.
    depth: factor of the rates of all parameters of layers, by tower.
  """

  width: float
  depth: dict[str, float] = dataclasses.field(default_factory=dict)

  def by_width(
    self,
    rule: WidthPowers,
    updates: optax.Updates,
    params: optax.Params | None = None,
  ) -> optax.Updates:
    """Multiplies updates by powers of the width; weight decay comes after.

    Args:
      rule: the powers.
      updates: updates of all parameters.
      params: not looked at.
    """
    del params

    def factor(path: jax.tree_util.KeyPath, u: nnx.Variable) -> float:
      del path
      power = 0.0  # Of embeddings, norms and biases.
      if is_matrix(u):
        power = rule.matrix
        if rule.orthogonal is not None and is_orthogonalised(u):
          power = rule.orthogonal
      return self.width**power

    return _scaled(updates, factor)

  def by_depth(
    self, updates: optax.Updates, params: optax.Params | None = None
  ) -> optax.Updates:
    """Multiplies updates of the parameters of layers by a power of the depth.

    Args:
      updates: updates of all parameters.
      params: not looked at.
    """
    del params

    def factor(path: jax.tree_util.KeyPath, u: nnx.Variable) -> float:
      del u
      tower, _, rest = sharding.path_name(path).partition('.')
      return self.depth.get(tower, 1.0) if rest.startswith('layers.') else 1.0

    return _scaled(updates, factor)


def is_matrix(p: nnx.Variable) -> bool:
  """Whether a parameter is a matrix whose inputs grow with the width.

  Tables of tokens, positions and types are none: each token has one input.
  """
  if p.get_metadata().get('weight'):
    return True
  axes = p.get_metadata('axes')
  return len(axes) > 1 and axes[0] == 'embed'


def is_orthogonalised(p: nnx.Variable) -> bool:
  """Whether Muon orthogonalises the updates of a parameter."""
  axes = p.get_metadata('axes')
  return 'embed' in axes and bool(_MATRIX_OUT & set(axes))


def _scaled(
  updates: optax.Updates,
  factor: Callable[[jax.tree_util.KeyPath, nnx.Variable], float],
) -> optax.Updates:
  def leaf(path: jax.tree_util.KeyPath, u: object) -> Any:
    if not isinstance(u, nnx.Variable):
      return u
    own = factor(path, u)
    return u if own == 1.0 else jax.tree.map(lambda a: a * own, u)

  return jax.tree_util.tree_map_with_path(
    leaf, updates, is_leaf=sharding.is_variable
  )

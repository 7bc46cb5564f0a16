"""Functions whose compiled programs are looked at before the first run."""

from collections.abc import Callable
from typing import Any

import jax


class Checked:
  """A jitted function that compiles, is checked, and only then runs.

  Args:
    fn: what `jax.jit` returned. Its programs are made under the mesh and the
      rules that are active at the first call with given arguments' shapes.
    check: raises for the text of a program that must not run.
  """

  def __init__(self, fn: Any, check: Callable[[str], None]):
    self._fn = fn
    self._check = check
    self._compiled: dict[Any, jax.stages.Compiled] = {}

  def __call__(self, *args):
    leaves, treedef = jax.tree.flatten(args)
    key = treedef, tuple((x.shape, x.dtype, x.sharding) for x in leaves)
    if key not in self._compiled:
      compiled = self.lower(*args).compile()
      text = compiled.as_text()
      assert text is not None
      self._check(text)
      self._compiled[key] = compiled
    return self._compiled[key](*args)

  def lower(self, *args) -> jax.stages.Lowered:
    """Returns the function lowered for arrays or sharded shapes."""
    return self._fn.lower(*args)

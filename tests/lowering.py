"""Makes JAX lower programs faster, to the same numbers.

Both functions replace functions inside JAX, for tests alone, and do nothing
where another version of JAX has no such function.
"""

import threading
from typing import Any

import jax
from jax._src.interpreters import mlir
from jax.sharding import AxisType

_PROGRAMS = 200  # To a context, which keeps the types that it has seen.


def share_contexts() -> None:
  """Lets the programs of a thread share an MLIR context.

  JAX makes a new one for every program and loads its dialects into it: 5 ms, a
  fifth of what a single operation takes from Python to machine code. Tests run
  tens of thousands of them.
  """
  if not hasattr(mlir, 'ModuleContext') or not hasattr(mlir, 'make_ir_context'):
    return
  real_init = mlir.ModuleContext.__init__
  of_thread = threading.local()

  def init(self: Any, *args: Any, **kwargs: Any) -> None:
    if kwargs.get('context') is None:
      number = getattr(of_thread, 'number', 0)
      if number % _PROGRAMS == 0:
        of_thread.context = mlir.make_ir_context()
      of_thread.number = number + 1
      kwargs['context'] = of_thread.context
    real_init(self, *args, **kwargs)

  mlir.ModuleContext.__init__ = init


def leave_out_open_shardings() -> None:
  """Leaves out annotations of sharding that say nothing, as tests compile.

  Where some axes of a mesh are manual and none is explicit, JAX annotates the
  result of each operation with a sharding that is open in each dimension: in a
  pipeline 4,758 of 16,132 instructions, and a third of the time to compile it.
  JAX has a TODO for this in `lower_with_sharding_in_types`. Programs that are
  compiled as users do keep them: where LLVM's optimizations are on.
  """
  real = getattr(mlir, 'lower_with_sharding_in_types', None)
  if real is None:
    return

  def lower(ctx: Any, op: Any, aval: Any) -> Any:
    says_nothing = AxisType.Explicit not in aval.sharding.mesh.axis_types
    if says_nothing and jax.config.read('jax_disable_most_optimizations'):
      return op
    return real(ctx, op, aval)

  mlir.lower_with_sharding_in_types = lower

"""Makes JAX lower many programs in one MLIR context, each thread in its own.

JAX makes a new context for every program and loads its dialects into it: 5 ms,
a fifth of what a single operation takes from Python to machine code. Tests run
tens of thousands of them.
"""

import threading
from typing import Any

from jax._src.interpreters import mlir

_PROGRAMS = 200  # To a context, which keeps the types that it has seen.


def share_contexts() -> None:
  """Lets the programs of a thread share a context, if JAX makes them here."""
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

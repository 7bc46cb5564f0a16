"""A stack of layers: a repeating group of stacked layers, and a remainder.

The parameters of layer i are at index i // group size of a member of the group,
whether the layers run as a scan or unrolled, so that checkpoints have one form.
"""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import functools
from typing import Any
from typing import TypeVar

from flax import nnx
import jax
from jax import ad_checkpoint
import jax.numpy as jnp

from t2x.layers import param
from t2x.layers import routing

Tree = TypeVar('Tree')

# Applies one layer: (layer, x, cache or None, number) -> (x, output).
Apply = Callable[[Any, jax.Array, Any, jax.Array], tuple[jax.Array, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Execution:
  """How a stack runs, without a change of its results.

  Attributes:
    scan: whether the repeats run as one `lax.scan`, which compiles once; else
      they are unrolled.
    remat: activations that the backward pass recomputes: `none`; `full`, all
      but each layer's input; `dots`, all but products with weights; `save:A,B`,
      all but the activations of these names (query, key, value, attention,
      mlp_up, mlp_gate); `offload:A,B`, the same, but kept in the memory of the
      devices' hosts, also each layer's input (layer_input);
      `save:A;offload:B`, both.
    zigzag: number of devices over which the tokens of a causal row are in
      zigzag order (t2x/parallel/zigzag.py), in inputs, positions, segments and
      features alike.
  """

  scan: bool = True
  remat: str = 'none'
  zigzag: int = 1

  def __post_init__(self) -> None:
    if self.remat in ('none', 'full', 'dots'):
      return
    kept = self.saved
    names = [name for group in kept.values() for name in group]
    once = len({*names}) == len(names)
    known = {*names} <= {*SAVED_NAMES, INPUT} and INPUT not in kept['save']
    kinds = [part.partition(':')[0] for part in self.remat.split(';')]
    if not (once and known and kinds in _KINDS):
      raise ValueError(
        f'remat={self.remat!r}; it is none, full, dots, save:NAME,NAME, '
        'offload:NAME,NAME, or both (save:NAME;offload:NAME), each name once, '
        f'with names among {", ".join(SAVED_NAMES)}; offload also takes '
        f'{INPUT}.'
      )

  @property
  def saved(self) -> dict[str, tuple[str, ...]]:
    """Names of the activations that `save` and `offload` keep."""
    parts = [part.partition(':') for part in self.remat.split(';')]
    given = {kind: tuple(names.split(',')) for kind, _, names in parts}
    return {kind: given.get(kind, ()) for kind in ('save', 'offload')}


SAVED_NAMES = ('query', 'key', 'value', 'attention', 'mlp_up', 'mlp_gate')
INPUT = 'layer_input'  # Name of a layer's input, for `remat`.
_KINDS = (['save'], ['offload'], ['save', 'offload'], ['offload', 'save'])


class Stack(nnx.Module):
  """`num_layers` layers, made in turn by the members of a group.

  Args:
    makers: constructors, one for each member of the group.
    num_layers: number of layers; those past a multiple of the group's size are
      the remainder.
    rngs: random keys; layer i draws from the i-th of `num_layers` keys.
  """

  def __init__(
    self,
    makers: Sequence[Callable[[nnx.Rngs], nnx.Module]],
    num_layers: int,
    *,
    rngs: nnx.Rngs,
  ):
    size = len(makers)
    repeats = num_layers // size
    keys = jax.random.split(rngs.params(), num_layers)
    self.num_layers = num_layers
    self.group = nnx.List(
      [
        jax.vmap(lambda key, make=make: make(nnx.Rngs(key)))(
          keys[i : repeats * size : size]
        )
        for i, make in enumerate(makers)
        if repeats
      ]
    )
    self.remainder = nnx.List(
      [
        makers[i % size](nnx.Rngs(keys[i]))
        for i in range(repeats * size, num_layers)
      ]
    )

  def __call__(
    self,
    apply: Apply,
    x: jax.Array,
    *,
    caches: Any = None,
    execution: Execution = Execution(),
  ) -> tuple[jax.Array, Any]:
    """Applies the layers in order.

    Args:
      apply: function that runs one layer; its last argument is the layer's
        number.
      x: activations.
      caches: caches of the layers, in the structure of `map_layers`, or None.
      execution: scan or unroll, and what to recompute.

    Returns:
      The activations, and the second output of `apply` for each layer (such as
      its new cache), in the structure of `map_layers`.
    """
    apply = _rematerialized(apply, execution)
    group_caches, rest_caches = caches if caches is not None else (None, None)
    size = len(self.group)
    repeats = (self.num_layers - len(self.remainder)) // max(size, 1)
    group = tuple(self.group)
    numbers = jnp.arange(repeats * size).reshape(repeats, size)

    def repeat(
      x: jax.Array, part: tuple[Any, ...]
    ) -> tuple[jax.Array, tuple[Any, ...]]:
      layers, cache, number = part
      outputs = []
      for i, layer in enumerate(layers):
        x, out = apply(layer, x, cache and cache[i], number[i])
        outputs.append(out)
      return x, tuple(outputs)

    parts = (group, group_caches, numbers)
    if not size:
      group_outputs = ()
    elif execution.scan:
      x, group_outputs = jax.lax.scan(repeat, x, parts)
    else:
      outputs = []
      for part in unstack(parts, repeats):
        x, out = repeat(x, part)
        outputs.append(out)
      group_outputs = jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)
    rest_outputs = []
    for i, layer in enumerate(self.remainder):
      number = jnp.asarray(repeats * size + i)
      x, out = apply(layer, x, rest_caches and rest_caches[i], number)
      rest_outputs.append(out)
    return x, (group_outputs, tuple(rest_outputs))

  def apart(self) -> 'Stack':
    """Returns a stack of the same layers, unstacked, all in the remainder."""
    leaves, treedef = jax.tree.flatten(self)
    result = treedef.unflatten(leaves)
    size = len(self.group)
    repeats = (self.num_layers - len(self.remainder)) // max(size, 1)
    members = [unstack(member, repeats) for member in self.group]
    layers = [layer for repeat in zip(*members) for layer in repeat]
    result.group = nnx.List([])
    result.remainder = nnx.List([*layers, *self.remainder])
    return result

  def map_layers(self, fn: Callable[[Any], Any]) -> Any:
    """Returns fn(layer) of every layer: stacked ones, then the remainder."""
    group = tuple(jax.vmap(fn)(member) for member in self.group)
    return group, tuple(fn(layer) for layer in self.remainder)


def unstack(tree: Tree, num: int) -> list[Tree]:
  """Splits the first dimension of every leaf into a list of trees.

  The gradient of each leaf is one stack; the gradients of plain slices would
  each be as large as the whole leaf.

  Args:
    tree: tree of arrays.
    num: size of their first dimension.
  """
  leaves, treedef = jax.tree.flatten(tree)
  split: list[Any] = [_split(leaf, num) for leaf in leaves]
  return [treedef.unflatten([s[i] for s in split]) for i in range(num)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _split(x: jax.Array, num: int) -> tuple[jax.Array, ...]:
  return tuple(x[i] for i in range(num))


def _split_forward(
  x: jax.Array, num: int
) -> tuple[tuple[jax.Array, ...], None]:
  return _split(x, num), None


def _split_backward(
  num: int, _: None, grads: tuple[jax.Array, ...]
) -> tuple[jax.Array | None]:
  del num
  if grads[0].dtype == jax.dtypes.float0:
    return (None,)
  return (jnp.stack(grads),)


_split.defvjp(_split_forward, _split_backward)


def _rematerialized(apply: Apply, execution: Execution) -> Apply:
  remat = execution.remat
  if remat == 'none':
    return apply
  policies = jax.checkpoint_policies
  if remat == 'full':
    policy = policies.save_only_these_names(routing.CHOICE)
  elif remat == 'dots':
    policy = policies.save_only_these_names(param.PRODUCT, routing.CHOICE)
  elif not execution.saved['offload']:
    names = execution.saved['save']
    policy = policies.save_only_these_names(*names, routing.CHOICE)
  else:
    policy = policies.save_and_offload_only_these_names(
      names_which_can_be_saved=[*execution.saved['save'], routing.CHOICE],
      names_which_can_be_offloaded=[*execution.saved['offload']],
      offload_src='device',
      offload_dst='pinned_host',
    )
  if INPUT in execution.saved['offload']:
    inner = apply
    apply = lambda layer, x, cache, number: inner(
      layer, ad_checkpoint.checkpoint_name(x, INPUT), cache, number
    )
  return jax.checkpoint(apply, policy=policy)

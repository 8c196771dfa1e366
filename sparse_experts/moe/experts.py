"""The experts of a layer: one module, and a parameter tree for each of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
from flax import linen as nn

from sparse_experts import sharding
from sparse_experts.layers.linear import use_product
from sparse_experts.letters import Array


@flax.struct.dataclass
class Experts:
  """E experts, a function of their parameters.

  A value and not a module, so that a dispatcher may run all of them or, inside
  `jax.shard_map`, those that live on its device.

  Attributes:
    params: parameters of one expert, with a leading axis E on every leaf.
    key: of dropout, if any.
    module: the expert, unbound: x_...xD -> y_...xD.
    deterministic: no dropout.
  """

  params: Any
  key: Array | None
  module: nn.Module = flax.struct.field(pytree_node=False)
  deterministic: bool = flax.struct.field(pytree_node=False, default=True)

  @property
  def stacked(self) -> int:
    """E, or how many of them there are on this device."""
    return jax.tree.leaves(self.params)[0].shape[0]

  def __call__(self, x_ExGxCxD: Array) -> Array:
    """Expert e on its slots of every group, [E, G, C, D]."""
    E = x_ExGxCxD.shape[0]
    keys_E = None if self.key is None else jax.random.split(self.key, E)
    axes = sharding.current().axes('expert')
    return jax.vmap(self.apply, spmd_axis_name=axes or None)(
      self.params, keys_E, x_ExGxCxD
    )

  def grouped(
    self,
    x_TxD: Array,
    group_sizes_E: Array,
    product: Callable[[Array, Array, Array], Array],
  ) -> Array:
    """Each expert on its own rows, [T, D], by one product for all of them.

    The module runs once, with the stacked parameters, so it must be made of
    `Linear` and of functions without parameters of single rows. Dropout masks
    are drawn once too, and not for each expert.

    Args:
      x_TxD: rows, those of expert 0 first, then those of expert 1, ...
      group_sizes_E: int32, how many rows each expert has.
      product: `grouped_matmul` or a like of it.

    Raises:
      ValueError: the expert has a parameter that is not the kernel of a Linear.
    """

    def by_group(x_TxD, w_ExDxF):
      return product(x_TxD, w_ExDxF, group_sizes_E)

    try:
      with use_product(by_group):
        return self.apply(self.params, self.key, x_TxD)
    except flax.errors.ScopeParamShapeError as error:
      raise ValueError(
        f'this expert cannot be grouped: {type(self.module).__name__} has a '
        f'parameter that is not the kernel of a Linear ({error.args[0]}); use '
        'dispatch=gather.'
      ) from error

  def apply(self, params: Any, key: Array | None, x_xD: Array) -> Array:
    """One expert on any tokens."""
    return self.module.apply(
      {'params': params},
      x_xD,
      deterministic=self.deterministic,
      rngs=None if key is None else {'dropout': key},
    )


def init(
  module: nn.Module, num_experts: int, width: int
) -> Callable[[Array], Any]:
  """Initialiser of stacked parameters, boxed with an axis name `expert`.

  Each expert is initialised by itself with a key of its own, so its fan-in
  never counts E.
  """

  def stacked(key):
    x_1xD = jnp.zeros((1, width))
    boxed = jax.vmap(lambda key: module.init(key, x_1xD)['params'])(
      jax.random.split(key, num_experts)
    )
    return nn.meta.add_axis(boxed, 0, {nn.PARTITION_NAME: 'expert'})

  return stacked

"""The experts of a layer: one module, and a parameter tree for each of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
from flax import linen as nn

from sparse_experts.arrays import Array


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

  def __call__(self, x_ExGxCxD: Array) -> Array:
    """Expert e on its slots of every group, [E, G, C, D]."""
    E = x_ExGxCxD.shape[0]
    keys_E = None if self.key is None else jax.random.split(self.key, E)
    return jax.vmap(self.apply, spmd_axis_name='expert')(
      self.params, keys_E, x_ExGxCxD
    )

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

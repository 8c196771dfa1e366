"""The experts of a layer: one module, and a parameter tree for each of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import errors, struct
from flax import linen as nn

from sparse_experts import sharding
from sparse_experts.layers import parameters
from sparse_experts.letters import Array

# What runs an expert that cannot be grouped.
UNGROUPED = (
  'dispatch=gather and exact_dispatch=all_experts (in gin '
  'layer.MoE.dispatch = @gather.gather and '
  'layer.MoE.exact_dispatch = @all_experts.all_experts)'
)


@struct.dataclass
class Experts:
  """E experts, a function of their parameters.

  A value and not a module, so that a dispatcher may run all of them or, inside
  `jax.shard_map`, those that live on its device. Dropout is drawn for each
  expert and each row.

  Attributes:
    params: parameters of one expert, with a leading axis E on every leaf.
    key: of dropout, if any.
    module: the expert, unbound: x_...xD -> y_...xD.
    deterministic: no dropout.
  """

  params: Any
  key: Array | None
  module: nn.Module = struct.field(pytree_node=False)
  deterministic: bool = struct.field(pytree_node=False, default=True)

  @property
  def stacked(self) -> int:
    """E, or how many of them there are on this device."""
    return jax.tree.leaves(self.params)[0].shape[0]

  @jax.named_scope('experts')
  def __call__(self, x_ExGxCxD: Array) -> Array:
    """Expert e on its slots of every group, [E, G, C, D]."""
    E = x_ExGxCxD.shape[0]
    keys_E = None if self.key is None else jax.random.split(self.key, E)
    axes = sharding.current().axes('expert')
    return jax.vmap(self.apply, spmd_axis_name=axes or None)(
      self.params, keys_E, x_ExGxCxD
    )

  @jax.named_scope('experts')
  def grouped(
    self,
    x_RxD: Array,
    group_sizes_E: Array,
    product: Callable[[Array, Array, Array], Array],
  ) -> Array:
    """Each expert on its own rows, [T, D], by one product for all of them.

    The module runs once, with the stacked parameters, which meet rows by
    `layers.parameters`: it must declare them by that or by layers that do, as
    all of ours.

    Args:
      x_RxD: rows, those of expert 0 first, then those of expert 1, ...
      group_sizes_E: int32, how many rows each expert has.
      product: `grouped_matmul` or a like of it.

    Raises:
      ValueError: the expert declares a parameter by itself.
    """
    rows = parameters.Grouped(x_RxD.shape[0], group_sizes_E, product)
    try:
      return self._apply(self.params, self.key, x_RxD, rows)
    except errors.ScopeParamShapeError as error:
      raise ValueError(
        f'this expert cannot be grouped: {type(self.module).__name__} declares '
        f'{_which(error)} by itself, and not by layers.parameters; declare it '
        f'so, or set {UNGROUPED}.'
      ) from error

  def apply(self, params: Any, key: Array | None, x_xD: Array) -> Array:
    """One expert on any tokens.

    Args:
      params: of this expert, without an axis of experts.
      key: of its draws; None where nothing is drawn.
      x_xD: tokens, [..., D].
    """
    return self._apply(params, key, x_xD, parameters.Shared(mask_dims=()))

  def fold_in(self, number: Array | int) -> Experts:
    """The same experts with other draws, if they draw."""
    if self.key is None:
      return self
    return dataclasses.replace(self, key=jax.random.fold_in(self.key, number))

  def _apply(self, params, key, x_xD, rows) -> Array:
    with parameters.use(rows):
      return self.module.apply(
        {'params': params},
        x_xD,
        deterministic=self.deterministic,
        rngs=None if key is None else {'dropout': key},
      )


def _which(error: errors.ScopeParamShapeError) -> str:
  """Flax's words for the parameter: 'parameter "bias" in "/"'."""
  return str(error).partition(',')[0].removeprefix('For ')


def init(
  module: nn.Module, num_experts: int, width: int
) -> Callable[[Array], Any]:
  """Initialiser of stacked parameters, boxed with an axis name `expert`.

  Each expert is initialised by itself with a key of its own, so its fan-in
  never counts E.

  Args:
    module: an expert, `x_...xD -> y_...xD`.
    num_experts: E.
    width: D.

  Returns:
    key -> parameters, each array with E before its own axes.
  """

  def stacked(key):
    x_1xD = jnp.zeros((1, width))
    boxed = jax.vmap(lambda key: module.init(key, x_1xD)['params'])(
      jax.random.split(key, num_experts)
    )
    return nn.meta.add_axis(boxed, 0, {nn.PARTITION_NAME: 'expert'})

  return stacked

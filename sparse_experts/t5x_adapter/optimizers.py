"""Optimizers for T5X that know our axes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax
import jax
import optax
from flax import linen as nn
from flax import traverse_util
from jax.sharding import PartitionSpec
from t5x import adafactor, optimizers

from sparse_experts.training.optimizers import ROLES

_FACTOR = {'row': 'row', 'column': 'column', 'batch': 'batch', 'whole': 'none'}


class Optax(optimizers.OptaxWrapper):
  """One of `training.optimizers`, or any function (names) -> optax optimizer.

  The axes of its state are read from its own `init` of parameters boxed with
  their names, so no kind of state has to be registered with T5X.

  Args:
    make_optimizer: its learning rate is a schedule of its own; the one T5X's
      `Trainer` is given is only written to TensorBoard.
  """

  def __init__(
    self, make_optimizer: Callable[..., optax.GradientTransformation]
  ):
    self._make_optimizer = make_optimizer
    super().__init__(optax_optimizer=None)

  def set_param_axes(self, param_logical_axes: Any) -> None:
    """Builds the optimizer; T5X calls this before it makes a state."""
    self.optax_optimizer = self._make_optimizer(_names(param_logical_axes))

  def init_state(self, params):
    return super().init_state(flax.core.unfreeze(params))

  def apply_gradient(self, hyper_params, params, state, grads):
    """A step of the optimizer.

    Args:
      hyper_params: T5X's, of which the optimizer reads none.
      params: trees of arrays. grads: alike.
      state: the optimizer's, from `init_state` or the step before.

    Returns:
      Parameters, frozen, and state after the step.
    """
    new_params, new_state = super().apply_gradient(
      hyper_params, flax.core.unfreeze(params), state, flax.core.unfreeze(grads)
    )
    return flax.core.freeze(new_params), new_state

  def derive_logical_axes(self, optimizer, param_logical_axes):
    """Names of axes in the place of the arrays of parameters and state."""
    names = _names(param_logical_axes)
    boxed = jax.tree.map(
      lambda leaf_names, leaf: nn.LogicallyPartitioned(
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), leaf_names
      ),
      names,
      flax.core.unfreeze(optimizer.target),
      is_leaf=_is_names,
    )
    state = jax.eval_shape(self.optax_optimizer.init, boxed)
    axes = jax.tree.map(
      lambda leaf: PartitionSpec(*leaf.names) if _is_boxed(leaf) else None,
      state,
      is_leaf=_is_boxed,
    )
    made = jax.tree.map(lambda _: None, optimizer.state_dict())
    made['target'] = flax.core.unfreeze(param_logical_axes)
    made['state']['param_states'] = flax.serialization.to_state_dict(axes)
    return optimizer.restore_state(made)


class Adafactor(adafactor.Adafactor):
  """T5X's Adafactor with our names' factor rules, its state sharded as ours.

  `logical_factor_rules` default to `training.optimizers.ROLES`; `expert` and
  `layers` are batch dimensions. T5X leaves factored moments on every device;
  here those of stacked parameters are laid out as the parameters are.
  """

  def __init__(self, logical_factor_rules=None, **kwargs):
    if logical_factor_rules is None:
      logical_factor_rules = {
        name: adafactor.factor_name_to_factordim(_FACTOR[role])
        for name, role in ROLES.items()
      }
    super().__init__(logical_factor_rules=logical_factor_rules, **kwargs)

  def derive_logical_axes(self, optimizer, param_logical_axes):
    derived = super().derive_logical_axes(optimizer, param_logical_axes)
    states = _flat(optimizer.state_dict()['state']['param_states'])
    axes = derived.state_dict()
    flat = _flat(axes['state']['param_states'])
    for path, names in _flat(_names(param_logical_axes)).items():
      roles = [ROLES.get(name) for name in names]
      if 'batch' not in roles:
        continue
      for moment, averaged in (('v_row', 'column'), ('v_col', 'row')):
        kept = [n for n, role in zip(names, roles) if role != averaged]
        if states[f'{path}/{moment}'].ndim == len(kept):
          flat[f'{path}/{moment}'] = PartitionSpec(*kept)
    axes['state']['param_states'] = traverse_util.unflatten_dict(flat, sep='/')
    return derived.restore_state(axes)


def _names(param_logical_axes: Any) -> Any:
  """Tuples of names from T5X's PartitionSpecs."""
  return jax.tree.map(
    tuple,
    flax.core.unfreeze(param_logical_axes),
    is_leaf=lambda x: isinstance(x, PartitionSpec),
  )


def _is_names(leaf: Any) -> bool:
  return isinstance(leaf, tuple)


def _is_boxed(leaf: Any) -> bool:
  return isinstance(leaf, nn.LogicallyPartitioned)


def _flat(tree: Any) -> dict[str, Any]:
  return traverse_util.flatten_dict(flax.core.unfreeze(tree), sep='/')

"""Optimizers that know stacked axes.

Each is a function of `names`, a tree like the parameters whose leaves are
tuples of logical axis names (`sharding.names_of`). `expert` and `layers` stack
parameters that have nothing to do with each other: Adafactor treats each slice
on its own, so scanned layers and vmapped experts train as if listed one by one.

`init` of boxed parameters gives boxed state, for `nn.get_partition_spec`;
`update` takes plain arrays. All arithmetic and all state is float32.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from sparse_experts.moe.routers.deepseek import BIAS
from sparse_experts.numbers import NotNegative, Positive, Rate
from sparse_experts.training import schedules

# What a dimension is to Adafactor. A parameter with a 'whole' dimension keeps a
# second moment for each of its elements.
ROLES: Mapping[str, str] = {
  'embed': 'row',
  'mlp': 'column',
  'heads': 'column',
  'kv': 'column',
  'vocab': 'column',
  'expert': 'batch',
  'layers': 'batch',
  'router': 'whole',
  'router_width': 'whole',
  'slots': 'whole',
  'relpos_buckets': 'whole',
  'patch': 'column',
  'position': 'whole',
}

_TINY = float(jnp.finfo(jnp.float32).tiny)  # Least "positive" number.


def adam(
  names: Any,
  *,
  learning_rate: float | optax.Schedule,
  b1: Rate = 0.9,
  b2: Rate = 0.999,
  eps: float = 1e-8,
  weight_decay: NotNegative = 0.0,
  max_grad_norm: Positive | None = None,
) -> optax.GradientTransformation:
  """Adam (Kingma & Ba 2015), or AdamW where `weight_decay` is not 0.

  Adam works element by element: `names` only say what decays. `weight_decay`
  is multiplied by the learning rate (Loshchilov & Hutter 2019). Gradients of a
  global norm above `max_grad_norm` are scaled down to it. Raises ValueError for
  arguments out of range.

  Args:
    names: tree of the parameters' axis names.
    learning_rate: a number, or a function of the step.
    b1, b2: decay of the two moments, a step.
    eps: added to the root of the second.
    weight_decay: a step, times the learning rate.
    max_grad_norm: global; None: no limit.

  Example:
    >>> tx = adam({'scale': ('embed',)}, learning_rate=0.1)
    >>> state = tx.init({'scale': jnp.ones(4)})
  """
  _check(0, 1, b1=b1, b2=b2)
  _check(0, math.inf, weight_decay=weight_decay)
  _check(_TINY, math.inf, eps=eps)
  rate = schedules.as_schedule(learning_rate)
  if weight_decay:
    mask = _decays(names)
    tx = optax.adamw(rate, b1, b2, eps, weight_decay=weight_decay, mask=mask)
  else:
    tx = optax.adam(rate, b1, b2, eps)
  return _in_float32(max_grad_norm, tx)


def adafactor(
  names: Any,
  *,
  learning_rate: float | optax.Schedule,
  decay_rate: float = 0.8,
  beta1: float | None = None,
  clipping_threshold: float | None = 1.0,
  multiply_by_parameter_scale: bool = True,
  weight_decay_rate: float = 0.0,
  epsilon1: float = 1e-30,
  epsilon2: float = 1e-3,
  max_grad_norm: Positive | None = None,
  roles: Mapping[str, str] = ROLES,
) -> optax.GradientTransformation:
  """Adafactor with T5X's defaults, on each slice of a stack by itself.

  A parameter of row, column and batch dimensions keeps two means of g^2; one
  without a row, without a column, or with a 'whole' dimension keeps all of it
  (v). Size decides nothing. With beta2 = 1 - (step + 1)^-decay_rate:

      v_row  = beta2 v_row + (1 - beta2) mean_columns(g^2 + epsilon1)
      v_col  = beta2 v_col + (1 - beta2) mean_rows(g^2 + epsilon1)
      u      = g / sqrt(v_row v_col / mean_rows(v_row))    or g / sqrt(v)
      u      = u / max(1, rms(u) / clipping_threshold)
      update = -learning_rate max(epsilon2, rms(parameter)) u

  Several columns (heads, kv) count as one merged; rms is over all dimensions
  but the batch ones.

  Args:
    beta1: decay of a moving average of the updates; None for none.
    weight_decay_rate: share of a parameter taken off per step, not multiplied
      by the learning rate (as in T5X and optax.adafactor).
    max_grad_norm: gradients of a larger global norm are scaled down to it.
    roles: row, column, batch or whole for every name that occurs; extend it
      with `{**ROLES, 'name': 'column'}`.

  Raises:
    ValueError: an argument is out of range, a name has no role, or (from
      `init`) names and parameters do not match.

  Example:
    >>> tx = adafactor({'wi': ('expert', 'embed', 'mlp')}, learning_rate=0.1)
    >>> state = tx.init({'wi': jnp.ones((8, 4, 16))})
    >>> jax.tree.map(jnp.shape, state[0].moments)
    {'wi': {'v_col': (8, 16), 'v_row': (8, 4)}}

  References:
    Shazeer & Stern 2018, https://arxiv.org/abs/1804.04235, algorithms 4 and 5,
    section 7.2; constants and order as in t5x/adafactor.py.
  """
  _check(0, 1, beta1=beta1, weight_decay_rate=weight_decay_rate)
  _check(_TINY, math.inf, epsilon1=epsilon1, epsilon2=epsilon2)
  _check(_TINY, math.inf, clipping_threshold=clipping_threshold)
  _check(_TINY, math.inf, decay_rate=decay_rate)
  dims = _dims(names, roles)

  def direction(dims, grad, moments, param):
    u = _normalised(dims, grad, moments)
    if clipping_threshold is not None:
      u /= jnp.maximum(1, _slice_rms(dims, u) / clipping_threshold)
    if multiply_by_parameter_scale:
      u *= jnp.maximum(epsilon2, _slice_rms(dims, param))
    return u

  def init(params):
    _check_names(dims, params)
    return SecondMoments(
      jnp.zeros([], jnp.int32), jax.tree.map(_zero_moments, dims, params)
    )

  def update(grads, state, params):
    step = optax.safe_increment(state.step)
    beta2 = 1 - jnp.float32(step) ** -decay_rate

    def moments(dims, grad, old):
      square = grad**2 + epsilon1
      return {
        key: beta2 * old[key] + (1 - beta2) * square.mean(axis)
        for key, axis in dims.averaged.items()
      }

    new = jax.tree.map(moments, dims, grads, state.moments)
    updates = jax.tree.map(direction, dims, grads, new, params)
    return updates, SecondMoments(step, new)

  transforms = [
    optax.GradientTransformation(init, update),
    optax.scale_by_learning_rate(schedules.as_schedule(learning_rate)),
  ]
  if beta1 is not None:
    transforms.append(optax.ema(beta1, debias=False))
  if weight_decay_rate:
    mask = _decays(names, roles)
    transforms.append(optax.add_decayed_weights(-weight_decay_rate, mask))
  return _in_float32(max_grad_norm, *transforms)


class SecondMoments(NamedTuple):
  """`moments` has {v_row, v_col} or {v} in the place of each parameter."""

  step: jax.Array
  moments: Any


@dataclasses.dataclass(frozen=True)
class _Dims:
  """A parameter's dimensions by role; in a tree, a leaf."""

  names: tuple[str, ...]
  slice: tuple[int, ...]  # All but batch.
  averaged: Mapping[str, tuple[int, ...]]  # Over what each moment is a mean.


def _dims(names: Any, roles: Mapping[str, str]) -> Any:
  def dims(path, names):
    for name in names:
      if roles.get(name) not in ('row', 'column', 'batch', 'whole'):
        raise ValueError(
          f'{_path(path)}: axis {name!r} has role {roles.get(name)}; make it '
          'row, column, batch or whole, by roles={**ROLES, ...}.'
        )

    def of(*some):
      return tuple(i for i, name in enumerate(names) if roles[name] in some)

    rows, columns = of('row'), of('column')
    factored = rows and columns and not of('whole')
    averaged = {'v_row': columns, 'v_col': rows} if factored else {'v': ()}
    return _Dims(names, of('row', 'column', 'whole'), averaged)

  leaf = lambda x: isinstance(x, tuple)
  return jax.tree_util.tree_map_with_path(dims, names, is_leaf=leaf)


def _zero_moments(dims: _Dims, param: Any) -> dict[str, Any]:
  def zeros(averaged):
    kept = [i for i in range(len(dims.names)) if i not in averaged]
    value = jnp.zeros([_value(param).shape[i] for i in kept], jnp.float32)
    if not _is_boxed(param):
      return value
    return param.replace(value=value, names=tuple(dims.names[i] for i in kept))

  return {key: zeros(axes) for key, axes in dims.averaged.items()}


def _normalised(
  dims: _Dims, grad: jax.Array, moments: dict[str, jax.Array]
) -> jax.Array:
  """`grad` over the root of its second moment."""
  if 'v' in moments:
    return grad * jax.lax.rsqrt(moments['v'])
  columns, rows = dims.averaged['v_row'], dims.averaged['v_col']
  row = jnp.expand_dims(moments['v_row'], columns)
  col = jnp.expand_dims(moments['v_col'], rows)
  mean = row.mean(rows, keepdims=True)
  # One factor after the other: beside large gradients, the quotient row / mean
  # of a row without any (1e-30) underflows, and 0 times its root is NaN.
  return grad * jax.lax.rsqrt(row) * jax.lax.rsqrt(col) * jnp.sqrt(mean)


def _slice_rms(dims: _Dims, x: jax.Array) -> jax.Array:
  return jnp.sqrt(jnp.mean(x**2, dims.slice, keepdims=True))


def _in_float32(
  max_grad_norm: float | None, *transforms: optax.GradientTransformation
) -> optax.GradientTransformation:
  """The chain of transforms, after clipping, on float32 casts of its inputs."""
  _check(_TINY, math.inf, max_grad_norm=max_grad_norm)
  if max_grad_norm is not None:
    transforms = (optax.clip_by_global_norm(max_grad_norm), *transforms)
  tx = optax.chain(*transforms)
  cast = lambda tree: optax.tree.cast(tree, jnp.float32)
  return optax.GradientTransformation(
    lambda params: tx.init(cast(params)),
    lambda updates, state, params=None: tx.update(
      cast(updates), state, cast(params)
    ),
  )


def _decays(names: Any, roles: Mapping[str, str] = ROLES) -> Any:
  """Whether weight decay is for a parameter: not for biases of routers.

  They have no gradient either: no optimizer moves them, `update_biases` does.
  Nor for single numbers, such as a temperature, for which 0 is not simpler.
  """
  return jax.tree_util.tree_map_with_path(
    lambda path, axes: (
      any(roles.get(axis) != 'batch' for axis in axes)
      and BIAS not in [getattr(key, 'key', None) for key in path]
    ),
    names,
    is_leaf=lambda axes: isinstance(axes, tuple),
  )


def _check_names(dims: Any, params: Any) -> None:
  leaves = jax.tree_util.tree_leaves_with_path
  named = {(_path(path), len(leaf.names)) for path, leaf in leaves(dims)}
  found = {
    (_path(path), _value(leaf).ndim)
    for path, leaf in leaves(params, is_leaf=_is_boxed)
  }
  if named != found:
    raise ValueError(
      'Every parameter needs one name per dimension, but (path, names) '
      f'{sorted(named - found)} meet (path, dimensions) '
      f'{sorted(found - named)}; take names from sharding.names_of.'
    )


def _check(low: float, high: float, **values: float | None) -> None:
  for name, value in values.items():
    if value is not None and not low <= value < high:
      raise ValueError(
        f'{name} must be at least {low:.3g} and below {high}, but '
        f'{name}={value}; change it.'
      )


def _path(path) -> str:
  return jax.tree_util.keystr(path, simple=True, separator='/')


def _is_boxed(leaf: Any) -> bool:
  return isinstance(leaf, nn.LogicallyPartitioned)


def _value(param: Any) -> jax.Array:
  return param.value if _is_boxed(param) else param

"""An average of the parameters over steps, kept with the optimizer's state."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike


class AveragedState(NamedTuple):
  """The optimizer's own state, updates counted, and a tree of averages."""

  optimizer: Any
  updates: jax.Array
  average: Any


def averaged(
  names: Any,
  *,
  learning_rate: float | optax.Schedule,
  optimizer: Callable[..., optax.GradientTransformation],
  decay: float,
) -> optax.GradientTransformation:
  """An optimizer that also averages the parameters exponentially.

  With p_i the parameters after update i, after n updates

      average = sum_i decay^(n - i) p_i / sum_i decay^(n - i),   i = 1 ... n

  whose weights add up to 1: Adam's bias correction, so the parameters before
  the first update are not in it. Kept corrected, by

      average += (1 - decay) / (1 - decay^n) (p_n - average),

  so it can be read as it is, and a parameter that does not move keeps its bits.
  The average has the parameters' axis names and lies where the rules of the
  optimizer's state say. Updates are the optimizer's own.

  Args:
    names, learning_rate: as of any optimizer, see `optimizers`.
    optimizer: (names, learning_rate=) -> what moves the parameters.
    decay: 0 is the last parameters, 0.999 about the last 1,000 updates.

  Raises:
    ValueError: decay is not in [0, 1).

  Example:
    >>> tx = averaged({'w': ('embed',)}, learning_rate=1.0, decay=0.5,
    ...               optimizer=lambda names, learning_rate: optax.sgd(1.0))
    >>> params = {'w': jnp.zeros(1)}
    >>> state = tx.init(params)
    >>> for _ in range(2):  # w is 1, then 2: (0.5 * 1 + 2) / 1.5.
    ...   updates, state = tx.update({'w': -jnp.ones(1)}, state, params)
    ...   params = optax.apply_updates(params, updates)
    >>> round(float(state.average['w'][0]), 4)
    1.6667

  References:
    Polyak & Juditsky 1992, https://doi.org/10.1137/0330046 (averaging);
    Kingma & Ba 2015, https://arxiv.org/abs/1412.6980, section 3 (correction).
  """
  if not 0 <= decay < 1:
    raise ValueError(
      f'decay={decay} of an average must be at least 0 and below 1; 0.999 '
      'averages about the last 1,000 updates.'
    )
  inner = optimizer(names, learning_rate=learning_rate)

  def init(params):
    # A copy: parameters and average are donated to the step, each by itself.
    average = jax.tree.map(jnp.copy, params)
    return AveragedState(inner.init(params), jnp.zeros([], jnp.int32), average)

  def update(grads, state, params=None):
    updates, optimizer_state = inner.update(grads, state.optimizer, params)
    n = optax.safe_increment(state.updates)
    share = _share(decay, n)
    average = jax.tree.map(
      lambda average, p: average + share * (p - average),
      state.average,
      optax.apply_updates(params, updates),
    )
    return updates, AveragedState(optimizer_state, n, average)

  # What else it says of itself stays, see `subsets.Subset`.
  return inner._replace(init=init, update=update)


def _share(decay: float, n: ArrayLike) -> jax.Array:
  """(1 - decay) / (1 - decay^n), float32, exactly 1 at n = 1.

  By expm1: for a decay near 1 the differences lose digits.
  """
  if decay == 0:
    return jnp.float32(1)
  log = jnp.float32(math.log(decay))
  return jnp.expm1(log) / jnp.expm1(log * jnp.float32(n))

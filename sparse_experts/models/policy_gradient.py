"""Losses of routers that learn from reward.

A router that takes part gives, for every token, numbers that its decision (the
choice of an expert) appears in, `Aux.decisions`:

    value   what reward it expected, differentiable
    gain    surrogates whose gradients are the directions of the policy when
    pain    the reward was higher, or lower, than expected; absent in routers
            that only learn values

REINFORCE has gain = pain = log pi(choice).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from sparse_experts.letters import Array
from sparse_experts.models.layout import LayerId
from sparse_experts.moe.outputs import Aux


def losses(
  auxes: Mapping[str, Aux],
  rewards: Mapping[str, tuple[Array, Array]],
  total_weight: Array,
) -> dict[str, Aux]:
  """The same Aux, with losses 'policy' and 'value' where there are decisions.

      advantage a = reward - value, a constant
      policy      = -mean of max(a, 0) gain + min(a, 0) pain
      value       = mean of (value - reward)^2

  Args:
    auxes: of sparse layers, 'encoder/...' or 'decoder/...'.
    rewards: by stack, float32 [B, L]: what each token's decision earned, a
      constant, and its weight in the mean.
    total_weight: what weighted sums are divided by.
  """

  def with_losses(name, aux):
    if not aux.decisions:
      return aux
    reward_BxL, weights_BxL = rewards[LayerId.parse(name).stack]
    more = {
      loss: (term_BxL * weights_BxL).sum() / total_weight
      for loss, term_BxL in terms(reward_BxL, **aux.decisions).items()
    }
    return dataclasses.replace(aux, losses={**aux.losses, **more})

  return {name: with_losses(name, aux) for name, aux in auxes.items()}


def terms(
  reward_BxL: Array,
  *,
  value: Array,
  gain: Array | None = None,
  pain: Array | None = None,
) -> dict[str, Array]:
  """What each token adds to the losses 'value' and 'policy'.

  Args:
    reward_BxL: what each token earned, float32; no gradient passes it.
    value: the reward that was expected, [B, L].
    gain, pain: surrogates of the choice's log-probability, [B, L], where the
      reward is above and below what was expected; None: no policy learns.

  Example:
    >>> half = jnp.log(jnp.array([0.5]))  # Of two experts, at even odds.
    >>> better = terms(jnp.array([3.]), value=jnp.array([1.]), gain=half,
    ...                pain=half)
    >>> [f'{better[name][0]:.3f}' for name in ('value', 'policy')]
    ['4.000', '1.386']
  """
  result = {'value': jnp.square(value - reward_BxL)}
  if gain is not None:
    advantage_BxL = reward_BxL - jax.lax.stop_gradient(value)
    result['policy'] = -(
      jnp.maximum(advantage_BxL, 0) * gain
      + jnp.minimum(advantage_BxL, 0) * pain
    )
  return result

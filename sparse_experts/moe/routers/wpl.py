"""Routing networks: a policy that learns by the weighted policy learner."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sparse_experts.letters import Array
from sparse_experts.moe.routers.policy import Policy


class WPL(Policy):
  """A `Policy` by REINFORCE's gradient weighted by WPL, without balance.

      weight   1 - pi(expert)   where the reward was higher than expected
               pi(expert)       where it was lower

  A policy so learns slowly what it is about to be sure of, and is quick to
  leave what others have made worse: several routers learn at once.

  The paper's routers decide by task, from a table of policies or a small
  network each, may pass a layer over, and can be given a share of the others'
  confidence (the collaboration reward). Here a policy is softmax(x W) of the
  token, always takes an expert, and is rewarded with log p(target) alone. The
  average reward that the paper compares with is a learned head, as in RL-R.

  Example:
    >>> router = WPL(num_experts=2)
    >>> variables = {'params': {
    ...   'kernel': jnp.log(jnp.array([[3., 1.]])),
    ...   'value_kernel': jnp.zeros((1, 1)), 'value_bias': jnp.zeros(1),
    ... }}
    >>> _, aux = router.apply(variables, jnp.ones((1, 1, 1)))
    >>> gain, pain = (aux.decisions[name] for name in ('gain', 'pain'))
    >>> f'{gain[0, 0] / jnp.log(.75):.2f}, {pain[0, 0] / jnp.log(.75):.2f}'
    '0.25, 0.75'

  References:
    Rosenbaum et al. 2017, https://arxiv.org/abs/1711.01239, section 3, WPL
    after Abdallah & Lesser 2008. Their later code (PytorchRouting, `WPL.py`)
    instead fits the probability to itself times 1 + a or 2 - a, a the
    advantage; this follows the paper.
  """

  def surrogates(self, log_prob_GxS: Array) -> tuple[Array, Array]:
    """log pi(choice), weighted by 1 - pi(choice) and by pi(choice)."""
    prob_GxS = jnp.exp(jax.lax.stop_gradient(log_prob_GxS))
    return (1 - prob_GxS) * log_prob_GxS, prob_GxS * log_prob_GxS

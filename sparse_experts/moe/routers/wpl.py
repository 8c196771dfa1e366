"""Routing networks: a policy that learns by the weighted policy learner."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from sparse_experts.letters import Array
from sparse_experts.moe.assignment import Assignment
from sparse_experts.moe.outputs import Aux
from sparse_experts.moe.router import KERNEL_INIT, Router
from sparse_experts.moe.routers.rl_r import (
  act,
  check_one_choice,
  predict_reward,
)


class WPL(Router):
  """As `rl_r.RLR`, with REINFORCE's gradient weighted by WPL, and no balance.

      weight   1 - pi(expert)   where the reward was higher than expected
               pi(expert)       where it was lower

  A policy so learns slowly what it is about to be sure of, and is quick to
  leave what others have made worse: several routers learn at once.

  The paper's routers decide by task, from a table of policies or a small
  network each, may pass a layer over, and can be given a share of the others'
  confidence (the collaboration reward). Here a policy is softmax(x W) of the
  token, always takes an expert, and is rewarded with log p(target) alone. The
  average reward that the paper compares with is a learned head, as in RL-R.

  Attributes:
    kernel_init: initialiser of W, [D, E].

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

  kernel_init: nn.initializers.Initializer = KERNEL_INIT

  needs = ('rng',)

  @nn.compact
  def __call__(
    self,
    x_GxSxD: Array,
    *,
    mask_GxS: Array | None = None,
    deterministic: bool = True,
  ) -> tuple[Assignment, Aux]:
    """Routes tokens x [G, S, D]; masked tokens get no expert."""
    check_one_choice(self)
    logits_GxSxE = self.logits(x_GxSxD, kernel_init=self.kernel_init)
    if mask_GxS is not None:  # Whatever padding holds, NaN too, stays there.
      logits_GxSxE = jnp.where(mask_GxS[..., None], logits_GxSxE, 0)
    rng = None if deterministic else self.make_rng('dropout')
    assignment, log_prob_GxS, metrics = act(logits_GxSxE, mask_GxS, rng)
    value_GxSx1 = predict_reward(self, x_GxSxD, mask_GxS, 1)
    prob_GxS = jnp.exp(jax.lax.stop_gradient(log_prob_GxS))
    return assignment, Aux(
      losses={},
      metrics=metrics,
      logits=logits_GxSxE,
      log_z=jax.nn.logsumexp(logits_GxSxE, -1),
      decisions={
        'value': value_GxSx1[..., 0],
        'gain': (1 - prob_GxS) * log_prob_GxS,
        'pain': prob_GxS * log_prob_GxS,
      },
    )

"""A contextual bandit: the expert from which most reward is expected."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from sparse_experts.letters import Array
from sparse_experts.moe.assignment import Assignment, largest, ungated
from sparse_experts.moe.outputs import Aux
from sparse_experts.moe.router import Router
from sparse_experts.moe.routers.policy import check_one_choice, predict_reward


class Bandit(Router):
  """Epsilon-greedy: argmax of Q(x) = x V + b, or any expert now and then.

  Q_e is regressed on the reward log p(target) that tokens sent to expert e
  earned (`models.policy_gradient.losses`, loss 'value'); there is no policy to
  learn, and the gate is 1. Q starts at 0, above any log-probability, so that
  experts not tried yet look best. The model adds the loss 'value'.

  Attributes:
    epsilon: in training, the probability of an expert drawn uniformly.

  Example:
    >>> router = Bandit(num_experts=2)
    >>> variables = {'params': {
    ...   'value_kernel': jnp.zeros((1, 2)), 'value_bias': jnp.array([-3., -2.])
    ... }}
    >>> assignment, aux = router.apply(variables, jnp.ones((1, 1, 1)))
    >>> assignment.expert_GxSxK.item(), aux.decisions['value'].item()
    (1, -2.0)

  References:
    Sutton & Barto 2018, Reinforcement Learning, sections 2.2 and 2.9; Fedus et
    al. 2021, https://arxiv.org/abs/2101.03961, appendix C, on routing as a
    bandit.
  """

  epsilon: float = 0.1

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
    if not 0 <= self.epsilon <= 1:
      raise ValueError(f'epsilon must be from 0 to 1, got {self.epsilon}.')
    E = self.num_experts
    value_GxSxE = predict_reward(self, x_GxSxD, mask_GxS)
    expert_GxSx1 = largest(value_GxSxE, 1)
    if not deterministic:
      explores, which = jax.random.split(self.make_rng('dropout'))
      expert_GxSx1 = jnp.where(
        jax.random.bernoulli(explores, self.epsilon, expert_GxSx1.shape),
        jax.random.randint(which, expert_GxSx1.shape, 0, E),
        expert_GxSx1,
      )
    assignment = ungated(expert_GxSx1, E, mask_GxS)
    onehot_GxSxE = jax.nn.one_hot(assignment.expert_GxSxK[..., 0], E)
    return assignment, Aux(
      losses={},
      metrics={},
      decisions={'value': (value_GxSxE * onehot_GxSxE).sum(-1)},
      logits=value_GxSxE,
    )

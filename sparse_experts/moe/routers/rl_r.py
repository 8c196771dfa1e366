"""RL-R: routing by REINFORCE, with a learned baseline."""

from __future__ import annotations

import dataclasses

import jax

from sparse_experts.letters import Array
from sparse_experts.moe import losses
from sparse_experts.moe.assignment import Assignment
from sparse_experts.moe.losses import masked_mean
from sparse_experts.moe.outputs import Aux
from sparse_experts.moe.routers.policy import Policy, entropy


class RLR(Policy):
  """A `Policy` by REINFORCE, whose gradient is that of log pi(choice).

  Losses: load_balance of the drawn choices, and negative_entropy of the policy
  (mean over tokens, nats) for whoever rewards exploration; beside policy and
  value, which the model adds.

  Example:
    >>> router = RLR(num_experts=4)
    >>> x_GxSxD = jax.random.normal(jax.random.key(0), (2, 16, 8))
    >>> variables = router.init(jax.random.key(1), x_GxSxD)
    >>> rngs = {'dropout': jax.random.key(2)}
    >>> _, aux = router.apply(
    ...   variables, x_GxSxD, deterministic=False, rngs=rngs
    ... )
    >>> sorted(aux.decisions), aux.decisions['gain'].shape
    (['gain', 'pain', 'value'], (2, 16))

  References:
    Clark et al. 2022, https://arxiv.org/abs/2202.01169, section 3.3 (RL-R):
    REINFORCE with a learned baseline, reward log p(target), a balancing loss.
    The form of the baseline and of its loss are this project's.
  """

  def with_losses(
    self,
    aux: Aux,
    assignment: Assignment,
    logits_GxSxE: Array,
    mask_GxS: Array | None,
  ) -> Aux:
    """Balance of what was drawn, and the entropy of the policy."""
    counted_GxSxE = jax.nn.one_hot(
      assignment.expert_GxSxK[..., 0], self.num_experts
    )
    balance = losses.Balance.of(
      jax.nn.softmax(logits_GxSxE), counted_GxSxE, mask_GxS
    )
    return dataclasses.replace(
      aux,
      losses={
        'load_balance': balance.loss(),
        'negative_entropy': -masked_mean(
          entropy(logits_GxSxE), mask_GxS, axis=(0, 1)
        ),
      },
      tokens=balance.tokens_G.sum(),
      balance=balance,
    )

  def surrogates(self, log_prob_GxS: Array) -> tuple[Array, Array]:
    """REINFORCE: both log pi(choice)."""
    return log_prob_GxS, log_prob_GxS

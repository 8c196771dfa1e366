"""Routing of the DeepSeek models: many small experts, groups, and a bias.

DeepSeekMoE, V2 and V3, and loss-free balancing: they differ in the arguments
below, which every recipe states. Shared experts, which every token meets, are
the layer's: `MoE.make_shared_expert`.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.scipy.special import entr

from sparse_experts import sharding
from sparse_experts.letters import Array
from sparse_experts.moe import losses
from sparse_experts.moe.assignment import (
  Assignment,
  is_causal,
  largest,
  positions,
)
from sparse_experts.moe.outputs import Aux
from sparse_experts.moe.router import KERNEL_INIT, Router

BIAS = 'balance_bias'  # The name of the parameter, float32 [E] of each router.

# Finite, for differences of infinities are NaN.
_LEAST = float(jnp.finfo(jnp.float32).tiny)
_LEAST_LOG = -1e30


class DeepSeek(Router):
  """Learned router: scores of x W in float32, then `route_scores`.

  Attributes:
    scores: 'softmax' (DeepSeekMoE, V2) or 'sigmoid' (V3) of the logits.
    renormalise: gates sum to `scale` (V3) or are the scores times it.
    scale: what all gates are multiplied by: 16 in V2, 2.5 in V3.
    expert_groups, limited_groups, group_score: see `route_scores`.
    balance_bias: a bias of each expert is added to the scores for the choice.
      It has no gradient; `balance_bias.update_biases` moves it after each
      step, where `Objective.bias_rate` says how far.
    balance_counts: see `route_scores`.
    priority: who is served first, see `assignment.positions`.
    kernel_init: initialiser of W, [D, E].

  Example:
    >>> router = DeepSeek(num_experts=8, k=2, scores='sigmoid')
    >>> x_GxSxD = jax.random.normal(jax.random.key(0), (2, 16, 8))
    >>> variables = router.init(jax.random.key(1), x_GxSxD)
    >>> assignment, aux = router.apply(variables, x_GxSxD)
    >>> assignment.expert_GxSxK.shape
    (2, 16, 2)

  References:
    Dai et al. 2024 (DeepSeekMoE), https://arxiv.org/abs/2401.06066.
    DeepSeek-AI 2024 (V2), https://arxiv.org/abs/2405.04434.
    DeepSeek-AI 2024 (V3), https://arxiv.org/abs/2412.19437.
    Wang et al. 2024 (loss-free), https://arxiv.org/abs/2408.15664.
  """

  scores: str = 'softmax'
  renormalise: bool = False
  scale: float = 1.0
  expert_groups: int = 1
  limited_groups: int = 1
  group_score: str = 'max'
  balance_bias: bool = False
  balance_counts: str = 'scores'
  priority: str = 'token'
  kernel_init: nn.initializers.Initializer = KERNEL_INIT

  @property
  def is_causal(self) -> bool:
    """No token's fate depends on a later token of its group."""
    return is_causal(self.priority, self.k)

  @property
  def exchangeable(self) -> bool:
    """Groups are runs of neighbours."""
    return self.expert_groups == 1

  @nn.compact
  def __call__(
    self,
    x_GxSxD: Array,
    *,
    mask_GxS: Array | None = None,
    deterministic: bool = True,
  ) -> tuple[Assignment, Aux]:
    """Routes tokens x [G, S, D]; masked tokens get no expert."""
    del deterministic  # Nothing is drawn.
    if self.scores not in ('softmax', 'sigmoid'):
      raise ValueError(
        f"scores must be 'softmax' or 'sigmoid', not {self.scores!r}."
      )
    self.check_gradient(
      self.renormalise and self.k == 1, 'renormalise=True of k=1 choice'
    )
    logits_GxSxE = self.logits(x_GxSxD, kernel_init=self.kernel_init)
    if mask_GxS is not None:  # Whatever padding holds, NaN too, stays there.
      logits_GxSxE = jnp.where(mask_GxS[..., None], logits_GxSxE, 0)
    bias_E = None
    if self.balance_bias:
      zeros = sharding.named(nn.initializers.zeros, 'router')
      bias_E = self.param(BIAS, zeros, (self.num_experts,), jnp.float32)
    act, log_act = nn.sigmoid, nn.log_sigmoid
    if self.scores == 'softmax':
      act, log_act = nn.softmax, nn.log_softmax
    assignment, aux = route_scores(
      act(logits_GxSxE),
      log_scores_GxSxE=log_act(logits_GxSxE),
      k=self.k,
      bias_E=bias_E,
      mask_GxS=mask_GxS,
      renormalise=self.renormalise,
      scale=self.scale,
      expert_groups=self.expert_groups,
      limited_groups=self.limited_groups,
      group_score=self.group_score,
      balance_counts=self.balance_counts,
      priority=self.priority,
    )
    return assignment, dataclasses.replace(
      aux, log_z=jax.nn.logsumexp(logits_GxSxE, -1)
    )


def route_scores(
  scores_GxSxE: Array,
  *,
  k: int,
  log_scores_GxSxE: Array | None = None,
  bias_E: Array | None = None,
  mask_GxS: Array | None = None,
  renormalise: bool = False,
  scale: float = 1.0,
  expert_groups: int = 1,
  limited_groups: int = 1,
  group_score: str = 'max',
  balance_counts: str = 'scores',
  priority: str = 'token',
) -> tuple[Assignment, Aux]:
  """Top-k routing of given scores, biased and limited to groups of experts.

  Args:
    scores_GxSxE: float32 affinities s >= 0 (V3, equation 15).
    k: choices per token; ties go to the lower expert index.
    log_scores_GxSxE: their logarithms, of which shares are the softmax, as
      scores underflow where logits are below -87. None: taken of the scores.
    bias_E: added to the scores for the choice, never for the gates (V3,
      equation 16; Wang et al. 2024, equation 3); without gradient. None: none.
    mask_GxS: boolean, False for padding, which gets no expert and no position.
    renormalise: gates are s_e / sum of the k chosen s (V3, equation 13), for
      scores of any size: V3's code adds 1e-20 to the sum, so that gates of
      logits below -45 fall short there.
    scale: what gates are multiplied by (`routed_scaling_factor`).
    expert_groups: the E experts are that many runs of equal length, each on a
      device (V2) or node (V3) of its own.
    limited_groups: a token's experts come from its best so many groups.
    group_score: a group is as good as the 'max' of its biased scores (V2,
      section 2.2.2), or the sum of its 'top2' (V3, section 2.1.2: of the
      highest k / limited_groups, which are 8 / 4; its code has 2).
    balance_counts: f of the balance loss counts the k largest 'scores', without
      bias and groups (V3, equation 18; Megatron-Core), or the 'chosen' experts
      (V2's code). Once a bias balances the choice, the chosen ones are balanced
      and their loss teaches nothing.
    priority: see `assignment.positions`.

  Returns:
    Assignment, and Aux with metrics `entropy` and `confidence` (sums over
    tokens, of scores that sum to 1) and the loss `load_balance`,

        sum_e f_e P_e,  f_e = E / (k S) * number of tokens that count for e,
                        P_e = mean of s_e / sum_j s_j

    which is 1 at perfect balance, per group: with a sequence as group V3's
    equations 17 to 20 and V2's code, with more the expert-level loss of
    DeepSeekMoE, equations 12 to 14.

  Raises:
    ValueError: an argument is out of its range.

  Example:
    >>> scores_GxSxE = jnp.array([[[.1, .6, .3], [.8, .1, .2]]])
    >>> assignment, aux = route_scores(
    ...   scores_GxSxE, k=1, bias_E=jnp.array([0, -.5, 0.]))
    >>> assignment.expert_GxSxK[0].tolist(), assignment.gate_GxSxK[0].tolist()
    ([[2], [0]], [[0.30000001192092896], [0.800000011920929]])
  """
  E = scores_GxSxE.shape[-1]
  _check(E, k, expert_groups, limited_groups, group_score, balance_counts)
  if mask_GxS is None:
    mask_GxS = jnp.ones(scores_GxSxE.shape[:2], bool)
  # Whatever padding holds, NaN too, stays there.
  scores_GxSxE = jnp.where(mask_GxS[..., None], scores_GxSxE, 0)
  if log_scores_GxSxE is None:
    log_scores_GxSxE = jnp.log(jnp.maximum(scores_GxSxE, _LEAST))
  log_scores_GxSxE = jnp.where(mask_GxS[..., None], log_scores_GxSxE, 0)
  log_scores_GxSxE = jnp.maximum(log_scores_GxSxE, _LEAST_LOG)
  biased_GxSxE = jax.lax.stop_gradient(scores_GxSxE)
  if bias_E is not None:
    biased_GxSxE += jax.lax.stop_gradient(bias_E)[None, None]
  if limited_groups < expert_groups:
    biased_GxSxE = _limit(
      biased_GxSxE, expert_groups, limited_groups, group_score
    )
  expert_GxSxK = largest(biased_GxSxE, k)
  onehot_GxSxKxE = jax.nn.one_hot(expert_GxSxK, E)
  if renormalise:
    gate_GxSxK = jax.nn.softmax(
      (onehot_GxSxKxE * log_scores_GxSxE[:, :, None]).sum(-1)
    )
  else:
    gate_GxSxK = (onehot_GxSxKxE * scores_GxSxE[:, :, None]).sum(-1)
  taken_GxSxK = jnp.broadcast_to(mask_GxS[..., None], gate_GxSxK.shape)
  expert_GxSxK = jnp.where(taken_GxSxK, expert_GxSxK, E)

  probs_GxSxE = jnp.where(
    mask_GxS[..., None], jax.nn.softmax(log_scores_GxSxE), 0
  )
  confidence_GxS = (onehot_GxSxKxE[:, :, 0] * probs_GxSxE).sum(-1)
  counted_GxSxE = onehot_GxSxKxE.sum(2)
  if balance_counts == 'scores':
    counted_GxSxE = jax.nn.one_hot(largest(scores_GxSxE, k), E).sum(2)
  entropy_GxS = entr(jax.lax.stop_gradient(probs_GxSxE)).sum(-1)
  balance = losses.Balance.of(probs_GxSxE, counted_GxSxE, mask_GxS, E / k)
  return Assignment(
    expert_GxSxK=expert_GxSxK,
    gate_GxSxK=jnp.where(taken_GxSxK, scale * gate_GxSxK, 0),
    position_GxSxK=positions(
      expert_GxSxK, E, priority=priority, confidence_GxS=confidence_GxS
    ),
    num_experts=E,
  ), Aux(
    losses={'load_balance': balance.loss()},
    metrics={
      'entropy': entropy_GxS.sum(),
      'confidence': (confidence_GxS * mask_GxS).sum(),
    },
    logits=log_scores_GxSxE,
    tokens=balance.tokens_G.sum(),
    balance=balance,
  )


def _limit(
  scores_GxSxE: Array, expert_groups: int, limited_groups: int, by: str
) -> Array:
  """Scores, -inf outside of each token's best groups of experts."""
  G, S, E = scores_GxSxE.shape
  # J groups of experts, of Q experts each.
  scores_GxSxJxQ = scores_GxSxE.reshape(G, S, expert_groups, -1)
  score_GxSxJ = scores_GxSxJxQ.max(-1)
  if by == 'top2':
    Q = scores_GxSxJxQ.shape[-1]
    best_GxSxJ = jnp.argmax(scores_GxSxJxQ, -1)
    is_best_GxSxJxQ = jax.nn.one_hot(best_GxSxJ, Q, dtype=bool)
    score_GxSxJ += jnp.where(is_best_GxSxJxQ, -jnp.inf, scores_GxSxJxQ).max(-1)
  open_GxSxJ = jax.nn.one_hot(
    largest(score_GxSxJ, limited_groups), expert_groups
  ).sum(2)
  return jnp.where(open_GxSxJ[..., None] > 0, scores_GxSxJxQ, -jnp.inf).reshape(
    G, S, E
  )


def _check(E, k, expert_groups, limited_groups, group_score, balance_counts):
  if not 1 <= limited_groups <= expert_groups or E % expert_groups:
    raise ValueError(
      f'expert_groups={expert_groups} must divide num_experts={E}, and '
      f'limited_groups={limited_groups} be from 1 to expert_groups.'
    )
  size = E // expert_groups
  if not 1 <= k <= limited_groups * size:
    raise ValueError(
      f'k must be from 1 to the {limited_groups * size} experts of '
      f'{limited_groups} of {expert_groups} groups, got {k}.'
    )
  if group_score not in ('max', 'top2') or (group_score == 'top2' and size < 2):
    raise ValueError(
      f"group_score must be 'max', or 'top2' for groups of two experts or "
      f'more, not {group_score!r} for groups of {size}.'
    )
  if balance_counts not in ('chosen', 'scores'):
    raise ValueError(
      f"balance_counts must be 'chosen' or 'scores', not {balance_counts!r}."
    )

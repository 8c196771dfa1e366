"""Hierarchical noisy top-k: a gate over groups of experts, gates within."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.scipy.special import entr

from sparse_experts.letters import Array
from sparse_experts.moe import losses
from sparse_experts.moe.assignment import Assignment, is_causal, positions
from sparse_experts.moe.outputs import Aux
from sparse_experts.moe.router import Router
from sparse_experts.moe.routers.noisy_top_k import (
  add_noise,
  chosen_probability,
  gate_of_each,
)
from sparse_experts.moe.routers.top_k import route
from sparse_experts.numbers import NotNegative


class Hierarchical(Router):
  """A primary gate chooses groups of experts, a secondary gate experts in each.

      y = sum over i, j of G_primary(x)_i G_i(x)_j E_ij(x)

  Each gate is a noisy top-k one (`noisy_top_k.NoisyTopK`). Expert j of group i
  is expert i * E / expert_groups + j.

  Attributes:
    k: choices of a token in all, primary_k times those in each group.
    primary_k: groups that a token chooses.
    expert_groups: a, that many groups of experts; None: the largest divisor of
      E up to its root.
    priority: who is served first, see `assignment.positions`; the paper drops
      nothing.
    least_noise: see `NoisyTopK`.
    kernel_init: of `primary_kernel`, `primary_noise_kernel` [D, a] and
      `kernel`, `noise_kernel` [D, E].

  Losses: importance and load of the E experts, both levels multiplied
  (equations 13 and 14).

  Example:
    >>> router = Hierarchical(num_experts=16)
    >>> x_GxSxD = jax.random.normal(jax.random.key(0), (2, 16, 8))
    >>> variables = router.init(jax.random.key(1), x_GxSxD)
    >>> assignment, aux = router.apply(variables, x_GxSxD)
    >>> (assignment.expert_GxSxK // 4)[0, 0].tolist()  # Two of each of two.
    [0, 0, 1, 1]

  References:
    Shazeer et al. 2017, https://arxiv.org/abs/1701.06538, appendix B.
  """

  k: int = 4
  primary_k: int = 2
  expert_groups: int | None = None
  priority: str = 'token'
  least_noise: NotNegative = 0.0
  kernel_init: nn.initializers.Initializer = nn.initializers.zeros

  needs = ('rng',)
  exchangeable = False  # Neighbours are a group.

  @property
  def is_causal(self) -> bool:
    """No token's fate depends on a later token of its group."""
    return is_causal(self.priority, self.k)

  @nn.compact
  def __call__(
    self,
    x_GxSxD: Array,
    *,
    mask_GxS: Array | None = None,
    deterministic: bool = True,
  ) -> tuple[Assignment, Aux]:
    """Routes tokens x [G, S, D]; masked tokens get no expert."""
    self.check_gradient(self.k == 1, 'k=1 choice')
    width = self.expert_groups or _squarest(self.num_experts)
    levels = {'primary_': width, '': None}
    given = {}
    for level, columns in levels.items():
      logits, noise = (
        self.logits(
          x_GxSxD,
          width=columns,
          kernel_init=self.kernel_init,
          name=f'{level}{name}',
        )
        for name in ('kernel', 'noise_kernel')
      )
      normal = None
      if not deterministic:
        normal = jax.random.normal(self.make_rng('dropout'), logits.shape)
      given[level] = logits, self.least_noise + nn.softplus(noise), normal
    return route_hierarchically(
      given['primary_'],
      given[''],
      k=self.k,
      primary_k=self.primary_k,
      mask_GxS=mask_GxS,
      priority=self.priority,
    )


def route_hierarchically(
  primary: tuple[Array, Array, Array | None],
  secondary: tuple[Array, Array, Array | None],
  *,
  k: int,
  primary_k: int,
  mask_GxS: Array | None = None,
  priority: str = 'token',
) -> tuple[Assignment, Aux]:
  """Hierarchical gating of given logits; see `Hierarchical`.

  Args:
    primary: float32 logits, the deviation of their noise, and standard normal
      noise or None, [G, S, J] each, J groups of experts.
    secondary: likewise of all experts, [G, S, E].
    k: choices per token. primary_k: groups per token.
    mask_GxS: boolean, False for padding, which gets no expert and no position.
    priority: see `assignment.positions`.

  Raises:
    ValueError: groups or choices do not divide.
  """
  G, S, E = secondary[0].shape
  J = primary[0].shape[-1]
  secondary_k = k // max(primary_k, 1)
  if (
    E % J
    or not 1 <= primary_k <= J
    or k % primary_k
    or not 1 <= secondary_k <= E // J
  ):
    raise ValueError(
      f'expert_groups={J} must divide num_experts={E}, primary_k={primary_k} '
      f'(1 to {J}) divide k={k}, and k / primary_k be 1 to {E // J}.'
    )
  if mask_GxS is None:
    mask_GxS = jnp.ones((G, S), bool)
  Q = E // J

  def gate(level, k, mask_GxS):
    """Choices, P of equation 9, the noisy softmax, and logits."""
    logits, deviation, normal = level
    real = mask_GxS[..., None]
    logits, deviation = (
      jnp.where(real, logits, 0),
      jnp.where(real, deviation, 1),
    )
    noisy = add_noise(logits, deviation, normal)
    assignment, _ = route(noisy, k=k, mask_GxS=mask_GxS, gates='chosen')
    chances = chosen_probability(logits, noisy, deviation, k)
    return assignment, chances, jax.nn.softmax(noisy), logits

  first, chance_GxSxJ, prob_GxSxJ, primary_logits_GxSxJ = gate(
    primary, primary_k, mask_GxS
  )
  # Every group of experts has a row of Q gates for every token.
  rows = [x if x is None else x.reshape(G, S * J, Q) for x in secondary]
  second, chance_GxSJxQ, prob_GxSJxQ, logits_GxSJxQ = gate(
    rows, secondary_k, jnp.repeat(mask_GxS, J, axis=1)
  )

  def chosen(x_GxSJx__):
    """The rows of the groups that were chosen, [G, S, primary_k, ...]."""
    x_GxSxJx__ = x_GxSJx__.reshape(G, S, 1, J, -1)
    return (is_group_GxSxKxJ[..., None] * x_GxSxJx__).sum(3)

  is_group_GxSxKxJ = jax.nn.one_hot(first.expert_GxSxK, J, dtype=jnp.int32)
  expert_GxSxK = (
    first.expert_GxSxK[..., None] * Q + chosen(second.expert_GxSxK)
  ).reshape(G, S, k)
  expert_GxSxK = jnp.where(mask_GxS[..., None], expert_GxSxK, E)
  gate_GxSxK = (
    first.gate_GxSxK[..., None] * chosen(second.gate_GxSxK)
  ).reshape(G, S, k)
  prob_GxSxE = (
    prob_GxSxJ[..., None] * prob_GxSJxQ.reshape(G, S, J, Q)
  ).reshape(G, S, E)
  fixed_GxSxE = jax.lax.stop_gradient(prob_GxSxE)
  confidence_GxS = fixed_GxSxE.max(-1)
  assignment = Assignment(
    expert_GxSxK=expert_GxSxK,
    gate_GxSxK=gate_GxSxK,
    position_GxSxK=positions(
      expert_GxSxK, E, priority=priority, confidence_GxS=confidence_GxS
    ),
    num_experts=E,
  )

  tokens_G = mask_GxS.sum(1).astype(jnp.float32)
  # Of every gate, one primary and J secondary; the z-loss is a mean over them.
  log_z_GxSxI = jnp.concatenate(
    [
      jax.nn.logsumexp(primary_logits_GxSxJ, -1)[..., None],
      jax.nn.logsumexp(logits_GxSJxQ, -1).reshape(G, S, J),
    ],
    -1,
  )
  # Equation 14: the load of a group, shared as its own tokens share it.
  member_GxSxJ = is_group_GxSxKxJ.sum(2)
  primary_GxJ = (chance_GxSxJ * mask_GxS[..., None]).sum(1)
  secondary_GxJxQ = jnp.einsum(
    'GSJ,GSJQ->GJQ',
    member_GxSxJ.astype(jnp.float32),
    chance_GxSJxQ.reshape(G, S, J, Q),
  )
  load_GxJxQ = (
    primary_GxJ[..., None]
    * secondary_GxJxQ
    / jnp.maximum(member_GxSxJ.sum(1), 1)[..., None]
  )
  return assignment, Aux(
    losses={
      'importance': losses.importance(  # Equation 13.
        gate_of_each(assignment), mask_GxS
      ),
      'load': losses.square_variation(load_GxJxQ.reshape(G, E), tokens_G),
    },
    metrics={
      'entropy': (entr(fixed_GxSxE).sum(-1) * mask_GxS).sum(),
      'confidence': (confidence_GxS * mask_GxS).sum(),
    },
    logits=jnp.log(jnp.maximum(fixed_GxSxE, 1e-30)),  # Finite.
    log_z=jnp.sqrt(jnp.square(log_z_GxSxI).mean(-1)),
    tokens=tokens_G.sum(),
  )


def _squarest(num_experts: int) -> int:
  """The largest divisor up to the root."""
  root = math.isqrt(num_experts)
  return max(n for n in range(1, root + 1) if num_experts % n == 0)

"""Each expert chooses the tokens it scores highest.

Every expert has the same number of tokens by construction, so there is no
auxiliary loss; a token has as many experts as chose it, which can be none.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.scipy.special import entr, logsumexp

from sparse_experts.arrays import Array, Aux
from sparse_experts.moe.assignment import Assignment, largest
from sparse_experts.moe.router import KERNEL_INIT, Router


class ExpertChoice(Router):
  """Learned router: softmax(x W) over experts in float32, then `choose`.

  Lines are never longer than S * k / E rounded, so a capacity factor of 1
  drops nothing of what experts chose.

  Attributes:
    k: average experts of a token; the paper's capacity factor c.
    max_experts: experts a token can have, at least k; None: any number.
    entropy: lambda of the capped choice.
    iterations: of the capped choice.
    kernel_init: initialiser of W, [D, E].

  Example:
    >>> router = ExpertChoice(num_experts=4, k=2)
    >>> x_GxSxD = jax.random.normal(jax.random.key(0), (2, 16, 8))
    >>> variables = router.init(jax.random.key(1), x_GxSxD)
    >>> assignment, aux = router.apply(variables, x_GxSxD)
    >>> (assignment.expert_GxSxK < 4).sum(1).tolist()  # 16 * 2 / 4 tokens each.
    [[8, 8, 8, 8], [8, 8, 8, 8]]

  References:
    Zhou et al. 2022, https://arxiv.org/abs/2202.09368, section 3.2; capped:
    section 3.3.
  """

  k: int = 2
  max_experts: int | None = None
  entropy: float = 1e-3
  iterations: int = 100
  kernel_init: nn.initializers.Initializer = KERNEL_INIT

  is_causal = False
  drops = True

  @nn.compact
  def __call__(
    self,
    x_GxSxD: Array,
    *,
    mask_GxS: Array | None = None,
    deterministic: bool = True,
  ) -> tuple[Assignment, Aux]:
    """Routes tokens x [G, S, D]; masked tokens are chosen by no expert."""
    del deterministic  # Training and evaluation are the same.
    return choose(
      self.logits(x_GxSxD, kernel_init=self.kernel_init),
      k=self.k,
      max_experts=self.max_experts,
      mask_GxS=mask_GxS,
      entropy=self.entropy,
      iterations=self.iterations,
    )


def choose(
  logits_GxSxE: Array,
  *,
  k: int,
  max_experts: int | None = None,
  mask_GxS: Array | None = None,
  entropy: float = 1e-3,
  iterations: int = 100,
) -> tuple[Assignment, Aux]:
  """Expert choice on given logits.

  Each expert takes its n = round(S * k / E) tokens of the highest score
  softmax(logits), over experts; ties go to the earlier token. With
  `max_experts` it takes those of the highest entry in `capped_log_plan`, ties
  to the higher score. That plan is fractional and found in a limited number of
  iterations, so its top n can still give a token too many experts (the paper
  leaves them); here the token keeps those of the largest entry, and the others
  have fewer tokens.

  Args:
    logits_GxSxE: float32 router logits.
    k: average experts of a token.
    max_experts: experts a token can have; None: any number.
    mask_GxS: boolean, False for padding, which no expert takes. n counts all
      positions: an expert with fewer than n unmasked tokens takes them all.
    entropy, iterations: of `capped_log_plan`.

  Returns:
    Assignment, whose gates are the scores, and Aux without losses and with
    metrics `entropy` and `confidence`. Without a cap, column e of the choices
    is expert e (K = E); with one, a token's experts in order of the plan
    (K = max_experts). A place is the rank among an expert's tokens.

  Raises:
    ValueError: n is 0, or max_experts is not between k and E.

  Example:
    >>> logits_GxSxE = jnp.log(jnp.array([[[.9, .1], [.6, .4]]]))
    >>> assignment, _ = choose(logits_GxSxE, k=1)
    >>> assignment.expert_GxSxK.tolist()  # 2 is no choice.
    [[[0, 2], [2, 1]]]
  """
  _, S, E = logits_GxSxE.shape
  n = min(round(S * k / E), S)
  if n < 1:
    raise ValueError(
      f'experts choose S * k / E = {S} * {k} / {E} tokens each, which rounds '
      'to 0: give larger groups or a larger k.'
    )
  if max_experts is not None and not k <= max_experts <= E:
    raise ValueError(
      f'max_experts must be from k={k} to num_experts={E}, got {max_experts}.'
    )
  if mask_GxS is None:
    mask_GxS = jnp.ones(logits_GxSxE.shape[:2], bool)
  real_GxSx1 = mask_GxS[..., None]
  logits_GxSxE = jnp.where(real_GxSx1, logits_GxSxE, 0)
  probs_GxSxE = jax.nn.softmax(logits_GxSxE)  # S of section 3.2.
  score_GxSxE = jax.lax.stop_gradient(probs_GxSxE)

  if max_experts is None:
    place_GxSxK = _rank(real_GxSx1, score_GxSxE)
    taken_GxSxK = (place_GxSxK < n) & real_GxSx1
    expert_GxSxK = jnp.broadcast_to(
      jnp.arange(E, dtype=jnp.int32), taken_GxSxK.shape
    )
    gate_GxSxK = probs_GxSxE
  else:
    plan_GxSxE = capped_log_plan(
      score_GxSxE,
      n=n,
      max_experts=max_experts,
      mask_GxS=mask_GxS,
      entropy=entropy,
      iterations=iterations,
    )
    rank_GxSxE = _rank(real_GxSx1, plan_GxSxE, score_GxSxE)
    top_GxSxE = (rank_GxSxE < n) & real_GxSx1
    expert_GxSxK = largest(
      jnp.where(top_GxSxE, plan_GxSxE, -jnp.inf), max_experts
    )
    onehot_GxSxKxE = jax.nn.one_hot(expert_GxSxK, E, dtype=bool)
    onehot_GxSxKxE &= top_GxSxE[:, :, None]
    place_GxSxE = _rank(onehot_GxSxKxE.any(2), plan_GxSxE, score_GxSxE)
    taken_GxSxK = onehot_GxSxKxE.any(-1)
    place_GxSxK = (place_GxSxE[:, :, None] * onehot_GxSxKxE).sum(-1)
    gate_GxSxK = (probs_GxSxE[:, :, None] * onehot_GxSxKxE).sum(-1)

  assignment = Assignment(
    expert_GxSxK=jnp.where(taken_GxSxK, expert_GxSxK, E),
    gate_GxSxK=jnp.where(taken_GxSxK, gate_GxSxK, 0),
    place_GxSxK=jnp.where(taken_GxSxK, place_GxSxK, 0),
    num_experts=E,
  )
  return assignment, Aux(
    losses={},
    metrics={
      'entropy': (entr(score_GxSxE).sum(-1) * mask_GxS).sum(),
      'confidence': (score_GxSxE.max(-1) * mask_GxS).sum(),
    },
    logits=logits_GxSxE,
    log_z=logsumexp(logits_GxSxE, -1),
  )


def capped_log_plan(
  scores_GxSxE: Array,
  *,
  n: int,
  max_experts: int,
  mask_GxS: Array,
  entropy: float = 1e-3,
  iterations: int = 100,
) -> Array:
  """Log of the plan A that maximises <scores, A> + entropy * H(A), [G, S, E].

  Subject to: every expert has n tokens, no token more than `max_experts`
  experts, and 0 <= A <= 1. Found by Dykstra's alternating projections. Where
  too few tokens are unmasked for n, an expert has an equal share of them.

  Args:
    scores_GxSxE: in 0 to 1.
    n: tokens of an expert.
    max_experts: b, experts of a token.
    mask_GxS: tokens there are.
    entropy: lambda; the paper's is 0.001.
    iterations: the paper needs at most 100.

  References:
    Zhou et al. 2022, section 3.3. In logarithms, for exp(scores / 0.001)
    overflows; Dykstra's algorithm in the Kullback-Leibler geometry as in
    Benamou et al. 2015, https://arxiv.org/abs/1412.5154, section 3.
  """
  E = scores_GxSxE.shape[-1]
  tokens_G = mask_GxS.sum(1).astype(jnp.float32)
  share_G = jnp.minimum(jnp.minimum(n, tokens_G), tokens_G * (max_experts / E))
  log_share_Gx1x1 = jnp.log(jnp.maximum(share_G, 1e-9))[:, None, None]
  # Far below any score, yet finite: differences of infinities are NaN.
  log_plan_GxSxE = jnp.where(mask_GxS[..., None], scores_GxSxE / entropy, -1e9)

  def project(_, carry):
    log_plan_GxSxE, token_GxSx1, entry_GxSxE = carry
    # On the experts' sums; an equality needs no correction.
    log_plan_GxSxE += log_share_Gx1x1 - logsumexp(
      log_plan_GxSxE, axis=1, keepdims=True
    )
    # On the tokens' sums, with the correction of the projection before.
    log_plan_GxSxE += token_GxSx1
    excess_GxSx1 = logsumexp(log_plan_GxSxE, axis=2, keepdims=True)
    token_GxSx1 = jnp.maximum(excess_GxSx1 - jnp.log(float(max_experts)), 0)
    log_plan_GxSxE -= token_GxSx1
    # On the entries.
    log_plan_GxSxE += entry_GxSxE
    entry_GxSxE = jnp.maximum(log_plan_GxSxE, 0)
    return log_plan_GxSxE - entry_GxSxE, token_GxSx1, entry_GxSxE

  start = (
    log_plan_GxSxE,
    jnp.zeros_like(log_plan_GxSxE[..., :1]),
    jnp.zeros_like(log_plan_GxSxE),
  )
  return jax.lax.fori_loop(0, iterations, project, start)[0]


def _rank(eligible_GxSxE: Array, *keys_GxSxE: Array) -> Array:
  """Rank of every token with every expert, 0 the best, int32 [G, S, E].

  Those eligible first, then by the first key, the second, and token order.
  """
  shape = keys_GxSxE[0].shape
  keys = [-key for key in reversed(keys_GxSxE)]
  keys.append(~jnp.broadcast_to(eligible_GxSxE, shape))
  # A position within its own group: nothing is gathered from other devices.
  order_GxSxE = jnp.lexsort(keys, axis=1)
  return jnp.argsort(order_GxSxE, axis=1).astype(jnp.int32)

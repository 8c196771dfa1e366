"""BASE layers: a balanced linear assignment of tokens to experts.

In training each expert gets equally many tokens, at the highest total score; in
evaluation each token goes to its best expert. There is no auxiliary loss.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from sparse_experts.letters import Array
from sparse_experts.moe.assignment import Assignment, positions
from sparse_experts.moe.outputs import Aux
from sparse_experts.moe.router import Router

# fairseq's base_layer.py.
ORTHOGONAL = nn.initializers.orthogonal(scale=0.1)


class BalancedAssignment(Router):
  """Learned router: scores x W in float32, gates sigmoid(x . w_e).

  The tokens that are balanced are those of a group. The paper balances a
  worker's tokens, after a shuffle between workers that mixes sequences; a
  group_size of several sequences does that here.

  In training lines are as long as the load of `balanced` and none is left out
  at a capacity factor of 1; the greedy choice of evaluation, though causal by
  itself, can overflow.

  Attributes:
    epsilon: of the auction, see `balanced`.
    kernel_init: initialiser of W, [D, E].

  Example:
    >>> router = BalancedAssignment(num_experts=4)
    >>> x_GxSxD = jax.random.normal(jax.random.key(0), (2, 18, 8))
    >>> variables = router.init(jax.random.key(1), x_GxSxD)
    >>> assignment, _ = router.apply(variables, x_GxSxD, deterministic=False)
    >>> loads = jax.vmap(lambda e_Sx1: jnp.bincount(e_Sx1[:, 0], length=4))(
    ...   assignment.expert_GxSxK
    ... )
    >>> jnp.sort(loads).tolist()
    [[4, 4, 5, 5], [4, 4, 5, 5]]

  References:
    Lewis et al. 2021, https://arxiv.org/abs/2103.16716, section 3, and their
    code, fairseq/modules/base_layer.py. That code mixes
    alpha * expert(x) + (1 - alpha) * x with experts that are residual
    themselves, which is x + alpha * (expert(x) - x): the layer here, with its
    residual connection around it.
  """

  epsilon: float = 1e-2
  kernel_init: nn.initializers.Initializer = ORTHOGONAL

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
    """Routes tokens x [G, S, D]; masked tokens get no expert."""
    if self.k != 1:
      raise ValueError(f'a BASE layer gives a token k=1 expert, not {self.k}.')
    logits_GxSxE = self.logits(x_GxSxD, kernel_init=self.kernel_init)
    E = self.num_experts
    if mask_GxS is None:
      mask_GxS = jnp.ones(x_GxSxD.shape[:2], bool)
    logits_GxSxE = jnp.where(mask_GxS[..., None], logits_GxSxE, 0)
    if deterministic:  # "At test time": section 3.2.
      expert_GxS = jnp.argmax(logits_GxSxE, -1).astype(jnp.int32)
    else:  # Section 3.1, equation 2.
      expert_GxS = balanced(
        logits_GxSxE, mask_GxS=mask_GxS, epsilon=self.epsilon
      )
    expert_GxSxK = jnp.where(mask_GxS, expert_GxS, E)[..., None]
    # Equation 1: alpha = sigmoid(h . w_a). A one-hot, so that the gradient is
    # no scatter-add; it is 0 where there is no expert.
    onehot_GxSxE = jax.nn.one_hot(expert_GxSxK[..., 0], E)
    logit_GxSx1 = jnp.where(onehot_GxSxE > 0, logits_GxSxE, 0).sum(
      -1, keepdims=True
    )
    gate_GxSxK = jnp.where(mask_GxS[..., None], jax.nn.sigmoid(logit_GxSx1), 0)
    return Assignment(
      expert_GxSxK=expert_GxSxK,
      gate_GxSxK=gate_GxSxK,
      position_GxSxK=positions(expert_GxSxK, E),
      num_experts=E,
    ), Aux(
      losses={},
      metrics={},
      logits=logits_GxSxE,
      log_z=jax.nn.logsumexp(logits_GxSxE, -1),
    )


def balanced(
  scores_GxSxE: Array,
  *,
  mask_GxS: Array | None = None,
  epsilon: float = 1e-2,
) -> Array:
  """The expert of each token, equally loaded, of the highest total score.

  Of T unmasked tokens in a group every expert gets floor(T / E) or ceil(T / E),
  whichever is best. The total is within (T + E) * epsilon * (largest - smallest
  score of the group) of the optimum. Found by Bertsekas' auction algorithm: all
  tokens without an expert bid at once for the one they gain most from, up to
  what the second best would give them and epsilon more; an expert keeps its
  highest bidders. Rounds with a smaller and smaller epsilon start from the
  prices before (epsilon scaling). In all it takes tens to some hundreds of
  rounds; all groups take as many as the slowest.

  fairseq solves the same problem with the roles exchanged, experts bidding for
  tokens, for token counts that E divides, and takes what it has after 100
  rounds.

  Args:
    scores_GxSxE: float32; what is not finite counts as the lowest score of the
      group that is (as in fairseq).
    mask_GxS: False for tokens that get no expert.
    epsilon: from 1e-5, in units of the group's range of scores. fairseq's is
      1/50.

  Returns:
    int32 [G, S], E for masked tokens. No gradient.

  Raises:
    ValueError: epsilon is out of range.

  Example:
    >>> scores_GxSxE = jnp.array([[[3., 0.], [2., 1.], [9., 0.], [4., 5.]]])
    >>> balanced(scores_GxSxE).tolist()  # Token 1 loses least by moving.
    [[0, 1, 0, 1]]

  References:
    Bertsekas 1992, "Auction algorithms for network flow problems: a tutorial
    introduction", sections 1 and 2; Bertsekas and Castanon 1989, "The auction
    algorithm for the transportation problem" (the slots of an expert are
    similar objects, with one price, that of the cheapest).
  """
  if not 1e-5 <= epsilon <= 1:  # Below, float32 prices would stop rising.
    raise ValueError(f'epsilon must be from 1e-5 to 1, got {epsilon}.')
  G, S, E = scores_GxSxE.shape
  if mask_GxS is None:
    mask_GxS = jnp.ones((G, S), bool)
  gain_GxSxE = _unit_range(jax.lax.stop_gradient(scores_GxSxE), mask_GxS)
  # Slots that would stay empty are taken by dummies, who gain nothing anywhere;
  # an expert takes one at most. With them, everyone gets a slot.
  tokens_Gx1 = mask_GxS.sum(1, keepdims=True)
  slots_Gx1 = -(-tokens_Gx1 // E)  # Of one expert.
  is_dummy_S = jnp.arange(S + E - 1) >= S
  bidders_GxS = jnp.concatenate(
    [mask_GxS, jnp.arange(E - 1)[None] < slots_Gx1 * E - tokens_Gx1], axis=1
  )
  gain_GxSxE = jnp.concatenate([gain_GxSxE, jnp.zeros((G, E - 1, E))], axis=1)
  experts_E = jnp.arange(E)

  def prices(expert_GxS, bid_GxS, base_GxE):
    """What a token and a dummy must outbid with each expert, [G, E]."""
    holds_GxSxE = expert_GxS[..., None] == experts_E[None, None]
    lowest_GxE = jnp.where(holds_GxSxE, bid_GxS[..., None], jnp.inf).min(1)
    count_GxE = holds_GxSxE.sum(1)
    full_GxE = (count_GxE == slots_Gx1) & (count_GxE > 0)
    price_GxE = jnp.where(full_GxE, lowest_GxE, base_GxE)
    dummies_GxSxE = holds_GxSxE & is_dummy_S[None, :, None]
    dummy_GxE = jnp.where(dummies_GxSxE, bid_GxS[..., None], -jnp.inf).max(1)
    return price_GxE, jnp.where(dummies_GxSxE.any(1), dummy_GxE, price_GxE)

  def bid(carry, eps, base_GxE):
    expert_GxS, bid_GxS = carry
    token_price_GxE, dummy_price_GxE = prices(expert_GxS, bid_GxS, base_GxE)
    price_GxSxE = jnp.where(
      is_dummy_S[None, :, None],
      dummy_price_GxE[:, None],
      token_price_GxE[:, None],
    )
    value_GxSxE = gain_GxSxE - price_GxSxE
    best_GxS = jnp.argmax(value_GxSxE, -1).astype(jnp.int32)
    is_best_GxSxE = best_GxS[..., None] == experts_E[None, None]
    first_GxS = value_GxSxE.max(-1)
    second_GxS = jnp.where(is_best_GxSxE, -jnp.inf, value_GxSxE).max(-1)
    if E == 1:
      second_GxS = first_GxS
    offer_GxS = jnp.where(is_best_GxSxE, price_GxSxE, 0).sum(-1)
    offer_GxS += first_GxS - second_GxS + eps
    free_GxS = bidders_GxS & (expert_GxS == E)
    bid_GxS = jnp.where(free_GxS, offer_GxS, bid_GxS)
    expert_GxS = jnp.where(free_GxS, best_GxS, expert_GxS)
    # An expert's highest dummy stays in the contest, then its highest bidders.
    expert_GxS = jnp.where(
      is_dummy_S[None] & (_rank(expert_GxS, bid_GxS, is_dummy_S) > 0),
      E,
      expert_GxS,
    )
    accepted_GxS = _rank(expert_GxS, bid_GxS) < slots_Gx1
    return jnp.where(accepted_GxS, expert_GxS, E), bid_GxS

  def auction(base_GxE, eps):
    # Ends: every round fills a slot or raises the lowest bid of a full expert
    # by eps, and while a slot is empty nobody bids more than the largest gain
    # above what it costs.
    start = (
      jnp.full((G, S + E - 1), E, jnp.int32),
      jnp.zeros((G, S + E - 1), jnp.float32),
    )
    expert_GxS, bid_GxS = jax.lax.while_loop(
      lambda carry: (bidders_GxS & (carry[0] == E)).any(),
      lambda carry: bid(carry, eps, base_GxE),
      start,
    )
    return prices(expert_GxS, bid_GxS, base_GxE)[0], expert_GxS

  steps = [epsilon]
  while steps[0] < 0.25:
    steps.insert(0, min(steps[0] * 4, 0.25))
  _, expert_TxGxS = jax.lax.scan(
    auction, jnp.zeros((G, E)), jnp.array(steps, jnp.float32)
  )
  return expert_TxGxS[-1, :, :S]


def _unit_range(scores_GxSxE: Array, mask_GxS: Array) -> Array:
  """Scores of unmasked tokens moved to 0 to 1, 0 for the others."""
  finite_GxSxE = jnp.isfinite(scores_GxSxE) & mask_GxS[..., None]
  low_Gx1x1 = jnp.where(finite_GxSxE, scores_GxSxE, jnp.inf).min(
    (1, 2), keepdims=True
  )
  high_Gx1x1 = jnp.where(finite_GxSxE, scores_GxSxE, -jnp.inf).max(
    (1, 2), keepdims=True
  )
  range_Gx1x1 = jnp.where(high_Gx1x1 > low_Gx1x1, high_Gx1x1 - low_Gx1x1, 1)
  return jnp.where(finite_GxSxE, (scores_GxSxE - low_Gx1x1) / range_Gx1x1, 0)


def _rank(
  expert_GxS: Array, bid_GxS: Array, first_S: Array | None = None
) -> Array:
  """Rank of a bidder with its expert, 0 the highest, int32 [G, S].

  Those of `first_S` before all others.
  """
  keys = [-bid_GxS]
  if first_S is not None:
    keys.append(jnp.broadcast_to(~first_S[None], expert_GxS.shape))
  order_GxS = jnp.lexsort([*keys, expert_GxS], axis=1)
  sorted_GxS = jnp.take_along_axis(expert_GxS, order_GxS, axis=1)
  # The start of each run of equal experts, carried along it.
  positions_1xS = jnp.arange(expert_GxS.shape[1])[None]
  starts_GxS = jnp.pad(
    sorted_GxS[:, 1:] != sorted_GxS[:, :-1],
    ((0, 0), (1, 0)),
    constant_values=True,
  )
  start_GxS = jax.lax.cummax(jnp.where(starts_GxS, positions_1xS, 0), axis=1)
  back_GxS = jnp.argsort(order_GxS, axis=1)
  return jnp.take_along_axis(positions_1xS - start_GxS, back_GxS, axis=1)

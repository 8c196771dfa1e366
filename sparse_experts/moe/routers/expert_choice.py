"""Each expert chooses the tokens it scores highest.

Every expert has the same number of tokens by construction, so there is no
auxiliary loss; a token has as many experts as chose it, which can be none.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.scipy.special import entr

from sparse_experts.letters import Array
from sparse_experts.moe.assignment import Assignment, largest
from sparse_experts.moe.outputs import Aux
from sparse_experts.moe.router import KERNEL_INIT, Router


class ExpertChoice(Router):
  """Learned router: softmax(x W) over experts in float32, then `choose`.

  Lines are never longer than S * k / E rounded, so a capacity factor of 1
  drops nothing of what experts chose.

  Attributes:
    k: average experts of a token; the paper's capacity factor c.
    max_experts: experts a token can have, at least k; None: any number.
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
    )


def choose(
  logits_GxSxE: Array,
  *,
  k: int,
  max_experts: int | None = None,
  mask_GxS: Array | None = None,
) -> tuple[Assignment, Aux]:
  """Expert choice on given logits.

  Each expert takes its n = round(S * k / E) tokens of the highest score
  softmax(logits), over experts; ties go to the earlier token. With
  `max_experts` a token has no more of them than that, every expert is full all
  the same, and the total score is near the highest there is, see `capped`.

  There the paper solves a linear programme with an entropy (lambda 0.001) by
  Dykstra's algorithm, 100 iterations, and takes each expert's top n of that
  fractional plan, which can still give a token too many experts. Here the
  programme without the entropy is solved, in whole tokens: nothing is rounded.

  Args:
    logits_GxSxE: float32 router logits.
    k: average experts of a token.
    max_experts: experts a token can have; None: any number.
    mask_GxS: boolean, False for padding, which no expert takes. n counts all
      positions: without a cap an expert with fewer than n unmasked tokens
      takes them all.

  Returns:
    Assignment, whose gates are the scores, and Aux without losses and with
    metrics `entropy` and `confidence`. Without a cap, column e of the choices
    is expert e (K = E); with one, a token's experts in order of the score, ties
    to the lower (K = max_experts). A position is the rank of the score among an
    expert's tokens.

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
    position_GxSxK = _rank(real_GxSx1, score_GxSxE)
    taken_GxSxK = (position_GxSxK < n) & real_GxSx1
    expert_GxSxK = jnp.broadcast_to(
      jnp.arange(E, dtype=jnp.int32), taken_GxSxK.shape
    )
    gate_GxSxK = probs_GxSxE
  else:
    taken_GxSxE = capped(
      score_GxSxE, n=n, max_experts=max_experts, mask_GxS=mask_GxS
    )
    expert_GxSxK = largest(jnp.where(taken_GxSxE, score_GxSxE, -1), max_experts)
    onehot_GxSxKxE = jax.nn.one_hot(expert_GxSxK, E, dtype=bool)
    onehot_GxSxKxE &= taken_GxSxE[:, :, None]
    position_GxSxE = _rank(taken_GxSxE, score_GxSxE)
    taken_GxSxK = onehot_GxSxKxE.any(-1)
    position_GxSxK = (position_GxSxE[:, :, None] * onehot_GxSxKxE).sum(-1)
    gate_GxSxK = jnp.where(onehot_GxSxKxE, probs_GxSxE[:, :, None], 0).sum(-1)

  assignment = Assignment(
    expert_GxSxK=jnp.where(taken_GxSxK, expert_GxSxK, E),
    gate_GxSxK=jnp.where(taken_GxSxK, gate_GxSxK, 0),
    position_GxSxK=jnp.where(taken_GxSxK, position_GxSxK, 0),
    num_experts=E,
  )
  return assignment, Aux(
    losses={},
    metrics={
      'entropy': (entr(score_GxSxE).sum(-1) * mask_GxS).sum(),
      'confidence': (score_GxSxE.max(-1) * mask_GxS).sum(),
    },
    logits=logits_GxSxE,
    log_z=jax.nn.logsumexp(logits_GxSxE, -1),
  )


def capped(
  scores_GxSxE: Array, *, n: int, max_experts: int, mask_GxS: Array
) -> Array:
  """Full experts of a high total score, b = `max_experts` a token at most.

  The linear programme of section 3.3 without its entropy: maximise the sum of
  the scores taken, where expert e takes n_e tokens and a token has at most b
  experts. Its optimum is integral. n_e is n. Only where the T unmasked tokens
  have too few places, T b < E n, are all T b shared out: each expert has
  T b / E of them rounded down or, those of the highest sum of scores, up.

  Found by an auction. In a round every expert that is not full bids for as many
  tokens as it lacks, those of the highest score less price, up to what the best
  of the other tokens is worth to it and epsilon more. A token keeps its b
  highest bids; the lowest of them is its price, which is 0 while it has room.
  Ties go to the earlier token and to the lower expert.

  It ends with every expert full, for a round that takes no new place raises the
  bids by epsilon at least, and no bid exceeds E (1 + epsilon). The total is
  within E n epsilon of the optimum, with the epsilon of the last round; the
  optimum is at least n. Epsilon is (1 + t / 128) / (256 E) in round t: an
  auction that is soon done is nearly exact, and a long one ends. For N = E n it
  takes at most N + 363 E sqrt(N) + 4 E N rounds.

  What it takes is far less. With S up to 512 and E up to 32: some 20 rounds
  where places are left, T b > E n, hundreds if tokens are duplicates or scores
  saturate; up to 3,500 where none is left, as with b = k, for then the places
  that nobody wants must be taken too. The total was at least .997 of the
  optimum. All groups take as many rounds as the slowest, which changes none.

  Args:
    scores_GxSxE: float32, from 0 to 1; NaN counts as 0.
    n: tokens of an expert.
    max_experts: b, experts of a token, from 1 to E.
    mask_GxS: tokens there are.

  Returns:
    Boolean [G, S, E]. No gradient.

  Example:
    >>> scores_GxSxE = jnp.array([[[0.9, 0.8], [0.5, 0.1]]])
    >>> mask_GxS = jnp.ones((1, 2), bool)
    >>> capped(scores_GxSxE, n=1, max_experts=1, mask_GxS=mask_GxS).tolist()
    [[[False, True], [True, False]]]

  References:
    Bertsekas and Castanon 1989, "The auction algorithm for the transportation
    problem": experts are the persons, the places of a token similar objects.
  """
  E = scores_GxSxE.shape[-1]
  scores_GxSxE = jnp.nan_to_num(jax.lax.stop_gradient(scores_GxSxE))
  scores_GxSxE = jnp.where(mask_GxS[..., None], scores_GxSxE, 0)
  # Ranks by the sum of scores, ties to the lower expert.
  rank_GxE = jnp.argsort(jnp.argsort(-scores_GxSxE.sum(1), axis=-1), axis=-1)
  tokens_Gx1 = mask_GxS.sum(1, keepdims=True)
  places_Gx1 = tokens_Gx1 * max_experts
  n_GxE = jnp.minimum(n, places_Gx1 // E + (rank_GxE < places_Gx1 % E))

  def lacks(bid_GxSxE):
    return n_GxE - (bid_GxSxE > 0).sum(1)

  def auction(carry):
    bid_GxSxE, t = carry
    epsilon = (1 + t / 128) / (256 * E)
    has_GxSxE = bid_GxSxE > 0  # Every bid is epsilon at least.
    price_GxS = jnp.where(
      has_GxSxE.sum(-1) < max_experts,
      0,
      jnp.where(has_GxSxE, bid_GxSxE, jnp.inf).min(-1),
    )
    worth_GxSxE = jnp.where(
      has_GxSxE | ~mask_GxS[..., None],
      -jnp.inf,
      scores_GxSxE - price_GxS[..., None],
    )
    wants_GxSxE, next_Gx1xE = _best(worth_GxSxE, lacks(bid_GxSxE)[:, None])
    bid_GxSxE = jnp.where(
      wants_GxSxE, scores_GxSxE - next_Gx1xE + epsilon, bid_GxSxE
    )
    kept_GxSxK = largest(bid_GxSxE, max_experts)
    kept_GxSxE = jax.nn.one_hot(kept_GxSxK, E, dtype=bool).any(2)
    return jnp.where(kept_GxSxE, bid_GxSxE, 0), t + 1

  # An expert of every token has no other to compare with: it gets them first.
  all_GxSxE = (n_GxE == tokens_Gx1)[:, None] & mask_GxS[..., None]
  bid_GxSxE, _ = jax.lax.while_loop(
    lambda carry: (lacks(carry[0]) > 0).any(),
    auction,
    (jnp.where(all_GxSxE, jnp.inf, 0), 0),
  )
  return bid_GxSxE > 0


def _best(worth_GxSxE: Array, count_Gx1xE: Array) -> tuple[Array, Array]:
  """An expert's `count` tokens of highest worth, and what the next is worth.

  Ties go to the earlier token. By bisection: a count of those above a threshold
  is a sum, where a sort in every round took ten times as long.
  """
  bits_GxSxE = jax.lax.bitcast_convert_type(worth_GxSxE, jnp.int32)
  # Integers in the order of the floats.
  key_GxSxE = bits_GxSxE ^ ((bits_GxSxE >> 31) & jnp.int32(0x7FFFFFFF))

  def halve(_, carry):
    low_Gx1xE, high_Gx1xE = carry  # More than `count` are above low, not high.
    middle_Gx1xE = (low_Gx1xE & high_Gx1xE) + ((low_Gx1xE ^ high_Gx1xE) >> 1)
    above_Gx1xE = (key_GxSxE > middle_Gx1xE).sum(1, keepdims=True)
    more_Gx1xE = above_Gx1xE > count_Gx1xE
    return (
      jnp.where(more_Gx1xE, middle_Gx1xE, low_Gx1xE),
      jnp.where(more_Gx1xE, high_Gx1xE, middle_Gx1xE),
    )

  ends = jnp.iinfo(jnp.int32)
  _, next_Gx1xE = jax.lax.fori_loop(
    0,
    32,
    halve,
    (
      jnp.full_like(count_Gx1xE, ends.min),
      jnp.full_like(count_Gx1xE, ends.max),
    ),
  )
  above_GxSxE = key_GxSxE > next_Gx1xE
  ties_GxSxE = key_GxSxE == next_Gx1xE
  room_Gx1xE = count_Gx1xE - above_GxSxE.sum(1, keepdims=True)
  chosen_GxSxE = above_GxSxE | (
    ties_GxSxE & (jnp.cumsum(ties_GxSxE, axis=1) <= room_Gx1xE)
  )
  next_Gx1xE = jnp.where(ties_GxSxE, worth_GxSxE, -jnp.inf).max(
    1, keepdims=True
  )
  return chosen_GxSxE, next_Gx1xE


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

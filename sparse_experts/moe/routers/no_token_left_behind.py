"""No token left behind: who finds no slot goes to its next best expert."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from sparse_experts.letters import Array
from sparse_experts.moe.assignment import Assignment, largest, positions
from sparse_experts.moe.outputs import Aux
from sparse_experts.moe.router import KERNEL_INIT, Router
from sparse_experts.moe.routers.top_k import route
from sparse_experts.numbers import Count, Rate


class NoTokenLeftBehind(Router):
  """Switch, iterated: tokens that overflow their expert try the next one.

  All tokens try their most probable expert, in token order. Those that find no
  slot try their second, those that find none there their third, and so on. The
  gate is the probability of the expert a token ends with. A token that no
  attempt gives a slot stays with its first expert, beyond the capacity. Without
  a capacity this is Switch. Tokens rank experts by logits; their code, by
  probabilities, takes those that round to 0 in order of their index.

  It is not causal: a later token's first attempt comes before an earlier
  token's second.

  Attributes:
    attempts: experts that a token tries; E leaves no token behind at a capacity
      factor of 1 or more. 4 in their code (`ntlb_top_k`).
    jitter: see `Router.logits`; in training only.
    kernel_init: initialiser of W, [D, E].

  Losses: as Switch's, load_balance (of first attempts) and router_z.

  Example:
    >>> router = NoTokenLeftBehind(num_experts=4, attempts=2)
    >>> x_GxSxD = jax.random.normal(jax.random.key(0), (2, 16, 8))
    >>> variables = router.init(jax.random.key(1), x_GxSxD)
    >>> assignment, aux = router.apply(variables, x_GxSxD, capacity=5)
    >>> assignment.expert_GxSxK.shape
    (2, 16, 1)

  References:
    Fedus et al. 2021, https://arxiv.org/abs/2101.03961, appendix B, Figure 11.
  """

  attempts: Count = 4
  jitter: Rate = 0.0
  kernel_init: nn.initializers.Initializer = KERNEL_INIT

  is_causal = False

  @property
  def needs(self) -> tuple[str, ...]:
    return ('capacity', 'rng') if self.jitter else ('capacity',)

  @property
  def drops(self) -> bool:
    """A token can find no slot at a capacity factor of 1."""
    return self.attempts < self.num_experts

  @nn.compact
  def __call__(
    self,
    x_GxSxD: Array,
    *,
    capacity: int | None = None,
    mask_GxS: Array | None = None,
    deterministic: bool = True,
  ) -> tuple[Assignment, Aux]:
    """Routes tokens x [G, S, D]; masked tokens get no expert."""
    if self.k != 1 or not 1 <= self.attempts <= self.num_experts:
      raise ValueError(
        'NoTokenLeftBehind makes k=1 choice in 1 to '
        f'num_experts={self.num_experts} attempts, got k={self.k} and '
        f'attempts={self.attempts}.'
      )
    logits_GxSxE = self.logits(
      x_GxSxD,
      kernel_init=self.kernel_init,
      jitter=0.0 if deterministic else self.jitter,
    )
    assignment, aux = route(logits_GxSxE, mask_GxS=mask_GxS)
    if capacity is not None:
      assignment = reroute(
        logits_GxSxE, assignment.chosen()[..., 0], self.attempts, capacity
      )
    return assignment, aux


def reroute(
  logits_GxSxE: Array, real_GxS: Array, attempts: int, capacity: int
) -> Assignment:
  """The assignment of given logits, K = 1; see `NoTokenLeftBehind`.

  Args:
    logits_GxSxE: float32 router logits.
    real_GxS: boolean, False for padding, which gets no expert and no position.
    attempts: experts that a token tries, from 1 to E.
    capacity: slots of each expert.

  Example:
    >>> logits_GxSxE = jnp.log(jnp.array([[[.6, .4], [.7, .3], [.1, .9]]]))
    >>> assignment = reroute(logits_GxSxE, jnp.ones((1, 3), bool), 2, 1)
    >>> assignment.expert_GxSxK[0, :, 0].tolist()  # Expert 1 is full.
    [0, 0, 1]
  """
  E = logits_GxSxE.shape[-1]
  logits_GxSxE = jnp.where(real_GxS[..., None], logits_GxSxE, 0)
  probs_GxSxE = jax.nn.softmax(logits_GxSxE)
  ranked_GxSxK = largest(jax.lax.stop_gradient(logits_GxSxE), attempts)
  first_GxS = jnp.where(real_GxS, ranked_GxSxK[..., 0], E)
  # Who finds no slot at all keeps its position there.
  expert_GxS, position_GxS = (
    first_GxS,
    positions(first_GxS[..., None], E)[..., 0],
  )
  placed_GxS = real_GxS & (position_GxS < capacity)
  for attempt in range(1, attempts):
    filled_GxE = jax.nn.one_hot(
      jnp.where(placed_GxS, expert_GxS, E), E, dtype=jnp.int32
    ).sum(1)
    tries_GxS = real_GxS & ~placed_GxS
    next_GxS = jnp.where(tries_GxS, ranked_GxSxK[..., attempt], E)
    filled_GxS = (
      jax.nn.one_hot(next_GxS, E, dtype=jnp.int32) * filled_GxE[:, None]
    ).sum(-1)
    line_GxS = positions(next_GxS[..., None], E)[..., 0] + filled_GxS
    fits_GxS = tries_GxS & (line_GxS < capacity)
    expert_GxS = jnp.where(fits_GxS, next_GxS, expert_GxS)
    position_GxS = jnp.where(fits_GxS, line_GxS, position_GxS)
    placed_GxS |= fits_GxS
  # One-hot rather than a lookup: the gradient is no scatter-add.
  gate_GxS = (jax.nn.one_hot(expert_GxS, E) * probs_GxSxE).sum(-1)
  return Assignment(
    expert_GxSxK=expert_GxS[..., None],
    gate_GxSxK=gate_GxS[..., None],
    position_GxSxK=position_GxS[..., None],
    num_experts=E,
  )

"""Expert prototyping: k groups of experts, and the best expert of each."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from sparse_experts.letters import Array
from sparse_experts.moe import losses
from sparse_experts.moe.assignment import Assignment
from sparse_experts.moe.outputs import Aux
from sparse_experts.moe.router import KERNEL_INIT, Router
from sparse_experts.moe.routers.top_k import route


class Prototyping(Router):
  """k top-1 routers side by side, each over E / k experts of its own.

      y = sum over prototypes z of p_z E_z(x),  p_z = max softmax(x W_z)

  Expert e belongs to prototype e // (E / k); W is all W_z beside one another.
  As every line holds first choices only, this is causal for any k.

  Attributes:
    jitter: see `Router.logits`; in training only.
    kernel_init: initialiser of W, [D, E].

  Losses: load_balance and router_z of Switch, means over prototypes. The
  paper finds that imbalance hardly hurts quality.

  Example:
    >>> router = Prototyping(num_experts=4, k=2)
    >>> x_GxSxD = jax.random.normal(jax.random.key(0), (2, 16, 8))
    >>> variables = router.init(jax.random.key(1), x_GxSxD)
    >>> assignment, aux = router.apply(variables, x_GxSxD)
    >>> (assignment.expert_GxSxK // 2)[0, 0].tolist()  # One of each prototype.
    [0, 1]

  References:
    Yang et al. 2021 (M6-T), https://arxiv.org/abs/2105.15082, section 3.2.
  """

  k: int = 2
  jitter: float = 0.0
  kernel_init: nn.initializers.Initializer = KERNEL_INIT

  exchangeable = False  # Neighbours are a prototype.

  @property
  def needs(self) -> tuple[str, ...]:
    return ('rng',) if self.jitter else ()

  @nn.compact
  def __call__(
    self,
    x_GxSxD: Array,
    *,
    mask_GxS: Array | None = None,
    deterministic: bool = True,
  ) -> tuple[Assignment, Aux]:
    """Routes tokens x [G, S, D]; masked tokens get no expert."""
    self.check_gradient(
      self.k == self.num_experts, 'one expert a prototype (k=num_experts)'
    )
    logits_GxSxE = self.logits(
      x_GxSxD,
      kernel_init=self.kernel_init,
      jitter=0.0 if deterministic else self.jitter,
    )
    return route_prototypes(logits_GxSxE, k=self.k, mask_GxS=mask_GxS)


def route_prototypes(
  logits_GxSxE: Array, *, k: int, mask_GxS: Array | None = None
) -> tuple[Assignment, Aux]:
  """Expert prototyping of given logits; see `Prototyping`.

  Args:
    logits_GxSxE: float32 router logits, those of a prototype in a run.
    k: prototypes, of equal size; choice z of a token is prototype z's.
    mask_GxS: boolean, False for padding, which gets no expert and no position.

  Raises:
    ValueError: k does not divide E.
  """
  G, S, E = logits_GxSxE.shape
  if k < 1 or E % k:
    raise ValueError(f'k must divide num_experts={E} into prototypes, got {k}.')
  if mask_GxS is not None:  # Whatever padding holds, NaN too, stays there.
    logits_GxSxE = jnp.where(mask_GxS[..., None], logits_GxSxE, 0)
  size = E // k
  # A prototype is a group of its own to the top-1 router.
  logits_GKxSxE = (
    logits_GxSxE.reshape(G, S, k, size).swapaxes(1, 2).reshape(G * k, S, size)
  )
  mask_GKxS = None if mask_GxS is None else jnp.repeat(mask_GxS, k, axis=0)
  assignment, aux = route(logits_GKxSxE, mask_GxS=mask_GKxS)

  def choices(x_GKxSx1):
    return x_GKxSx1.reshape(G, k, S).swapaxes(1, 2)

  expert_GxSxK = choices(assignment.expert_GxSxK)
  first_1x1xK = size * jnp.arange(k, dtype=jnp.int32)[None, None]
  # f and P are of the same tokens for all prototypes.
  balance = losses.Balance(
    counted_GxE=aux.balance.counted_GxE.reshape(G, E),
    score_GxE=aux.balance.score_GxE.reshape(G, E),
    tokens_G=aux.balance.tokens_G[::k],
    scale=size / k,
  )
  return Assignment(
    expert_GxSxK=jnp.where(expert_GxSxK < size, first_1x1xK + expert_GxSxK, E),
    gate_GxSxK=choices(assignment.gate_GxSxK),
    position_GxSxK=choices(assignment.position_GxSxK),
    num_experts=E,
  ), Aux(
    losses={
      'load_balance': balance.loss(),
      'router_z': aux.losses['router_z'],
    },
    metrics=jax.tree.map(lambda total: total / k, aux.metrics),
    logits=logits_GxSxE,
    # Its square is what the z-loss is the mean of.
    log_z=jnp.sqrt(jnp.square(aux.log_z).reshape(G, k, S).mean(1)),
    tokens=aux.tokens / k,
    balance=balance,
  )

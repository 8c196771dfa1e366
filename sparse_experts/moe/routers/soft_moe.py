"""Soft MoE: slots that are mixtures of tokens; no token is assigned at all."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.scipy.special import entr

from sparse_experts import sharding
from sparse_experts.layers.cost import Cost
from sparse_experts.letters import Array
from sparse_experts.moe.assignment import SoftAssignment
from sparse_experts.moe.outputs import Aux
from sparse_experts.moe.router import Router

# Of the authors' code. Its scale does not matter: phi is normalised.
LECUN_NORMAL = nn.initializers.lecun_normal()


class SoftMoE(Router):
  """Soft router in float32, then `mix`.

      logits = norm(x) . (scale * norm(phi))

  where norm divides by the l2 norm over D: without it, the logits of a wide
  model would saturate both softmaxes. Its slots are its own: capacity does not
  matter to it. Every token sees every other: it is not causal.

  Attributes:
    slots: p, slots of an expert. The paper's best is 1 with many experts.
    noise: in training, Gaussian noise of this standard deviation is added to
      the logits (the authors' code; 0 in their runs).
    phi_init: initialiser of phi, [D, E, p]. Their code's.

  Example:
    >>> router = SoftMoE(num_experts=4, slots=2)
    >>> x_GxSxD = jax.random.normal(jax.random.key(0), (2, 16, 8))
    >>> variables = router.init(jax.random.key(1), x_GxSxD)
    >>> assignment, aux = router.apply(variables, x_GxSxD)
    >>> assignment.combine_GxSxExC.shape
    (2, 16, 4, 2)

  References:
    Puigcerver et al. 2023, https://arxiv.org/abs/2308.00951, section 2.1 and
    Algorithms 1 and 2; norms and scale: section 2.3; and their code,
    vmoe/projects/soft_moe/router.py.
  """

  slots: int = 1
  noise: float = 0.0
  phi_init: nn.initializers.Initializer = LECUN_NORMAL

  is_causal = False
  drops = False

  @property
  def needs(self) -> tuple[str, ...]:
    return ('rng',) if self.noise else ()

  @nn.compact
  def __call__(
    self,
    x_GxSxD: Array,
    *,
    mask_GxS: Array | None = None,
    deterministic: bool = True,
  ) -> tuple[SoftAssignment, Aux]:
    """Mixes tokens x [G, S, D]; masked tokens give and get nothing."""
    if self.slots < 1:
      raise ValueError(f'slots must be at least 1, got {self.slots}.')
    phi_DxExC = self.param(
      'phi',
      sharding.named(self.phi_init, 'embed', 'router', 'slots'),
      (x_GxSxD.shape[-1], self.num_experts, self.slots),
      jnp.float32,
    )
    scale = self.param(
      'scale', sharding.named(nn.initializers.ones), (), jnp.float32
    )
    if mask_GxS is not None:
      x_GxSxD = jnp.where(mask_GxS[..., None], x_GxSxD, 0)
    logits_GxSxExC = jnp.einsum(
      'GSD,DEC->GSEC',
      _normalise(x_GxSxD.astype(jnp.float32), -1),
      scale * _normalise(phi_DxExC, 0),
      precision=jax.lax.Precision.HIGHEST,
    )
    if self.noise and not deterministic:
      logits_GxSxExC += self.noise * jax.random.normal(
        self.make_rng('dropout'), logits_GxSxExC.shape
      )
    return mix(logits_GxSxExC, mask_GxS)

  def cost(self, x_GxSxD: Array, **_) -> Cost:
    """As of any router, with logits of slots and the product with phi."""
    slots = self.num_experts * self.slots
    return Cost(
      float32_inputs=1,
      routed=math.prod(x_GxSxD.shape[:2]) * slots,
      flops=2 * math.prod(x_GxSxD.shape) * slots,
    )

  def slots_of_expert(self, rule, factor, group_size) -> float:
    """Its own, whatever the capacity."""
    del rule, factor, group_size
    return self.slots


def mix(
  logits_GxSxExC: Array, mask_GxS: Array | None = None
) -> tuple[SoftAssignment, Aux]:
  """Both softmaxes of given logits: over tokens, and over slots.

  Args:
    logits_GxSxExC: float32, of each token with each slot of each expert.
    mask_GxS: False for tokens that give nothing to any slot and get nothing.

  Returns:
    SoftAssignment: dispatch weights sum to 1 over the unmasked tokens for each
    slot, combine weights to 1 over slots for each unmasked token. Aux without
    losses; `entropy` and `confidence` are those of a token's shares of experts.

  Example:
    >>> assignment, _ = mix(jnp.zeros((1, 4, 2, 1)))
    >>> assignment.dispatch_GxSxExC[0, 0, 0, 0], float(
    ...   assignment.combine_GxSxExC[0, 0, 0, 0]
    ... )
    (Array(0.25, dtype=float32), 0.5)
  """
  G, S, E, C = logits_GxSxExC.shape
  if mask_GxS is None:
    mask_GxS = jnp.ones((G, S), bool)
  real_GxSx1x1 = mask_GxS[..., None, None]
  logits_GxSxExC = jnp.where(real_GxSx1x1, logits_GxSxExC, 0)
  # Finite, for a group that is all padding.
  dispatch_GxSxExC = jax.nn.softmax(
    jnp.where(real_GxSx1x1, logits_GxSxExC, -1e30), axis=1
  )
  combine_GxSxExC = jax.nn.softmax(logits_GxSxExC, axis=(2, 3))
  share_GxSxE = jax.lax.stop_gradient(combine_GxSxExC).sum(-1)
  return SoftAssignment(
    dispatch_GxSxExC=jnp.where(real_GxSx1x1, dispatch_GxSxExC, 0),
    combine_GxSxExC=jnp.where(real_GxSx1x1, combine_GxSxExC, 0),
  ), Aux(
    losses={},
    metrics={
      'entropy': (entr(share_GxSxE).sum(-1) * mask_GxS).sum(),
      'confidence': (share_GxSxE.max(-1) * mask_GxS).sum(),
    },
    logits=jax.nn.logsumexp(logits_GxSxExC, -1),
  )


def _normalise(x: Array, axis: int) -> Array:
  """x over its l2 norm; 0 for 0, with the epsilon of the authors' code."""
  square = jnp.square(x).sum(axis, keepdims=True)
  return x * jax.lax.rsqrt(square + 1e-6)

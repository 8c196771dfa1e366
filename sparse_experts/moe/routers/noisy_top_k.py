"""Noisy top-k gating: each token chooses its k largest noisy logits.

The gate that made sparse experts trainable. Importance and load losses balance
it, through the noise.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn

from sparse_experts.letters import Array
from sparse_experts.moe import losses
from sparse_experts.moe.assignment import Assignment, is_causal
from sparse_experts.moe.outputs import Aux
from sparse_experts.moe.router import Router
from sparse_experts.moe.routers.top_k import route
from sparse_experts.numbers import NotNegative

# Deviations at or below it divide nothing.
_LEAST = 1e-6


class NoisyTopK(Router):
  """G(x) = softmax(KeepTopK(x Wg + N(0, 1) softplus(x Wnoise), k)).

  There is noise in training only. With k = 1 the gate is always 1, which
  `allow_no_gradient` has to allow: the paper takes k > 1.

  Attributes:
    priority: who is served first, see `assignment.positions`; the paper drops
      nothing.
    least_noise: added to the noise's deviation: 0 in the paper, 1e-2 in its
      code (Tensor2Tensor, `noisy_top_k_gating`).
    kernel_init: of Wg, `kernel`, and Wnoise, `noise_kernel`, both [D, E]: zeros
      in the paper's appendix A, "no signal and some noise".

  Losses: importance and load. Without noise the load loss asks how likely each
  expert were to be chosen with noise on it alone; with k = E it is 0.

  Example:
    >>> router = NoisyTopK(num_experts=4, k=2)
    >>> x_GxSxD = jax.random.normal(jax.random.key(0), (2, 16, 8))
    >>> variables = router.init(jax.random.key(1), x_GxSxD)
    >>> assignment, aux = router.apply(variables, x_GxSxD)
    >>> sorted(aux.losses)
    ['importance', 'load', 'router_z']

  References:
    Shazeer et al. 2017, https://arxiv.org/abs/1701.06538, equations 3 to 5 and
    appendix A.
  """

  k: int = 4
  priority: str = 'token'
  least_noise: NotNegative = 0.0
  kernel_init: nn.initializers.Initializer = nn.initializers.zeros

  needs = ('rng',)

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
    logits_GxSxE = self.logits(x_GxSxD, kernel_init=self.kernel_init)
    deviation_GxSxE = self.least_noise + nn.softplus(
      self.logits(x_GxSxD, kernel_init=self.kernel_init, name='noise_kernel')
    )
    normal_GxSxE = None
    if not deterministic:
      normal_GxSxE = jax.random.normal(
        self.make_rng('dropout'), logits_GxSxE.shape
      )
    return route_noisily(
      logits_GxSxE,
      deviation_GxSxE,
      normal_GxSxE,
      k=self.k,
      mask_GxS=mask_GxS,
      priority=self.priority,
    )


def route_noisily(
  logits_GxSxE: Array,
  deviation_GxSxE: Array,
  normal_GxSxE: Array | None = None,
  *,
  k: int,
  mask_GxS: Array | None = None,
  priority: str = 'token',
) -> tuple[Assignment, Aux]:
  """Noisy top-k gating of given logits.

  Args:
    logits_GxSxE: float32, x Wg.
    deviation_GxSxE: float32 >= 0, softplus(x Wnoise).
    normal_GxSxE: standard normal noise; None for none.
    k: choices per token, 1 <= k <= E.
    mask_GxS: boolean, False for padding, which gets no expert and no position.
    priority: see `assignment.positions`.

  Returns:
    Assignment and Aux with losses `importance`, `load` and `router_z` and the
    metrics of `top_k.route` (of the noisy softmax).

  Raises:
    ValueError: an argument is out of its range.
  """
  if mask_GxS is not None:
    real_GxSx1 = mask_GxS[..., None]
    logits_GxSxE = jnp.where(real_GxSx1, logits_GxSxE, 0)
    deviation_GxSxE = jnp.where(real_GxSx1, deviation_GxSxE, 1)
  noise_GxSxE = None
  if normal_GxSxE is not None:
    noise_GxSxE = normal_GxSxE * deviation_GxSxE
  assignment, aux = route(
    logits_GxSxE,
    noise_GxSxE=noise_GxSxE,
    k=k,
    mask_GxS=mask_GxS,
    gates='chosen',
    priority=priority,
  )
  noisy_GxSxE = add_noise(logits_GxSxE, deviation_GxSxE, normal_GxSxE)
  probs_GxSxE = chosen_probability(
    logits_GxSxE, noisy_GxSxE, deviation_GxSxE, k
  )
  return assignment, balanced_by(
    aux, gate_of_each(assignment), probs_GxSxE, mask_GxS
  )


def balanced_by(
  aux: Aux, weight_GxSxE: Array, probs_GxSxE: Array, mask_GxS: Array | None
) -> Aux:
  """Losses of importance and load in the place of one of f and P.

  Args:
    aux: of `top_k.route`.
    weight_GxSxE: of each token for each expert, whose sums are importance.
    probs_GxSxE: of being chosen, whose sums are load.
    mask_GxS: tokens that count; None: all.
  """
  return dataclasses.replace(
    aux,
    losses={
      'importance': losses.importance(weight_GxSxE, mask_GxS),
      'load': losses.load(probs_GxSxE, mask_GxS),
      'router_z': aux.losses['router_z'],
    },
    balance=None,
  )


def add_noise(
  logits_GxSxE: Array, deviation: Array | float, normal_GxSxE: Array | None
) -> Array:
  """H(x) of equation 4, float32 [G, S, E].

  Args:
    logits_GxSxE: float32, without noise.
    deviation: its standard deviation, [G, S, E] or one for all.
    normal_GxSxE: standard normal draws; None: no noise.
  """
  if normal_GxSxE is None:
    return logits_GxSxE
  return logits_GxSxE + normal_GxSxE * deviation


def chosen_probability(
  logits_GxSxE: Array, noisy_GxSxE: Array, deviation_GxSxE: Array, k: int
) -> Array:
  """P(x, e) of equation 9, float32 [G, S, E]; 1 where all are chosen.

  Args:
    logits_GxSxE: float32, without noise.
    noisy_GxSxE: with it.
    deviation_GxSxE: the noise's standard deviation.
    k: choices of a token.
  """
  if k == logits_GxSxE.shape[-1]:
    return jnp.ones_like(logits_GxSxE)
  return losses.selection_probability(
    logits_GxSxE,
    losses.others_threshold(noisy_GxSxE, k),
    jnp.maximum(deviation_GxSxE, _LEAST),
  )


def gate_of_each(assignment: Assignment) -> Array:
  """G(x): the gate of every expert, 0 where not chosen, float32 [G, S, E]."""
  onehot_GxSxKxE = jax.nn.one_hot(
    assignment.expert_GxSxK, assignment.num_experts
  )
  return jnp.einsum('GSK,GSKE->GSE', assignment.gate_GxSxK, onehot_GxSxKxE)

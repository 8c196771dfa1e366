"""V-MoE's router: top-k of a noisy softmax, importance and load losses."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from sparse_experts.letters import Array
from sparse_experts.moe import losses
from sparse_experts.moe.assignment import Assignment, is_causal, largest
from sparse_experts.moe.outputs import Aux
from sparse_experts.moe.router import KERNEL_INIT, Router
from sparse_experts.moe.routers.noisy_top_k import add_noise, balanced_by
from sparse_experts.moe.routers.top_k import route
from sparse_experts.numbers import NotNegative


class VMoE(Router):
  """TOP_k(softmax(x W + noise)): softmax before top-k, never renormalised.

  Attributes:
    priority: who is served first, see `assignment.positions`: 'choice', or
      'confidence' for batch-prioritised routing (section 4.1).
    noise: in training, Gaussian noise of standard deviation noise / E is added
      to the logits (section 2.1, noise = 1).
    kernel_init: initialiser of W, [D, E].

  Losses: importance, of the noise-free softmax, and load; the paper's is the
  mean of both, so each has half its weight. Without noise in the logits (in
  evaluation) the load loss asks how likely each expert were to be chosen with
  noise on it alone.

  Example:
    >>> router = VMoE(num_experts=4, k=2)
    >>> x_GxSxD = jax.random.normal(jax.random.key(0), (2, 16, 8))
    >>> variables = router.init(jax.random.key(1), x_GxSxD)
    >>> assignment, aux = router.apply(variables, x_GxSxD)
    >>> sorted(aux.losses)
    ['importance', 'load', 'router_z']

  References:
    Riquelme et al. 2021, https://arxiv.org/abs/2106.05974, section 2.1 and
    appendix A.2; constants as in its code, `vmoe/nn/routing.py`.
  """

  k: int = 2
  priority: str = 'choice'
  noise: NotNegative = 1.0
  kernel_init: nn.initializers.Initializer = KERNEL_INIT

  @property
  def needs(self) -> tuple[str, ...]:
    return ('rng',) if self.noise else ()

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
    logits_GxSxE = self.logits(x_GxSxD, kernel_init=self.kernel_init)
    normal_GxSxE = None
    if self.noise and not deterministic:
      normal_GxSxE = jax.random.normal(
        self.make_rng('dropout'), logits_GxSxE.shape
      )
    return route_softmax(
      logits_GxSxE,
      normal_GxSxE,
      k=self.k,
      deviation=self.noise / self.num_experts,
      mask_GxS=mask_GxS,
      priority=self.priority,
    )


def route_softmax(
  logits_GxSxE: Array,
  normal_GxSxE: Array | None = None,
  *,
  k: int,
  deviation: float,
  mask_GxS: Array | None = None,
  priority: str = 'choice',
) -> tuple[Assignment, Aux]:
  """V-MoE's routing of given logits.

  Args:
    logits_GxSxE: float32, x W.
    normal_GxSxE: standard normal noise; None for none.
    k: choices per token, 1 <= k <= E.
    deviation: of the noise, 1 / E.
    mask_GxS: boolean, False for padding, which gets no expert and no position.
    priority: see `assignment.positions`.

  Returns:
    Assignment and Aux with losses `importance`, `load` and `router_z` and the
    metrics of `top_k.route` (of the noisy softmax).

  Raises:
    ValueError: an argument is out of its range.
  """
  if mask_GxS is not None:  # Whatever padding holds, NaN too, stays there.
    logits_GxSxE = jnp.where(mask_GxS[..., None], logits_GxSxE, 0)
  noise_GxSxE = None
  if normal_GxSxE is not None:
    noise_GxSxE = deviation * normal_GxSxE
  assignment, aux = route(
    logits_GxSxE,
    noise_GxSxE=noise_GxSxE,
    k=k,
    mask_GxS=mask_GxS,
    gates='all',
    choose_by='probs',  # As its code.
    priority=priority,
  )
  noisy_GxSxE = add_noise(logits_GxSxE, deviation, normal_GxSxE)
  chances_GxSxE = selected_probability(logits_GxSxE, noisy_GxSxE, deviation, k)
  return assignment, balanced_by(
    aux, jax.nn.softmax(logits_GxSxE), chances_GxSxE, mask_GxS
  )


def selected_probability(
  logits_GxSxE: Array, noisy_GxSxE: Array, deviation: float, k: int
) -> Array:
  """That an expert beats the k-th largest noisy logit, float32 [G, S, E].

  Unlike Shazeer's (`noisy_top_k.chosen_probability`) that logit may be its own,
  as in appendix A.2 and the code. Where `deviation` is 0: is it reached?

  Args:
    logits_GxSxE: float32, without noise.
    noisy_GxSxE: with it, or the same where nothing was drawn.
    deviation: the noise's standard deviation.
    k: choices of a token.
  """
  expert_GxSxK = largest(noisy_GxSxE, k)
  last_GxSxE = jax.nn.one_hot(expert_GxSxK[..., -1], noisy_GxSxE.shape[-1])
  threshold_GxSx1 = jnp.where(last_GxSxE > 0, noisy_GxSxE, 0).sum(
    -1, keepdims=True
  )
  if not deviation:
    return (noisy_GxSxE >= threshold_GxSx1).astype(jnp.float32)
  return losses.selection_probability(logits_GxSxE, threshold_GxSx1, deviation)

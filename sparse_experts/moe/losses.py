"""Losses that keep a router balanced and its logits small.

Each is computed per group and averaged over groups, so microbatches that keep
groups whole give the same value and gradient as the whole batch.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sparse_experts.arrays import Array, masked_mean


def load_balance(
  probs_GxSxE: Array, counted_GxSxE: Array, mask_GxS: Array | None = None
) -> Array:
  """E * sum_e f_e P_e, the mean over groups.

  f_e is the fraction of tokens with a counted choice of expert e (before any
  capacity), P_e the mean router probability. 1 at perfect balance when one
  choice of each token counts, k when k do. The gradient flows through P.

  Args:
    probs_GxSxE: float32 router probabilities.
    counted_GxSxE: 1 where a choice counts.
    mask_GxS: tokens to average over; None averages over all S positions.

  References:
    Fedus et al. 2021, https://arxiv.org/abs/2101.03961, equations 4 to 6,
    without alpha; per group as in their code.
  """
  mask = None if mask_GxS is None else mask_GxS[..., None]
  f_GxE = masked_mean(counted_GxSxE, mask, axis=1)
  p_GxE = masked_mean(probs_GxSxE, mask, axis=1)
  num_experts = probs_GxSxE.shape[-1]
  return num_experts * (jax.lax.stop_gradient(f_GxE) * p_GxE).sum(-1).mean()


def router_z(logits_GxSxE: Array, mask_GxS: Array | None = None) -> Array:
  """Mean of logsumexp(logits)^2, which keeps router logits small.

  References:
    Zoph et al. 2022, https://arxiv.org/abs/2202.08906, equation 5.
  """
  z_GxS = jnp.square(jax.nn.logsumexp(logits_GxSxE, axis=-1))
  return masked_mean(z_GxS, mask_GxS).mean()

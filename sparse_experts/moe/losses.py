"""Losses that keep a router balanced and its logits small.

Each is computed per group and averaged over groups, so microbatches that keep
groups whole give the same value and gradient as the whole batch.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sparse_experts.arrays import Array, masked_mean
from sparse_experts.moe.assignment import largest


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


def importance(gates_GxSxE: Array, mask_GxS: Array | None = None) -> Array:
  """CV^2 over experts of the sums of their gates, the mean over groups.

  0 where all experts weigh the same.

  Args:
    gates_GxSxE: float32, the gate of every expert, 0 where it is not chosen
      (Shazeer et al. 2017); noise-free softmax over all (Riquelme et al. 2021).
    mask_GxS: tokens that count; None: all.

  References:
    Shazeer et al. 2017, https://arxiv.org/abs/1701.06538, equations 6 and 7.
    Riquelme et al. 2021, https://arxiv.org/abs/2106.05974, appendix A.2.
  """
  return _square_variation(_sum_over_tokens(gates_GxSxE, mask_GxS)).mean()


def load(probs_GxSxE: Array, mask_GxS: Array | None = None) -> Array:
  """CV^2 over experts of the tokens expected in each, the mean over groups.

  Args:
    probs_GxSxE: from `selection_probability`.
    mask_GxS: tokens that count; None: all.

  References:
    Shazeer et al. 2017, appendix A, equations 10 and 11; Riquelme et al. 2021,
    appendix A.2.
  """
  return importance(probs_GxSxE, mask_GxS)


def selection_probability(
  logits_GxSxE: Array, threshold: Array, deviation: Array | float
) -> Array:
  """P(x, e) that an expert is chosen if its own noise were drawn again.

  Float32 [G, S, E]; the gradient flows through all three arguments.

  Args:
    logits_GxSxE: without noise.
    threshold: the noisy logit it has to beat, shape [G, S, E] or [G, S, 1]; see
      `others_threshold`.
    deviation: standard deviation of the noise, a number or shape [G, S, E].

  References:
    Shazeer et al. 2017, appendix A, equations 8 and 9.
  """
  return jax.scipy.stats.norm.cdf((logits_GxSxE - threshold) / deviation)


def others_threshold(noisy_GxSxE: Array, k: int) -> Array:
  """The k-th largest noisy logit among the other experts, shape [G, S, E].

  kth_excluding(H(x), k, i) of Shazeer et al. 2017, appendix A, for every i: the
  (k + 1)-th largest of all for those in the top k, the k-th for the others.

  Raises:
    ValueError: k is not below E.
  """
  E = noisy_GxSxE.shape[-1]
  if not 1 <= k < E:
    raise ValueError(
      f'a k-th of the {E - 1} other experts needs k from 1 to {E - 1}, got {k}.'
    )
  expert_GxSxK = largest(noisy_GxSxE, k + 1)
  onehot_GxSxKxE = jax.nn.one_hot(expert_GxSxK[:, :, -2:], E)
  value_GxSx2 = jnp.where(onehot_GxSxKxE > 0, noisy_GxSxE[:, :, None], 0).sum(
    -1
  )
  chosen_GxSxE = jax.nn.one_hot(expert_GxSxK[:, :, :k], E).sum(2) > 0
  return jnp.where(chosen_GxSxE, value_GxSx2[..., 1:], value_GxSx2[..., :1])


def _sum_over_tokens(x_GxSxE: Array, mask_GxS: Array | None) -> Array:
  if mask_GxS is not None:
    x_GxSxE = jnp.where(mask_GxS[..., None], x_GxSxE, 0)
  return x_GxSxE.sum(1)


def _square_variation(x_GxE: Array) -> Array:
  """(deviation / mean)^2 of each row; 0 for zeros.

  Without the root: its slope at perfect balance is infinite.
  """
  mean_Gx1 = x_GxE.mean(-1, keepdims=True)
  variance_G = jnp.square(x_GxE - mean_Gx1).mean(-1)
  return variance_G / (jnp.square(mean_Gx1[:, 0]) + 1e-10)

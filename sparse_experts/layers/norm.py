"""Root mean square normalisation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from sparse_experts import sharding
from sparse_experts.arrays import Array


class RMSNorm(nn.Module):
  """y = x / sqrt(mean(x^2) + epsilon) * scale, computed in float32.

  flax's own norms give their scale no axis names.

  References:
    Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467.
  """

  epsilon: float = 1e-6

  @nn.compact
  def __call__(self, x_xD: Array) -> Array:
    scale_D = self.param(
      'scale',
      sharding.named(nn.initializers.ones, 'embed'),
      (x_xD.shape[-1],),
      jnp.float32,
    )
    y_xD = x_xD.astype(jnp.float32)
    y_xD *= jax.lax.rsqrt(
      jnp.square(y_xD).mean(-1, keepdims=True) + self.epsilon
    )
    scale_xD = scale_D.reshape((1,) * (x_xD.ndim - 1) + (-1,))
    return (y_xD * scale_xD).astype(x_xD.dtype)

"""Normalisation, by the root mean square or by mean and deviation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from sparse_experts import sharding
from sparse_experts.layers.cost import Cost
from sparse_experts.letters import Array


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

  def cost(self, x_xD: Array) -> Cost:
    """Of reading x in float32."""
    del x_xD
    return Cost(float32_inputs=1)


class LayerNorm(nn.Module):
  """y = (x - mean) / sqrt(variance + epsilon) * scale + bias, in float32.

  References:
    Ba et al. 2016, https://arxiv.org/abs/1607.06450.
  """

  epsilon: float = 1e-6

  @nn.compact
  def __call__(self, x_xD: Array) -> Array:
    def parameter(name, init):
      value_D = self.param(
        name, sharding.named(init, 'embed'), (x_xD.shape[-1],), jnp.float32
      )
      return value_D.reshape((1,) * (x_xD.ndim - 1) + (-1,))

    y_xD = x_xD.astype(jnp.float32)
    y_xD -= y_xD.mean(-1, keepdims=True)
    y_xD *= jax.lax.rsqrt(
      jnp.square(y_xD).mean(-1, keepdims=True) + self.epsilon
    )
    y_xD *= parameter('scale', nn.initializers.ones)
    return (y_xD + parameter('bias', nn.initializers.zeros)).astype(x_xD.dtype)

  def cost(self, x_xD: Array) -> Cost:
    """Of reading x in float32."""
    del x_xD
    return Cost(float32_inputs=1)

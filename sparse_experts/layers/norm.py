"""Normalisation, by the root mean square or by mean and deviation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from sparse_experts import sharding
from sparse_experts.layers import parameters
from sparse_experts.layers.cost import Cost
from sparse_experts.letters import Array
from sparse_experts.numbers import NotNegative


class RMSNorm(nn.Module):
  """y = x / sqrt(mean(x^2) + epsilon) * scale, computed in float32.

  flax's own norms give their scale no axis names.

  References:
    Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467.
  """

  epsilon: NotNegative = 1e-6

  @nn.compact
  def __call__(self, x_xD: Array) -> Array:
    y_xD = x_xD.astype(jnp.float32)
    y_xD *= jax.lax.rsqrt(
      jnp.square(y_xD).mean(-1, keepdims=True) + self.epsilon
    )
    return (y_xD * _vector(self, y_xD, 'scale')).astype(x_xD.dtype)

  def cost(self, x_xD: Array) -> Cost:
    """Of reading x in float32."""
    del x_xD
    return Cost(float32_inputs=1)


class LayerNorm(nn.Module):
  """y = (x - mean) / sqrt(variance + epsilon) * scale + bias, in float32.

  References:
    Ba et al. 2016, https://arxiv.org/abs/1607.06450.
  """

  epsilon: NotNegative = 1e-6

  @nn.compact
  def __call__(self, x_xD: Array) -> Array:
    y_xD = x_xD.astype(jnp.float32)
    y_xD -= y_xD.mean(-1, keepdims=True)
    y_xD *= jax.lax.rsqrt(
      jnp.square(y_xD).mean(-1, keepdims=True) + self.epsilon
    )
    y_xD *= _vector(self, y_xD, 'scale')
    return (y_xD + _vector(self, y_xD, 'bias')).astype(x_xD.dtype)

  def cost(self, x_xD: Array) -> Cost:
    """Of reading x in float32."""
    del x_xD
    return Cost(float32_inputs=1)


def _vector(module: nn.Module, x_xD: Array, name: str) -> Array:
  """A scale, of ones, or a bias, of zeros, as rows meet it."""
  init = {'scale': nn.initializers.ones, 'bias': nn.initializers.zeros}[name]
  init = sharding.named(init, 'embed')
  return parameters.vector(module, x_xD, name, init, x_xD.shape[-1:])

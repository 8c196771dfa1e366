"""The feed-forward block, which is also the expert."""

from __future__ import annotations

import math

import jax
from flax import linen as nn

from sparse_experts.layers import parameters
from sparse_experts.layers.cost import Cost
from sparse_experts.layers.dropout import Dropout
from sparse_experts.layers.linear import Linear
from sparse_experts.letters import Array
from sparse_experts.numbers import Count, Positive, Rate

ACTIVATIONS = {
  'relu': jax.nn.relu,
  'gelu': jax.nn.gelu,  # The tanh approximation, as in T5 1.1.
  'gelu_exact': lambda x: jax.nn.gelu(x, approximate=False),
  'silu': jax.nn.silu,
}


class Mlp(nn.Module):
  """activation(x wi) wo, or gated: (activation(x wi_0) * (x wi_1)) wo.

  GEGLU is activation 'gelu' gated, SwiGLU 'silu' gated (Shazeer 2020,
  https://arxiv.org/abs/2002.05202).

  Attributes:
    hidden_width: F.
    activation: one of ACTIVATIONS.
    gated: two input matrices, one gating the other.
    dropout_rate: on the hidden activations, a unit at all positions or at none,
      as T5 drops; an expert's is "expert dropout" (Fedus et al. 2021, section
      2.4), drawn for each row.
    init_scale: see `linear.Linear`.
  """

  hidden_width: Count
  activation: str = 'relu'
  gated: bool = False
  dropout_rate: Rate = 0.0
  init_scale: Positive = 1.0

  @nn.compact
  def __call__(self, x_xD: Array, *, deterministic: bool = True) -> Array:
    if self.activation not in ACTIVATIONS:
      raise ValueError(
        f'activation must be one of {", ".join(ACTIVATIONS)}, not '
        f'{self.activation!r}.'
      )
    activation = ACTIVATIONS[self.activation]

    def wi(name):
      return Linear(
        (self.hidden_width,), ('embed', 'mlp'), 1, self.init_scale, name=name
      )(x_xD)

    if self.gated:
      h_xF = activation(wi('wi_0')) * wi('wi_1')
    else:
      h_xF = activation(wi('wi'))
    h_xF = Dropout(
      self.dropout_rate, broadcast_dims=parameters.current().mask_dims
    )(h_xF, deterministic=deterministic)
    return Linear(
      (x_xD.shape[-1],), ('mlp', 'embed'), 1, self.init_scale, name='wo'
    )(h_xF)

  def cost(self, x_xD: Array, **_) -> Cost:
    """Of the activation."""
    hidden = math.prod(x_xD.shape[:-1]) * self.hidden_width * (1 + self.gated)
    return Cost(activated=hidden, relu=hidden * (self.activation == 'relu'))

"""The product with a matrix that all layers are made of."""

from __future__ import annotations

import math

from flax import linen as nn

from sparse_experts import sharding
from sparse_experts.layers import parameters
from sparse_experts.layers.cost import Cost
from sparse_experts.letters import Array
from sparse_experts.numbers import Positive


class Linear(nn.Module):
  """y = x W, or x W + b, over the last `num_inputs` axes of x.

  Parameters are float32. The kernel is cast to the dtype of x, the bias is
  added in float32; y has the dtype of x. See `parameters` for how they meet
  rows.

  Attributes:
    features: sizes of the output axes.
    names: logical names of the kernel's axes, inputs then outputs.
    num_inputs: input axes contracted.
    init_scale: s of the initialiser, a truncated normal of variance s / fan-in
      (Fedus et al. 2021, section 2.4: s = 0.1 for Switch, 1 is T5's).
    use_bias: b, zeros at first.
  """

  features: tuple[int, ...]
  names: tuple[str, ...]
  num_inputs: int = 1
  init_scale: Positive = 1.0
  use_bias: bool = False

  @nn.compact
  def __call__(self, x: Array) -> Array:
    num_inputs, rank = self.num_inputs, len(self.names)
    init = nn.initializers.variance_scaling(
      self.init_scale,
      'fan_in',
      'truncated_normal',
      in_axis=tuple(range(num_inputs)),
      out_axis=tuple(range(num_inputs, rank)),
    )
    y = parameters.matrix(
      self,
      x,
      'kernel',
      sharding.named(init, *self.names),
      (*x.shape[x.ndim - num_inputs :], *self.features),
      num_inputs,
    )
    if not self.use_bias:
      return y
    zeros = sharding.named(nn.initializers.zeros, *self.names[num_inputs:])
    bias = parameters.vector(self, y, 'bias', zeros, self.features)
    return (y + bias).astype(x.dtype)

  def cost(self, x: Array) -> Cost:
    """Of the product."""
    outputs = math.prod(x.shape[: x.ndim - self.num_inputs] + self.features)
    inputs = math.prod(x.shape[x.ndim - self.num_inputs :])
    kinds = {
      'embed': 'width',
      'kv': 'heads',
      'heads': 'heads',
      'vocab': 'logits',
    }
    kind = kinds.get(self.names[-1], 'mlp')
    return Cost(flops=2 * outputs * inputs, **{kind: outputs})


class Projection(nn.Module):
  """y = x W as wide as x: an expert of attention, see `attention.Attention`.

  Attributes:
    init_scale: see `Linear`.
  """

  init_scale: Positive = 1.0

  @nn.compact
  def __call__(self, x_xD: Array, *, deterministic: bool = True) -> Array:
    del deterministic  # All experts take it.
    return Linear(
      (x_xD.shape[-1],),
      ('embed', 'heads'),
      init_scale=self.init_scale,
      name='projection',
    )(x_xD)

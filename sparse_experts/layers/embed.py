"""Token embedding, also read backwards as output logits."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from sparse_experts import sharding
from sparse_experts.layers.cost import Cost
from sparse_experts.letters import Array, Dtype
from sparse_experts.numbers import Count


class TokenEmbed(nn.Module):
  """A table [V, D] of token embeddings, initialised from normal(1).

  Attributes:
    vocab_size: V, at least the vocabulary's size; a multiple of 128 serves TPU.
    width: D, the model's width.
    dtype: of the activations; every layer follows the dtype of its input.
    scaled_logits: logits against the table are divided by sqrt(D), as T5's
      (Mesh TF); Hugging Face's decoders do not.
  """

  vocab_size: Count
  width: Count
  dtype: Dtype = jnp.float32
  scaled_logits: bool = True

  def setup(self):
    self.embedding = self.param(
      'embedding',
      sharding.named(nn.initializers.normal(1.0), 'vocab', 'embed'),
      (self.vocab_size, self.width),
      jnp.float32,
    )

  def __call__(self, tokens_BxL: Array) -> Array:
    """Embeddings of token ids, [B, L, D]."""
    # Cast after the look-up: a frequent token's gradient is a sum over all its
    # places, and bfloat16 cannot count beyond 256.
    return self.embedding[tokens_BxL].astype(self.dtype)

  def attend(self, x_BxLxD: Array) -> Array:
    """Logits [B, L, V] against the table."""
    if self.scaled_logits:
      x_BxLxD = x_BxLxD / np.sqrt(self.width).astype(x_BxLxD.dtype)
    return jnp.einsum(
      'BLD,VD->BLV', x_BxLxD, self.embedding.astype(x_BxLxD.dtype)
    )

  def cost(self, tokens_BxL: Array) -> Cost:
    """Of looking up: no product."""
    del tokens_BxL
    return Cost()

  def attend_cost(self, x_BxLxD: Array) -> Cost:
    """Of the product with the table."""
    logits = math.prod(x_BxLxD.shape[:-1]) * self.vocab_size
    return Cost(flops=2 * logits * self.width, logits=logits)

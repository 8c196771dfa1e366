"""Rotary position embedding."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from sparse_experts.letters import Array


def rotate(x_BxLxHxA: Array, positions_BxL: Array, base: float) -> Array:
  """Turns pair i of each head by the angle position * base^(-2 i / A).

  A pair is elements i and i + A / 2. The product of a query and a key then
  depends on the distance of their positions. Computed in float32.

  Args:
    x_BxLxHxA: queries or keys, A even.
    positions_BxL: integers; B may be 1.
    base: of the wave lengths, 10,000 in the paper.

  Example:
    >>> x_BxLxHxA = jnp.array([1.0, 0.0]).reshape(1, 1, 1, 2)
    >>> rotate(x_BxLxHxA, jnp.array([[1]]), 10000.0).ravel()  # cos 1, sin 1
    Array([0.5403023 , 0.84147096], dtype=float32)

  References:
    Su et al. 2021, https://arxiv.org/abs/2104.09864, section 3.2.2.
  """
  A = x_BxLxHxA.shape[-1]
  if A % 2:
    raise ValueError(f'rotary positions need an even head width, not {A}.')
  frequencies = (base ** (-np.arange(0, A, 2) / A)).astype(np.float32)
  angles = positions_BxL[..., None, None] * frequencies.reshape(1, 1, 1, -1)
  cos, sin = jnp.cos(angles), jnp.sin(angles)
  x, y = jnp.split(x_BxLxHxA.astype(jnp.float32), 2, axis=-1)
  turned = jnp.concatenate([x * cos - y * sin, y * cos + x * sin], axis=-1)
  return turned.astype(x_BxLxHxA.dtype)

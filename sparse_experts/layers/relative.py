"""Relative positions as Transformer-XL has them: logits of query and distance.

References:
  Dai et al. 2019, https://arxiv.org/abs/1901.02860, section 3.3.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from sparse_experts.letters import Array


def sinusoids(length: int, width: int) -> np.ndarray:
  """Sines, then cosines, of distances 0 to length - 1, float32 [U, D].

  Wave lengths are 2 pi 10000^(2 i / D).

  Example:
    >>> sinusoids(2, 2).tolist()[0]  # Of distance 0.
    [0.0, 1.0]
  """
  waves_D = 10000.0 ** (-np.arange(0, width, 2) / width)
  angles_UxD = np.arange(length)[:, None] * waves_D
  both_UxD = np.concatenate([np.sin(angles_UxD), np.cos(angles_UxD)], axis=1)
  return both_UxD.astype(np.float32)


def relative_logits(
  q_BxLxHxA: Array, r_UxHxA: Array, queries_BxL: Array, keys_BxM: Array
) -> Array:
  """q_l . r_(distance of l and m), [B, H, L, M]; 0 for keys after the query.

  Args:
    q_BxLxHxA: of a whole sequence, L = M, positions 0 to L - 1; or of one.
    r_UxHxA: a vector for each distance from 0 to U - 1; U = M.
    queries_BxL, keys_BxM: positions; B may be 1.
  """
  logits_BxHxLxU = jnp.einsum('BLHA,UHA->BHLU', q_BxLxHxA, r_UxHxA)
  distances_Bx1xLxM = (queries_BxL[:, :, None] - keys_BxM[:, None, :])[:, None]
  shape = logits_BxHxLxU.shape
  if q_BxLxHxA.shape[1] == r_UxHxA.shape[0]:
    logits_BxHxLxM = _skew(logits_BxHxLxU)
  else:
    index = jnp.broadcast_to(jnp.maximum(distances_Bx1xLxM, 0), shape)
    logits_BxHxLxM = jnp.take_along_axis(logits_BxHxLxU, index, axis=-1)
  return jnp.where(
    jnp.broadcast_to(distances_Bx1xLxM >= 0, shape), logits_BxHxLxM, 0
  )


def _skew(x_BxHxLxL: Array) -> Array:
  """y[l, m] = x[l, l - m] for m <= l: a reshape, whose gradient is no scatter.

  Reversed, row l has distance 0 last; one more column moves every row one place
  further than the row above it.
  """
  L = x_BxHxLxL.shape[-1]
  moved = jnp.pad(x_BxHxLxL[..., ::-1], ((0, 0), (0, 0), (0, 0), (1, 0)))
  return moved.reshape(*x_BxHxLxL.shape[:2], L + 1, L)[:, :, 1:]

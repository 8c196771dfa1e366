"""Multi-head attention with a key-value cache, and T5's relative bias."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from sparse_experts import sharding
from sparse_experts.layers.cost import Cost
from sparse_experts.layers.dropout import Dropout
from sparse_experts.layers.linear import Linear
from sparse_experts.layers.norm import RMSNorm
from sparse_experts.layers.relative import relative_logits, sinusoids
from sparse_experts.layers.rotary import rotate
from sparse_experts.letters import Array
from sparse_experts.numbers import Count, NotNegative, Positive, Rate


class Attention(nn.Module):
  """softmax(q k + bias) v, unscaled as in T5: 1/sqrt(A) is in q's initialiser.

  Attributes:
    num_heads: H.
    head_width: A.
    dropout_rate: on the attention weights.
    init_scale: see `linear.Linear`.
    num_kv_heads: keys and values have fewer heads, each of which serves H /
      num_kv_heads queries' (Ainslie et al. 2023,
      https://arxiv.org/abs/2305.13245); None: H.
    rotary_base: queries and keys are turned by their positions, see
      `rotary.rotate`; None: they are not.
    scaled: 1/sqrt(A) is applied to q, and not in its initialiser.
    norm: queries and keys are normalised, all heads as one (OLMoE).
    norm_epsilon: of those norms, see `norm.RMSNorm`.
    relative: logits of queries and distances are added, see `relative`, without
      Transformer-XL's two bias vectors. For decoders.
    make_projection: builds what makes queries, keys and values, each with its
      own, a `moe.MoE` of `linear.Projection` (Fedus et al. 2021, appendix A;
      H A must be D, and heads all have keys); None: a matrix.
  """

  num_heads: Count
  head_width: Count
  dropout_rate: Rate = 0.0
  init_scale: Positive = 1.0
  num_kv_heads: Count | None = None
  rotary_base: Positive | None = None
  scaled: bool = False
  norm: bool = False
  norm_epsilon: NotNegative = 1e-6
  relative: bool = False
  make_projection: Callable[..., nn.Module] | None = None

  @nn.compact
  def __call__(
    self,
    x_BxLxD: Array,
    memory_BxMxD: Array,
    *,
    mask_BxLxM: Array | None = None,
    bias_1xHxLxM: Array | None = None,
    cache: str = 'none',
    cache_length: int = 0,
    positions_B: Array | None = None,
    queries_BxL: Array | None = None,
    keys_BxM: Array | None = None,
    deterministic: bool = True,
    routing: Mapping[str, Any] | None = None,
  ) -> Array | tuple[Array, dict[str, Any]]:
    """Attends from x to memory (x itself in self-attention).

    Args:
      x_BxLxD: queries' input.
      memory_BxMxD: keys' and values' input.
      mask_BxLxM: boolean, True where a query may look.
      bias_1xHxLxM: added to the logits; its first axis is 1 or B.
      cache: 'none'; 'fill' also stores keys and values, in the collection
        'cache'; 'extend' writes those of memory (one position) at `positions_B`
        and attends to all stored; 'read' attends to those stored, ignoring
        memory.
      cache_length: positions of a filled cache; at least M.
      positions_B: where 'extend' writes.
      queries_BxL, keys_BxM: positions of queries and of all keys attended to,
        for `rotary_base` and `relative`; B may be 1.
      deterministic: no dropout.
      routing: what layers of `make_projection` are called with.

    Returns:
      The output; with `make_projection` also the Aux of each of its layers.
    """
    H, A = self.num_heads, self.head_width
    kv_heads = self.num_kv_heads or H
    if H % kv_heads:
      raise ValueError(
        f'num_kv_heads={kv_heads} must divide num_heads={H}: each serves as '
        'many queries.'
      )
    auxes = {}
    if self.make_projection is not None and not (
      x_BxLxD.shape[-1] == H * A and kv_heads == H and self.scaled
    ):
      raise ValueError(
        'experts that make queries, keys and values keep the width of tokens: '
        f'num_heads={H} x head_width={A} must be {x_BxLxD.shape[-1]}, '
        f'num_kv_heads={kv_heads} be {H}, and scaled=True.'
      )

    def project(name, source, heads=H, scale=1.0):
      if self.make_projection is not None and name != 'relative':
        y_BxMxD, auxes[name] = self.make_projection(name=name)(
          source, **routing
        )
        return y_BxMxD.reshape(*source.shape[:2], heads, A)
      y_BxMxHxA = Linear(
        (heads, A),
        ('embed', 'heads', 'kv'),
        init_scale=self.init_scale * scale,
        name=name,
      )(source)
      if self.norm and name in ('query', 'key'):
        y_BxMxF = y_BxMxHxA.reshape(*y_BxMxHxA.shape[:2], heads * A)
        y_BxMxF = RMSNorm(self.norm_epsilon, name=f'{name}_norm')(y_BxMxF)
        y_BxMxHxA = y_BxMxF.reshape(y_BxMxHxA.shape)
      return y_BxMxHxA

    q_BxLxHxA = project('query', x_BxLxD, scale=1.0 if self.scaled else 1 / A)
    if self.scaled:
      q_BxLxHxA /= np.sqrt(A).astype(q_BxLxHxA.dtype)
    if cache == 'read':
      k_BxMxHxA = self.get_variable('cache', 'cached_key')
      v_BxMxHxA = self.get_variable('cache', 'cached_value')
    else:
      k_BxMxHxA = project('key', memory_BxMxD, kv_heads)
      v_BxMxHxA = project('value', memory_BxMxD, kv_heads)
    if cache == 'fill':
      pad = ((0, 0), (0, cache_length - memory_BxMxD.shape[1]), (0, 0), (0, 0))
      self.put_variable('cache', 'cached_key', jnp.pad(k_BxMxHxA, pad))
      self.put_variable('cache', 'cached_value', jnp.pad(v_BxMxHxA, pad))
    elif cache == 'extend':
      k_BxMxHxA = self._extend('cached_key', k_BxMxHxA, positions_B)
      v_BxMxHxA = self._extend('cached_value', v_BxMxHxA, positions_B)
    positional = self.relative or self.rotary_base is not None
    if positional and (queries_BxL is None or keys_BxM is None):
      raise ValueError(
        'rotary and relative attention need the positions of queries and keys; '
        'cross-attention has none: give it neither.'
      )
    if self.rotary_base is not None:  # The cache has keys as they were.
      q_BxLxHxA = rotate(q_BxLxHxA, queries_BxL, self.rotary_base)
      k_BxMxHxA = rotate(k_BxMxHxA, keys_BxM, self.rotary_base)
    if kv_heads < H:
      k_BxMxHxA = jnp.repeat(k_BxMxHxA, H // kv_heads, axis=2)
      v_BxMxHxA = jnp.repeat(v_BxMxHxA, H // kv_heads, axis=2)

    logits_BxHxLxM = jnp.einsum('BLHA,BMHA->BHLM', q_BxLxHxA, k_BxMxHxA)
    logits_BxHxLxM = logits_BxHxLxM.astype(jnp.float32)
    if self.relative:
      distances_MxD = sinusoids(k_BxMxHxA.shape[1], x_BxLxD.shape[-1])
      r_MxHxA = project('relative', jnp.asarray(distances_MxD, x_BxLxD.dtype))
      logits_BxHxLxM += relative_logits(
        q_BxLxHxA, r_MxHxA, queries_BxL, keys_BxM
      )
    if bias_1xHxLxM is not None:
      logits_BxHxLxM += _of_rows(bias_1xHxLxM, logits_BxHxLxM.shape[0])
    if mask_BxLxM is not None:
      mask_BxHxLxM = jnp.broadcast_to(mask_BxLxM[:, None], logits_BxHxLxM.shape)
      logits_BxHxLxM = jnp.where(mask_BxHxLxM, logits_BxHxLxM, -1e10)
    weights_BxHxLxM = jax.nn.softmax(logits_BxHxLxM).astype(x_BxLxD.dtype)
    weights_BxHxLxM = Dropout(self.dropout_rate, broadcast_dims=(-2,))(
      weights_BxHxLxM, deterministic=deterministic
    )
    y_BxLxHxA = jnp.einsum('BHLM,BMHA->BLHA', weights_BxHxLxM, v_BxMxHxA)
    y_BxLxD = Linear(
      (x_BxLxD.shape[-1],),
      ('heads', 'kv', 'embed'),
      num_inputs=2,
      init_scale=self.init_scale,
      name='out',
    )(y_BxLxHxA)
    return y_BxLxD if self.make_projection is None else (y_BxLxD, auxes)

  def cost(
    self,
    x_BxLxD: Array,
    memory_BxMxD: Array,
    *,
    bias_1xHxLxM: Array | None = None,
    **_,
  ) -> Cost:
    """Of queries with keys (and with distances) and of weights with values.

    Args:
      x_BxLxD, memory_BxMxD, bias_1xHxLxM: as of a call, by shape alone.
    """
    B, L, _ = x_BxLxD.shape
    logits = B * self.num_heads * L * memory_BxMxD.shape[1]
    biased = self.relative or bias_1xHxLxM is not None
    products = 3 if self.relative else 2
    return Cost(
      attention_flops=2 * products * logits * self.head_width,
      attention=logits,
      biased=logits * biased,
    )

  def _extend(self, name: str, new_Bx1xHxA: Array, positions_B: Array) -> Array:
    """The stored array with the new position written into it."""
    stored_BxMxHxA = self.get_variable('cache', name)
    M = stored_BxMxHxA.shape[1]
    here_BxMx1x1 = (jnp.arange(M)[None] == positions_B[:, None])[
      ..., None, None
    ]
    here_BxMxHxA = jnp.broadcast_to(here_BxMx1x1, stored_BxMxHxA.shape)
    new_BxMxHxA = jnp.broadcast_to(new_Bx1xHxA, stored_BxMxHxA.shape)
    stored_BxMxHxA = jnp.where(here_BxMxHxA, new_BxMxHxA, stored_BxMxHxA)
    self.put_variable('cache', name, stored_BxMxHxA)
    return stored_BxMxHxA


def _of_rows(bias_1xHxLxM: Array, rows: int) -> Array:
  """The bias of each row, [B, H, L, M].

  By a product with ones, whose gradient is a product, too: as a sum over rows
  it was a twentieth of a small model's step on XLA:CPU (docs/performance.md).
  """
  if bias_1xHxLxM.shape[0] == rows:
    return bias_1xHxLxM
  if bias_1xHxLxM.shape[0] != 1:
    raise ValueError(
      f'a bias is of one row or of all {rows}, not of {bias_1xHxLxM.shape[0]}.'
    )
  return jnp.einsum(
    'B,HLM->BHLM',
    jnp.ones(rows, bias_1xHxLxM.dtype),
    bias_1xHxLxM[0],
    precision=jax.lax.Precision.HIGHEST,
  )


class RelativeBias(nn.Module):
  """T5's learned bias by bucketed distance between query and key.

  Attributes:
    num_heads: H.
    bidirectional: keys after the query have buckets of their own (encoder).
    num_buckets: half of each direction's buckets hold one distance each, the
      rest grow geometrically up to `max_distance`.
    max_distance: beyond it all distances share a bucket.

  References:
    Raffel et al. 2020, https://arxiv.org/abs/1910.10683, section 2.1.
  """

  num_heads: Count
  bidirectional: bool
  num_buckets: int = 32
  max_distance: int = 128

  @nn.compact
  def __call__(self, queries_BxL: Array, keys_BxM: Array) -> Array:
    """Bias [B, H, L, M] of positions; B is 1 where all rows have the same."""
    embedding_HxU = self.param(
      'embedding',
      sharding.named(
        nn.initializers.variance_scaling(
          1.0, 'fan_avg', 'uniform', in_axis=1, out_axis=0
        ),
        'heads',
        'relpos_buckets',
      ),
      (self.num_heads, self.num_buckets),
      jnp.float32,
    )
    buckets_BxLxM = relative_buckets(
      keys_BxM[:, None, :] - queries_BxL[:, :, None],
      bidirectional=self.bidirectional,
      num_buckets=self.num_buckets,
      max_distance=self.max_distance,
    )
    # One-hot rather than a lookup: its gradient is a product, not a scatter.
    onehot_BxLxMxU = jax.nn.one_hot(buckets_BxLxM, self.num_buckets)
    return jnp.einsum('HU,BLMU->BHLM', embedding_HxU, onehot_BxLxMxU)

  def cost(self, queries_BxL: Array, keys_BxM: Array) -> Cost:
    """Next to nothing: most often it is one row's, and all others have it."""
    del queries_BxL, keys_BxM
    return Cost()


def relative_buckets(
  distances: Array, *, bidirectional: bool, num_buckets: int, max_distance: int
) -> Array:
  """Bucket of each distance (key position minus query position), int32.

  Args:
    distances: int32, of any shape.
    bidirectional: half of the buckets are for keys after the query; else they
      are as those at it.
    num_buckets: in all.
    max_distance: from which on distances share the last bucket.

  Example:
    >>> relative_buckets(jnp.array([0, -1, -2, 5]), bidirectional=False,
    ...                  num_buckets=4, max_distance=8).tolist()
    [0, 1, 2, 0]
  """
  first = jnp.zeros_like(distances)
  if bidirectional:
    num_buckets //= 2
    first = jnp.where(distances > 0, num_buckets, 0)
    back = jnp.abs(distances)
  else:
    back = jnp.maximum(-distances, 0)
  exact = num_buckets // 2
  log_ratio = jnp.log(jnp.maximum(back, 1).astype(jnp.float32) / exact)
  far = exact + (
    log_ratio / np.log(max_distance / exact) * (num_buckets - exact)
  ).astype(jnp.int32)
  return first + jnp.where(
    back < exact, back, jnp.minimum(far, num_buckets - 1)
  )

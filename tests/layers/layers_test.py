"""Layers against loops in numpy, and T5's buckets in integers."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from sparse_experts.layers.attention import (
  Attention,
  RelativeBias,
  relative_buckets,
)
from sparse_experts.layers.embed import TokenEmbed
from sparse_experts.layers.linear import Linear
from sparse_experts.layers.mlp import Mlp
from sparse_experts.layers.norm import LayerNorm, RMSNorm
from sparse_experts.layers.relative import relative_logits, sinusoids
from sparse_experts.layers.rotary import rotate

B, L, M, D, H, A, F, V = 2, 3, 5, 4, 2, 3, 6, 7
KEY = jax.random.key(0)

close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-6)


def normal(*shape, seed=0):
  rng = np.random.default_rng([seed, *shape])
  return rng.normal(size=shape).astype(np.float32)


def test_layer_norm():
  # x = (1, 3, 5, 7): mean 4, variance 5; epsilon 4 makes the root 3.
  x = jnp.array([[1.0, 3.0, 5.0, 7.0]])
  params = {'scale': jnp.arange(1.0, 5.0), 'bias': jnp.array([0.0, 0, 1, 2])}
  y = LayerNorm(epsilon=4.0).apply({'params': params}, x)
  close(y, [[-1, -2 / 3, 1 + 1, 4 + 2]])
  low = LayerNorm().apply({'params': params}, x.astype(jnp.bfloat16))
  assert low.dtype == jnp.bfloat16


def test_rms_norm():
  # x = (3, 4, 0, 0): mean square 25 / 4, root 2.5; (1.2, 1.6, 0, 0) times 1..4.
  scale = {'params': {'scale': jnp.arange(1.0, 5.0)}}
  x = jnp.array([[3.0, 4.0, 0.0, 0.0]])
  close(RMSNorm().apply(scale, x), [[1.2, 3.2, 0, 0]])
  # Epsilon is under the root: 25 / 4 + 2.75 = 9.
  close(RMSNorm(epsilon=2.75).apply(scale, x), [[1, 8 / 3, 0, 0]])
  ones = {'params': {'scale': jnp.ones(4)}}
  low = RMSNorm().apply(ones, x.astype(jnp.bfloat16))
  assert low.dtype == jnp.bfloat16
  close(low.astype(jnp.float32), [[1.2, 1.6, 0, 0]], rtol=4e-3)


def test_linear_contracts_the_last_axes():
  x = normal(B, L, H, A)
  kernel = normal(H, A, D)
  linear = Linear((D,), ('heads', 'kv', 'embed'), num_inputs=2)
  y = linear.apply({'params': {'kernel': kernel}}, x)
  close(y, x.reshape(B, L, -1) @ kernel.reshape(-1, D))


def test_fan_in_counts_all_contracted_axes():
  # 8 * 16 inputs: variance .5 / 128 of 128 * 64 entries, deviation 1.6%.
  linear = Linear((64,), ('heads', 'kv', 'embed'), 2, init_scale=0.5)
  params = linear.init(KEY, jnp.ones((1, 8, 16)))['params']
  assert params['kernel'].names == ('heads', 'kv', 'embed')
  close(params['kernel'].value.var() * 128, 0.5, rtol=0.08)


@pytest.mark.parametrize('gated', [False, True])
@pytest.mark.parametrize('activation', ['relu', 'gelu', 'gelu_exact', 'silu'])
def test_mlp(activation, gated):
  x = normal(L, D)
  names = ('wi_0', 'wi_1') if gated else ('wi',)
  weights = {name: normal(D, F, seed=i) for i, name in enumerate(names)}
  weights['wo'] = normal(F, D)
  params = {name: {'kernel': kernel} for name, kernel in weights.items()}
  y = Mlp(F, activation=activation, gated=gated).apply({'params': params}, x)
  close(y, [oracle.mlp(row, weights, activation) for row in x])


def test_unknown_activations_are_named():
  with pytest.raises(
    ValueError,
    match="activation must be one of relu, gelu, gelu_exact, silu, not 'swish'",
  ):
    Mlp(F, activation='swish').init(KEY, jnp.ones((L, D)))


def test_dropout_drops_a_hidden_unit_at_all_positions():
  # One hidden unit, all weights 1: a sequence is all 0 or all 1 / (1 - .5).
  mlp = Mlp(1, dropout_rate=0.5)
  params = {name: {'kernel': jnp.ones((1, 1))} for name in ('wi', 'wo')}
  x = jnp.ones((64, L, 1))
  run = functools.partial(mlp.apply, {'params': params}, x)
  y = run(deterministic=False, rngs={'dropout': KEY})
  assert ((y == 0).all(1) | (y == 2).all(1)).all()
  assert 16 <= (y[:, 0] == 0).sum() <= 48
  assert (run() == 1).all()


def attention_params():
  kernels = {name: normal(D, H, A, seed=i) for i, name in enumerate('qkv')}
  return {
    'query': {'kernel': kernels['q']},
    'key': {'kernel': kernels['k']},
    'value': {'kernel': kernels['v']},
    'out': {'kernel': normal(H, A, D)},
  }


def attend(params, x, memory, mask=None, bias=None):
  """Attention of one sequence in loops."""
  kernels = {name: np.float64(p['kernel']) for name, p in params.items()}
  y = np.zeros((len(x), D))
  for i in range(len(x)):
    for h in range(H):
      query = x[i] @ kernels['query'][:, h]
      logits = np.array(
        [
          query @ (row @ kernels['key'][:, h])
          + (0 if bias is None else bias[h, i, j])
          for j, row in enumerate(memory)
        ]
      )
      if mask is not None:
        logits[~mask[i]] = -np.inf
      for weight, row in zip(oracle.softmax(logits), memory):
        value = row @ kernels['value'][:, h]
        y[i] += weight * value @ kernels['out'][h]
  return y


ATTENTION = Attention(num_heads=H, head_width=A)


@pytest.mark.parametrize(
  'masked, bias_rows', [(False, None), (True, 1), (True, B)]
)
def test_attention(masked, bias_rows):
  params, x, memory = attention_params(), normal(B, L, D), normal(B, M, D)
  mask = bias = None
  if masked:
    last = np.arange(L) + np.array([[0], [1]])  # Visible key of each [B, L].
    mask = np.arange(M) <= last[..., None]
  if bias_rows:
    bias = normal(bias_rows, H, L, M)
  y = ATTENTION.apply(
    {'params': params}, x, memory, mask_BxLxM=mask, bias_1xHxLxM=bias
  )
  for b in range(B):
    expected = attend(
      params,
      x[b],
      memory[b],
      None if mask is None else mask[b],
      None if bias is None else bias[b % bias_rows],
    )
    close(y[b], expected)


def test_rotation_by_hand():
  # Pairs (x_0, x_2) and (x_1, x_3); angles p and p / 100^(2 / 4) = p / 10.
  x, p = normal(4), 7
  angles = np.array([p, p / 10])
  real, imaginary = x[:2], x[2:]
  turned = (real + 1j * imaginary) * np.exp(1j * angles)
  y = rotate(x.reshape(1, 1, 1, 4), jnp.array([[p]]), 100.0)
  close(y.ravel(), [*turned.real, *turned.imag])
  with pytest.raises(ValueError, match='even head width, not 3'):
    rotate(jnp.ones((1, 1, 1, 3)), jnp.array([[p]]), 100.0)


@pytest.mark.parametrize('shift', [0, 5])
def test_rotary_attention_sees_distances(shift):
  # Loops: the query at i and the key at j, turned by i and by j.
  x = normal(B, L, D)
  kernels = {name: normal(D, 2, 4, seed=i) for i, name in enumerate('qkv')}
  params = {
    'query': {'kernel': kernels['q']},
    'key': {'kernel': kernels['k']},
    'value': {'kernel': kernels['v']},
    'out': {'kernel': normal(2, 4, D)},
  }
  positions = jnp.arange(L)[None]
  y = Attention(num_heads=2, head_width=4, rotary_base=100.0).apply(
    {'params': params},
    x,
    x,
    queries_BxL=positions + shift,
    keys_BxM=positions + shift,
  )

  def complexes(row):
    return row[:2] + 1j * row[2:]

  expected = np.zeros((B, L, D))
  for b, i, h in itertools.product(range(B), range(L), range(2)):
    query = complexes(x[b, i] @ kernels['q'][:, h])
    keys = [complexes(row @ kernels['k'][:, h]) for row in x[b]]
    logits = [
      (query * np.exp(1j * (i - j) * np.array([1, 0.1])) @ key.conj()).real
      for j, key in enumerate(keys)
    ]
    for weight, row in zip(oracle.softmax(np.array(logits)), x[b]):
      value = weight * row @ kernels['v'][:, h]
      expected[b, i] += value @ params['out']['kernel'][h]
  close(y, expected, atol=1e-5)


def test_relative_logits_by_hand():
  # Whole sequences, then one query a row at positions of its own.
  q, r = normal(B, L, H, A), normal(L, H, A, seed=1)
  positions = jnp.arange(L)[None]
  whole = relative_logits(q, r, positions, positions)
  one = relative_logits(q[:, :1], r, jnp.array([[2], [1]]), positions)
  for b, h, l, m in itertools.product(range(B), range(H), range(L), range(L)):
    expected = q[b, l, h] @ r[l - m, h] if m <= l else 0
    close(whole[b, h, l, m], expected)
    distance = (2, 1)[b] - m
    expected = q[b, 0, h] @ r[distance, h] if distance >= 0 else 0
    close(one[b, h, 0, m], expected)


def test_relative_attention_adds_logits_of_distances():
  params, x = attention_params(), normal(B, L, D)
  kernel = normal(D, H, A, seed=7)
  positions = np.arange(L)
  # Distance d of D = 4: sin d, sin d / 100, cos d, cos d / 100.
  waves = positions[:, None] * np.array([1, 0.01])
  table = np.concatenate([np.sin(waves), np.cos(waves)], 1)
  close(sinusoids(L, D), table)
  bias = np.zeros((B, H, L, L), np.float32)
  for b, h, i, j in itertools.product(range(B), range(H), range(L), range(L)):
    if j <= i:
      query = x[b, i] @ params['query']['kernel'][:, h]
      bias[b, h, i, j] = query @ (table[i - j] @ kernel[:, h])
  mask = np.broadcast_to(np.tril(np.ones((L, L), bool)), (B, L, L))
  y = Attention(num_heads=H, head_width=A, relative=True).apply(
    {'params': {**params, 'relative': {'kernel': kernel}}},
    x,
    x,
    mask_BxLxM=mask,
    queries_BxL=positions[None],
    keys_BxM=positions[None],
  )
  for b in range(B):
    close(y[b], attend(params, x[b], x[b], mask[b], bias[b]), atol=1e-5)


@pytest.mark.parametrize('argument', ['rotary_base', 'relative'])
def test_positional_attention_needs_positions(argument):
  attention = Attention(num_heads=H, head_width=4, **{argument: True})
  with pytest.raises(
    ValueError, match='need the positions of queries and keys'
  ):
    attention.init(KEY, normal(B, L, D), normal(B, M, D))


def test_heads_share_keys_and_values():
  # Four heads of queries, two of keys: as four, the second and fourth copies.
  kernels = {
    'query': normal(D, 4, A),
    'key': normal(D, 2, A, seed=1),
    'value': normal(D, 2, A, seed=2),
    'out': normal(4, A, D),
  }
  copied = {
    name: kernel.repeat(2, axis=1) if name in ('key', 'value') else kernel
    for name, kernel in kernels.items()
  }
  x, memory = normal(B, L, D), normal(B, M, D)

  def run(kernels, **arguments):
    params = {name: {'kernel': kernel} for name, kernel in kernels.items()}
    attention = Attention(num_heads=4, head_width=A, **arguments)
    return attention.apply({'params': params}, x, memory)

  close(run(kernels, num_kv_heads=2), run(copied))
  close(
    run(kernels, num_kv_heads=2, scaled=True),
    run({**copied, 'query': copied['query'] / np.sqrt(A)}),
  )
  with pytest.raises(
    ValueError, match='num_kv_heads=3 must divide num_heads=4'
  ):
    run(kernels, num_kv_heads=3)


def test_queries_and_keys_are_normalised_over_all_heads():
  params, x, memory = attention_params(), normal(B, L, D), normal(B, M, D)
  scales = {name: normal(H * A, seed=i) for i, name in enumerate('qk')}
  normed = {
    **params,
    'query_norm': {'scale': scales['q']},
    'key_norm': {'scale': scales['k']},
  }
  y = Attention(num_heads=H, head_width=A, norm=True).apply(
    {'params': normed}, x, memory
  )

  def project(row, name, scale):
    flat = (row @ params[name]['kernel'].reshape(D, H * A)).astype(np.float64)
    flat *= scale / np.sqrt((flat**2).mean())
    return flat.reshape(H, A)

  expected = np.zeros((B, L, D))
  for b, i, h in itertools.product(range(B), range(L), range(H)):
    query = project(x[b, i], 'query', scales['q'])[h]
    keys = [project(row, 'key', scales['k'])[h] for row in memory[b]]
    weights = oracle.softmax(np.array([query @ key for key in keys]))
    for weight, row in zip(weights, memory[b]):
      value = weight * row @ params['value']['kernel'][:, h]
      expected[b, i] += value @ params['out']['kernel'][h]
  close(y, expected, atol=1e-5)


def test_attention_starts_with_unit_logits_unscaled():
  # T5 divides no logits by sqrt(A): the query's kernel starts with variance
  # 1 / (D A), the key's with 1 / D, deviation 1.6% of 8192 entries.
  attention = Attention(num_heads=8, head_width=16)
  x = jnp.ones((1, 2, 64))
  params = jax.jit(attention.init)(KEY, x, x)['params']
  for name, fan_in in [('query', 64 * 16), ('key', 64), ('out', 8 * 16)]:
    close(params[name]['kernel'].value.var() * fan_in, 1, rtol=0.08)


def test_a_filled_and_extended_cache_is_full_attention():
  # Rows of different length: row 0 has two tokens in the cache, row 1 three;
  # then two more each, one at a time.
  params, x = attention_params(), normal(B, M, D)
  lengths = np.array([2, 3])
  bias = normal(1, H, M, M)
  causal = np.tril(np.ones((M, M), bool))
  full = ATTENTION.apply(
    {'params': params},
    x,
    x,
    mask_BxLxM=np.broadcast_to(causal, (B, M, M)),
    bias_1xHxLxM=bias,
  )
  y, cache = ATTENTION.apply(
    {'params': params},
    x[:, :3],
    x[:, :3],
    mask_BxLxM=np.broadcast_to(causal[:3, :3], (B, 3, 3)),
    bias_1xHxLxM=bias[:, :, :3, :3],
    cache='fill',
    cache_length=M,
    mutable=['cache'],
  )
  close(y, full[:, :3])
  for step in range(2):
    positions = lengths + step
    rows = np.arange(B)
    new = x[rows, positions][:, None]
    y, cache = ATTENTION.apply(
      {'params': params, **cache},
      new,
      new,
      mask_BxLxM=causal[positions][:, None],
      bias_1xHxLxM=np.stack([bias[0][:, p : p + 1] for p in positions]),
      cache='extend',
      positions_B=jnp.asarray(positions),
      mutable=['cache'],
    )
    close(y[:, 0], full[rows, positions])


def test_a_read_cache_is_attention_to_its_memory():
  params, x, memory = attention_params(), normal(B, L, D), normal(B, M, D)
  filled, cache = ATTENTION.apply(
    {'params': params},
    x,
    memory,
    cache='fill',
    cache_length=M,
    mutable=['cache'],
  )
  read = ATTENTION.apply({'params': params, **cache}, x, None, cache='read')
  close(read, filled)
  close(filled, [attend(params, *row) for row in zip(x, memory)])


@pytest.mark.parametrize(
  'bidirectional, num_buckets, max_distance',
  [(True, 32, 128), (False, 32, 128), (False, 8, 16)],
)
def test_buckets_are_those_of_t5(bidirectional, num_buckets, max_distance):
  # T5: the first half of a direction's n buckets hold a distance d each; then
  # bucket e + floor(log(d / e) / log(m / e) * (n - e)), e = n // 2, m the
  # largest distance. It is e + j or more if and only if
  # d / e >= (m / e)^(j / (n - e)), or d^(n-e) e^j >= e^(n-e) m^j in integers.
  def bucket(distance):
    n, first = num_buckets, 0
    if bidirectional:
      n //= 2
      first = n if distance > 0 else 0
      d = abs(distance)
    else:
      d = max(-distance, 0)
    e = n // 2
    if d < e:
      return first + d
    over = [
      j
      for j in range(n - e)
      if d ** (n - e) * e**j >= e ** (n - e) * max_distance**j
    ]
    return first + e + max(over)

  distances = np.arange(-2 * max_distance, 2 * max_distance + 1)
  buckets = relative_buckets(
    jnp.asarray(distances),
    bidirectional=bidirectional,
    num_buckets=num_buckets,
    max_distance=max_distance,
  )
  assert buckets.dtype == jnp.int32
  assert buckets.tolist() == [bucket(int(d)) for d in distances]


def test_buckets_by_hand():
  # Encoder, n = 16 a direction, e = 8, m / e = 16: j of d = 16 is
  # 8 log 2 / log 16 = 2, of 20 it is 2.6, of 127 7.97. Keys after the query
  # add 16; 128 and beyond share the last bucket.
  distances = [0, -7, -8, -16, -20, -127, -128, -999, 7, 16, 999]
  buckets = relative_buckets(
    jnp.array(distances), bidirectional=True, num_buckets=32, max_distance=128
  )
  assert buckets.tolist() == [0, 7, 8, 10, 10, 15, 15, 15, 23, 26, 31]


def test_relative_bias_reads_the_bucket_of_key_minus_query():
  table = normal(H, 4)
  queries, keys = jnp.array([[1, 2]]), jnp.array([[0, 1, 2, 3]])
  bias = RelativeBias(H, bidirectional=True, num_buckets=4, max_distance=8)
  y = bias.apply({'params': {'embedding': table}}, queries, keys)
  # n = 2 a direction: distance 0 is bucket 0, before it 1, after it 2 + 1.
  expected = table[:, [[1, 0, 3, 3], [1, 1, 0, 3]]]
  close(y, expected[None])


def test_embedding_and_its_logits():
  table = normal(V, D)
  embed = TokenEmbed(V, D)
  params = {'params': {'embedding': table}}
  tokens = jnp.array([[0, 6, 3], [3, 3, 1]])
  close(embed.apply(params, tokens), table[np.asarray(tokens)])
  x = normal(B, L, D)
  logits = embed.apply(params, x, method='attend')
  close(logits, x @ table.T / 2)  # The root of D = 4.
  low = TokenEmbed(V, D, dtype=jnp.bfloat16)
  assert low.apply(params, tokens).dtype == jnp.bfloat16
  assert low.init(KEY, tokens)['params']['embedding'].value.dtype == jnp.float32


def test_the_gradient_of_a_frequent_token_counts_all_its_places():
  # In bfloat16, 256 + 1 is 256.
  embed = TokenEmbed(4, 2, dtype=jnp.bfloat16)
  tokens = jnp.full((2, 2048), 2)

  def total(params):
    return embed.apply(params, tokens).sum(dtype=jnp.float32)

  grads = jax.grad(total)({'params': {'embedding': jnp.ones((4, 2))}})
  expected = np.zeros((4, 2))
  expected[2] = 4096
  np.testing.assert_array_equal(grads['params']['embedding'], expected)

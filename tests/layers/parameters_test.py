"""How parameters meet rows: products and vectors of groups, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from sparse_experts import sharding
from sparse_experts.layers import parameters
from sparse_experts.layers.linear import Linear
from sparse_experts.layers.parameters import Grouped
from sparse_experts.moe.grouped_matmul import grouped_matmul


def grouped(num_rows, sizes):
  return Grouped(num_rows, jnp.asarray(sizes, jnp.int32), grouped_matmul)


def test_rows_meet_the_matrices_of_their_group_axis_by_axis():
  # Rows [T, P] of which each has P = 2 that share a matrix [2, 3] -> [4, 5].
  rng = np.random.default_rng(0)
  x = rng.normal(size=(5, 2, 2, 3)).astype(np.float32)
  w = rng.normal(size=(3, 2, 3, 4, 5)).astype(np.float32)
  linear = Linear((4, 5), ('embed', 'kv', 'heads', 'mlp'), num_inputs=2)
  with parameters.use(grouped(5, [2, 0, 3])):
    y = linear.apply({'params': {'kernel': w}}, x)
  for t, e in enumerate([0, 0, 2, 2, 2]):
    for p in range(2):
      expected = np.einsum('IJ,IJFG->FG', x[t, p], w[e])
      np.testing.assert_allclose(y[t, p], expected, rtol=1e-4, atol=1e-5)


class Shift(nn.Module):
  """x + b, of any shape."""

  shape: tuple[int, ...]

  @nn.compact
  def __call__(self, x):
    names = ('heads', 'kv')[: len(self.shape)]
    init = sharding.named(nn.initializers.zeros, *names)
    return x + parameters.vector(self, x, 'b', init, self.shape)


@pytest.mark.parametrize('shape', [(), (2,), (3, 2)])
def test_a_vector_lies_along_the_last_axes(shape):
  # Group 0 has no row, group 1 has two, group 2 one, and the last row is of
  # none: it meets zeros, and gives no gradient.
  rng = np.random.default_rng(0)
  x = rng.normal(size=(4, 3, 2)).astype(np.float32)
  b = rng.normal(size=(3, *shape)).astype(np.float32)
  dy = rng.normal(size=x.shape).astype(np.float32)
  dy[3] = np.nan

  def run(b, x):
    with parameters.use(grouped(4, [0, 2, 1])):
      return Shift(shape).apply({'params': {'b': b}}, x)

  y, pull_back = jax.vjp(run, b, x)
  own = [b[1], b[1], b[2], np.zeros(shape)]
  np.testing.assert_allclose(y, [x_ + b_ for x_, b_ in zip(x, own)], rtol=1e-6)
  axes = tuple(range(2 - len(shape)))
  expected = np.stack(
    [np.zeros(shape), (dy[0] + dy[1]).sum(axes), dy[2].sum(axes)]
  )
  np.testing.assert_allclose(pull_back(dy)[0], expected, rtol=1e-5, atol=1e-6)


def test_a_bias_is_added_and_its_gradient_summed_in_float32():
  # bfloat16 has no 1 + 2^-10, and no odd number beyond 256.
  linear = Linear((1,), ('embed', 'mlp'), use_bias=True)
  x = jnp.ones((301, 1), jnp.bfloat16)

  def total(params):
    y = linear.apply({'params': params}, x)
    assert y.dtype == jnp.bfloat16
    return y.astype(jnp.float32).sum(), y

  total = jax.grad(total, has_aux=True)
  one = {'kernel': -jnp.ones((1, 1)), 'bias': jnp.ones(1) + 2**-10}
  gradient, y = total(one)
  assert gradient['bias'].tolist() == [301] and (y == 2**-10).all()
  two = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), one)
  with parameters.use(grouped(301, [10, 291])):
    gradient, y = total(two)
  assert gradient['bias'].tolist() == [[10], [291]] and (y == 2**-10).all()


def test_a_bias_starts_at_zero_and_has_the_names_of_the_outputs():
  linear = Linear((2, 3), ('embed', 'heads', 'kv'), use_bias=True)
  y, variables = linear.init_with_output(jax.random.key(0), jnp.ones((4, 5)))
  bias = variables['params']['bias']
  assert bias.names == ('heads', 'kv') and bias.value.shape == (2, 3)
  without = Linear((2, 3), ('embed', 'heads', 'kv'))
  np.testing.assert_array_equal(
    y, without.init_with_output(jax.random.key(0), jnp.ones((4, 5)))[0]
  )
  shifted = {**nn.unbox(variables)['params'], 'bias': jnp.ones((2, 3))}
  np.testing.assert_allclose(
    linear.apply({'params': shifted}, jnp.ones((4, 5))) - y, 1, rtol=1e-5
  )


@pytest.mark.parametrize('shape', [(1, 4, 2), (8, 1)])
def test_rows_that_lose_their_order_are_refused(shape):
  linear = Linear((3,), ('embed', 'mlp'))
  params = {'kernel': jnp.ones((2, shape[-1], 3))}
  refused = pytest.raises(ValueError, match='of 4 rows: their first axis must')
  with parameters.use(grouped(4, [1, 3])), refused:
    linear.apply({'params': params}, jnp.ones(shape))

"""Dispatchers give the same outputs and gradients, the default by gathers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import primitives

from sparse_experts.moe import all_experts, einsum, gather, metrics, route

G, S, D, E = 2, 8, 3, 4
DISPATCHERS = {
  'gather': functools.partial(gather, capacity=2),
  'einsum': functools.partial(einsum, capacity=2),
  'gather_all': functools.partial(gather, capacity=S),
  'all_experts': functools.partial(all_experts, capacity=None),
}


def experts(w_ExDxD, x_ExGxCxD):
  """Experts all different and not linear."""
  return jnp.tanh(jnp.einsum('EGCD,EDF->EGCF', x_ExGxCxD, w_ExDxD)) + 0.1


def objective(x, w, logits, cotangent, mask, *, dispatch, k):
  """A number that all of the output enters, and the output."""
  assignment, _ = route(logits, k=k, mask_GxS=mask)
  y = dispatch(functools.partial(experts, w), x, assignment)
  return (y * cotangent).astype(jnp.float32).sum(), y


def gradients(dispatch, k):
  """Of tokens, experts and router, with the output."""
  run = functools.partial(objective, dispatch=dispatch, k=k)
  return jax.grad(run, argnums=(0, 1, 2), has_aux=True)


@functools.cache  # One compilation for each k.
def compiled(k):
  @jax.jit
  def run(*arguments):
    results = {}
    for name, dispatch in DISPATCHERS.items():
      (dx, dw, dlogits), y = gradients(dispatch, k)(*arguments)
      results[name] = {'y': y, 'x': dx, 'w': dw, 'logits': dlogits}
    return results

  return run


def arguments(dtype=np.float32, masked=False):
  """Tokens, experts, logits, cotangent, mask."""
  rng = np.random.default_rng(0)
  return (
    rng.normal(size=(G, S, D)).astype(dtype),
    rng.normal(size=(E, D, D)).astype(dtype),
    rng.normal(size=(G, S, E)).astype(np.float32),
    rng.normal(size=(G, S, D)).astype(dtype),
    rng.random((G, S)) < (0.7 if masked else 2),
  )


def same(left, right):
  for name in left:
    assert np.abs(left[name]).max() > 0.01  # There is something to compare.
    np.testing.assert_allclose(
      left[name], right[name], rtol=1e-6, atol=1e-6, err_msg=name
    )


@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('k', [1, 2])
def test_all_give_the_same_outputs_and_gradients(k, masked):
  *_, logits, _, mask = arguments(masked=masked)
  assignment, _ = route(logits, k=k, mask_GxS=mask)
  results = compiled(k)(*arguments(masked=masked))
  assert (assignment.chosen() & ~assignment.kept(2)).any()
  same(results['einsum'], results['gather'])
  same(results['all_experts'], results['gather_all'])
  # The capacity of 2 mattered, and padding got and gave nothing.
  assert np.abs(results['gather']['y'] - results['gather_all']['y']).max() > 0.1
  for result in results.values():
    assert all((result[name][~mask] == 0).all() for name in ('y', 'x'))


def test_a_dropped_token_gets_nothing_and_gives_nothing():
  # All eight tokens of a group choose expert 0, which has two slots.
  x, w, logits, cotangent, mask = arguments()
  logits[:] = [5.0, 0.0, 0.0, 0.0]
  results = compiled(1)(x, w, logits, cotangent, mask)
  for name in ('gather', 'einsum'):
    for array in (results[name]['y'], results[name]['x']):
      assert (array[:, 2:] == 0).all() and (array[:, :2] != 0).all()
    dw = results[name]['w']
    assert (dw[0] != 0).all() and (dw[1:] == 0).all()


def test_bfloat16_tokens_give_bfloat16_outputs():
  shapes = jax.eval_shape(compiled(2), *arguments(jnp.bfloat16))
  for result in shapes.values():
    assert all(result[part].dtype == jnp.bfloat16 for part in ('y', 'x', 'w'))
    assert result['logits'].dtype == jnp.float32


def test_no_gradient_of_gather_is_a_scatter_add():
  # The gradient that JAX gives a gather by itself is one.
  take = jax.jit(lambda x, index: jnp.take_along_axis(x, index, axis=1).sum())
  index = np.zeros((G, 1, D), np.int32)
  assert 'scatter-add' in primitives(jax.grad(take), arguments()[0], index)
  for k in (1, 2):
    # By tokens, experts and router.
    names = primitives(gradients(DISPATCHERS['gather'], k), *arguments())
    assert 'gather' in names and 'tanh' in names  # We looked inside.
    assert 'scatter-add' not in names


def test_no_slot_is_not_all_slots():
  x, w, logits, *_ = arguments()
  assignment, _ = route(logits)
  for dispatch in (gather, einsum):
    y = dispatch(functools.partial(experts, w), x, assignment, 0)
    assert y.shape == x.shape and not np.any(y)
  assert metrics.counts(assignment, 0, None)['slots'] == 0

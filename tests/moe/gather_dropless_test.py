"""Capped buffers that drop nothing: like dropless dispatch, at any skew."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_experts import sharding
from sparse_experts.layers.mlp import Mlp
from sparse_experts.moe.assignment import Assignment, positions
from sparse_experts.moe.dispatchers.gather import gather
from sparse_experts.moe.dispatchers.gather_dropless import gather_dropless
from sparse_experts.moe.dispatchers.grouped import grouped
from sparse_experts.moe.experts import Experts
from sparse_experts.planning import hlo

G, S, K, D, E, F = 8, 8, 2, 4, 4, 3
# A pass of the factors below has 1, 4 and 7 slots of an expert, of S.
FACTORS = (0.25, 1.0, 1.6)


def arrays(seed=0):
  """Parameters, tokens, gates, and a cotangent; experts are all different."""
  rng = np.random.default_rng(seed)
  params = {
    'wi': {'kernel': np.float32(rng.normal(size=(E, D, F)))},
    'wo': {'kernel': np.float32(rng.normal(size=(E, F, D)))},
  }
  return (
    params,
    np.float32(rng.normal(size=(G, S, D))),
    np.float32(rng.random((G, S, K))),
    np.float32(rng.normal(size=(G, S, D))),
  )


def choices(how, seed=1):
  """Two different experts of each token, int32; E where there is no choice."""
  rng = np.random.default_rng(seed)
  expert_GxSxK = np.argsort(rng.random((G, S, E)), axis=-1)[..., :K]
  if how == 'one expert':
    expert_GxSxK[..., 0] = 2
    expert_GxSxK[..., 1] = E
  if how == 'masked':
    expert_GxSxK[rng.random((G, S)) < 0.4] = E
  if how == 'nobody':
    expert_GxSxK[:] = E
  return np.int32(expert_GxSxK)


def output(dispatch, params, x, gates, expert_GxSxK, key=None, capacity=None):
  """Of experts with dropout, where there is a key."""
  module = Mlp(hidden_width=F, activation='gelu', dropout_rate=0.5)
  assignment = Assignment(
    expert_GxSxK=expert_GxSxK,
    gate_GxSxK=gates,
    position_GxSxK=positions(expert_GxSxK, E, priority='token'),
    num_experts=E,
  )
  experts = Experts(params, key, module, deterministic=key is None)
  return dispatch(experts, x, assignment, capacity)


def run(dispatch, params, x, gates, dy, expert_GxSxK, key=None, capacity=None):
  """The output, and gradients of parameters, tokens and gates."""
  y, pull_back = jax.vjp(
    lambda *of: output(dispatch, *of, expert_GxSxK, key, capacity),
    *(params, x, gates),
  )
  return y, pull_back(dy)


def has_passes(*given):
  """Whether there is a loop over further ones; else it is `grouped`."""
  lowered = jax.jit(functools.partial(run, gather_dropless)).lower(*given)
  return 'overflow' in lowered.as_text(debug_info=True)


@functools.cache  # One compilation for each, whatever the choices.
def compiled(factor, capacity=None):
  dispatch = functools.partial(gather_dropless, buffer_factor=factor)
  return jax.jit(functools.partial(run, dispatch, capacity=capacity))


def same(left, right):
  """Within the noise of float32 sums of numbers as large as the largest."""

  def close(a, b):
    scale = max(np.abs(b).max(), 1e-30)
    np.testing.assert_allclose(a / scale, b / scale, rtol=0, atol=1e-5)

  jax.tree.map(close, left, right)


@pytest.mark.parametrize('how', ['any', 'one expert', 'masked', 'nobody'])
@pytest.mark.parametrize('factor', FACTORS)
def test_it_is_dropless_at_any_skew(factor, how):
  expert_GxSxK = choices(how)
  y, gradients = compiled(factor)(*arrays(), expert_GxSxK)
  same((y, gradients), run(grouped, *arrays(), expert_GxSxK))
  chosen_GxS = (expert_GxSxK < E).any(-1)
  assert (np.abs(y).max(-1) > 0)[chosen_GxS].all()
  assert (np.asarray(y)[~chosen_GxS] == 0).all()


def test_a_capacity_is_kept():
  """Of one expert's choices in a group the first two, in passes of one."""
  expert_GxSxK = choices('any')
  found = compiled(0.25, capacity=2)(*arrays(), expert_GxSxK)
  same(found, run(gather, *arrays(), expert_GxSxK, capacity=2))
  exact = run(grouped, *arrays(), expert_GxSxK)
  assert np.abs(found[0] - exact[0]).max() > 0.1


def test_forward_and_backward_draw_alike():
  """Where a row of the output is zero, its gradients are."""
  expert_GxSxK = choices('one expert')
  y, (_, dx, dgates) = compiled(0.25)(
    *arrays(), expert_GxSxK, jax.random.key(3)
  )
  dropped_GxS = np.abs(y).max(-1) == 0  # All F units of that row: 1 in 8.
  assert 0 < dropped_GxS.sum() < G * S / 2
  assert (np.asarray(dx)[dropped_GxS] == 0).all()
  assert (np.asarray(dgates)[dropped_GxS] == 0).all()
  assert (np.abs(dgates[..., 0]) > 0)[~dropped_GxS].all()


def test_eight_devices_equal_one():
  expert_GxSxK = choices('one expert')
  given = (*arrays(), expert_GxSxK)
  one = compiled(1.0)(*given)
  with sharding.use_mesh(sharding.make_mesh(2, 4, 1)) as mesh:
    placed = jax.tree.map(
      lambda x: jax.device_put(x, sharding.batch_sharding(mesh, x.shape)),
      given[1:],
    )
    dispatch = functools.partial(gather_dropless, buffer_factor=1.0)
    jitted = jax.jit(functools.partial(run, dispatch))
    program = jitted.lower(given[0], *placed).compile()
    same(program(given[0], *placed), one)
  assert ' all-to-all(' in program.as_text()


def test_a_ledger_has_no_further_pass():
  """As under a balanced load; XLA's own count has the loops' bodies once."""
  given = (*arrays(), choices('any'))
  program = compiled(1.0).lower(*given).compile()
  capped = jax.jit(functools.partial(run, gather, capacity=S * K // E))
  one_pass = capped.lower(*given).compile().cost_analysis()['flops']
  assert program.cost_analysis()['flops'] > 2 * one_pass
  found = hlo.Program(program.as_text()).total.flops
  assert one_pass <= found < 1.3 * one_pass


def test_single_tokens_have_no_slots_to_fill():
  """As in decoding: E slots for K choices would be work in vain."""
  params, x, gates, dy = arrays()
  alone = (x[:, :1], gates[:, :1], dy[:, :1], choices('any')[:, :1])
  same(run(gather_dropless, params, *alone), run(grouped, params, *alone))
  assert not has_passes(params, *alone)


def test_a_choice_for_every_expert_is_grouped():
  """As of expert choice: slots of a share of those would be all of S."""
  rng = np.random.default_rng(5)
  params, x, _, dy = arrays()
  every_GxSxE = np.broadcast_to(np.arange(E), (G, S, E))
  some_GxSxE = np.int32(np.where(rng.random((G, S, E)) < 0.3, every_GxSxE, E))
  given = params, x, np.float32(rng.random((G, S, E))), dy, some_GxSxE
  same(run(gather_dropless, *given), run(grouped, *given))
  assert not has_passes(*given)
  assert has_passes(*arrays(), choices('any'))


def test_bfloat16_in_a_scanned_layer_with_remat():
  """As in a recipe: the loops are inside of a loop, and are recomputed."""
  params, x, gates, dy = jax.tree.map(
    lambda leaf: jnp.asarray(leaf, jnp.bfloat16), arrays()
  )
  expert_GxSxK = choices('one expert')

  def loss(params, x, dispatch):
    @jax.checkpoint
    def layer(x, _):
      return x + output(dispatch, params, x, gates, expert_GxSxK), None

    x, _ = jax.lax.scan(layer, x, None, length=2)
    return (x * dy).astype(jnp.float32).sum()

  gradient = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)
  dispatch = functools.partial(gather_dropless, buffer_factor=1.0)
  for ours, theirs in zip(
    *(jax.tree.leaves(gradient(params, x, d)) for d in (dispatch, grouped))
  ):
    assert ours.dtype == jnp.bfloat16
    scale = np.abs(theirs.astype(np.float32)).max()
    difference = np.abs(np.float32(ours) - np.float32(theirs)).max()
    assert scale > 0 and difference < 0.05 * scale


@pytest.mark.parametrize('factor', [0, -1.0, 2.5])
def test_factors_out_of_range(factor):
  with pytest.raises(ValueError, match='above 0 and at most 2, not'):
    run(
      functools.partial(gather_dropless, buffer_factor=factor),
      *arrays(),
      choices('any'),
    )

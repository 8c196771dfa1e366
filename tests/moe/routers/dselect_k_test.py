"""DSelect-k against its equations, one selector at a time."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from sparse_experts.moe.routers.dselect_k import DSelectK, select, smooth_step

G, S, D, K = 2, 4, 3, 2
KEY = jax.random.key(0)


def step(t, gamma):
  if t <= -gamma / 2:
    return 0.0
  if t >= gamma / 2:
    return 1.0
  return -2 / gamma**3 * t**3 + 3 / (2 * gamma) * t + 0.5


def mixture(codes, weights, num_experts, gamma):
  """Of one token: q, the entropy and the reach of its selectors."""
  q, entropy, reach = np.zeros(num_experts), 0.0, 0.0
  for code, share in zip(codes, oracle.softmax(weights)):
    r = np.ones(num_experts)
    for e in range(num_experts):
      bits = format(e, f'0{len(code)}b')
      for t, bit in zip(code, bits):
        r[e] *= step(t, gamma) if bit == '1' else 1 - step(t, gamma)
    q += share * r
    entropy -= (r * np.log(r + 1e-6)).sum()
    reach += 1 / r.sum()
  return q, entropy, reach


def router_and_parameters(num_experts, static, gamma=1.0, seed=0):
  router = DSelectK(num_experts, k=K, static=static, gamma=gamma)
  shapes = jax.eval_shape(router.init, KEY, jnp.zeros((G, S, D)))['params']
  rng = np.random.default_rng(seed)
  params = {
    name: rng.normal(size=box.value.shape, scale=0.2 * gamma)
    for name, box in shapes.items()
  }
  # Both selectors' first bit is 0, beyond the smooth step, for most tokens.
  params['code_bias'].reshape(K, -1)[:, 0] = -0.7 * gamma
  return router, params


@pytest.mark.parametrize('static', [False, True])
@pytest.mark.parametrize('num_experts, gamma', [(4, 1.0), (6, 1.5)])
def test_gates_losses_and_gradients_are_the_equations(
  num_experts, gamma, static
):
  router, params = router_and_parameters(num_experts, static, gamma)
  rng = np.random.default_rng(1)
  inputs = {'x': rng.normal(size=(G, S, D)), **params}
  cotangent = rng.normal(size=(G, S, num_experts))
  mask = rng.random((G, S)) < 0.8

  def by_definition(inputs):
    gates = np.zeros((G, S, num_experts))
    losses = np.zeros(2)
    for g in range(G):
      tokens = np.flatnonzero(mask[g])
      for s in tokens:
        x = inputs['x'][g, s]
        code, weight = inputs['code_bias'], inputs['weight_bias']
        if not static:
          code = code + x @ inputs['code_kernel']
          weight = weight + x @ inputs['weight_kernel']
        gates[g, s], *found = mixture(
          code.reshape(K, -1), weight, num_experts, gamma
        )
        losses += np.array(found) / mask.sum()
    return gates, losses

  def total(inputs):
    gates, (entropy, reach) = by_definition(inputs)
    reach *= num_experts == 6
    return (gates * cotangent).sum() + 2 * entropy + 3 * reach

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def run(arrays):
    params = {name: a for name, a in arrays.items() if name != 'x'}
    assignment, aux = router.apply(
      {'params': params}, arrays['x'], mask_GxS=jnp.asarray(mask)
    )
    losses = aux.losses
    value = (assignment.gate_GxSxK * cotangent).sum()
    value += 2 * losses['selector_entropy']
    return value + 3 * losses['unassigned_codes'], assignment

  (value, assignment), grads = run(jax.tree.map(jnp.float32, inputs))
  gates, _ = by_definition(inputs)
  np.testing.assert_allclose(assignment.gate_GxSxK, gates, rtol=1e-4, atol=1e-6)
  chosen = (gates[mask] > 0).sum(-1)  # Some codes are decided, some are not.
  assert chosen.min() < num_experts and chosen.max() >= K
  # An expert is chosen where it has weight.
  expected = np.where(gates > 0, np.arange(num_experts), num_experts)
  np.testing.assert_array_equal(assignment.expert_GxSxK, expected)
  np.testing.assert_allclose(value, total(inputs), rtol=1e-4)
  for name, array in oracle.gradient(total, inputs).items():
    assert np.abs(array).max() > 0.02 or (static and name == 'x')
    np.testing.assert_allclose(
      grads[name], array, rtol=2e-3, atol=2e-3, err_msg=name
    )


def test_converged_selectors_choose_k_experts_at_most():
  # Bits 10 and 01 are experts 2 and 1, weights 3 and 1 of 4.
  assignment, aux = jax.jit(functools.partial(select, num_experts=4))(
    jnp.array([[[[1.0, -1.0], [-0.5, 0.5]]]]), jnp.log(jnp.array([[[3.0, 1]]]))
  )
  assert assignment.expert_GxSxK.tolist() == [[[4, 1, 2, 4]]]
  np.testing.assert_allclose(assignment.gate_GxSxK, [[[0, 0.25, 0.75, 0]]])
  # One expert each: no entropy, up to the small constant in the logarithm.
  np.testing.assert_allclose(aux.losses['selector_entropy'], 0, atol=1e-5)
  entropy = -0.25 * math.log(0.25) - 0.75 * math.log(0.75)
  np.testing.assert_allclose(aux.metrics['entropy'], entropy, rtol=1e-6)
  np.testing.assert_allclose(aux.metrics['confidence'], 0.75, rtol=1e-6)


def test_undecided_selectors_are_uniform():
  assignment, aux = jax.jit(functools.partial(select, num_experts=8))(
    jnp.zeros((1, 1, 2, 3)), jnp.zeros((1, 1, 2))
  )
  np.testing.assert_allclose(assignment.gate_GxSxK, 1 / 8, rtol=1e-6)
  # Two selectors of entropy log 8.
  np.testing.assert_allclose(
    aux.losses['selector_entropy'], 2 * math.log(8), rtol=1e-4
  )


def test_codes_that_are_no_experts_are_kept_away_from():
  # Three experts: code 11 is nobody's. Bits (1, 1/2): experts 2 and nobody,
  # half each, 1 / (1/2) = 2. All on nobody: the limit, and a finite gradient.
  def loss(code):
    _, aux = select(code[None, None, None], jnp.zeros((1, 1, 1)), num_experts=3)
    return aux.losses['unassigned_codes']

  run = jax.jit(jax.value_and_grad(loss))
  value, grad = run(jnp.array([0.5, 0.0]))
  np.testing.assert_allclose(value, 2, rtol=1e-6)
  assert grad[1] > 0  # Downhill is towards expert 2.
  value, grad = run(jnp.array([0.5, 0.5]))
  np.testing.assert_allclose(value, 1e6, rtol=1e-4)
  assert np.isfinite(grad).all()
  _, aux = select(jnp.zeros((1, 1, 1, 2)), jnp.zeros((1, 1, 1)), num_experts=4)
  assert aux.losses['unassigned_codes'] == 0  # Every code is an expert's.


def test_the_smooth_step_is_exact_at_its_ends_for_any_width():
  for gamma in (0.3, 1.0, 7.0):
    ends = jnp.float32([-1e4, -gamma / 2, gamma / 2, 1e4])
    assert smooth_step(ends, gamma).tolist() == [0, 0, 1, 1]
    slopes = jax.vmap(jax.grad(functools.partial(smooth_step, gamma=gamma)))
    np.testing.assert_allclose(slopes(ends), 0, atol=1e-6)


def test_static_weights_are_the_same_for_all_tokens():
  router, params = router_and_parameters(4, static=True)
  assert set(params) == {'code_bias', 'weight_bias'}
  x = jnp.float32(np.random.default_rng(0).normal(size=(G, S, D)))
  params = jax.tree.map(jnp.float32, params)
  assignment, _ = jax.jit(router.apply)({'params': params}, x)
  gates = assignment.gate_GxSxK.reshape(-1, 4)
  assert (gates == gates[:1]).all() and (gates[0] > 0).any()


def test_one_expert_leaves_nothing_to_select():
  with pytest.raises(ValueError, match='two experts or more, got 1'):
    jax.eval_shape(DSelectK(1, k=1).init, KEY, jnp.ones((1, 2, 3)))


@pytest.mark.parametrize('num_experts', [3, 5, 6])
def test_the_losses_alone_leave_no_token_without_expert(num_experts):
  # As in their code, whose second loss has weight 1 beside any entropy's. With
  # the entropy alone selectors end in codes that are no expert's.
  rng = np.random.default_rng(num_experts)
  bits = (num_experts - 1).bit_length()
  # As the router starts; each token by its own gradient.
  start = rng.uniform(-0.01, 0.01, (1, 64, K, bits))

  def without_expert(weight):
    def loss(code):
      _, aux = select(code, jnp.zeros((1, 64, K)), num_experts=num_experts)
      return 64 * (
        aux.losses['selector_entropy'] + weight * aux.losses['unassigned_codes']
      )

    def descend(_, code):
      return code - 0.02 * jax.grad(loss)(code)

    code = jax.jit(lambda code: jax.lax.fori_loop(0, 300, descend, code))(
      jnp.asarray(start, jnp.float32)
    )
    assignment, _ = select(code, jnp.zeros((1, 64, K)), num_experts=num_experts)
    return 1 - assignment.chosen().any(-1).mean()

  assert without_expert(0.0) > 0.4
  assert without_expert(1.0) == 0


def test_every_number_of_experts_has_the_same_losses():
  # So that weights of both can be set for all.
  for num_experts in (3, 4):
    _, aux = select(
      jnp.zeros((1, 1, 1, 2)), jnp.zeros((1, 1, 1)), num_experts=num_experts
    )
    assert set(aux.losses) == {'selector_entropy', 'unassigned_codes'}

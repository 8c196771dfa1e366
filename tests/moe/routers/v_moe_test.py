"""V-MoE's router against its equations, one token at a time."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from sparse_experts.moe.routers.v_moe import VMoE, route_softmax

G, S, D, E = 2, 6, 3, 4
KEY = jax.random.key(0)


def square_variation(x):
  return np.var(x) / np.mean(x) ** 2


def by_definition(arrays, normal, mask, k):
  """Experts, gates, importance loss and load loss of tokens."""
  clean = arrays['x'] @ arrays['kernel']
  noisy = clean + normal / E
  experts, gates = np.full((G, S, k), E), np.zeros((G, S, k))
  importance = load = 0.0
  for g in range(G):
    sums, loads = np.zeros(E), np.zeros(E)
    for s in np.flatnonzero(mask[g]):
      order = sorted(range(E), key=lambda e: (-noisy[g, s, e], e))
      experts[g, s] = order[:k]
      gates[g, s] = oracle.softmax(noisy[g, s])[order[:k]]
      sums += oracle.softmax(clean[g, s])
      threshold = noisy[g, s, order[k - 1]]
      for e in range(E):
        wins = (threshold - clean[g, s, e]) * E  # In deviations.
        loads[e] += 1 - 0.5 * (1 + math.erf(wins / math.sqrt(2)))
    weight = mask[g].sum() / mask.sum()
    importance += weight * square_variation(sums)
    load += weight * square_variation(loads)
  return experts, gates, importance, load


@pytest.mark.parametrize('k, masked', [(1, False), (2, True), (E, False)])
def test_choices_losses_and_gradients_are_the_equations(k, masked):
  rng = np.random.default_rng(0)
  normal, cotangent = rng.normal(size=(G, S, E)), rng.normal(size=(G, S, k))
  inputs = {'x': rng.normal(size=(G, S, D)), 'kernel': rng.normal(size=(D, E))}
  mask = rng.random((G, S)) < 0.7 if masked else np.ones((G, S), bool)

  def total(gates, importance, load):
    return (gates * cotangent).sum() + 2 * importance + 3 * load

  @jax.jit
  @functools.partial(jax.grad, has_aux=True)
  def run(arrays):
    assignment, aux = route_softmax(
      arrays['x'] @ arrays['kernel'],
      jnp.asarray(normal, jnp.float32),
      k=k,
      deviation=1 / E,
      mask_GxS=jnp.asarray(mask) if masked else None,
    )
    parts = aux.losses['importance'], aux.losses['load']
    return total(assignment.gate_GxSxK, *parts), (assignment, *parts)

  grads, (assignment, *losses) = run(jax.tree.map(jnp.float32, inputs))
  experts, gates, *expected = by_definition(inputs, normal, mask, k)
  np.testing.assert_array_equal(assignment.expert_GxSxK, experts)
  np.testing.assert_allclose(assignment.gate_GxSxK, gates, rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(losses, expected, rtol=1e-4, atol=1e-6)
  gradient = oracle.gradient(
    lambda inputs: total(*by_definition(inputs, normal, mask, k)[1:]), inputs
  )
  for name, array in gradient.items():
    assert np.abs(array).max() > 0.1
    np.testing.assert_allclose(
      grads[name], array, rtol=1e-3, atol=1e-3, err_msg=name
    )


def test_load_by_hand():
  # Two experts, k = 1, logits 0, noise (1, -2) / 2: the threshold is .5, its
  # own for expert 0. Both beat it with 1 - cdf(.5 / .5): balance. Importance
  # is of the noise-free softmax, (1/2, 1/2): balance too.
  assignment, aux = route_softmax(
    jnp.zeros((1, 1, 2)), jnp.array([[[1.0, -2.0]]]), k=1, deviation=0.5
  )
  assert assignment.expert_GxSxK.tolist() == [[[0]]]
  # The gate is of the noisy softmax: 1 / (1 + e^-1.5).
  np.testing.assert_allclose(
    assignment.gate_GxSxK, 1 / (1 + math.exp(-1.5)), rtol=1e-6
  )
  assert aux.losses['importance'] == aux.losses['load'] == 0
  # Logits (0, 1), none drawn: the threshold is 1. P = 1 - cdf(1 / .5) = .022750
  # and 1/2: mean .261375, .238625 off it, CV^2 = .833495.
  _, aux = route_softmax(jnp.array([[[0.0, 1.0]]]), k=1, deviation=0.5)
  np.testing.assert_allclose(aux.losses['load'], 0.833495, rtol=1e-4)


def test_noise_is_for_training_in_units_of_one_over_experts():
  # See top_k_test.py: deviation d = .2 / 2, excess d / sqrt(pi) / 2.
  router = VMoE(2, k=1, noise=0.2)

  @functools.partial(jax.jit, static_argnums=0)
  def confidence(deterministic):
    _, aux = router.apply(
      {'params': {'kernel': jnp.ones((3, 2))}},
      jnp.zeros((1, 4096, 3)),
      deterministic=deterministic,
      rngs={} if deterministic else {'dropout': KEY},
    )
    return aux.metrics['confidence'] / 4096

  excess = 0.1 / math.sqrt(math.pi) / 2
  np.testing.assert_allclose(confidence(False) - 0.5, excess, rtol=0.05)
  assert confidence(True) == 0.5


@pytest.mark.parametrize('noise', [0.0, 1.0])
@pytest.mark.parametrize('deterministic', [True, False])
def test_at_balance_nothing_is_nan(noise, deterministic):
  router = VMoE(E, k=1, noise=noise)

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def run(params, x):
    assignment, aux = router.apply(
      {'params': params}, x, deterministic=deterministic, rngs={'dropout': KEY}
    )
    return assignment.gate_GxSxK.sum() + sum(aux.losses.values()), aux

  for scale in (0.0, 1.0, 1e4, -1e4):
    params, x = {'kernel': 3 * jnp.eye(E)}, scale * jnp.eye(E)[None]
    (_, aux), grads = run(params, x)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(aux))
    np.testing.assert_allclose(aux.losses['importance'], 0, atol=1e-10)


def test_the_most_confident_come_first():
  # Both choose experts (0, 1); the second token is surer of them.
  logits = jnp.array([[[1.0, 0.5, 0.0], [3.0, 1.0, 0.0]]])
  for priority, places in [('choice', [0, 1]), ('confidence', [1, 0])]:
    run = functools.partial(route_softmax, k=2, deviation=1, priority=priority)
    assignment, _ = jax.jit(run)(logits)
    assert assignment.expert_GxSxK.tolist() == [[[0, 1], [0, 1]]]
    assert assignment.position_GxSxK[0, :, 0].tolist() == places

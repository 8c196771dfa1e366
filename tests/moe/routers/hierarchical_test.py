"""Hierarchical gating against its equations, one token at a time."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from sparse_experts.moe.routers.hierarchical import (
  Hierarchical,
  route_hierarchically,
)

G, S, D = 2, 6, 3
E, P = 12, 3  # Experts, in groups of four.
Q = E // P
KEY = jax.random.key(0)
KERNELS = ('primary_kernel', 'primary_noise_kernel', 'kernel', 'noise_kernel')


def square_variation(x):
  return np.var(x) / np.mean(x) ** 2 if np.any(x) else 0.0


def noisy_top_k(clean, deviation, noisy, k):
  """G(x) and P(x, .) of one gate for one token, dense, and who is chosen."""
  n = len(clean)
  chosen = sorted(range(n), key=lambda i: (-noisy[i], i))[:k]
  gates, chances = np.zeros(n), np.ones(n)
  gates[chosen] = oracle.softmax(noisy[chosen])
  for i in range(n if k < n else 0):
    kth = sorted(np.delete(noisy, i), reverse=True)[k - 1]
    chances[i] = (clean[i] - kth) / deviation[i]
    chances[i] = 0.5 * (1 + math.erf(chances[i] / math.sqrt(2)))
  return gates, chances, chosen


def by_definition(arrays, normals, mask, k, primary_k):
  """Experts, gates, importance loss and load loss of tokens."""
  logits = {name: arrays['x'] @ arrays[name] for name in KERNELS}
  levels = []
  for clean, noise, normal in zip(KERNELS[::2], KERNELS[1::2], normals):
    deviation = np.log1p(np.exp(logits[noise]))
    clean = logits[clean]
    levels.append((clean, deviation, clean + normal * deviation))
  experts, gates = np.full((G, S, k), E), np.zeros((G, S, k))
  importance = load = 0.0
  for g in range(G):
    importance_H = np.zeros((P, Q))
    load_primary, load_within, members = np.zeros(P), np.zeros((P, Q)), [0] * P
    for s in np.flatnonzero(mask[g]):
      row = [level[g, s] for level in levels[0]]
      primary, chances, groups = noisy_top_k(*row, primary_k)
      load_primary += chances
      j = 0
      for i in groups:
        row = [level[g, s, i * Q : (i + 1) * Q] for level in levels[1]]
        within, chances, chosen = noisy_top_k(*row, k // primary_k)
        importance_H[i] += primary[i] * within
        load_within[i] += chances
        members[i] += 1
        for e in chosen:
          experts[g, s, j] = i * Q + e
          gates[g, s, j] = primary[i] * within[e]
          j += 1
    load_H = [
      load_primary[i] * load_within[i] / max(members[i], 1) for i in range(P)
    ]
    weight = mask[g].sum() / mask.sum()
    importance += weight * square_variation(importance_H)
    load += weight * square_variation(np.array(load_H))
  return experts, gates, importance, load


def arrays(seed=0):
  rng = np.random.default_rng(seed)
  shapes = dict(zip(KERNELS, [(D, P), (D, P), (D, E), (D, E)]))
  return {n: rng.normal(size=s) for n, s in {'x': (G, S, D), **shapes}.items()}


@pytest.mark.parametrize(
  'k, primary_k, masked, noisy',
  [(4, 2, True, True), (3, 3, False, True), (2, 1, True, False)],
)
def test_choices_losses_and_gradients_are_the_equations(
  k, primary_k, masked, noisy
):
  rng = np.random.default_rng(1)
  normals = [noisy * rng.normal(size=(G, S, n)) for n in (P, E)]
  cotangent = rng.normal(size=(G, S, k))
  mask = rng.random((G, S)) < (0.7 if masked else 1.1)

  def total(gates, importance, load):
    return (gates * cotangent).sum() + 2 * importance + 3 * load

  def routed(arrays):
    x = arrays['x']
    if not noisy:
      router = Hierarchical(E, k=k, primary_k=primary_k, expert_groups=P)
      params = {name: arrays[name] for name in KERNELS}
      return router.apply({'params': params}, x, mask_GxS=jnp.asarray(mask))
    primary, secondary = (
      (
        x @ arrays[clean],
        jax.nn.softplus(x @ arrays[noise]),
        jnp.asarray(normal, jnp.float32),
      )
      for clean, noise, normal in zip(KERNELS[::2], KERNELS[1::2], normals)
    )
    return route_hierarchically(
      primary,
      secondary,
      k=k,
      primary_k=primary_k,
      mask_GxS=jnp.asarray(mask) if masked else None,
    )

  @jax.jit
  @functools.partial(jax.grad, has_aux=True)
  def run(arrays):
    assignment, aux = routed(arrays)
    parts = aux.losses['importance'], aux.losses['load']
    return total(assignment.gate_GxSxK, *parts), (assignment, *parts)

  inputs = arrays()
  given = normals, mask, k, primary_k
  grads, (assignment, *losses) = run(jax.tree.map(jnp.float32, inputs))
  experts, gates, *expected = by_definition(inputs, *given)
  np.testing.assert_array_equal(assignment.expert_GxSxK, experts)
  np.testing.assert_allclose(assignment.gate_GxSxK, gates, rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(losses, expected, rtol=1e-4, atol=1e-6)
  gradient = oracle.gradient(
    lambda inputs: total(*by_definition(inputs, *given)[1:]), inputs
  )
  for name, array in gradient.items():
    # With all groups chosen the noise of the primary gate moves no chance.
    if np.abs(array).max() < 0.02:
      assert primary_k == P and name == 'primary_noise_kernel'
    np.testing.assert_allclose(
      grads[name], array, rtol=2e-3, atol=2e-3, err_msg=name
    )


def test_gates_multiply_by_hand():
  # Groups (.75, .25), both chosen; within them (.9, .1) and (.2, .8), all
  # chosen.
  primary = jnp.log(jnp.array([[[3.0, 1]]]))
  secondary = jnp.log(jnp.array([[[9.0, 1, 1, 4]]]))
  ones = jnp.ones((1, 1, 2)), jnp.ones((1, 1, 4))
  run = jax.jit(functools.partial(route_hierarchically, k=4, primary_k=2))
  assignment, aux = run((primary, ones[0], None), (secondary, ones[1], None))
  assert assignment.expert_GxSxK.tolist() == [[[0, 1, 3, 2]]]
  gates = [0.675, 0.075, 0.2, 0.05]
  np.testing.assert_allclose(assignment.gate_GxSxK, [[gates]], rtol=1e-6)
  # Importance: mean .25, mean square (.455625 + .005625 + .04 + .0025) / 4 =
  # .1259375, CV^2 = .1259375 / .0625 - 1. All are chosen: the load is even.
  np.testing.assert_allclose(aux.losses['importance'], 1.015, rtol=1e-5)
  np.testing.assert_allclose(aux.losses['load'], 0, atol=1e-10)


@pytest.mark.parametrize('deterministic', [True, False])
def test_at_balance_nothing_is_nan(deterministic):
  router = Hierarchical(E)  # Three groups of four by itself.
  x = jnp.ones((1, 4, D))
  shapes = jax.eval_shape(router.init, KEY, x)['params']
  params = {name: jnp.zeros(box.value.shape) for name, box in shapes.items()}
  assert params['primary_kernel'].shape == (D, P)

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def run(params, x):
    assignment, aux = router.apply(
      {'params': params}, x, deterministic=deterministic, rngs={'dropout': KEY}
    )
    return assignment.gate_GxSxK[..., 0].sum() + sum(aux.losses.values()), aux

  for scale in (0.0, 1.0, 1e4):
    kernels = jax.tree.map(lambda leaf, scale=scale: leaf + scale, params)
    results = run(kernels, x)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(results))


@pytest.mark.parametrize(
  'options, message',
  [
    ({'expert_groups': 5}, 'expert_groups=5 must divide num_experts=12'),
    ({'k': 3}, r'primary_k=2 \(1 to 3\) divide k=3'),
    ({'primary_k': 4}, r'primary_k=4 \(1 to 3\) divide k=4'),
    ({'k': 10}, 'k / primary_k be 1 to 4'),
    ({'primary_k': 0}, r'primary_k=0 \(1 to 3\)'),
  ],
)
def test_wrong_arguments_are_named(options, message):
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(Hierarchical(E, **options).init, KEY, jnp.ones((1, 2, 3)))

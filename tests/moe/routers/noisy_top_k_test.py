"""Noisy top-k gating against its equations, one token at a time."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from sparse_experts.moe import losses
from sparse_experts.moe.routers.noisy_top_k import (
  NoisyTopK,
  chosen_probability,
  gate_of_each,
  route_noisily,
)

G, S, D, E = 2, 6, 3, 4
KEY = jax.random.key(0)


def normal_cdf(x):
  return 0.5 * (1 + math.erf(x / math.sqrt(2)))


def square_variation(x):
  return np.var(x) / np.mean(x) ** 2 if np.any(x) else 0.0


def gate(clean, deviation, noisy, k):
  """Of one token: experts chosen, their gates, and P of every expert."""
  ranked = sorted(range(E), key=lambda e: (-noisy[e], e))[:k]
  gates = oracle.softmax([noisy[e] for e in ranked])
  chances = np.ones(E)
  if k < E:
    for e in range(E):
      others = sorted((noisy[i] for i in range(E) if i != e), reverse=True)
      chances[e] = normal_cdf((clean[e] - others[k - 1]) / deviation[e])
  return ranked, gates, chances


def noisily(arrays, normal, mask, k):
  """Experts, gates, importance loss and load loss of tokens."""
  clean = arrays['x'] @ arrays['kernel']
  deviation = np.log1p(np.exp(arrays['x'] @ arrays['noise_kernel']))
  noisy = clean + normal * deviation
  experts, gates = np.full((G, S, k), E), np.zeros((G, S, k))
  importance = load = 0.0
  for g in range(G):
    sums, loads = np.zeros(E), np.zeros(E)
    for s in range(S):
      if mask[g, s]:
        experts[g, s], gates[g, s], chances = gate(
          clean[g, s], deviation[g, s], noisy[g, s], k
        )
        sums[experts[g, s]] += gates[g, s]
        loads += chances
    weight = mask[g].sum() / mask.sum()
    importance += weight * square_variation(sums)
    load += weight * square_variation(loads)
  return experts, gates, importance, load


def arrays(seed=0):
  rng = np.random.default_rng(seed)
  shapes = {'x': (G, S, D), 'kernel': (D, E), 'noise_kernel': (D, E)}
  return {name: rng.normal(size=shape) for name, shape in shapes.items()}


@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('k', [1, 2, 3, E])
def test_choices_losses_and_gradients_are_the_equations(k, masked):
  rng = np.random.default_rng(1)
  normal = rng.normal(size=(G, S, E))
  cotangent = rng.normal(size=(G, S, k))
  mask = np.ones((G, S), bool)
  if masked:
    mask = rng.random((G, S)) < 0.7

  def total(gates, importance, load):
    return (gates * cotangent).sum() + 2 * importance + 3 * load

  @jax.jit
  @functools.partial(jax.grad, has_aux=True)
  def run(arrays):
    x = arrays['x']
    deviation = jax.nn.softplus(x @ arrays['noise_kernel'])
    assignment, aux = route_noisily(
      x @ arrays['kernel'],
      deviation,
      jnp.asarray(normal, jnp.float32),
      k=k,
      mask_GxS=jnp.asarray(mask) if masked else None,
    )
    parts = aux.losses['importance'], aux.losses['load']
    return total(assignment.gate_GxSxK, *parts), (assignment, *parts)

  inputs = arrays()
  grads, (assignment, importance, load) = run(jax.tree.map(jnp.float32, inputs))
  experts, gates, *expected = noisily(inputs, normal, mask, k)
  np.testing.assert_array_equal(assignment.expert_GxSxK, experts)
  np.testing.assert_allclose(assignment.gate_GxSxK, gates, rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose((importance, load), expected, rtol=1e-4, atol=1e-6)
  gradient = oracle.gradient(
    lambda inputs: total(*noisily(inputs, normal, mask, k)[1:]), inputs
  )
  for name, array in gradient.items():
    assert np.abs(array).max() > 0.1
    np.testing.assert_allclose(
      grads[name], array, rtol=1e-3, atol=1e-3, err_msg=name
    )


def test_without_noise_the_router_is_the_function_of_its_parameters():
  inputs = arrays()
  params = {n: jnp.float32(inputs[n]) for n in ('kernel', 'noise_kernel')}
  router = NoisyTopK(E, k=2)

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def run(params):
    assignment, aux = router.apply({'params': params}, jnp.float32(inputs['x']))
    weighted = assignment.gate_GxSxK @ jnp.array([1.0, 2.0])
    losses = aux.losses['importance'] + aux.losses['load']
    return weighted.sum() + losses, assignment

  def expected(params):
    _, gates, importance, load = noisily(
      {**inputs, **params}, 0.0, np.ones((G, S), bool), 2
    )
    return (gates @ [1, 2]).sum() + importance + load

  (value, assignment), grads = run(params)
  params = {name: inputs[name] for name in params}
  np.testing.assert_allclose(value, expected(params), rtol=1e-5)
  for name, array in oracle.gradient(expected, params).items():
    np.testing.assert_allclose(grads[name], array, rtol=1e-3, atol=1e-4)
  sums = gate_of_each(assignment).sum((0, 1))
  np.testing.assert_allclose(sums.sum(), G * S, rtol=1e-6)


def test_load_by_hand():
  # Two experts, k = 1, logits 0, deviations .5, noise (1, -2): H = (.5, -1).
  # P(x, 0) = cdf(1 / .5) = .977250, P(x, 1) = cdf(-.5 / .5) = .158655:
  # mean .567953, deviation from it .409298, CV^2 = .519344. G = (1, 0): CV^2
  # of importance is (.5 / .5)^2 = 1.
  assignment, aux = jax.jit(functools.partial(route_noisily, k=1))(
    jnp.zeros((1, 1, 2)),
    jnp.full((1, 1, 2), 0.5),
    jnp.array([[[1.0, -2.0]]]),
  )
  assert assignment.expert_GxSxK.tolist() == [[[0]]]
  np.testing.assert_allclose(aux.losses['load'], 0.519344, rtol=1e-5)
  np.testing.assert_allclose(aux.losses['importance'], 1, rtol=1e-6)


def test_probability_is_how_often_new_noise_of_one_expert_chooses_it():
  # Equation 8, by drawing: of 20,000 draws the deviation is at most .0035.
  rng = np.random.default_rng(2)
  clean, deviation = rng.normal(size=E), rng.uniform(0.3, 2, size=E)
  noisy = clean + rng.normal(size=E) * deviation
  k = 2
  chances = chosen_probability(
    *(jnp.float32(v)[None, None] for v in (clean, noisy, deviation)), k
  )
  for e in range(E):
    redrawn = np.tile(noisy, (20_000, 1))
    redrawn[:, e] = clean[e] + rng.normal(size=20_000) * deviation[e]
    chosen = (np.argsort(-redrawn, axis=1)[:, :k] == e).any(1)
    np.testing.assert_allclose(chances[0, 0, e], chosen.mean(), atol=0.014)


@pytest.mark.parametrize('deterministic', [True, False])
@pytest.mark.parametrize('k', [1, E])
def test_at_balance_and_with_all_experts_nothing_is_nan(k, deterministic):
  # Perfect balance: E tokens that each choose an expert of their own.
  router = NoisyTopK(E, k=k, allow_no_gradient=True)
  params = {'kernel': 3 * jnp.eye(E), 'noise_kernel': jnp.zeros((E, E))}

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def run(params, x):
    assignment, aux = router.apply(
      {'params': params}, x, deterministic=deterministic, rngs={'dropout': KEY}
    )
    return assignment.gate_GxSxK.sum() + sum(aux.losses.values()), aux

  for scale in (0.0, 1.0, 1e4, -1e4):
    (_, aux), grads = run(params, scale * jnp.eye(E)[None])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(aux))
    if deterministic and (scale > 0 or k == E):
      losses = [aux.losses[name] for name in ('importance', 'load')]
      np.testing.assert_allclose(losses, 0, atol=1e-10)


def test_a_group_of_padding_alone_has_no_losses():
  _, aux = jax.jit(functools.partial(route_noisily, k=2))(
    jnp.full((1, 2, E), jnp.nan),
    jnp.full((1, 2, E), jnp.nan),
    mask_GxS=jnp.zeros((1, 2), bool),
  )
  assert all(value == 0 for value in aux.losses.values())


def test_starts_with_no_signal_and_some_noise():
  x = jnp.ones((1, 2, D))
  boxed = jax.eval_shape(NoisyTopK(E).init, KEY, x)['params']
  assert {n: box.names for n, box in boxed.items()} == {
    'kernel': ('embed', 'router'),
    'noise_kernel': ('embed', 'router'),
  }
  params = NoisyTopK(E).init(KEY, x)['params']
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(params))


def test_noise_is_for_training_and_of_the_deviation_said():
  # Two experts, x = 1, Wg = 0, d = softplus(-2) + .1 = .22693: the logits'
  # difference has deviation d sqrt(2), and to first order the confidence is
  # 1/2 + |difference| / 4, of mean 1/2 + d sqrt(2) sqrt(2 / pi) / 4.
  router = NoisyTopK(2, k=1, least_noise=0.1, allow_no_gradient=True)
  params = {'kernel': jnp.zeros((1, 2)), 'noise_kernel': jnp.full((1, 2), -2.0)}

  @functools.partial(jax.jit, static_argnums=0)
  def confidence(deterministic):
    _, aux = router.apply(
      {'params': params},
      jnp.ones((1, 8192, 1)),
      deterministic=deterministic,
      rngs={} if deterministic else {'dropout': KEY},
    )
    return aux.metrics['confidence'] / 8192

  excess = 0.22693 / math.sqrt(math.pi) / 2
  np.testing.assert_allclose(confidence(False) - 0.5, excess, rtol=0.04)
  assert confidence(True) == 0.5


def test_the_others_threshold_by_hand():
  # Without 5 the second largest is 2, without 3 it is 2, without 2 or 1 it
  # is 3; ties count twice.
  threshold = losses.others_threshold(jnp.array([[[5.0, 3, 2, 1]]]), 2)
  assert threshold.tolist() == [[[2, 2, 3, 3]]]
  threshold = losses.others_threshold(jnp.array([[[3.0, 3, 3, 1]]]), 2)
  assert threshold.tolist() == [[[3, 3, 3, 3]]]
  with pytest.raises(ValueError, match='needs k from 1 to 3, got 4'):
    losses.others_threshold(jnp.zeros((1, 1, 4)), 4)

"""S-BASE: the plan against a slow oracle and its marginals; gates."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_experts.moe.routers.sinkhorn import Sinkhorn, log_plan

G, S, E, D = 2, 8, 4, 5
plan_of = jax.jit(log_plan, static_argnames='iterations')


def plan(logits, mask, iterations):
  """Sinkhorn's algorithm on one group, entry by entry."""
  tokens = [s for s in range(S) if mask[s]]
  T = len(tokens)
  pi = {(s, e): np.exp(logits[s, e]) for s in tokens for e in range(E)}

  def rows():
    for s in tokens:
      total = sum(pi[s, e] for e in range(E))
      for e in range(E):
        pi[s, e] /= total * T

  for _ in range(iterations):
    rows()
    for e in range(E):
      total = sum(pi[s, e] for s in tokens)
      for s in tokens:
        pi[s, e] /= total * E
  rows()
  return pi


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(0, 2**16), st.booleans(), st.sampled_from([3, 50]))
def test_plan_is_the_oracle(seed, masked, iterations):
  rng = np.random.default_rng(seed)
  logits = 2 * rng.normal(size=(G, S, E)).astype(np.float32)
  mask = rng.random((G, S)) < 0.7 if masked else np.ones((G, S), bool)
  ours = np.exp(plan_of(logits, mask_GxS=mask, iterations=iterations))
  for g in range(G):
    theirs = plan(logits[g].astype(float), mask[g], iterations)
    for s, e in np.ndindex(S, E):
      np.testing.assert_allclose(
        ours[g, s, e], theirs.get((s, e), 0), rtol=1e-4, atol=1e-9
      )
    if mask[g].any():
      np.testing.assert_allclose(
        ours[g, mask[g]].sum(1) * mask[g].sum(), 1, 1e-5
      )
      if iterations == 50:
        np.testing.assert_allclose(ours[g].sum(0) * E, 1, atol=0.05)


def test_plan_by_hand():
  # Two tokens, two experts, exp(logits) ((2, 1), (8, 1)). A plan of equal sums
  # is ((a, 1/2 - a), (1/2 - a, a)); scaling rows and columns keeps the cross
  # ratio 2 * 1 / (1 * 8) = 1/4 = (a / (1/2 - a))^2, so a = 1/6.
  logits = jnp.log(jnp.array([[[2.0, 1], [8, 1]]]))
  np.testing.assert_allclose(
    jnp.exp(log_plan(logits)), [[[1 / 6, 1 / 3], [1 / 3, 1 / 6]]], rtol=1e-5
  )


def test_training_follows_the_plan_and_evaluation_the_logits():
  # The case above: both tokens prefer expert 0, the second more.
  x = jnp.log(jnp.array([[[2.0, 1], [8, 1]]]))
  router = Sinkhorn(2)
  variables = {'params': {'kernel': jnp.eye(2)}}
  for deterministic, experts, gates in [
    (True, [[0], [0]], [[2 / 3], [8 / 9]]),
    (False, [[1], [0]], [[1 / 3], [8 / 9]]),
  ]:
    assignment, _ = router.apply(variables, x, deterministic=deterministic)
    assert assignment.expert_GxSxK[0].tolist() == experts
    np.testing.assert_allclose(assignment.gate_GxSxK[0], gates, rtol=1e-6)
  router = Sinkhorn(2, gates='sigmoid')
  assignment, _ = router.apply(variables, x)  # sigmoid(log 2) = 2 / 3.
  np.testing.assert_allclose(
    assignment.gate_GxSxK[0], [[2 / 3], [8 / 9]], rtol=1e-6
  )


@pytest.mark.parametrize('gates', ['softmax', 'sigmoid'])
@pytest.mark.parametrize('k', [1, 2])
def test_router_and_gradients_are_the_oracle(k, gates):
  rng = np.random.default_rng(k)
  inputs = {'x': rng.normal(size=(G, S, D)), 'kernel': rng.normal(size=(D, E))}
  mask = np.arange(S)[None] < np.array([[S], [S - 3]])
  weight = rng.normal(size=(G, S, k))
  router = Sinkhorn(E, k=k, gates=gates)

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def ours(inputs):
    assignment, aux = router.apply(
      {'params': {'kernel': inputs['kernel']}},
      inputs['x'],
      mask_GxS=mask,
      deterministic=False,
    )
    return (assignment.gate_GxSxK * weight).sum(), (assignment, aux)

  (value, (assignment, aux)), grads = ours(
    jax.tree.map(functools.partial(jnp.asarray, dtype=jnp.float32), inputs)
  )
  assert aux.losses == {}
  logits = inputs['x'] @ inputs['kernel']
  ranked = np.zeros((G, S, k), int)
  for g in range(G):
    pi = plan(logits[g], mask[g], 50)
    for s in np.flatnonzero(mask[g]):
      ranked[g, s] = sorted(range(E), key=lambda e: -pi[s, e])[:k]
  np.testing.assert_array_equal(
    assignment.expert_GxSxK, np.where(mask[..., None], ranked, E)
  )
  assert (ranked[..., 0] != logits.argmax(-1))[mask].any()

  def theirs(inputs):
    logits = inputs['x'] @ inputs['kernel']
    total = 0
    for g, s in np.argwhere(mask):
      values = (
        oracle.softmax(logits[g, s])
        if gates == 'softmax'
        else 1 / (1 + np.exp(-logits[g, s]))
      )
      total += (weight[g, s] * values[ranked[g, s]]).sum()
    return total

  np.testing.assert_allclose(value, theirs(inputs), rtol=1e-5)
  for name, expected in oracle.gradient(theirs, inputs).items():
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(grads[name], expected, rtol=1e-3, atol=1e-5)
  probs = np.apply_along_axis(oracle.softmax, -1, logits)
  np.testing.assert_allclose(
    aux.metrics['entropy'], -(probs * np.log(probs))[mask].sum(), rtol=1e-4
  )
  np.testing.assert_allclose(
    aux.metrics['confidence'], probs.max(-1)[mask].sum(), rtol=1e-5
  )


def test_it_balances_what_top_1_does_not():
  # Logits that favour expert 0 for all tokens: top-1 sends all 8 there.
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(1, S, E)).astype(np.float32)
  logits[..., 0] += 9
  assert (logits.argmax(-1) == 0).all()
  loads = np.bincount(plan_of(logits)[0].argmax(-1), minlength=E)
  assert loads.max() <= 3


def test_extreme_logits_and_nan_padding_stay_finite():
  inf = np.inf
  x = np.array(
    [
      [[1e4, -1e4, 0, -inf], [-inf, 0, 1, -inf], [0, 0, 0, -inf], [np.nan] * 4],
      [[np.nan] * 4] * 4,
    ],
    np.float32,
  )
  mask = np.array([[True, True, True, False], [False] * 4])
  log_pi = np.asarray(log_plan(jnp.asarray(x), mask_GxS=mask))
  assert not np.isnan(log_pi).any()
  np.testing.assert_allclose(
    np.exp(log_pi).sum(-1)[0], [1 / 3, 1 / 3, 1 / 3, 0], rtol=1e-5
  )
  assert (np.exp(log_pi[1]) == 0).all()


def test_what_cannot_be_is_refused():
  for arguments, message in [
    ({'k': 5}, 'k must be from 1 to num_experts=4, got 5'),
    ({'gates': 'chosen'}, "'softmax' or 'sigmoid', not 'chosen'"),
  ]:
    with pytest.raises(ValueError, match=message):
      Sinkhorn(E, **arguments).init(jax.random.key(0), jnp.ones((1, 2, 8)))

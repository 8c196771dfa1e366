"""The dense-to-sparse gate: its schedule, its choices, the step it needs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
import tiny_models
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_experts.models import layout
from sparse_experts.moe.routers.dense_to_sparse import (
  DenseToSparse,
  above_threshold,
)
from sparse_experts.training import state, step

G, S, E, D = 2, 7, 4, 5


def decide(noisy, temperature, threshold, only_first, mask):
  """Which experts each token takes, [G, S, E], and the weights."""
  taken, weights = np.zeros((G, S, E), bool), np.zeros((G, S, E))
  for g, s in np.argwhere(mask):
    weights[g, s] = oracle.softmax(noisy[g, s] / temperature)
    for e in range(E):
      above = weights[g, s, e] > threshold and not only_first
      taken[g, s, e] = above or e == weights[g, s].argmax()
  return taken, weights


def gates_and_loss(logits, noisy, taken, temperature, gates, mask):
  """Gates [G, S, E] and the balance loss, with the choices held fixed."""
  values = np.zeros((G, S, E))
  balance = 0.0
  for g in range(G):
    for s in np.flatnonzero(mask[g]):
      row = noisy[g, s] / temperature if gates == 'gumbel' else logits[g, s]
      values[g, s] = oracle.softmax(row) * taken[g, s]
    tokens = max(mask[g].sum(), 1)
    f, P = taken[g].sum(0) / tokens, values[g].sum(0) / tokens
    balance += E * (f * P).sum() * mask[g].sum() / mask.sum()
  return values, balance


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
  st.integers(0, 2**16),
  st.sampled_from([0.3, 1.0, 5.0]),
  st.sampled_from([1e-3, 0.2, 0.9]),
  st.booleans(),
  st.booleans(),
)
def test_choices_are_the_oracle(seed, temperature, threshold, hard, masked):
  rng = np.random.default_rng(seed)
  logits, noise = rng.normal(size=(2, G, S, E)).astype(np.float32)
  mask = rng.random((G, S)) < 0.7 if masked else np.ones((G, S), bool)
  noisy = logits + noise
  for gates in ('gumbel', 'softmax'):
    assignment, aux = jax.jit(above_threshold, static_argnames='gates')(
      logits,
      noisy,
      temperature=temperature,
      threshold=threshold,
      only_first=hard,
      gates=gates,
      mask_GxS=mask,
    )
    taken, weights = decide(noisy, temperature, threshold, hard, mask)
    expert = np.where(taken, np.arange(E), E)
    np.testing.assert_array_equal(assignment.expert_GxSxK, expert)
    values, balance = gates_and_loss(
      logits.astype(float), noisy.astype(float), taken, temperature, gates, mask
    )
    np.testing.assert_allclose(
      assignment.gate_GxSxK, values, rtol=1e-4, atol=1e-7
    )
    np.testing.assert_allclose(
      aux.losses['load_balance'], balance, rtol=1e-4, atol=1e-7
    )
    for g, e in np.ndindex(G, E):  # Token order, no gaps.
      line = assignment.position_GxSxK[g, :, e][taken[g, :, e]]
      assert line.tolist() == list(range(len(line)))
    logs = np.log(np.where(weights > 0, weights, 1))
    np.testing.assert_allclose(
      aux.metrics['entropy'], -(weights * logs).sum(), rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(
      aux.metrics['confidence'], weights.max(-1).sum(), rtol=1e-5
    )


def test_choices_by_hand():
  # Weights (.7, .2, .1) at temperature 1; at 1/2 squares: (.49, .04, .01) / .54
  # = (.907, .074, .019); at 1e4 a third each.
  logits = jnp.log(jnp.array([[[0.7, 0.2, 0.1]]]))
  for temperature, threshold, experts, gates in [
    (1.0, 0.15, [0, 1, 3], [0.7, 0.2, 0]),
    (0.5, 0.15, [0, 3, 3], [0.49 / 0.54, 0, 0]),
    (0.5, 0.05, [0, 1, 3], [0.49 / 0.54, 0.04 / 0.54, 0]),
    (1e4, 0.15, [0, 1, 2], [1 / 3, 1 / 3, 1 / 3]),
    (1e4, 0.95, [0, 3, 3], [1 / 3, 0, 0]),  # The first is always taken.
  ]:
    assignment, _ = above_threshold(
      logits, logits, temperature=temperature, threshold=threshold
    )
    assert assignment.expert_GxSxK[0, 0].tolist() == experts
    np.testing.assert_allclose(
      assignment.gate_GxSxK[0, 0], gates, rtol=1e-3, atol=1e-6
    )


def test_schedule_by_hand():
  # From 4 to 1 in 10 steps: halfway the geometric mean 2, linearly 2.5.
  make = functools.partial(
    DenseToSparse, E, max_temperature=4.0, min_temperature=1.0, decay_steps=10
  )
  for decay, half in [('exponential', 2.0), ('linear', 2.5)]:
    router = make(decay=decay)
    found = [router.temperature(jnp.int32(n)) for n in (0, 5, 10, 99)]
    np.testing.assert_allclose(found, [4, half, 1, 1], rtol=1e-6)
    assert router.temperature(None) == 1


@pytest.mark.parametrize('gates', ['gumbel', 'softmax'])
def test_router_and_gradients_are_the_oracle(gates):
  rng = np.random.default_rng(0)
  inputs = {'x': rng.normal(size=(G, S, D)), 'kernel': rng.normal(size=(D, E))}
  mask = np.arange(S)[None] < np.array([[S], [S - 3]])
  weight = rng.normal(size=(G, S, E))
  router = DenseToSparse(
    E, max_temperature=2.0, decay_steps=10, threshold=0.15, gates=gates
  )
  now = 3  # Temperature 2 (1/4)^(3/10).
  temperature = 2 * 0.25**0.3

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def ours(inputs, step):
    assignment, aux = router.apply(
      {'params': {'kernel': inputs['kernel']}},
      inputs['x'],
      mask_GxS=mask,
      deterministic=False,
      step=step,
      rngs={'dropout': jax.random.key(7)},
    )
    total = (assignment.gate_GxSxK * weight).sum()
    return total + 3 * aux.losses['load_balance'], assignment

  # The noise, read off a router whose logits are zero and all weights gates.
  zeros = {'x': jnp.zeros((G, S, D)), 'kernel': jnp.zeros((D, E))}
  noise, _ = router.clone(threshold=0.0, gates='gumbel').apply(
    {'params': {'kernel': zeros['kernel']}},
    zeros['x'],
    deterministic=False,
    step=now,
    rngs={'dropout': jax.random.key(7)},
  )
  noise = np.log(np.asarray(noise.gate_GxSxK, float)) * temperature

  (value, assignment), grads = ours(
    jax.tree.map(functools.partial(jnp.asarray, dtype=jnp.float32), inputs),
    jnp.int32(now),
  )
  logits = inputs['x'] @ inputs['kernel']
  taken, _ = decide(logits + noise, temperature, 0.15, False, mask)
  np.testing.assert_array_equal(
    assignment.expert_GxSxK, np.where(taken, np.arange(E), E)
  )
  assert 1 < taken[mask].sum(-1).mean() < E

  def theirs(inputs):
    logits = inputs['x'] @ inputs['kernel']
    values, balance = gates_and_loss(
      logits, logits + noise, taken, temperature, gates, mask
    )
    return (values * weight).sum() + 3 * balance

  np.testing.assert_allclose(value, theirs(inputs), rtol=1e-4)
  for name, expected in oracle.gradient(theirs, inputs).items():
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(grads[name], expected, rtol=1e-3, atol=1e-4)


def test_from_dense_to_sparse():
  # Logits of about 1: at temperature 100 weights are near 1/4, above .15; at
  # .01 the largest alone is. From step 20 on the first is alone by rule.
  x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 32, E)), jnp.float32)
  variables = {'params': {'kernel': jnp.eye(E)}}
  router = DenseToSparse(
    E,
    max_temperature=100.0,
    min_temperature=0.01,
    decay_steps=10,
    threshold=0.15,
  )

  def experts(router, **arguments):
    assignment, _ = router.apply(
      variables, x, rngs={'dropout': jax.random.key(0)}, **arguments
    )
    return assignment.chosen().sum(-1).mean()

  train = functools.partial(experts, router, deterministic=False)
  counts = [train(step=jnp.int32(n)) for n in (0, 3, 5, 10)]
  assert counts[0] == E and counts == sorted(counts, reverse=True)
  assert 1 <= counts[-1] < 1.1 < counts[2] < E
  hard = router.clone(min_temperature=50.0, hard_from=20)
  for n, count in [(19, E), (20, 1)]:
    assert experts(hard, deterministic=False, step=jnp.int32(n)) == count
  # Evaluation: the first alone; or the schedule's end, or a step of it.
  assert experts(hard) == 1
  dense = hard.clone(sparse_eval=False)
  assert experts(dense) == E
  assert experts(router.clone(sparse_eval=False)) < 1.1
  assert experts(router.clone(sparse_eval=False), step=jnp.int32(0)) == E


def test_extreme_logits_and_nan_padding_stay_finite():
  inf = np.inf
  logits = np.array(
    [[[1e4, 0, -1e4, 0], [-inf, 2, 1, 0], [-inf, -inf, 0, -1e4], [np.nan] * 4]],
    np.float32,
  )
  mask = jnp.array([[True, True, True, False]])

  def everything(logits):
    assignment, aux = above_threshold(
      logits, logits, temperature=0.5, mask_GxS=mask
    )
    total = assignment.gate_GxSxK.sum() + aux.losses['load_balance']
    return total, (assignment, aux)

  results = jax.grad(everything, has_aux=True)(logits)
  aux = results[1][1]
  assert not np.isnan(aux.logits).any()  # They may be infinite, as given.
  finite = (results[0], results[1][0], aux.replace(logits=None))
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(finite))
  assert (results[0][0, 3] == 0).all()
  assert results[1][0].expert_GxSxK[0, 3].tolist() == [E] * E


@pytest.mark.parametrize(
  'arguments, message',
  [
    ({'min_temperature': 2.0}, 'fall from max_temperature to min_temperature'),
    ({'min_temperature': 0.0}, 'above 0'),
    ({'decay_steps': 0}, 'decay_steps >= 1, got 1.0, 0.5 and 0'),
    ({'decay': 'cosine'}, "exponential, linear, not 'cosine'"),
    ({'gates': 'all'}, "gumbel, softmax, not 'all'"),
  ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
  with pytest.raises(ValueError, match=message):
    DenseToSparse(E, **arguments).init(jax.random.key(0), jnp.ones((1, S, D)))


def make_model(scan=False):
  """A model whose routers anneal without noise, so that runs compare."""
  return tiny_models.make_model(
    encoder=False,
    scan=scan,
    num_experts=4,
    make_router=functools.partial(
      DenseToSparse,
      num_experts=4,
      noise=False,
      max_temperature=10.0,
      min_temperature=0.1,
      decay_steps=4,
      threshold=0.1,
    ),
    loss_weights={'load_balance': 0.1},
    capacity_factor_train=None,
  )


def take_step(model, params, batch, number, microbatches=1):
  """Gradients and sums of training step `number`."""
  identity = optax.identity()
  before = state.TrainState(
    jnp.int32(number), params, identity.init(params), jnp.int32(0)
  )
  take = functools.partial(
    step.train_step,
    model=model,
    optimizer=identity,
    microbatches=microbatches,
  )
  after, sums = jax.jit(take)(before, batch, jax.random.key(0))
  return jax.tree.map(jnp.subtract, after.params, params), sums


def test_the_step_reaches_routers_with_scan_and_microbatches():
  batch = tiny_models.make_batch(encoder=False)
  model = make_model()
  params = tiny_models.make_params(model, batch)

  def experts(sums):
    """Experts of a token, for each sparse layer."""
    return {
      name: float(layer['chosen_E'].sum() / layer['tokens'])
      for name, layer in sums['layers'].items()
    }

  def close(a, b):
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), a, b
    )

  early, late = (take_step(model, params, batch, n) for n in (0, 4))
  assert len(experts(early[1])) == 2
  for name, count in experts(early[1]).items():
    assert count > 3 > 1.5 > experts(late[1])[name]

  grads, sums = take_step(model, params, batch, 2, microbatches=2)
  whole_grads, whole_sums = take_step(model, params, batch, 2)
  close(grads, whole_grads)
  close(experts(sums), experts(whole_sums))
  assert early[1]['objective'] != whole_sums['objective']

  kinds = layout.kinds(4, 2)

  def rolled(tree):
    return {
      name: layout.roll(part, kinds) if name in ('encoder', 'decoder') else part
      for name, part in tree.items()
    }

  grads, sums = take_step(make_model(scan=True), rolled(params), batch, 2)
  close(grads, rolled(whole_grads))
  close(experts(sums), experts(whole_sums))


def test_training_needs_the_step_and_evaluation_does_not():
  batch = tiny_models.make_batch(encoder=False)
  model = make_model()
  params = jax.eval_shape(
    lambda: tiny_models.nn.unbox(model.init(jax.random.key(0), batch))
  )

  def loss(train, **arguments):
    return jax.eval_shape(
      lambda params: model.loss(
        params, batch, jax.random.key(0), train=train, **arguments
      ),
      params,
    )

  loss(False)
  loss(True, step=jnp.int32(3))
  with pytest.raises(ValueError, match='pass step in training'):
    loss(True)

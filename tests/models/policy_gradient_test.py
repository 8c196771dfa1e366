"""What the model makes of decisions, and of two passes with other draws."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
import tiny_models

from sparse_experts.models import layout, policy_gradient
from sparse_experts.moe.outputs import Aux
from sparse_experts.moe.routers.random import Random
from sparse_experts.moe.routers.rl_r import RLR
from sparse_experts.training import state, step

WEIGHTS = {'policy': 0.5, 'value': 0.25, 'load_balance': 0.1}


def make_model(make_router=RLR, **options):
  options = {'loss_weights': WEIGHTS, 'layers': 2, **options}
  make_router = functools.partial(make_router, num_experts=4)
  return tiny_models.make_model(
    make_router=make_router, num_experts=4, **options
  )


def slow_losses(stack, decisions, log_probs, weights, examples, inputs):
  """(value, policy) of one layer by a loop over targets.

  Args:
    stack: 'encoder' or 'decoder'.
    decisions: arrays [B, L] of the layer.
    log_probs, weights: of targets, [B, L].
    examples: which example of its row a target is of, [B, L].
    inputs: which example an input is of, [B, M], 0 for padding.
  """
  value_loss = policy_loss = 0.0

  def add(b, m, r, weight):
    nonlocal value_loss, policy_loss
    value, gain, pain = (
      decisions[name][b, m] for name in ('value', 'gain', 'pain')
    )
    value_loss += weight * (value - r) ** 2
    policy_loss -= weight * (r - value) * (gain if r > value else pain)

  for b in range(len(weights)):
    if stack == 'decoder':
      for t in np.flatnonzero(weights[b]):
        add(b, t, log_probs[b, t], weights[b, t])
      continue
    for example in {*inputs[b]} - {0}:
      of_it = (examples[b] == example) * weights[b]
      if not of_it.sum():
        continue
      r = (of_it * log_probs[b]).sum() / of_it.sum()
      tokens = np.flatnonzero(inputs[b] == example)
      for m in tokens:  # Its targets' weight, shared by its tokens.
        add(b, m, r, of_it.sum() / len(tokens))
  return value_loss / weights.sum(), policy_loss / weights.sum()


@pytest.mark.parametrize('packed', [False, True])
def test_losses_are_the_oracle(packed):
  # By random decisions and log-probabilities; no model is needed.
  random = np.random.default_rng(0)
  B, M, L = 3, 7, 5
  ends = np.array([[7, 5], [4, 3], [6, 0]])  # The last row has no targets.
  inputs = (np.arange(M) < ends[:, :1]).astype(int)
  examples = (np.arange(L) < ends[:, 1:]).astype(int)
  weights = examples.astype(np.float32)
  batch = {'encoder_input_tokens': jnp.asarray(5 * inputs)}
  if packed:
    inputs[:, 3:] *= 2
    examples[:, 2:] *= 2
    batch['encoder_segment_ids'] = jnp.asarray(inputs)
    batch['decoder_segment_ids'] = jnp.asarray(examples)
    weights[0, :2] = 0  # A prompt: the first example of row 0 has no targets.
  log_probs = -random.exponential(size=(B, L)).astype(np.float32)
  auxes = {
    f'{stack}/layers_1': Aux(
      losses={'other': jnp.ones(())},
      metrics={},
      decisions={
        name: random.normal(size=(B, length)).astype(np.float32) - 1
        for name in ('value', 'gain', 'pain')
      },
    )
    for stack, length in (('encoder', M), ('decoder', L))
  }
  ours = policy_gradient.losses(auxes, batch, log_probs, weights, weights.sum())
  for stack in ('encoder', 'decoder'):
    aux = ours[f'{stack}/layers_1']
    value, policy = slow_losses(
      stack, aux.decisions, log_probs, weights, examples, inputs
    )
    np.testing.assert_allclose(aux.losses['value'], value, rtol=1e-5)
    np.testing.assert_allclose(aux.losses['policy'], policy, rtol=1e-5)
    assert aux.losses['other'] == 1
  with_value = auxes['decoder/layers_1'].replace(
    decisions={'value': auxes['decoder/layers_1'].decisions['value']}
  )
  ours = policy_gradient.losses(
    {'decoder/layers_1': with_value}, batch, log_probs, weights, weights.sum()
  )
  assert set(ours['decoder/layers_1'].losses) == {'other', 'value'}


def test_a_model_adds_them_with_their_weights():
  model = make_model(capacity_factor_eval=1.0)
  batch = tiny_models.make_batch()
  params = tiny_models.make_params(model, batch)
  loss, sums = jax.jit(functools.partial(model.loss, train=False))(
    params, batch
  )
  logits, auxes = jax.jit(
    functools.partial(model.module.apply, capacity_factor=1.0)
  )({'params': params}, batch)
  targets = np.asarray(batch['decoder_target_tokens'])
  weights = (targets > 0).astype(float)
  log_probs = np.take_along_axis(
    np.asarray(jax.nn.log_softmax(logits)), targets[..., None], -1
  )[..., 0]
  losses = {'value': 0, 'policy': 0, 'load_balance': 0}
  for name, aux in auxes.items():
    assert aux.decisions['gain'].shape == (8, 12 if 'encoder' in name else 8)
    value, policy = slow_losses(
      name.split('/')[0],
      aux.decisions,
      log_probs,
      weights,
      np.ones(targets.shape),
      np.asarray(batch['encoder_input_tokens'] > 0).astype(int),
    )
    losses['value'] += value
    losses['policy'] += policy
    losses['load_balance'] += aux.losses['load_balance']
  for name, value in losses.items():
    np.testing.assert_allclose(sums['aux_losses'][name], value, rtol=1e-4)
  expected = -(log_probs * weights).sum() / weights.sum()
  expected += sum(WEIGHTS[name] * value for name, value in losses.items())
  np.testing.assert_allclose(loss, expected, rtol=1e-5)


def evaluation(model, params, batch, totals=None):
  """Loss and gradients, without draws, so that parts can be compared."""

  def loss(params):
    return model.loss(params, batch, train=False, totals=totals)

  (value, _), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
  return value, grads


def close(a, b):
  """Equal to 1e-4 of the largest entry of each array."""

  def check(a, b):
    assert np.abs(a - b).max() <= 1e-4 * np.abs(b).max()

  jax.tree.map(check, a, b)


def test_scan_and_remat_change_nothing():
  options = {'layers': 4, 'encoder': False}
  batch = tiny_models.make_batch(encoder=False)
  model = make_model(**options)
  params = tiny_models.make_params(model, batch)
  loss, grads = evaluation(model, params, batch)
  roll = lambda tree: {
    **tree,
    'decoder': layout.roll(tree['decoder'], layout.kinds(4, 2)),
  }
  scanned = make_model(scan=True, remat='full', **options)
  close(evaluation(scanned, roll(params), batch), (loss, roll(grads)))


def test_the_mean_over_parts_of_a_batch_is_the_whole():
  model = make_model(layers=1, sparse_layers=1)
  batch = tiny_models.make_batch()
  params = tiny_models.make_params(model, batch)
  whole = evaluation(model, params, batch)
  # Every router learns, its baseline too.
  for stack in ('encoder', 'decoder'):
    for leaf in jax.tree.leaves(whole[1][stack]['layers_0']['moe']['router']):
      assert np.abs(leaf).max() > 1e-3
  # Rows have different numbers of targets, so the halves do too.
  totals = jax.tree.map(lambda x: x / 2, model.totals(batch))
  halves = [
    evaluation(
      model,
      params,
      {name: x[part] for name, x in batch.items()},
      totals,
    )
    for part in (slice(4), slice(4, 8))
  ]
  close(jax.tree.map(lambda a, b: (a + b) / 2, *halves), whole)


def test_training_draws_and_learns():
  model = make_model(scan=True, remat='dots', layers=4, encoder=False)
  batch = tiny_models.make_batch(encoder=False)
  params = tiny_models.make_params(model, batch)
  optimizer = optax.adam(1e-2)
  now = state.TrainState(
    jnp.int32(0), params, optimizer.init(params), jnp.int32(0)
  )
  train_step = jax.jit(
    functools.partial(
      step.train_step, model=model, optimizer=optimizer, microbatches=2
    )
  )
  values = []
  for _ in range(30):
    now, sums = train_step(now, batch, jax.random.key(0))
    values.append(float(sums['aux_losses']['value']))
  assert np.isfinite(values).all() and now.skipped == 0
  # Rewards of about -log 64 are learned to be expected.
  assert values[-1] < 0.7 * values[0]


def test_consistency_is_two_passes_by_hand():
  # THOR on a model with dropout: everything differs between the passes.
  make_router = functools.partial(Random, draw='batch', evaluation='mean')
  options = dict(
    loss_weights={},
    z_loss=0.1,
    dropout_rate=0.2,
    capacity_factor_train=None,
    encoder=False,
  )
  alone = make_model(make_router, **options)
  thor = make_model(make_router, consistency=3.0, **options)
  batch = tiny_models.make_batch(encoder=False)
  params = tiny_models.make_params(alone, batch)
  rng = jax.random.key(7)
  loss, sums = jax.jit(functools.partial(thor.loss, train=True))(
    params, batch, rng
  )

  run = jax.jit(functools.partial(alone.loss, train=True))
  apply = jax.jit(functools.partial(alone.module.apply, deterministic=False))
  losses, probs, passes = [], [], []
  for i in (0, 1):
    key = jax.random.fold_in(rng, i)
    value, its_sums = run(params, batch, key)
    logits, _ = apply({'params': params}, batch, rngs={'dropout': key})
    losses.append(value)
    probs.append(np.apply_along_axis(oracle.softmax, -1, logits))
    passes.append(its_sums)
  assert losses[0] != losses[1]
  p, q = probs
  kl = (p * np.log(p / q)).sum(-1), (q * np.log(q / p)).sum(-1)
  real = np.asarray(batch['decoder_target_tokens'] > 0)
  divergence = ((kl[0] + kl[1]) / 2)[real].mean()
  assert divergence > 1e-3
  np.testing.assert_allclose(
    sums['aux_losses']['consistency'], divergence, rtol=1e-4
  )
  np.testing.assert_allclose(
    loss, losses[0] + losses[1] + 3 * divergence, rtol=1e-5
  )
  # Metrics are of one pass, on average.
  assert sums['batches'] == 1 and sums['targets'] == real.sum()
  for name in ('cross_entropy', 'correct'):
    mean = (passes[0][name] + passes[1][name]) / 2
    np.testing.assert_allclose(sums[name], mean, rtol=1e-6)
  # Evaluation is one pass.
  close(
    jax.jit(functools.partial(thor.loss, train=False))(params, batch),
    jax.jit(functools.partial(alone.loss, train=False))(params, batch),
  )

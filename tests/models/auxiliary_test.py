"""Balance over groups, microbatches, batches and layers: whose tokens count."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_models
from paths import DATA

from sparse_experts import sharding
from sparse_experts.layers.mlp import Mlp
from sparse_experts.models import auxiliary
from sparse_experts.models.auxiliary import Totals
from sparse_experts.moe import Assignment, MoE, TopK, route
from sparse_experts.moe.losses import Balance, per_choice
from sparse_experts.moe.outputs import Aux
from sparse_experts.moe.router import Router
from sparse_experts.planning import hlo
from sparse_experts.training import state, step

partial = functools.partial


def combined(auxes, tokens, reduction, over, balance=None):
  """The balance loss of layers of one decoder."""
  totals = Totals(jnp.float32(1), {'decoder': jnp.float32(tokens)}, balance)
  parts = auxiliary.of_layers(auxes, over, totals)
  return auxiliary.over_layers(parts, reduction, over, totals)['load_balance']


@pytest.mark.parametrize('masked', [False, True])
def test_joint_balance_is_that_of_transformers(masked):
  stored = np.load(DATA / 'transformers_balance.npz')
  mask = jnp.asarray(stored['mask']) if masked else None
  tokens = stored['mask'].sum() if masked else stored['mask'].size

  @jax.jit
  @jax.value_and_grad
  def run(logits):
    auxes = {
      f'decoder/layers_{i}': route(
        layer, k=2, balance_counts='all', mask_GxS=mask
      )[1]
      for i, layer in enumerate(logits)
    }
    return combined(auxes, tokens, 'joint', 'microbatch')

  loss, grad = run(stored['logits'])
  case = 'masked' if masked else 'plain'
  for name in ('mixtral', 'olmoe'):
    np.testing.assert_allclose(loss, stored[f'{name}_{case}_loss'], rtol=1e-6)
  np.testing.assert_allclose(
    grad, stored[f'mixtral_{case}_grad'], rtol=1e-4, atol=1e-8
  )


def test_joint_balance_sees_no_layers_imbalance():
  # Two layers, each with one expert of two for all tokens, not the same one:
  # alone each is 2 * (1 * 1) = 2, together f = P = 1/2: 1.
  layers = [[[[50.0, 0.0]] * 4], [[[0.0, 50.0]] * 4]]
  auxes = {
    f'decoder/layers_{i}': route(jnp.array(logits))[1]
    for i, logits in enumerate(layers)
  }
  for reduction, value in [('sum', 4), ('mean', 2), ('joint', 1)]:
    for over in ('group', 'microbatch', 'batch'):
      loss = combined(auxes, 4, reduction, over)
      np.testing.assert_allclose(loss, value, rtol=1e-6)


def test_experts_in_attention_are_not_balanced_by_those_of_ffns():
  # The same two layers, of different kinds or stacks: each is 2, and they add.
  layers = [[[[50.0, 0.0]] * 4], [[[0.0, 50.0]] * 4]]
  first, second = (route(jnp.array(logits))[1] for logits in layers)
  tokens = {'decoder': jnp.float32(4), 'encoder': jnp.float32(4)}
  totals = Totals(jnp.float32(1), tokens)
  for name in ('decoder/query_1', 'encoder/layers_1'):
    auxes = {'decoder/layers_1': first, name: second}
    found = auxiliary.over_layers(auxes, 'joint', 'microbatch', totals)
    np.testing.assert_allclose(found['load_balance'], 4, rtol=1e-6)


def test_opposite_sequences_are_balanced_together():
  # 64 experts; sequences of 2,048 tokens that prefer the one or the other half
  # with probability .9, evenly within it. Per sequence f is 1/32 there, P .9 /
  # 32: 64 * 32 * .9 / 32^2 = 1.8. Together f = 1 / 64 = P: 1.
  logits = np.full((2, 2048, 64), np.log(0.1 / 32), np.float32)
  logits[0, :, :32] = logits[1, :, 32:] = np.log(0.9 / 32)
  tokens = np.arange(2048)
  logits[0, tokens, tokens % 32] += 1e-3  # Each expert is chosen as often.
  logits[1, tokens, 32 + tokens % 32] += 1e-3
  auxes = {'decoder/layers_0': route(jnp.asarray(logits))[1]}
  for over, value in [('group', 1.8), ('microbatch', 1.0), ('batch', 1.0)]:
    loss = combined(auxes, 4096, 'sum', over)
    np.testing.assert_allclose(loss, value, rtol=1e-4)


def test_groups_weigh_by_their_tokens():
  # Of three groups one is padding alone and dilutes nothing; one of one token
  # weighs a third of one of three.
  logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3, 4)))
  mask = jnp.array([[True] * 3, [False] * 3, [False, True, False]])
  _, aux = route(logits, mask_GxS=mask)
  _, first = route(logits[:1])
  _, last = route(logits[2:, 1:2])
  for name in ('load_balance', 'router_z'):
    expected = (3 * first.losses[name] + last.losses[name]) / 4
    np.testing.assert_allclose(aux.losses[name], expected, rtol=1e-6)
  assert aux.tokens == 4
  # Over positions, as the papers' own code has it, all groups weigh alike.
  _, diluted = route(logits, mask_GxS=mask, losses_over='positions')
  _, whole = route(logits[:1], losses_over='positions')
  padded = route(logits[2:], mask_GxS=mask[2:], losses_over='positions')[
    1
  ].losses['load_balance']
  expected = (whole.losses['load_balance'] + 0 + padded) / 3
  np.testing.assert_allclose(
    diluted.losses['load_balance'], expected, rtol=1e-6
  )


def test_losses_per_choice():
  weights = {'load_balance': 1e-2, 'router_z': 1e-3}
  assert per_choice(weights, k=8) == {
    'load_balance': 1.25e-3,
    'router_z': 1.25e-4,
  }


def make_model(**arguments):
  return tiny_models.make_model(
    encoder=False,
    layers=2,
    sparse_layers=1,
    k=2,
    z_loss=1e-2,
    loss_weights={'load_balance': 0.5, 'router_z': 0.01},
    **arguments,
  )


@pytest.fixture(scope='module')
def inputs():
  """A batch whose rows differ in length, one of them empty, and parameters."""
  batch = tiny_models.make_batch(encoder=False, rows=64)
  batch = {name: x.at[5].set(0) for name, x in batch.items()}
  return batch, tiny_models.make_params(make_model(), batch)


def take_step(model, inputs, microbatches=1, devices=1, balance=()):
  """Gradients, sums and the state after."""
  batch, params = inputs
  identity = optax.identity()  # An optimizer whose update is the gradient.
  mesh = sharding.make_mesh(data=devices, devices=jax.devices()[:devices])
  with sharding.use_mesh(mesh):
    boxed, _ = state.abstract(model, batch, lambda names: identity)
    zero = jnp.int32(0)
    before = state.TrainState(
      zero, params, identity.init(params), zero, balance
    )
    placed = state.shardings(boxed, mesh)
    batch = jax.device_put(
      batch,
      {k: sharding.batch_sharding(mesh, x.shape) for k, x in batch.items()},
    )
    after, sums = jax.jit(
      partial(
        step.train_step,
        model=model,
        optimizer=identity,
        key=jax.random.key(0),
        microbatches=microbatches,
        data_shards=devices,
      ),
      out_shardings=(placed, sharding.replicated(mesh)),
    )(jax.device_put(before, placed), batch)
  grads = jax.tree.map(lambda a, b: np.asarray(a) - b, after.params, params)
  return grads, sums, after


def close(actual, expected, rtol=1e-4, atol=1e-6):
  jax.tree.map(
    partial(np.testing.assert_allclose, rtol=rtol, atol=atol), actual, expected
  )


ALL = [(2, 1), (4, 1), (8, 1), (1, 8), (4, 8)]


@pytest.mark.parametrize(
  'scope, reduction, others',
  [
    ('batch', 'sum', [(4, 8)]),
    ('group', 'joint', [(4, 1)]),
    pytest.param('batch', 'sum', ALL, marks=pytest.mark.slow),
    pytest.param('batch', 'joint', ALL, marks=pytest.mark.slow),
  ],
)
def test_parts_and_devices_change_no_gradient(inputs, scope, reduction, others):
  model = make_model(balance_over=scope, layer_reduction=reduction)
  expected, sums, _ = take_step(model, inputs)
  routers = expected['decoder']['layers_0']['moe']['router']
  assert np.abs(routers['kernel']).max() > 1e-2
  for microbatches, devices in others:
    grads, sums_of_parts, _ = take_step(model, inputs, microbatches, devices)
    close(grads, expected)
    close(sums_of_parts['objective'] / microbatches, sums['objective'])


def test_fewer_targets_and_tokens_than_microbatches():
  # Two targets and three tokens in eight microbatches: 1/4 and 3/8 in the mean.
  model = make_model(balance_over='batch')
  batch = tiny_models.make_batch(encoder=False, rows=8)
  params = tiny_models.make_params(model, batch)
  token = jnp.zeros((8, 8), jnp.int32).at[0, :2].set(1).at[5, 0].set(1)
  weights = token.at[0, 1].set(0)
  batch = {name: x * token for name, x in batch.items()}
  batch['decoder_loss_weights'] = weights
  expected, sums, _ = take_step(model, (batch, params))
  grads, sums_of_parts, _ = take_step(model, (batch, params), 8)
  close(grads, expected)
  close(sums_of_parts['objective'] / 8, sums['objective'])


def sums_of(aux):
  """Counts [E], sums of scores [E] and the number of tokens of a layer."""
  balance = aux.balance
  return (
    np.asarray(x, np.float64).sum(0)
    for x in (balance.counted_GxE, balance.score_GxE, balance.tokens_G)
  )


def test_balance_over_the_batch_is_the_definition(inputs):
  # f and P of all tokens, by hand, at four microbatches.
  batch, params = inputs
  model = make_model(balance_over='batch')
  _, auxes = model._apply(
    params, batch, train=True, rng=jax.random.key(0), factor=1.25
  )
  expected = 0.0
  for aux in auxes.values():
    counted, score, tokens = sums_of(aux)
    expected += 8 * (counted * score).sum() / tokens**2
  _, sums, _ = take_step(model, inputs, microbatches=4)
  np.testing.assert_allclose(
    sums['aux_losses']['load_balance'] / 4, expected, rtol=1e-5
  )


def test_one_microbatch_knows_the_batch(inputs):
  whole = take_step(make_model(balance_over='batch'), inputs)[0]
  for scope in ('microbatch', 'batch_so_far'):
    close(take_step(make_model(balance_over=scope), inputs)[0], whole)


def test_the_batch_so_far_is_the_definition(inputs):
  # f of the first half is its own, of the second that of both; P is each half's
  # own, and a half weighs by its tokens.
  batch, params = inputs
  model = make_model(balance_over='batch_so_far')
  apply = jax.jit(partial(model._apply, train=True, factor=1.25))
  so_far, value, total = {}, 0.0, 0.0
  for rows in (slice(32), slice(32, 64)):
    half = {name: x[rows] for name, x in batch.items()}
    _, auxes = apply(params, half)
    for name, aux in auxes.items():
      counted, score, tokens = sums_of(aux)
      before = so_far.get(name, (0.0, 0.0))
      so_far[name] = f, n = before[0] + counted, before[1] + tokens
      value += 8 * (f / n * score).sum()
    total += tokens
  _, sums, _ = take_step(model, inputs, microbatches=2)
  np.testing.assert_allclose(
    sums['aux_losses']['load_balance'] / 2, value / total, rtol=1e-5
  )


def test_a_microbatch_of_padding_dilutes_no_batch_so_far(inputs):
  # The second of two halves is padding alone: the first is all there is.
  batch, params = inputs
  half = {name: x.at[32:].set(0) for name, x in batch.items()}
  model = make_model(balance_over='batch_so_far')
  _, sums, _ = take_step(model, (half, params))
  _, sums_of_parts, _ = take_step(model, (half, params), microbatches=2)
  close(
    sums_of_parts['aux_losses']['load_balance'] / 2,
    sums['aux_losses']['load_balance'],
  )


def test_the_last_steps_counts_are_the_next_steps_f(inputs):
  batch, _ = inputs
  model = make_model(balance_over='last_step')
  boxed, _ = state.abstract(model, batch, lambda names: optax.identity())
  assert set(boxed.balance) == {'decoder/layers_0', 'decoder/layers_1'}
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), boxed.balance)
  first, _, after = take_step(model, inputs, balance=zeros)
  exact = take_step(make_model(balance_over='batch'), inputs)[0]
  close(first, exact)  # Nothing came before: its own.
  # The same parameters and batch again, in parts: now f is the batch's.
  again, _, _ = take_step(model, inputs, 4, balance=after.balance)
  close(again, exact)
  # f of one expert alone is what the loss is of then: E P_e.
  alone = jax.tree.map(jnp.zeros_like, after.balance)
  alone = {
    name: layer.replace(
      counted_GxE=layer.counted_GxE.at[0, 3].set(7.0),
      tokens_G=layer.tokens_G + 7,
    )
    for name, layer in alone.items()
  }
  _, sums, _ = take_step(model, inputs, balance=alone)
  expected = sum(
    8 * layer.score_GxE[0, 3] / layer.tokens_G[0]
    for layer in after.balance.values()
  )
  np.testing.assert_allclose(
    sums['aux_losses']['load_balance'], expected, rtol=1e-5
  )


def test_other_models_keep_no_counts(inputs):
  _, _, after = take_step(make_model(balance_over='batch'), inputs)
  assert after.balance == ()


class Unbalanced(Router):
  """A router of another project, which knows no Balance."""

  def __call__(self, x_GxSxD, *, mask_GxS=None, deterministic=True):
    G, S, _ = x_GxSxD.shape
    zeros = jnp.zeros((G, S, 1), jnp.int32)
    assignment = Assignment(zeros, jnp.ones((G, S, 1)), zeros, self.num_experts)
    return assignment, Aux({'load_balance': jnp.float32(2)}, {})


def test_a_loss_without_its_counts_is_refused_where_they_are_needed():
  batch = tiny_models.make_batch(encoder=False, rows=2)
  for arguments in ({'balance_over': 'batch'}, {'layer_reduction': 'joint'}):
    model = tiny_models.make_model(
      encoder=False,
      layers=2,
      make_router=partial(Unbalanced, num_experts=4),
      loss_weights={'load_balance': 1.0},
      **arguments,
    )
    params = tiny_models.make_params(model, batch)
    with pytest.raises(ValueError, match='decoder/layers_1 returns load_bal'):
      jax.eval_shape(partial(model.loss, train=False), params, batch)


def test_layers_that_cannot_be_taken_together_are_named():
  balances = [
    Balance.of(jnp.ones((1, 2, E)), jnp.ones((1, 2, E))) for E in (2, 3)
  ]
  with pytest.raises(ValueError, match=r'\(1, 2\) and \(1, 3\).*: set another'):
    balances[0] + balances[1]


@pytest.mark.parametrize(
  'arguments, match',
  [
    ({'balance_over': 'world'}, 'balance_over must be one of group'),
    ({'layer_reduction': 'max'}, 'layer_reduction must be one of sum'),
    ({'balance_over': 'batch', 'consistency': 1.0}, 'makes two'),
  ],
)
def test_unknown_scopes_are_named(arguments, match):
  with pytest.raises(ValueError, match=match):
    make_model(**arguments)


def test_any_router_with_logits_has_a_z_loss():
  # Logits (log 3, 0): log Z = log 4.
  router = partial(TopK, num_experts=2, noise=100.0)
  layer = MoE(make_router=router, make_expert=partial(Mlp, hidden_width=1))
  one = {'kernel': jnp.ones((2, 1, 1))}
  params = {
    'router': {'kernel': jnp.log(jnp.array([[3.0, 1.0]]))},
    'expert': {'wi': one, 'wo': one},
  }
  _, aux = layer.apply(
    {'params': params},
    jnp.ones((1, 4, 1)),
    deterministic=False,
    rngs={'dropout': jax.random.key(0)},
  )
  # Of the raw logits: noise is for the choice.
  np.testing.assert_allclose(aux.losses['router_z'], np.log(4) ** 2, rtol=1e-6)


def test_counting_a_batch_first_costs_a_forward_pass(inputs):
  batch, params = inputs
  flops = {}
  for scope in ('group', 'batch_so_far', 'last_step', 'batch'):
    model = make_model(balance_over=scope)
    balance = ()
    if scope == 'last_step':
      balance = jax.eval_shape(partial(model.loss, train=False), params, batch)
      balance = balance[1]['balance']
    zero = jnp.int32(0)
    take = partial(
      step.train_step,
      model=model,
      optimizer=optax.identity(),
      key=jax.random.key(0),
      microbatches=4,
    )
    before = state.TrainState(zero, params, optax.EmptyState(), zero, balance)
    text = jax.jit(take).lower(before, batch).compile().as_text()
    flops[scope] = hlo.Program(text).total.flops
  for scope in ('batch_so_far', 'last_step'):
    assert flops[scope] == pytest.approx(flops['group'], rel=0.02)
  # A step is three passes, one forward and two backward. The first pass ends
  # with the last router: half of these two layers' FFNs and no logits.
  assert 1.1 < flops['batch'] / flops['group'] < 4 / 3

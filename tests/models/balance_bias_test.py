"""Biases of routers: moved against the load, by nothing but the update."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_models

from sparse_experts import sharding
from sparse_experts.models import layout
from sparse_experts.models.balance_bias import update_biases
from sparse_experts.moe.routers.deepseek import BIAS, DeepSeek
from sparse_experts.training import ema, optimizers, step, subsets
from sparse_experts.training.state import TrainState

E = 4
KEY = jax.random.key(0)
partial = functools.partial


def make_model(bias_rate=0.1, balance_bias=True, **arguments):
  return tiny_models.make_model(
    encoder=False,
    num_experts=E,
    make_router=partial(
      DeepSeek, num_experts=E, k=2, scores='sigmoid', balance_bias=balance_bias
    ),
    loss_weights={},
    bias_rate=bias_rate,
    **arguments,
  )


def biases(params):
  """Of each router, by its path."""
  flat = jax.tree_util.tree_leaves_with_path(params)
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): np.asarray(leaf)
    for path, leaf in flat
    if path[-1].key == BIAS
  }


def trainer(model, optimizer, microbatches=1):
  return jax.jit(
    partial(
      step.train_step,
      model=model,
      optimizer=optimizer,
      key=KEY,
      microbatches=microbatches,
    )
  )


def make_state(params, optimizer):
  zero = jnp.int32(0)
  return TrainState(zero, params, optimizer.init(params), zero)


def params_of(model, batch):
  """All different, with biases of 0."""
  params = tiny_models.make_params(model, batch)
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: jnp.zeros_like(leaf) if path[-1].key == BIAS else leaf,
    params,
  )


SGD = optax.sgd(0.1)


def test_biases_move_against_the_load_by_hand():
  params = {
    'encoder': {'layers_1': {'moe': {'router': {BIAS: jnp.array([1.0, 1, 1])}}}}
  }
  # Mean load 3: the first is over it, the second under it, the third on it.
  sums = {'encoder/layers_1': {'chosen_E': jnp.array([5.0, 1.0, 3.0])}}
  moved = update_biases(params, sums, 0.25)
  assert biases(moved) == {
    f'encoder/layers_1/moe/router/{BIAS}': pytest.approx([0.75, 1.25, 1])
  }


def test_biases_of_a_scanned_stack_meet_the_loads_of_their_layers():
  # d d s d s d s: one before, three times two; the bias is block 1's of two,
  # so layers 2, 4 and 6.
  kinds = (False, False, True, False, True, False, True)
  assert layout.split_period(kinds) == (1, 2, 3)
  block = {'mlp': {'wi': jnp.ones(2)}}
  sparse = {'moe': {'router': {BIAS: jnp.zeros(2)}}}
  plain = {f'layers_{i}': sparse if kinds[i] else block for i in range(7)}
  sums = {
    f'decoder/layers_{i}': {'chosen_E': jnp.array(load)}
    for i, load in [(2, [3.0, 1.0]), (4, [1.0, 3.0]), (6, [2.0, 2.0])]
  }
  moved = update_biases({'decoder': layout.roll(plain, kinds)}, sums, 0.5)
  assert next(iter(biases(moved).values())).tolist() == [
    [-0.5, 0.5],
    [0.5, -0.5],
    [0, 0],
  ]
  expected = update_biases({'decoder': plain}, sums, 0.5)
  unrolled = {'decoder': layout.unroll(moved['decoder'], kinds)}
  jax.tree.map(np.testing.assert_array_equal, unrolled, expected)


def test_an_average_is_of_the_biases_after_the_step():
  """Of decay 0 it is the parameters as the step leaves them."""
  model = make_model(bias_rate=0.02)
  batch = tiny_models.make_batch(encoder=False, rows=16)
  optimizer = ema.averaged(
    None, learning_rate=0.1, optimizer=lambda *_, **__: SGD, decay=0.0
  )
  start = make_state(params_of(model, batch), optimizer)
  after, _ = trainer(model, optimizer)(start, batch)
  assert all(bias.any() for bias in biases(after.params).values())
  jax.tree.map(
    np.testing.assert_array_equal, after.opt_state.average, after.params
  )


def test_training_moves_biases_against_the_load_and_imbalance_falls():
  model = make_model(bias_rate=0.02)
  batch = tiny_models.make_batch(encoder=False, rows=16)
  frozen = optax.set_to_zero()  # All that learns is the bias.
  state = make_state(params_of(model, batch), frozen)
  train = trainer(model, frozen)
  imbalances = []
  for _ in range(40):
    before = biases(state.params)
    state, sums = train(state, batch)
    after = biases(state.params)
    assert len(after) == 2
    for path, bias in after.items():
      name = '/'.join(path.split('/')[:2])
      load = np.asarray(sums['layers'][name]['chosen_E'])
      np.testing.assert_allclose(
        bias - before[path], 0.02 * np.sign(load.mean() - load), atol=1e-6
      )
    loads = [layer['chosen_E'] for layer in sums['layers'].values()]
    imbalances.append([float(load.max() / load.mean()) for load in loads])
  first, last = np.array(imbalances)[0], np.array(imbalances)[-5:].mean(0)
  assert (first > 1.3).any()
  assert (last < 1.15).all() and (last <= first).all()


@pytest.fixture(scope='module')
def one_step():
  """A batch, parameters, and biases after one step of it as a whole."""
  model = make_model()
  batch = tiny_models.make_batch(encoder=False)
  params = params_of(model, batch)
  state, _ = trainer(model, SGD)(make_state(params, SGD), batch)
  found = biases(state.params)
  assert len({tuple(np.sign(bias)) for bias in found.values()}) == 2
  return batch, params, found


def test_microbatches_move_biases_as_the_whole_batch_does(one_step):
  batch, params, expected = one_step
  state = make_state(params, SGD)
  state, _ = trainer(make_model(), SGD, microbatches=4)(state, batch)
  jax.tree.map(np.testing.assert_array_equal, biases(state.params), expected)


def test_scanned_layers_move_biases_as_listed_ones_do(one_step):
  batch, params, expected = one_step
  kinds = layout.kinds(4, 2)
  rolled = {**params, 'decoder': layout.roll(params['decoder'], kinds)}
  state, _ = trainer(make_model(scan=True), SGD)(make_state(rolled, SGD), batch)
  unrolled = {'decoder': layout.unroll(state.params['decoder'], kinds)}
  jax.tree.map(np.testing.assert_array_equal, biases(unrolled), expected)


@pytest.mark.parametrize(
  'make_optimizer',
  [
    partial(optimizers.adam, learning_rate=0.1, weight_decay=0.1),
    partial(optimizers.adafactor, learning_rate=0.1, weight_decay_rate=0.1),
    partial(optimizers.adafactor, learning_rate=0.1, beta1=0.9),
  ],
)
def test_optimizers_leave_biases_alone(make_optimizer):
  names = {
    'kernel': ('embed', 'router'),
    BIAS: ('router',),
    'period': {BIAS: ('layers', 'router')},
  }
  params = {
    'kernel': jnp.ones((3, 2)),
    BIAS: jnp.array([1.0, -2.0]),
    'period': {BIAS: jnp.ones((3, 2))},
  }
  optimizer = make_optimizer(names)
  state = optimizer.init(params)
  grads = jax.tree.map(jnp.zeros_like, params)
  grads['kernel'] += 1
  new = params
  for _ in range(2):
    updates, state = jax.jit(optimizer.update)(grads, state, new)
    new = optax.apply_updates(new, updates)
  assert (new['kernel'] != params['kernel']).all()
  jax.tree.map(np.testing.assert_array_equal, biases(new), biases(params))


def test_a_skipped_step_moves_no_bias():
  model = make_model()
  batch = tiny_models.make_batch(encoder=False)
  params = params_of(model, batch)
  # A NaN that no router sees.
  params['logits']['kernel'] = params['logits']['kernel'].at[0, 0].set(jnp.nan)
  state, sums = trainer(model, SGD)(make_state(params, SGD), batch)
  assert sums['skipped'] == 1
  assert all((bias == 0).all() for bias in biases(state.params).values())


def test_a_rate_without_a_bias_is_refused():
  model = make_model(balance_bias=False)
  batch = tiny_models.make_batch(encoder=False)
  params = jax.eval_shape(partial(params_of, model, batch))
  state = jax.eval_shape(partial(make_state, optimizer=SGD), params)
  with pytest.raises(ValueError, match='bias_rate=0.1 moves .* none has one'):
    jax.eval_shape(
      partial(step.train_step, model=model, optimizer=SGD, key=KEY),
      state,
      batch,
    )


@pytest.mark.parametrize('trained, move', [('non_moe', False), ('moe', True)])
def test_biases_outside_of_what_is_trained_keep_every_bit(trained, move):
  model = make_model()
  batch = tiny_models.make_batch(encoder=False)
  optimizer = subsets.only(
    sharding.names_of(jax.eval_shape(partial(model.init, shapes=batch), KEY)),
    learning_rate=0.1,
    optimizer=optimizers.adam,
    trained=trained,
  )
  state = make_state(params_of(model, batch), optimizer)
  before = biases(state.params)
  after, _ = trainer(model, optimizer)(state, batch)
  assert len(before) == 2
  for path, bias in biases(after.params).items():
    assert (bias != before[path]).any() == move
  dense = [x.params['decoder']['layers_0']['mlp'] for x in (state, after)]
  assert (dense[0]['wi']['kernel'] != dense[1]['wi']['kernel']).any() != move

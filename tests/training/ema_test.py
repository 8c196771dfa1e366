"""The average of the parameters is the formula, wherever it lies."""

import json
import types

import command
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util
from jax.sharding import NamedSharding, PartitionSpec
from paths import ROOT

from sparse_experts import config, sharding
from sparse_experts.training import (
  checkpoints,
  ema,
  held_out,
  optimizers,
  saver,
  state,
  train,
)

DECAY = 0.8
NAMES = {'wi': ('expert', 'embed', 'mlp'), 'scale': ('embed',)}


def formula(history, decay=DECAY):
  """Weights decay^(n - i), over their sum; in float64, `history` from i = 1."""
  weights = [decay ** (len(history) - i) for i in range(1, len(history) + 1)]
  total = sum(w * np.asarray(p, np.float64) for w, p in zip(weights, history))
  return total / sum(weights)


def arrays(seed):
  random = np.random.default_rng(seed)
  shapes = {'wi': (2, 4, 8), 'scale': (4,)}
  return {k: jnp.float32(random.normal(size=s)) for k, s in shapes.items()}


def test_two_steps_by_hand():
  """From 7 to 1 to 2: (0.8 * 1 + 2) / 1.8, without the 7."""
  tx = ema.averaged(
    None,
    learning_rate=1.0,
    optimizer=lambda *_, **__: optax.sgd(1.0),
    decay=0.8,
  )
  state = tx.init(jnp.float32(7))
  assert state.average == 7  # Of no update, the parameters.
  _, state = tx.update(jnp.float32(6), state, jnp.float32(7))
  assert state.average == 1
  _, state = tx.update(jnp.float32(-1), state, jnp.float32(1))
  np.testing.assert_allclose(state.average, 2.8 / 1.8, rtol=1e-6)
  assert state.updates == 2


@pytest.mark.parametrize('make', [optimizers.adam, optimizers.adafactor])
def test_the_optimizer_is_as_without_and_the_average_is_the_formula(make):
  averaged = ema.averaged(NAMES, learning_rate=0.1, optimizer=make, decay=DECAY)
  alone = make(NAMES, learning_rate=0.1)
  params, history = arrays(0), []
  state, state_alone = averaged.init(params), alone.init(params)
  for i in range(1, 6):
    updates, state = averaged.update(arrays(i), state, params)
    expected, state_alone = alone.update(arrays(i), state_alone, params)
    jax.tree.map(np.testing.assert_array_equal, updates, expected)
    params = optax.apply_updates(params, updates)
    history.append(params)
  for name in NAMES:
    expected = formula([params[name] for params in history])
    np.testing.assert_allclose(state.average[name], expected, rtol=1e-5)


def test_what_does_not_move_keeps_its_bits():
  tx = ema.averaged(
    NAMES,
    learning_rate=0.1,
    optimizer=lambda names, learning_rate: optax.set_to_zero(),
    decay=0.999,
  )
  params = arrays(0)
  state = tx.init(params)
  for i in range(20):
    _, state = tx.update(arrays(i), state, params)
  jax.tree.map(np.testing.assert_array_equal, state.average, params)


def test_weights_add_up_to_one_for_a_decay_near_one():
  """1 - 0.99999^n loses two digits of float32 as a difference."""
  for n in (1, 2, 1000, 10**6):
    share = ema._share(0.99999, jnp.int32(n))
    decay = np.float64(0.99999)
    assert float(share) == pytest.approx((1 - decay) / (1 - decay**n), rel=1e-6)
  assert ema._share(0.99999, jnp.int32(1)) == 1


@pytest.mark.parametrize('decay', [-0.1, 1.0])
def test_decays_out_of_range(decay):
  with pytest.raises(ValueError, match=rf'decay={decay} .* below 1; 0.999'):
    ema.averaged(
      NAMES, learning_rate=0.1, optimizer=optimizers.adam, decay=decay
    )


# A run with gin/ema.gin, in two parts, on eight devices and with ZeRO-1.

EMA = (
  f'--gin_file={ROOT}/gin/ema.gin',
  f'--gin.EMA_DECAY={DECAY}',
  "--gin.MESH={'data': 2, 'expert': 4}",
  "--gin.OPTIMIZER_RULES={'embed': 'data'}",
)


@pytest.fixture(scope='module')
def model_dir(tmp_path_factory):
  model_dir = tmp_path_factory.mktemp('ema')
  each = (*EMA, '--gin.CHECKPOINT_PERIOD=1', '--gin.KEEP_CHECKPOINTS=None')
  command.train(model_dir, *each, '--gin.TRAIN_STEPS=2')
  command.train(model_dir, *each, '--gin.TRAIN_STEPS=3')
  return model_dir


def averages(model_dir, step):
  prefix = 'optimizer/opt_state/average/'
  return {
    name.removeprefix(prefix): array
    for name, array in command.saved(model_dir, step).items()
    if name.startswith(prefix)
  }


def test_a_resumed_run_averages_what_it_saved(model_dir):
  history = [command.saved(model_dir, step) for step in (1, 2, 3)]
  found = averages(model_dir, 3)
  names = {n.removeprefix('params/') for n in history[0] if n[:7] == 'params/'}
  assert found.keys() == names
  for name, average in found.items():
    expected = formula([arrays[f'params/{name}'] for arrays in history])
    np.testing.assert_allclose(average, expected, rtol=1e-5, atol=1e-7)
    assert (average != history[-1][f'params/{name}']).any(), name


def test_eight_devices_are_one():
  params, grads = arrays(0), arrays(1)
  tx = ema.averaged(
    NAMES, learning_rate=0.1, optimizer=optimizers.adam, decay=DECAY
  )
  mesh = sharding.make_mesh(2, 2, 2)
  placed = {
    'wi': NamedSharding(mesh, PartitionSpec('expert', 'data', 'model')),
    'scale': NamedSharding(mesh, PartitionSpec('data')),
  }

  @jax.jit
  def two(params, grads):
    state = tx.init(params)
    for _ in range(2):
      updates, state = tx.update(grads, state, params)
      params = optax.apply_updates(params, updates)
    return state.average

  alone = two(params, grads)
  sharded = two(jax.device_put(params, placed), jax.device_put(grads, placed))
  jax.tree.map(np.testing.assert_array_equal, alone, sharded)


def test_the_average_is_read_where_parameters_are(model_dir):
  config.parse([command.TINY.partition('=')[2]], [f'MODEL_DIR={model_dir}'], [])
  mesh = sharding.make_mesh(2, 4)
  with sharding.use_mesh(mesh, {'embed': 'data'}):
    found, step = checkpoints.restore_params(
      config.value('MODEL'),
      model_dir,
      config.argument(train.train, 'dataset'),
      mesh,
      'ema',
    )
  assert step == 3
  wi = found['decoder']['layers_1']['moe']['expert']['wi_0']['kernel']
  assert wi.sharding.spec == PartitionSpec('expert', 'data', 'model')
  found = {k: np.asarray(x) for k, x in checkpoints.flatten(found).items()}
  command.assert_same_bits(found, averages(model_dir, 3))


@pytest.mark.slow
def test_evaluation_takes_the_average(model_dir):
  """Its loss is that of the average, put in by hand."""
  arguments = (command.TINY, *EMA, f'--gin.MODEL_DIR={model_dir}')
  parameters = '--gin.PARAMETERS=ema'
  outcome = command.run('evaluate', *arguments, parameters, '--json')
  assert outcome.code == 0, outcome.stderr
  found = json.loads(outcome.stdout)
  files = {path.name for path in (model_dir / 'evaluation').iterdir()}
  assert files == {'tiny_sums-validation-ema-3.json'}

  dataset = config.argument(train.train, 'eval_dataset')
  mesh = sharding.make_mesh(2, 4)
  with sharding.use_mesh(mesh):
    evaluation = held_out.LossEvaluation(config.value('MODEL'), dataset, mesh)
    average = traverse_util.unflatten_dict(averages(model_dir, 3), sep='/')
    loss = evaluation(average)['loss']
    trained = {
      tuple(name.split('/')[1:]): array
      for name, array in command.saved(model_dir, 3).items()
      if name.startswith('params/')
    }
    other = evaluation(traverse_util.unflatten_dict(trained))['loss']
  assert found['metrics']['loss'] == pytest.approx(loss, rel=1e-6)
  assert abs(other - loss) > 1e-4

  for name, folder in (('infer', 'inferences'), ('record', 'records')):
    outcome = command.run(name, *arguments, parameters)
    assert outcome.code == 0, outcome.stderr
    assert list((model_dir / folder).glob('tiny_sums-validation-3-ema.*'))


def test_parameters_that_are_not_there(tmp_path):
  params = {'w': jnp.ones(2)}
  zero = jnp.int32(0)
  now = state.TrainState(zero, params, optax.adam(0.1).init(params), zero)
  writer = saver.Saver(tmp_path)
  batches = types.SimpleNamespace(save=lambda folder, streams: None)
  writer.save(now, saver.DataArgs(batches))
  writer.close()
  mesh = sharding.make_mesh()
  placed = jax.tree.map(lambda _: sharding.replicated(mesh), params)
  found, _ = checkpoints.load_params(tmp_path, params, placed)
  np.testing.assert_array_equal(found['w'], params['w'])
  with pytest.raises(ValueError, match='0 has no average of the parameters; '):
    checkpoints.load_average(tmp_path, params, placed)
  with pytest.raises(ValueError, match="are trained or ema, not 'mean'"):
    checkpoints.restore_params(None, tmp_path, None, mesh, 'mean')

"""Models: scan, remat and microbatches change nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_models
from flax import linen as nn

from sparse_experts.models import layout
from sparse_experts.models.auxiliary import Totals
from sparse_experts.models.sums import summary
from sparse_experts.sharding import names_of
from sparse_experts.training import optimizers, state, step


def close(a, b, rtol=2e-5, atol=2e-6):
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol), a, b
  )


def loss_and_grads(model, params, batch):
  def loss(params):
    return model.loss(params, batch, train=True, rng=jax.random.key(1))

  (value, sums), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
  return value, sums, grads


def rolled(params, kinds):
  return {
    name: layout.roll(part, kinds) if name in ('encoder', 'decoder') else part
    for name, part in params.items()
  }


KINDS = layout.kinds(4, 2)


@pytest.fixture(scope='module')
def plain():
  """An encoder-decoder, its batch, parameters, loss and gradients."""
  model = tiny_models.make_model()
  batch = tiny_models.make_batch()
  params = tiny_models.make_params(model, batch)
  return model, batch, params, loss_and_grads(model, params, batch)


@pytest.mark.parametrize('remat', ['none', 'full', 'dots'])
def test_scan_and_remat_change_nothing(plain, remat):
  _, batch, params, (loss, sums, grads) = plain
  model = tiny_models.make_model(scan=True, remat=remat)
  scanned = loss_and_grads(model, rolled(params, KINDS), batch)
  close(scanned[0], loss)
  close(scanned[1], sums)
  close(scanned[2], rolled(grads, KINDS))
  # Aux passed through the scan: every sparse layer reports.
  assert set(scanned[1]['layers']) == {
    f'{stack}/layers_{i}' for stack in ('encoder', 'decoder') for i in (1, 3)
  }
  # Its gradient too: the balance loss reaches each router.
  routers = scanned[2]['encoder']['period']['layers_1']['moe']['router']
  assert (np.abs(routers['kernel']).max((1, 2)) > 0).all()


@pytest.mark.parametrize('optimizer', ['adafactor', 'adam'])
def test_one_optimizer_step_is_equal_for_scan_and_no_scan(plain, optimizer):
  _, batch, params, (_, _, grads) = plain

  def take_step(scan, params, grads):
    model = tiny_models.make_model(scan=scan)
    make = functools.partial(getattr(optimizers, optimizer), learning_rate=0.1)
    _, transformation = state.abstract(model, batch, make)
    updates, _ = jax.jit(transformation.update)(
      grads, transformation.init(params), params
    )
    return updates

  expected = rolled(take_step(False, params, grads), KINDS)
  actual = take_step(True, rolled(params, KINDS), rolled(grads, KINDS))
  close(actual, expected, rtol=1e-5, atol=1e-8)
  assert min(np.abs(leaf).max() for leaf in jax.tree.leaves(actual)) > 0


def test_roll_and_unroll_are_inverse(plain):
  params = plain[2]['encoder']
  restored = layout.unroll(layout.roll(params, KINDS), KINDS)
  assert jax.tree.structure(restored) == jax.tree.structure(params)
  jax.tree.map(np.testing.assert_array_equal, restored, params)


def test_scan_without_a_period_is_an_error():
  model = tiny_models.make_model(scan=True, layers=2, sparse_layers=(1,))
  with pytest.raises(ValueError, match='needs a period that repeats.*ds'):
    jax.eval_shape(
      lambda: model.init(jax.random.key(0), tiny_models.make_batch())
    )


@pytest.mark.parametrize(
  'kinds, expected',
  [
    ('dsdsds', (0, 2, 3)),
    ('dddd', (0, 1, 4)),
    ('xdddy', (1, 1, 3)),
    # Two ways to compile 5 of 8: the shorter period, one block, wins.
    ('dddsddds', (0, 4, 2)),
    ('xdsdsy', (1, 2, 2)),
  ],
)
def test_period(kinds, expected):
  prefix, period, repeats = expected
  assert layout.split_period(kinds) == expected
  unit = kinds[prefix : prefix + period]
  assert kinds[prefix : prefix + period * repeats] == unit * repeats


@pytest.mark.parametrize('group_size', [None, 24])
def test_microbatches_change_nothing(group_size):
  # group_size 24: two sequences of 12 a group, so groups are whole in each
  # half. Rows have different numbers of targets.
  model = tiny_models.make_model(
    layers=2, group_size=group_size, z_loss=1e-2, capacity_factor_train=0.5
  )
  batch = tiny_models.make_batch(inputs=12, targets=12)
  params = tiny_models.make_params(model, batch)
  identity = optax.identity()  # An optimizer whose update is the gradient.

  def gradients(microbatches):
    before = state.TrainState(
      jnp.int32(0), params, identity.init(params), jnp.int32(0)
    )
    after, sums = jax.jit(
      functools.partial(
        step.train_step,
        model=model,
        optimizer=identity,
        key=jax.random.key(0),
        microbatches=microbatches,
      )
    )(before, batch)
    grads = jax.tree.map(jnp.subtract, after.params, params)
    return grads, sums

  (one, sums_one), (two, sums_two) = gradients(1), gradients(4)
  close(two, one, rtol=1e-4, atol=1e-5)
  summary_one, summary_two = summary(sums_one), summary(sums_two)
  assert summary_one['layers']['encoder/layers_1']['dropped'] > 0
  close(summary_two, summary_one, rtol=1e-5)
  close(sums_two['objective'] / 4, sums_one['objective'], rtol=1e-5)


def test_the_encoder_sees_a_packed_example_as_if_alone():
  model = tiny_models.make_model(layers=2)
  one, two = (
    {name: x[:1] for name, x in tiny_models.make_batch(seed=seed).items()}
    for seed in (1, 2)
  )
  packed = {}
  for name in one:
    packed[name] = jnp.concatenate([one[name], two[name]], axis=1)
  for side, feature in (('encoder', 'input'), ('decoder', 'target')):
    lengths = [x[f'{side}_{feature}_tokens'].shape[1] for x in (one, two)]
    segments = np.repeat([1, 2], lengths)[None]
    packed[f'{side}_segment_ids'] = jnp.asarray(
      np.where(packed[f'{side}_{feature}_tokens'] > 0, segments, 0)
    )
  params = tiny_models.make_params(model, one)
  score = jax.jit(model.score)
  alone = score(params, one) + score(params, two)
  np.testing.assert_allclose(score(params, packed), alone, rtol=1e-5)


def test_dropout_is_for_training_only():
  model = tiny_models.make_model(layers=2, dropout_rate=0.5)
  batch = tiny_models.make_batch()
  params = tiny_models.make_params(model, batch)

  @functools.partial(jax.jit, static_argnames='train')
  def loss(key, train):
    return model.loss(params, batch, key, train=train)[0]

  a, b = jax.random.split(jax.random.key(0))
  assert loss(a, train=True) == loss(a, train=True) != loss(b, train=True)
  assert loss(a, train=False) == loss(b, train=False)


def test_bfloat16_activations_and_float32_parameters():
  model = tiny_models.make_model(layers=2, dtype=jnp.bfloat16)
  batch = tiny_models.make_batch()
  params = tiny_models.make_params(model, batch)
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {
    jnp.dtype('float32')
  }
  logits, _ = jax.eval_shape(
    lambda: model.module.apply({'params': params}, batch)
  )
  assert logits.dtype == jnp.float32
  loss, _, grads = loss_and_grads(model, params, batch)
  assert loss.dtype == jnp.float32 and np.isfinite(loss)
  full = tiny_models.make_model(layers=2)
  np.testing.assert_allclose(
    loss, loss_and_grads(full, params, batch)[0], rtol=2e-2
  )
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(grads))


def test_prefix_sees_itself():
  # Of a decoder with a bidirectional prefix, the first position's prediction
  # depends on the prefix's last token; of a causal one it does not.
  def first_logits(bidirectional, last_token):
    model = tiny_models.make_model(encoder=False, layers=2)
    module = model.module.clone(bidirectional_prefix=bidirectional)
    batch = tiny_models.make_batch(encoder=False)
    prefix = (jnp.arange(8)[None] < 4) * jnp.ones((8, 1), jnp.int32)
    batch['decoder_causal_attention'] = prefix
    params = tiny_models.make_params(model, batch)
    batch['decoder_input_tokens'] = (
      batch['decoder_input_tokens'].at[:, 3].set(last_token)
    )
    return module.apply({'params': params}, batch)[0][:, 0]

  np.testing.assert_array_equal(first_logits(False, 5), first_logits(False, 6))
  assert np.abs(first_logits(True, 5) - first_logits(True, 6)).max() > 1e-3


def test_layer_reduction_and_weights():
  # Two sparse layers a stack: the sum over layers is four times their mean.
  batch = tiny_models.make_batch()
  values = {}
  for reduction in ('sum', 'mean'):
    model = tiny_models.make_model(layer_reduction=reduction)
    params = tiny_models.make_params(model, batch)
    _, sums = jax.jit(functools.partial(model.loss, train=False))(params, batch)
    values[reduction] = sums['aux_losses']
  close(values['sum'], jax.tree.map(lambda x: 4 * x, values['mean']))
  with pytest.raises(ValueError, match=r"\['sinkhorn'\], which no router"):
    bad = tiny_models.make_model()
    object.__setattr__(bad, 'loss_weights', {'sinkhorn': 1.0})
    jax.eval_shape(functools.partial(bad.loss, train=False), params, batch)


def test_padding_is_no_target():
  # Two targets, of probability 1/4 and 1/2, and padding of probability 1/4 that
  # counts neither there nor in what is divided by: (log 4 + log 2) / 2.
  model = tiny_models.make_model(encoder=False)
  logits = jnp.log(jnp.array([[[1, 1, 1, 1], [1, 1, 4, 2], [1, 1, 1, 1]]]))
  targets = jnp.array([[3, 2, 0]])
  for weights in ({}, {'decoder_loss_weights': jnp.array([[1, 1, 0]])}):
    batch = {'decoder_target_tokens': targets, **weights}
    totals = Totals(model.weight(batch), {})
    judged = model.measure(logits, batch, totals)
    np.testing.assert_allclose(judged.loss, 1.5 * np.log(2), rtol=1e-6)
    assert judged.counts == {'targets': 2}


def test_every_parameter_has_names():
  model = tiny_models.make_model(scan=True, extra_mlp=True)
  boxed = jax.eval_shape(
    lambda: model.init(jax.random.key(0), tiny_models.make_batch())
  )
  names = names_of(boxed)
  ranks = jax.tree.map(lambda x: x.ndim, nn.unbox(boxed))
  is_names = lambda x: isinstance(x, tuple)
  lengths = jax.tree.map(len, names, is_leaf=is_names)
  assert lengths == ranks
  wi = names['decoder']['period']['layers_1']['moe']['expert']['wi']['kernel']
  assert wi == ('layers', 'expert', 'embed', 'mlp')

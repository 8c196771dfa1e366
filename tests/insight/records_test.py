"""Routing records: the oracle's numbers, everywhere, and nothing when off."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tiny_models
import toy_assignment
from tiny_layer import RULE, B, E, L, arrays, make_layer, mask_of, variables
from tiny_layer import tokens as tokens_of

from sparse_experts import moe, sharding
from sparse_experts.insight import records, routing
from sparse_experts.models.layout import roll
from sparse_experts.moe import FATES
from sparse_experts.moe.assignment import SoftAssignment
from sparse_experts.moe.record import record
from sparse_experts.training import step

partial = functools.partial


# One layer.


def fates(record):
  return np.array(FATES)[np.asarray(record.fate_BxLxK)].tolist()


def test_fates_by_hand():
  """The toy of metrics_test under a capacity of one."""
  found = record(
    toy_assignment.TOY, shape=(2, 3), capacity=1, mask_GxS=toy_assignment.MASK
  )
  assert fates(found) == [
    [['kept'] * 2, ['capacity', 'no choice'], ['capacity'] * 2],
    [['kept', 'capacity'], ['kept', 'capacity'], ['padding'] * 2],
  ]
  # By who had no room: one choice within the capacity.
  lost = np.zeros((2, 3, 2), bool)
  lost[0, 0, 1] = True
  for who in ('sender', 'receiver'):
    found = record(
      toy_assignment.TOY, shape=(2, 3), capacity=1, lost={who: jnp.array(lost)}
    )
    assert fates(found)[0][0] == ['kept', who]
    assert routing.recount(found)[f'dropped_{who}'] == 1


def test_numbers_of_the_logits_by_hand():
  probs = np.array([[[0.5, 0.25, 0.25], [1.0, 0, 0]]])
  found = record(
    moe.Assignment(*(jnp.zeros((1, 2, 1), int),) * 3, num_experts=3),
    shape=(1, 2),
    mask_GxS=jnp.array([[True, False]]),
    logits_GxSxE=jnp.log(probs),
    log_z_GxS=jnp.array([[2.0, 5.0]]),
  )
  # 0.5 log 2 + 2 * 0.25 log 4 = 1.5 log 2; the second token is padding.
  np.testing.assert_allclose(found.entropy_BxL, [[1.5 * np.log(2), 0]], 1e-6)
  np.testing.assert_allclose(found.confidence_BxL, [[0.5, 0]], 1e-6)
  np.testing.assert_allclose(found.log_z_BxL, [[2, 0]], 1e-6)


def test_a_soft_router_is_recorded_by_its_largest_share():
  combine = jnp.array([[[[0.1, 0.2], [0.4, 0.3]], [[0.6, 0.1], [0.2, 0.1]]]])
  found = record(SoftAssignment(combine, combine), shape=(1, 2), capacity=5)
  assert found.expert_BxLxK.tolist() == [[[1], [0]]]  # Shares .3 .7 and .7 .3.
  np.testing.assert_allclose(found.gate_BxLxK, [[[0.7], [0.7]]], 1e-6)
  assert found.capacity is None


@pytest.mark.parametrize('group_size', [3, B * L])
def test_a_layers_record_is_the_oracles(group_size):
  inputs, mask = arrays(), mask_of()
  layer = make_layer(k=2, gates='chosen', group_size=group_size)
  apply = jax.jit(partial(layer.apply, capacity_factor=0.5, record=True))
  _, aux = apply(variables(inputs), tokens_of(inputs), mask_BxL=jnp.array(mask))
  shape = (B * L // group_size, group_size)
  logits = (inputs['x'] @ inputs['router']).reshape(*shape, E)
  decided = oracle.decide(logits, k=2, mask=mask.reshape(shape), over='chosen')
  C = RULE(0.5, tokens=group_size, num_experts=E, k=2)

  found, taken = aux.record, decided.taken
  assert (found.capacity, found.group_size, found.num_experts) == (
    C,
    group_size,
    E,
  )
  gates = oracle.gates(logits, decided.ranked, 'chosen')
  fate = np.select(
    [~mask.reshape(*shape, 1), decided.kept(C)], ['padding', 'kept'], 'capacity'
  )
  for mine, theirs in (
    (found.expert_BxLxK, np.where(taken, decided.ranked, E)),
    (found.gate_BxLxK, np.where(taken, gates, 0)),
    (found.position_BxLxK, decided.place),
    (
      np.array(FATES)[np.asarray(found.fate_BxLxK)],
      np.broadcast_to(fate, (*shape, 2)),
    ),
  ):
    mine = np.asarray(mine).reshape(*shape, 2)[mask.reshape(shape)]
    theirs = theirs[mask.reshape(shape)]
    if mine.dtype == np.float32:
      np.testing.assert_allclose(mine, theirs, 1e-5)
    else:
      np.testing.assert_array_equal(mine, theirs)
  assert (np.asarray(found.fate_BxLxK) == FATES.index('capacity')).any()
  probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  entropy = -(probs * np.log(probs)).sum(-1).reshape(B, L) * mask
  np.testing.assert_allclose(found.entropy_BxL, entropy, 1e-5, 1e-6)


# A model: scan, microbatches, meshes.

SIZES = dict(layers=4, k=2, capacity_factor_eval=0.75)


@pytest.fixture(scope='module')
def batch():
  return tiny_models.make_batch()


@pytest.fixture(scope='module')
def params(batch):
  return tiny_models.make_params(tiny_models.make_model(**SIZES), batch)


@pytest.fixture(scope='module')
def on_one(params, batch):
  """Records and evaluation's sums of the plain model on one device."""
  model = tiny_models.make_model(**SIZES)
  both = jax.jit(
    lambda params, batch: (
      model.record(params, batch),
      step.eval_step(params, batch, model=model),
    )
  )
  return both(params, batch)


def assert_same(some, others):
  assert some.keys() == others.keys()
  for name, layer in some.items():
    assert jax.tree.structure(layer) == jax.tree.structure(others[name])
    for mine, theirs in zip(
      jax.tree.leaves(layer), jax.tree.leaves(others[name])
    ):
      np.testing.assert_allclose(mine, theirs, 1e-4, 1e-5, err_msg=name)


def test_a_recount_is_what_evaluation_counts(on_one, batch):
  found, sums = on_one
  for name, layer in found.items():
    counted = routing.recount(jax.tree.map(np.asarray, layer))
    assert counted['chosen_E'].sum() > counted['kept_E'].sum()  # Drops.
    assert counted.keys() == sums['layers'][name].keys()
    for count, value in counted.items():
      np.testing.assert_allclose(
        value, sums['layers'][name][count], 1e-5, err_msg=f'{name} {count}'
      )
  padding = routing.is_padding(found['encoder/layers_1'])
  np.testing.assert_array_equal(padding, batch['encoder_input_tokens'] == 0)


def test_training_has_its_own_capacity(params, batch):
  model = tiny_models.make_model(**SIZES, capacity_factor_train=2.0)
  key = jax.random.key(0)
  # Of 12 tokens, 8 experts and k 2: 2.25, of which 4 are the least, and 6.
  for train, capacity in ((False, 4), (True, 6)):
    take = partial(model.record, train=train)
    layer = jax.eval_shape(take, params, batch, key)['encoder/layers_1']
    assert (layer.capacity, layer.group_size) == (capacity, 12)


def test_scanned(on_one, params, batch):
  model = tiny_models.make_model(scan=True, remat='full', **SIZES)
  kinds = (False, True, False, True)
  rolled = {
    **params,
    **{stack: roll(params[stack], kinds) for stack in ('encoder', 'decoder')},
  }
  assert_same(jax.jit(model.record)(rolled, batch), on_one[0])


@pytest.mark.parametrize('mesh', [(8, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize('microbatches', [1, 2])
def test_on_a_mesh_and_in_microbatches(mesh, microbatches, on_one, params):
  rows = 8 * microbatches
  batch = tiny_models.make_batch(rows=8)
  batch = {
    name: jnp.concatenate([x] * (rows // 8)) for name, x in batch.items()
  }
  model = tiny_models.make_model(**SIZES)
  built = sharding.make_mesh(*mesh)
  with sharding.use_mesh(built):
    take = jax.jit(
      partial(
        step.record_step,
        model=model,
        microbatches=microbatches,
        data_shards=sharding.data_shards(built),
      )
    )
    found = take(params, batch)
  once = {
    name: jax.tree.map(lambda x: np.concatenate([x] * (rows // 8)), layer)
    for name, layer in on_one[0].items()
  }
  assert_same(found, once)


def test_joining_microbatches_is_the_inverse_of_splitting():
  x = jnp.arange(24).reshape(12, 2)
  parts = step.split_microbatches({'x': x}, 3, 2)['x']
  assert parts[0, :, 0].tolist() == [0, 2, 12, 14]  # Of both shards' rows.
  np.testing.assert_array_equal(step.join_microbatches(parts, 2), x)


class Wordless(moe.TopK):
  """A router whose logits nobody can record."""

  def __call__(self, x_GxSxD, **given):
    assignment, aux = super().__call__(x_GxSxD, **given)
    return assignment, aux.replace(logits=None)


def test_off_it_is_free():
  """The gradient is compiled to the same program, with or without logits."""
  sizes = {**SIZES, 'layers': 2, 'encoder': False}
  wordless = partial(
    Wordless,
    num_experts=8,
    k=2,
    priority='token',
    kernel_init=jax.nn.initializers.normal(0.5),
  )
  models = [
    tiny_models.make_model(**sizes, make_router=make)
    for make in (None, wordless)
  ]
  batch = tiny_models.make_batch(encoder=False)
  params = tiny_models.make_params(models[0], batch)

  def compiled(model):
    loss = partial(model.loss, train=False)
    gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
    return gradient.lower(params, batch).compile()

  off, without = map(compiled, models)
  assert off.cost_analysis()['flops'] == without.cost_analysis()['flops']
  jax.tree.map(
    np.testing.assert_array_equal, off(params, batch), without(params, batch)
  )


# The file.


def test_a_file_holds_it_all(on_one, batch, tmp_path):
  whole = dataclasses.replace(
    records.collect([(batch, on_one[0]), (batch, on_one[0])]),
    pieces={'encoder': {5: '▁the'}},
    domain_names=('a', 'b'),
    facts={'step': 7, 'capacity_factor': None},
  )
  assert list(whole.layers) == [
    f'{stack}/layers_{i}' for stack in ('encoder', 'decoder') for i in (1, 3)
  ]
  assert whole.tokens['decoder'].shape == (16, 8)
  assert not whole.domains
  path = tmp_path / 'new' / 'record.npz'
  whole.save(path)
  assert [p.name for p in path.parent.iterdir()] == ['record.npz']
  read = records.load(path)
  assert_same(read.layers, whole.layers)
  np.testing.assert_array_equal(
    read.tokens['encoder'][8:], batch['encoder_input_tokens']
  )
  for field in ('pieces', 'domain_names', 'facts'):
    assert getattr(read, field) == getattr(whole, field)


def test_errors(tmp_path):
  with pytest.raises(FileNotFoundError, match='no routing record'):
    records.load(tmp_path / 'none.npz')
  for content in (b'text', b''):
    (tmp_path / 'text.npz').write_bytes(content)
    with pytest.raises(ValueError, match='is not a routing record'):
      records.load(tmp_path / 'text.npz')
  np.savez(tmp_path / 'other.npz', x=np.zeros(3))
  with pytest.raises(ValueError, match='is not a routing record'):
    records.load(tmp_path / 'other.npz')
  with pytest.raises(ValueError, match='no batch to record'):
    records.collect([])

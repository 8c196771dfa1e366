"""Meshes: the numbers of one device, and a program that is really split."""

import collections
import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from flax import linen as nn
from jax.sharding import Mesh, PartitionSpec

from sparse_experts import moe, sharding
from sparse_experts.layers.mlp import Mlp
from sparse_experts.sharding import placement
from sparse_experts.training import optimizers, state, step

MESHES = [(8, 1, 1), (1, 8, 1), (2, 4, 1), (2, 2, 2)]
ids = lambda mesh: 'x'.join(map(str, mesh))

G, S, D, F, E, K = 8, 32, 16, 64, 8, 2


class Constrained(Mlp):
  """An expert that says where what it returns is."""

  def __call__(self, x_xD, **given):
    y_xD = super().__call__(x_xD, **given)
    return sharding.constrain(y_xD, *[None] * (y_xD.ndim - 1), 'act_embed')


def make_layer(dispatch=moe.gather, expert=Mlp):
  return moe.MoE(
    make_router=functools.partial(
      moe.TopK, num_experts=E, k=K, priority='token'
    ),
    make_expert=functools.partial(expert, hidden_width=F),
    dispatch=dispatch,
  )


def compile_gradient(layer, mesh, capacity_factor=1.25, rules=None):
  """The compiled gradient of a layer by parameters and tokens."""
  x = jax.ShapeDtypeStruct((G, S, D), jnp.float32)
  with sharding.use_mesh(mesh, rules):
    boxed = jax.eval_shape(
      lambda: layer.init(jax.random.key(0), jnp.zeros(x.shape))['params']
    )
    params = jax.tree.map(
      lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s),
      nn.unbox(boxed),
      sharding.shardings(boxed, mesh),
    )
    x = jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=sharding.batch_sharding(mesh, x.shape)
    )

    def loss(params, x):
      y, _ = layer.apply({'params': params}, x, capacity_factor=capacity_factor)
      return jnp.square(y).sum()

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    return gradient.lower(params, x).compile()


def collectives(compiled):
  """How many of each collective a program has."""
  kinds = 'all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute'
  found = re.findall(rf' ({kinds})(?:-start)?\(', compiled.as_text())
  return collections.Counter(found)


@pytest.mark.parametrize('dispatch', [moe.gather, moe.einsum])
@pytest.mark.parametrize('mesh', [(1, 8, 1), (2, 4, 1)], ids=ids)
def test_a_layer_exchanges_tokens_by_all_to_all_only(mesh, dispatch):
  mesh = sharding.make_mesh(*mesh)
  compiled = compile_gradient(make_layer(dispatch), mesh)
  found = collectives(compiled)
  # Dispatch and combine, forward and backward.
  assert found['all-to-all'] == 4
  # Neither tokens, nor router probabilities, nor expert weights are gathered.
  assert found['all-gather'] == found['collective-permute'] == 0
  # What is summed is gradients: the router's over all shards, and where a
  # device group holds the same experts, theirs.
  assert 1 <= found['all-reduce'] <= (1 if mesh.shape['data'] == 1 else 2)
  router, expert = (
    compiled.input_shardings[0][0][part] for part in ('router', 'expert')
  )
  assert router['kernel'].spec == PartitionSpec(None, None)
  assert expert['wi']['kernel'].spec == PartitionSpec('expert', None, 'model')


def test_a_constraint_of_an_expert_leaves_experts_where_they_are():
  rules = {'expert': 'data', 'expert_group': None}
  layer, mesh = make_layer(expert=Constrained), sharding.make_mesh()
  found = collectives(compile_gradient(layer, mesh, rules=rules))
  assert found['all-to-all'] == 4
  assert found['all-gather'] == 0


def test_without_constraints_there_would_be_no_all_to_all():
  # The check above can fail: a mesh entered the old way is refused, because
  # JAX would ignore the constraints.
  mesh = sharding.make_mesh(1, 8, 1)
  with mesh, pytest.raises(ValueError, match='use_mesh'):
    make_layer().init(jax.random.key(0), jnp.zeros((G, S, D)))


def test_dense_flops_fall_by_the_number_of_devices():
  mlp = Mlp(hidden_width=F)

  def flops(mesh):
    mesh = sharding.make_mesh(*mesh, devices=jax.devices()[: np.prod(mesh)])
    with sharding.use_mesh(mesh):
      boxed = jax.eval_shape(
        lambda: mlp.init(jax.random.key(0), jnp.zeros((G, S, D)))['params']
      )
      params = jax.tree.map(
        lambda leaf, s: jax.ShapeDtypeStruct(
          leaf.shape, leaf.dtype, sharding=s
        ),
        nn.unbox(boxed),
        sharding.shardings(boxed, mesh),
      )
      shape = (G, S, D)
      x = jax.ShapeDtypeStruct(
        shape, jnp.float32, sharding=sharding.batch_sharding(mesh, shape)
      )
      apply = jax.jit(lambda params, x: mlp.apply({'params': params}, x))
      return apply.lower(params, x).compile().cost_analysis()['flops']

  one = flops((1, 1, 1))
  assert one >= 2 * 2 * G * S * D * F
  for mesh in MESHES:
    assert one / flops(mesh) == pytest.approx(8, rel=0.05), mesh


@pytest.fixture(scope='module')
def one_device():
  """A train step of a decoder on one device, and what went into it."""
  model = tiny_models.make_model(encoder=False, layers=2, k=2, z_loss=1e-3)
  batch = tiny_models.make_batch(encoder=False, rows=16)
  params = tiny_models.make_params(model, batch)
  return model, batch, params, take_step(model, batch, params, (1, 1, 1))


def take_step(model, batch, params, sizes, *rules):
  """Loss, gradient norm, expert counts, and the state after one step."""
  if isinstance(sizes, tuple):
    sizes = dict(zip(sharding.MESH_AXES, sizes))
  devices = jax.devices()[: math.prod(sizes.values())]
  with sharding.Placement(sizes, *rules, devices=devices).use() as mesh:
    make = functools.partial(optimizers.adam, learning_rate=1e-2, eps=1e-3)
    boxed, optimizer = state.abstract(model, batch, make)
    placed = state.shardings(boxed, mesh)
    before = jax.device_put(
      state.TrainState(
        jnp.int32(0), params, optimizer.init(params), jnp.int32(0)
      ),
      placed,
    )
    batch = jax.device_put(
      batch,
      {k: sharding.batch_sharding(mesh, x.shape) for k, x in batch.items()},
    )
    after, sums = jax.jit(
      functools.partial(
        step.train_step,
        model=model,
        optimizer=optimizer,
        data_shards=sharding.data_shards(mesh),
      ),
      out_shardings=(placed, sharding.replicated(mesh)),
    )(before, batch, jax.random.key(0))
  return after, sums


@pytest.mark.parametrize('mesh', MESHES, ids=ids)
def test_eight_devices_equal_one(one_device, mesh):
  model, batch, params, (expected, sums) = one_device
  after, sums_on_mesh = take_step(model, batch, params, mesh)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5),
    sums_on_mesh,
    sums,
  )
  # Adam's first moment after one step is a tenth of the gradient.
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6),
    jax.tree.leaves(after.opt_state),
    jax.tree.leaves(expected.opt_state),
  )
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
    after.params,
    expected.params,
  )
  wi = after.params['decoder']['layers_1']['moe']['expert']['wi']['kernel']
  parts = (E // mesh[1], 16, 32 // mesh[2])
  assert {shard.data.shape for shard in wi.addressable_shards} == {parts}


def test_fsdp_and_zero_are_rules(one_device):
  model, batch, params, (expected, _) = one_device
  fsdp, _ = take_step(model, batch, params, (8, 1, 1), {'embed': 'data'})
  zero, _ = take_step(model, batch, params, (8, 1, 1), {}, {'embed': 'data'})
  for after in (fsdp, zero):
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
      after.params,
      expected.params,
    )
  wi = lambda tree: tree['decoder']['layers_0']['mlp']['wi']['kernel']
  moment = lambda after: wi(after.opt_state[0][0].mu)
  split, whole = PartitionSpec('data', 'model'), PartitionSpec(None, 'model')
  assert wi(fsdp.params).sharding.spec == split
  assert wi(zero.params).sharding.spec == whole
  assert moment(fsdp).sharding.spec == moment(zero).sharding.spec == split


def test_what_an_axis_is_for_is_what_the_rules_say(one_device):
  """Rows over an axis of our own, and parameters with them."""
  model, batch, params, (expected, sums) = one_device
  sizes = {'data': 2, 'expert': 2, 'model': 1, 'fsdp': 2}
  rules = {
    'batch': ('data', 'fsdp', 'expert'),
    'group': ('data', 'fsdp', 'expert'),
    'expert_group': ('data', 'fsdp'),
    'embed': 'fsdp',
  }
  after, found = take_step(model, batch, params, sizes, rules)
  for key in ('gradient_norm', 'tokens'):
    np.testing.assert_allclose(found[key], sums[key], rtol=1e-5)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
    after.params,
    expected.params,
  )
  wi = after.params['decoder']['layers_1']['moe']['expert']['wi']['kernel']
  assert wi.sharding.spec == PartitionSpec('expert', 'fsdp', 'model')


def test_state_is_created_sharded_and_the_same_on_any_mesh():
  model = tiny_models.make_model(encoder=False, layers=2)
  shapes = tiny_models.make_batch(encoder=False)
  created = []
  for sizes in ((1, 1, 1), (1, 8, 1)):
    mesh = sharding.make_mesh(*sizes, devices=jax.devices()[: np.prod(sizes)])
    with sharding.use_mesh(mesh):
      boxed, optimizer = state.abstract(
        model,
        shapes,
        functools.partial(optimizers.adafactor, learning_rate=1.0),
      )
      placed = state.shardings(boxed, mesh)
      created.append(state.create(model, shapes, optimizer, placed, seed=3))
  jax.tree.map(np.testing.assert_array_equal, *created)
  moe_params = created[1].params['decoder']['layers_1']['moe']
  kernel = moe_params['expert']['wi']['kernel']
  assert kernel.sharding.spec == PartitionSpec('expert', None, 'model')
  assert {s.data.shape[0] for s in kernel.addressable_shards} == {1}


def test_errors_name_rule_values_and_remedy():
  with pytest.raises(ValueError, match=r'data=3 x expert=2 x model=1 on 8'):
    sharding.make_mesh(3, 2, 1)
  mesh = sharding.make_mesh(2, 4, 1)
  with sharding.use_mesh(mesh):
    with pytest.raises(ValueError, match="'wings' is in no rule"):
      sharding.constrain(jnp.zeros((8, 4)), 'batch', 'wings')
    with pytest.raises(
      ValueError, match='size 6 does not divide.*multiple of 8'
    ):
      sharding.constrain(jnp.zeros((6, 4)), 'batch', None)
    with pytest.raises(ValueError, match='has shape'):
      sharding.constrain(jnp.zeros((8, 4)), 'batch')
    boxed = nn.LogicallyPartitioned(
      jax.ShapeDtypeStruct((6, 2, 2), jnp.float32), ('expert', 'embed', 'mlp')
    )
    with pytest.raises(ValueError, match="moe/wi: axis 'expert' of size 6"):
      sharding.shardings({'moe': {'wi': boxed}}, mesh)
  with pytest.raises(ValueError, match='parameter a/b has no axis names'):
    sharding.names_of({'a': {'b': jnp.zeros(2)}})


ALSO_PODS = {'batch': ('pod', 'data'), 'group': ('pod', 'data')}


@pytest.mark.parametrize(
  'arguments,message',
  [
    ({'rules': {'embd': 'data'}}, "rules: no .*'embd'; did you mean embed"),
    (
      {'optimizer_rules': {'vocabulary': 'data'}},
      "optimizer_rules: .*'vocabulary'; did you mean vocab",
    ),
    (
      {'rules': {'embed': 'date'}},
      "'embed' cannot be split over 'date'.* mean data.*has data, expert, mod",
    ),
    ({'optimizer_rules': {'mlp': ('data', 'pod')}}, "over 'pod', which is no"),
    ({'rules': {'mlp': 2}}, "'mlp' must be split over a mesh axis.*not 2"),
    ({'sizes': {'modle': 2}}, "over mesh axis 'modle'; did you mean model"),
    ({'sizes': {'data': 0}}, "'data' must have .* at least 1, or -1.*got 0"),
    ({'sizes': {'data': True}}, 'got True'),
    ({'sizes': {'expert': 2.0}}, 'got 2.0'),
    ({'sizes': 8}, 'sizes of a placement must be a dictionary.*not 8'),
    ({'rules': 'data'}, "rules of a placement must be a dict.*not 'data'"),
  ],
)
def test_a_rule_or_an_axis_that_nobody_has(arguments, message):
  with pytest.raises(ValueError, match=message) as error:
    sharding.Placement(**arguments)
  assert '\n' not in str(error.value)


def test_a_mesh_whose_devices_would_all_do_the_same():
  whole = sharding.Placement({'model': 2}, dict.fromkeys(('mlp', 'heads')))
  assert whole.sizes_on(8) == {'data': 4, 'expert': 1, 'model': 2}  # `vocab`.
  rules = dict.fromkeys(('mlp', 'heads', 'vocab'))
  assert sharding.Placement({}, rules).sizes_on(8)['model'] == 1
  with pytest.raises(ValueError, match="axis 'model', so its 2 devices"):
    sharding.Placement({'model': 2}, rules).sizes_on(8)
  # The optimizer state alone is something to share.
  zero = sharding.Placement({'model': 2}, rules, {'embed': 'model'})
  assert zero.sizes_on(8)['model'] == 2


def test_two_axes_of_an_array_on_one_of_the_mesh():
  placed = sharding.Placement({'expert': 4}, {'embed': ('data', 'expert')})
  with (
    placed.use() as mesh,
    pytest.raises(ValueError, match="moe/wi: .* over mesh axis 'expert' 2 tim"),
  ):
    sharding.spec(('expert', 'embed'), (8, 16), mesh, 'moe/wi')


def test_a_placement_is_entered_and_left():
  rules = {'embed': 'data', 'expert': ('pod', 'expert')}
  placed = sharding.Placement({'pod': 2, 'expert': 2}, rules, ALSO_PODS)
  outside = sharding.current()
  with placed.use() as mesh:
    assert sharding.current() is placed
    assert dict(mesh.shape) == {'data': 2, 'expert': 2, 'model': 1, 'pod': 2}
    assert (sharding.shards('expert', mesh.shape)) == 4
    assert sharding.data_shards(mesh) == 4
    with sharding.use_rules(placed.optimizer_rules):
      assert sharding.data_shards(mesh) == 2 * 2  # pod x data
      assert sharding.current().axes('batch') == ('pod', 'data')
      assert sharding.current().axes('embed') == ('data',)
    assert sharding.current() is placed
  with placed.use_abstract(16) as abstract:
    assert abstract.shape['data'] == 4
    assert sharding.data_shards(abstract) == 8
  assert sharding.current() is outside


@dataclasses.dataclass(frozen=True)
class Device:
  """A device of one of several slices, as far as a layout asks."""

  id: int
  slice_index: int
  process_index: int = 0
  platform: str = 'gpu'
  device_kind: str = 'some'


@pytest.mark.parametrize(
  'slices, sizes',
  [(2, (2, 2, 2)), (2, (4, 2, 1)), (4, (4, 1, 2)), (2, (8, 1, 1))],
)
def test_slices_are_parts_of_data(slices, sizes):
  """Neither `expert` nor `model` crosses the slow network between slices."""
  devices = [Device(i, slice_index=i % slices) for i in range(8)]
  laid = placement._lay_out(list(sizes), devices)
  assert laid.shape == sizes
  assert sorted(device.id for device in laid.flat) == list(range(8))
  data = sizes[0] // slices  # Of a slice.
  for (d, _, _), device in np.ndenumerate(laid):
    assert device.slice_index == d // data


def test_slices_that_data_does_not_divide_over():
  devices = [Device(i, slice_index=i // 2) for i in range(8)]
  with pytest.raises(ValueError, match='data=2 .* over 4 slices.*multiple of'):
    placement._lay_out([2, 2, 2], devices)


def test_constrain_without_a_mesh_is_nothing():
  x = jnp.arange(6.0)
  assert sharding.constrain(x, 'batch') is x
  assert isinstance(sharding.make_mesh(), Mesh)

"""What is trained, by parameter and by expert: all else keeps every bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_models
from flax import linen as nn
from flax import traverse_util
from jax.sharding import NamedSharding, PartitionSpec
from paths import ROOT

from sparse_experts import config, sharding
from sparse_experts.moe.bias import BIAS
from sparse_experts.moe.routers.deepseek import DeepSeek
from sparse_experts.training import optimizers, state, step, subsets

partial = functools.partial

# Weight decay, momentum and clipping would each move what is frozen.
OPTIMIZERS = {
  'adafactor': partial(
    optimizers.adafactor, beta1=0.9, weight_decay_rate=0.01, max_grad_norm=0.5
  ),
  'adamw': partial(optimizers.adam, weight_decay=0.01, max_grad_norm=0.5),
}
NEW = (1, 2)  # The experts that are trained, of four.
STEPS = 20


def flat(tree):
  """Arrays of numpy by path."""
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): np.array(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def expert_axes(boxed):
  """The axis over experts of each array, by its path; None where none is."""
  leaves = jax.tree_util.tree_leaves_with_path(
    boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)
  )
  axes = {}
  for path, leaf in leaves:
    found = [
      axis
      for axis, name in enumerate(getattr(leaf, 'names', ()))
      if name in ('expert', 'router')
    ]
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    axes[name] = found[0] if found else None
  return axes


# A step.


@pytest.fixture(scope='module')
def model_of():
  """scan -> a decoder of two sparse blocks, with balance biases."""
  router = partial(
    DeepSeek, num_experts=4, k=2, scores='sigmoid', balance_bias=True
  )
  return lambda scan: tiny_models.make_model(
    encoder=False,
    layers=2,
    sparse_layers=1,
    scan=scan,
    width=8,
    hidden_width=8,
    make_router=router,
    bias_rate=0.1,
  )


def begin(model, batch, optimizer, mesh):
  """A state whose optimizer has moved everything before, and its boxes."""
  boxed, tx = state.abstract(model, batch, partial(optimizer))
  params = tiny_models.make_params(model, batch)
  random = np.random.default_rng(1)
  fresh = jax.eval_shape(tx.init, params)
  used = jax.tree.map(
    lambda leaf: (
      jnp.asarray(random.uniform(0.5, 1, leaf.shape), jnp.float32)
      if leaf.shape
      else jnp.zeros((), leaf.dtype)
    ),
    fresh,
  )
  placed = state.shardings(boxed, mesh)
  now = state.TrainState(jnp.int32(0), params, used, jnp.int32(0))
  return jax.device_put(now, placed), boxed, placed, tx


@pytest.mark.parametrize('devices', [1, 8])
@pytest.mark.parametrize('scan', [False, True])
@pytest.mark.parametrize('name', OPTIMIZERS)
def test_frozen_experts_keep_every_bit(name, scan, devices, model_of):
  model = model_of(scan)
  batch = tiny_models.make_batch(encoder=False)
  optimizer = partial(
    subsets.only,
    learning_rate=0.01,
    optimizer=OPTIMIZERS[name],
    trained={'experts': NEW, 'routers': NEW, 'attention': True},
  )
  mesh = sharding.make_mesh(
    data=2 if devices == 8 else 1,
    expert=4 if devices == 8 else 1,
    devices=jax.devices()[:devices],
  )
  with sharding.use_mesh(mesh):
    now, boxed, placed, tx = begin(model, batch, optimizer, mesh)
    if devices == 8:
      wi = traverse_util.flatten_dict(now.params, sep='/')
      (expert,) = {
        leaf.sharding.spec[-3]
        for path, leaf in wi.items()
        if path.endswith('expert/wi/kernel')
      }
      assert expert == 'expert'
    before = [flat(tree) for tree in (now.params, now.opt_state)]
    take_step = step.jit_train_step(
      model, tx, mesh, placed, batch_size=8, seed=0
    )
    for _ in range(STEPS):
      now, sums = take_step(now, batch)
      assert sums['skipped'] == 0
  after = [flat(tree) for tree in (now.params, now.opt_state)]
  axes = [expert_axes(tree) for tree in (boxed.params, boxed.opt_state)]
  sliced = 0
  for old, new, axis_of in zip(before, after, axes, strict=True):
    assert old.keys() == new.keys() == axis_of.keys()
    for path, axis in axis_of.items():
      if axis is None:
        parameter_frozen = axis_of is axes[0] and '/attention/' not in path
        same = old[path].tobytes() == new[path].tobytes()
        assert same == parameter_frozen, path
        continue
      sliced += 1
      for j in range(4):
        one, other = (x[path].take(j, axis) for x in (old, new))
        if j in NEW:
          assert (one != other).any(), (path, j)
        else:
          assert one.tobytes() == other.tobytes(), (path, j)
  assert sliced > 6
  assert any(BIAS in path for path, axis in axes[0].items() if axis is not None)

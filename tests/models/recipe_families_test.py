"""A step of every family of recipes, scaled down: 8 devices do as one does."""

import functools

import jax
import numpy as np
import pytest
import tiny_models
from paths import ROOT

from sparse_experts import config, sharding

SMALL = (
  'NUM_EMBEDDINGS=64',
  'NUM_LAYERS=4',
  'EMBED_DIM=16',
  'NUM_HEADS=4',
  'HEAD_DIM=4',
  'MLP_DIM=32',
  "DTYPE='float32'",  # So that it is the same to float32's tolerance.
)
GROUPS = ('GROUP_SIZE=16', 'DECODER_GROUP_SIZE=16')  # Two sequences.
EXPERTS = ('NUM_EXPERTS=4',)

# Recipes that differ in kind. A folder of gin/models/ of which none is here has
# its first, with `EXPERTS`.
FAMILIES = {
  't5_1_1/base': (),
  'switch/base': (*EXPERTS, *GROUPS),
  'switch/base_attention': (*EXPERTS, *GROUPS),
  'st_moe/base': (*EXPERTS, *GROUPS, 'SPARSE_LAYERS=2'),
  'glam/0.1b_64e': EXPERTS,
  'gshard/12l': (*EXPERTS, 'GROUP_SIZE=16'),
  'expert_choice/100m': EXPERTS,
  'clark/15m': EXPERTS,
  'prmoe/350m_prmoe': ('NUM_LAYERS=6', 'SPARSE_LAYERS={1: 4, 3: 4, 5: 8}'),
  'mixtral/8x7b': (*EXPERTS, 'NUM_KV_HEADS=2'),
  'olmoe/1b_7b': (*EXPERTS, 'NUM_SELECTED_EXPERTS=2'),
  'deepseek_moe/16b': (
    *EXPERTS,
    'NUM_SELECTED_EXPERTS=2',
    'EXPERT_DIM=8',
    'shared/mlp.Mlp.hidden_width=16',
    'SPARSE_LAYERS=(1, 2, 3)',
  ),
}
QUICK = 'prmoe/350m_prmoe'


for path in sorted(ROOT.glob('gin/models/*/*.gin')):
  folder = path.parent.name
  if folder not in {name.partition('/')[0] for name in FAMILIES}:
    FAMILIES[f'{folder}/{path.stem}'] = EXPERTS


@functools.cache
def step(name, fsdp, *axes):
  """Loss, gradients and where parameters lie, on a mesh."""
  bindings = (*SMALL, *FAMILIES[name])
  config.parse([f'gin/models/{name}.gin'], bindings, [])
  model = config.value('MODEL')
  encoder = model.module.encoder is not None
  batch = tiny_models.make_batch(inputs=8, encoder=encoder)
  params = tiny_models.make_params(model, batch)
  boxed = jax.eval_shape(lambda: model.init(jax.random.key(0), batch))

  def loss(params, batch):
    return model.loss(params, batch, jax.random.key(1), train=True, step=0)[0]

  mesh = sharding.make_mesh(*axes, devices=jax.devices()[: np.prod(axes)])
  with sharding.use_mesh(mesh, {'embed': 'data'} if fsdp else {}):
    params = jax.device_put(params, sharding.shardings(boxed, mesh))
    batch = jax.tree.map(
      lambda x: jax.device_put(x, sharding.batch_sharding(mesh, x.shape)), batch
    )
    value, grads = jax.jit(jax.value_and_grad(loss))(params, batch)
  return value, jax.device_get(grads), params


@pytest.mark.parametrize(
  'name,fsdp',
  [
    pytest.param(
      name,
      fsdp,
      marks=() if (name, fsdp) == (QUICK, True) else pytest.mark.slow,
    )
    for name in FAMILIES
    for fsdp in (False, True)
  ],
)
def test_eight_devices_do_as_one(name, fsdp):
  alone, grads_alone, _ = step(name, False, 1, 1, 1)
  value, grads, params = step(name, fsdp, 2, 2, 2)
  np.testing.assert_allclose(value, alone, rtol=2e-5)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-5),
    grads,
    grads_alone,
  )
  # And every matrix is split, over all axes that have a dimension in it.
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    keys = [key.key for key in path]
    if keys[-1] != 'kernel' or 'router' in keys:
      continue
    parts = 2 * (1 + fsdp) * (1 + ('expert' in keys))
    assert leaf.addressable_shards[0].data.size == leaf.size // parts, keys

"""The layer inside a model of flax.nnx, as docs/dependencies.md shows."""

import documents
import jax
import numpy as np
from flax import nnx
from paths import ROOT


def test_the_bridge_gives_the_same_outputs_and_gradients():
  names = documents.run(ROOT / 'docs/dependencies.md')
  layer, model, x_BxLxD = names['layer'], names['model'], names['x_BxLxD']
  params = nnx.to_pure_dict(nnx.state(model, nnx.Param))

  def loss(params, x_BxLxD):
    y_BxLxD, aux = layer.apply({'params': params}, x_BxLxD, capacity_factor=1.0)
    return (y_BxLxD**2).sum() + aux.losses['load_balance'], y_BxLxD

  def nnx_loss(model, x_BxLxD):
    y_BxLxD, aux = model(x_BxLxD, capacity_factor=1.0)
    return (y_BxLxD**2).sum() + aux.losses['load_balance'], y_BxLxD

  wanted = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(
    params, x_BxLxD
  )
  (outputs, (grads, dx_BxLxD)) = nnx.value_and_grad(
    nnx_loss, argnums=(0, 1), has_aux=True
  )(model, x_BxLxD)
  jax.tree.map(
    np.testing.assert_array_equal,
    (outputs, (nnx.to_pure_dict(grads), dx_BxLxD)),
    wanted,
  )
  assert all(np.abs(grad).max() > 0 for grad in jax.tree.leaves(wanted[1]))

"""Soft MoE against a slow oracle: weights, the layer, gradients, padding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from sparse_experts.layers.mlp import Mlp
from sparse_experts.moe import MoE, einsum, gather, metrics
from sparse_experts.moe.routers.soft_moe import SoftMoE, mix
from sparse_experts.sharding import names_of

G, S, D, E, C, F = 2, 5, 4, 3, 2, 3


def arrays(seed=0):
  rng = np.random.default_rng(seed)
  shapes = {
    'x': (G, S, D),
    'phi': (D, E, C),
    'scale': (),
    'wi': (E, D, F),
    'wo': (E, F, D),
  }
  return {name: np.array(rng.normal(size=s)) for name, s in shapes.items()}


def weights(inputs, mask):
  """Dispatch and combine weights [G, S, E, C] by Algorithm 1, one by one."""
  phi, x = inputs['phi'], inputs['x']
  dispatch, combine = np.zeros((2, G, S, E, C))
  for g in range(G):
    tokens = [s for s in range(S) if mask[g, s]]
    logits = np.zeros((S, E, C))
    for s, e, c in np.ndindex(S, E, C):
      x_D, phi_D = x[g, s], phi[:, e, c]
      norms = np.sqrt((x_D @ x_D + 1e-6) * (phi_D @ phi_D + 1e-6))
      logits[s, e, c] = inputs['scale'] * (x_D @ phi_D) / norms
    for e, c in np.ndindex(E, C):
      if tokens:
        dispatch[g, tokens, e, c] = oracle.softmax(logits[tokens, e, c])
    for s in tokens:
      combine[g, s] = oracle.softmax(logits[s].ravel()).reshape(E, C)
  return dispatch, combine


def layer(inputs, mask):
  """Algorithm 1 with its experts, slot by slot."""
  dispatch, combine = weights(inputs, mask)
  y = np.zeros((G, S, D))
  for g, e, c in np.ndindex(G, E, C):
    slot_D = dispatch[g, :, e, c] @ inputs['x'][g]
    expert = {'wi': inputs['wi'][e], 'wo': inputs['wo'][e]}
    y[g] += combine[g, :, e, c][:, None] * oracle.mlp(slot_D, expert, 'gelu')
  return y


def variables(inputs):
  inputs = {
    name: jnp.asarray(array, jnp.float32) for name, array in inputs.items()
  }
  experts = {name: {'kernel': inputs[name]} for name in ('wi', 'wo')}
  router = {name: inputs[name] for name in ('phi', 'scale')}
  return {'params': {'router': router, 'expert': experts}}


MASK = np.arange(S)[None] < np.array([[S], [S - 2]])
LAYER = MoE(
  make_router=functools.partial(SoftMoE, num_experts=E, slots=C),
  make_expert=functools.partial(Mlp, hidden_width=F, activation='gelu'),
  dispatch=einsum,
)


@pytest.mark.parametrize('masked', [False, True])
def test_layer_and_gradients_are_the_oracle(masked):
  inputs = arrays()
  mask = MASK if masked else np.ones((G, S), bool)
  cotangent = np.random.default_rng(1).normal(size=(G, S, D))

  def theirs(inputs):
    return (layer(inputs, mask) * cotangent).sum()

  @jax.jit
  @functools.partial(jax.grad, argnums=(0, 1), has_aux=True)
  def ours(variables, x):
    y, aux = LAYER.apply(variables, x, mask_BxL=mask if masked else None)
    return (y * cotangent).sum(), (y, aux)

  x = jnp.asarray(inputs['x'], jnp.float32)
  (grads, grad_x), (y, aux) = ours(variables(inputs), x)
  np.testing.assert_allclose(y, layer(inputs, mask), rtol=1e-4, atol=1e-5)
  assert (y[~mask] == 0).all() and aux.losses == {}
  found = {
    'x': grad_x,
    **grads['params']['router'],
    **{name: k['kernel'] for name, k in grads['params']['expert'].items()},
  }
  for name, expected in oracle.gradient(theirs, inputs).items():
    assert np.abs(expected).max() > 1e-2
    np.testing.assert_allclose(
      found[name], expected, rtol=1e-3, atol=1e-4, err_msg=name
    )

  # Counts: an expert's choices are its shares of the tokens' mixtures.
  _, combine = weights(inputs, mask)
  shares = combine.sum(-1)
  sums = aux.metrics
  np.testing.assert_allclose(sums['chosen_E'], shares.sum((0, 1)), rtol=1e-4)
  assert sums['slots'] == G * E * C and sums['left_out'] == 0
  logs = np.log(np.where(shares > 0, shares, 1))
  np.testing.assert_allclose(sums['entropy'], -(shares * logs).sum(), rtol=1e-4)
  np.testing.assert_allclose(
    sums['confidence'], shares.max(-1).sum(), rtol=1e-4
  )
  summary = metrics.summary(sums)
  np.testing.assert_allclose(summary['load_E'].sum(), 1)
  np.testing.assert_allclose(summary['gate_mass_E'], 1)
  assert summary['dropped'] == summary['left_out'] == summary['dead'] == 0


def test_weights_are_convex_combinations():
  logits = 20 * np.random.default_rng(0).normal(size=(G, S, E, C))
  assignment, _ = mix(jnp.asarray(logits, jnp.float32), jnp.asarray(MASK))
  dispatch, combine = assignment.dispatch_GxSxExC, assignment.combine_GxSxExC
  np.testing.assert_allclose(dispatch.sum(1), 1, rtol=1e-5)
  np.testing.assert_allclose(combine.sum((2, 3)), MASK, rtol=1e-5)
  assert (dispatch[~MASK] == 0).all() and (dispatch >= 0).all()


def test_weights_by_hand():
  # Two tokens, two experts of a slot. Logits (log 3, 0) and (0, 0): slot 0 is
  # 3/4 of token 0 and 1/4 of token 1, slot 1 half of each; token 0 is 3/4 of
  # slot 0 and 1/4 of slot 1, token 1 half of each.
  logits = jnp.log(jnp.array([[3.0, 1], [1, 1]]))[None, :, :, None]
  assignment, _ = mix(logits)
  np.testing.assert_allclose(
    assignment.dispatch_GxSxExC[0, ..., 0], [[0.75, 0.5], [0.25, 0.5]], 1e-6
  )
  np.testing.assert_allclose(
    assignment.combine_GxSxExC[0, ..., 0], [[0.75, 0.25], [0.5, 0.5]], 1e-6
  )


def test_the_lengths_of_tokens_and_of_phi_do_not_matter():
  inputs = arrays()
  longer = {**inputs, 'x': 100 * inputs['x'], 'phi': 1e3 * inputs['phi']}
  router = SoftMoE(E, slots=C)

  def route(inputs):
    params = variables(inputs)['params']['router']
    x = jnp.asarray(inputs['x'], jnp.float32)
    return router.apply({'params': params}, x)[0]

  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-4),
    route(longer),
    route(inputs),
  )


def test_nan_padding_and_groups_of_padding_stay_finite():
  inputs = arrays()
  mask = np.stack([MASK[1], np.zeros(S, bool)])
  x = jnp.asarray(np.where(mask[..., None], inputs['x'], np.nan), jnp.float32)

  @functools.partial(jax.grad, argnums=(0, 1), has_aux=True)
  def everything(params, x):
    assignment, aux = SoftMoE(E, slots=C).apply(
      {'params': params}, x, mask_GxS=mask
    )
    leaves = jax.tree.leaves(assignment)
    return sum((leaf**2).sum() for leaf in leaves), (assignment, aux)

  results = everything(variables(inputs)['params']['router'], x)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(results))
  (_, grad_x), (assignment, _) = results
  assert (grad_x[~mask] == 0).all()
  assert (assignment.dispatch_GxSxExC[1] == 0).all()


def test_parameters_are_named_and_scale_starts_at_one():
  boxed = SoftMoE(E, slots=C).init(jax.random.key(0), jnp.ones((1, S, D)))
  names = names_of(boxed['params'])
  assert names == {'phi': ('embed', 'router', 'slots'), 'scale': ()}
  assert boxed['params']['phi'].value.shape == (D, E, C)
  assert boxed['params']['scale'].value == 1


def test_noise_is_for_training():
  router = SoftMoE(E, slots=C, noise=1.0)
  assert router.needs == ('rng',) and SoftMoE(E).needs == ()
  params = variables(arrays())['params']['router']
  x = jnp.ones((1, S, D))
  still, _ = router.apply({'params': params}, x)
  noisy, _ = router.apply(
    {'params': params},
    x,
    deterministic=False,
    rngs={'dropout': jax.random.key(0)},
  )
  # Equal tokens weigh the same without noise.
  np.testing.assert_allclose(still.dispatch_GxSxExC, 1 / S, rtol=1e-5)
  assert np.abs(noisy.dispatch_GxSxExC - 1 / S).max() > 0.1


def test_choices_are_no_mixtures():
  layer = LAYER.clone(dispatch=gather)
  x = jnp.asarray(arrays()['x'], jnp.float32)
  with pytest.raises(ValueError, match='gather executes choices.*einsum'):
    layer.apply(variables(arrays()), x)
  with pytest.raises(ValueError, match='at least 1, got 0'):
    SoftMoE(E, slots=0).init(jax.random.key(0), x)

"""Expert prototyping against top-1 routing of each prototype by itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from sparse_experts.moe.routers.prototyping import Prototyping, route_prototypes

G, S, D, E = 2, 6, 3, 6


@pytest.mark.parametrize('k, masked', [(1, False), (2, True), (3, False)])
def test_each_prototype_is_a_top_1_router(k, masked):
  rng = np.random.default_rng(k)
  inputs = {'x': rng.normal(size=(G, S, D)), 'kernel': rng.normal(size=(D, E))}
  cotangent = rng.normal(size=(G, S, k))
  mask = rng.random((G, S)) < 0.7 if masked else None
  size = E // k

  def parts(inputs):
    logits = inputs['x'] @ inputs['kernel']
    return [logits[..., z * size : (z + 1) * size] for z in range(k)]

  decided = [oracle.decide(p, k=1, mask=mask) for p in parts(inputs)]

  def total(inputs):
    result = 0.0
    for z, logits in enumerate(parts(inputs)):
      gates = oracle.gates(logits, decided[z].ranked, 'all') * decided[z].taken
      balance, z_loss = oracle.losses(logits, decided[z].ranked, mask=mask)
      result += (gates[..., 0] * cotangent[..., z]).sum()
      result += (3 * balance + 0.5 * z_loss) / k
    return result

  router = Prototyping(E, k=k)

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def run(arrays):
    assignment, aux = router.apply(
      {'params': {'kernel': arrays['kernel']}},
      arrays['x'],
      mask_GxS=None if mask is None else jnp.asarray(mask),
    )
    losses = 3 * aux.losses['load_balance'] + 0.5 * aux.losses['router_z']
    weighted = (assignment.gate_GxSxK * cotangent).sum()
    return weighted + losses, (assignment, aux)

  (value, (assignment, aux)), grads = run(jax.tree.map(jnp.float32, inputs))
  for z, decisions in enumerate(decided):
    taken = decisions.taken[..., 0]
    np.testing.assert_array_equal(
      assignment.expert_GxSxK[..., z],
      np.where(taken, decisions.ranked[..., 0] + z * size, E),
    )
    np.testing.assert_array_equal(
      assignment.position_GxSxK[..., z], decisions.place[..., 0]
    )
  np.testing.assert_allclose(value, total(inputs), rtol=1e-5)
  for name, array in oracle.gradient(total, inputs).items():
    assert np.abs(array).max() > 0.1
    np.testing.assert_allclose(grads[name], array, rtol=1e-3, atol=1e-4)
  real = np.ones((G, S), bool) if mask is None else mask
  confidence = np.mean(
    [np.apply_along_axis(oracle.softmax, -1, p).max(-1) for p in parts(inputs)],
    axis=0,
  )
  np.testing.assert_allclose(
    aux.metrics['confidence'], confidence[real].sum(), rtol=1e-5
  )


def test_by_hand():
  # Prototypes {0, 1} and {2, 3}. Probabilities: (.9, .1) and (.25, .75).
  assignment, aux = jax.jit(functools.partial(route_prototypes, k=2))(
    jnp.log(jnp.array([[[9.0, 1, 1, 3]]]))
  )
  assert assignment.expert_GxSxK.tolist() == [[[0, 3]]]
  np.testing.assert_allclose(assignment.gate_GxSxK, [[[0.9, 0.75]]], rtol=1e-6)
  # f = (1, 0): 2 * .9 = 1.8 and 2 * .75 = 1.5, on average 1.65.
  np.testing.assert_allclose(aux.losses['load_balance'], 1.65, rtol=1e-6)


def test_lines_are_first_choices_only_so_that_it_is_causal():
  # Every token has its own place in each prototype, whatever comes after it.
  assignment, _ = route_prototypes(jnp.zeros((1, 3, 4)), k=2)
  assert assignment.position_GxSxK.tolist() == [[[0, 0], [1, 1], [2, 2]]]
  assert Prototyping(4, k=2).is_causal


def test_prototypes_have_equal_size():
  with pytest.raises(ValueError, match='k must divide num_experts=4 .* got 3'):
    route_prototypes(jnp.zeros((1, 2, 4)), k=3)

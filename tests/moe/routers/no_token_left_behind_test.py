"""No token left behind against a loop over attempts and tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_experts.moe import route
from sparse_experts.moe.routers.no_token_left_behind import (
  NoTokenLeftBehind,
  reroute,
)

G, S, D, E = 2, 8, 3, 4
KEY = jax.random.key(0)


def by_definition(logits, mask, attempts, capacity):
  """Expert and place of tokens, [G, S] each."""
  expert, place = np.full((G, S), E), np.full((G, S), -1)
  for g in range(G):
    ranked = [
      sorted(range(E), key=lambda e, s=s: (-logits[g, s, e], e))
      for s in range(S)
    ]
    filled, first_line = [0] * E, [0] * E
    waiting = list(np.flatnonzero(mask[g]))
    for attempt in range(attempts):
      left = []
      for s in waiting:
        e = ranked[s][attempt]
        if attempt == 0:  # Its place, if nothing better is found.
          expert[g, s], place[g, s] = e, first_line[e]
          first_line[e] += 1
        if filled[e] < capacity:
          expert[g, s], place[g, s] = e, filled[e]
          filled[e] += 1
        else:
          left.append(s)
      waiting = left
  return expert, place


run = jax.jit(reroute, static_argnums=(2, 3))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
  st.integers(0, 2**16),
  st.sampled_from([1, 2, E]),
  st.sampled_from([1, 2]),
  st.booleans(),
  st.sampled_from([1.0, 1e4]),
)
def test_reroutes_as_the_loop_does(seed, attempts, capacity, masked, scale):
  rng = np.random.default_rng(seed)
  # Few levels, so that there are ties.
  logits = np.float32(rng.integers(-2, 3, (G, S, E)) * scale)
  mask = rng.random((G, S)) < (0.6 if masked else 1.1)
  assignment = run(
    jnp.where(mask[..., None], logits, jnp.nan),
    jnp.asarray(mask),
    attempts,
    capacity,
  )
  expert, place = by_definition(logits, mask, attempts, capacity)
  np.testing.assert_array_equal(assignment.expert_GxSxK[..., 0], expert)
  np.testing.assert_array_equal(
    assignment.position_GxSxK[..., 0][mask], place[mask]
  )
  # Nobody shares a slot, and what is tried with all is left by nobody.
  kept = np.asarray(assignment.kept(capacity))[..., 0]
  for g in range(G):
    slots = [(expert[g, s], place[g, s]) for s in np.flatnonzero(kept[g])]
    assert len(slots) == len(set(slots))
    if attempts == E:
      assert len(slots) == min(mask[g].sum(), E * capacity)


def test_three_tokens_by_hand():
  # All prefer 0, then 1, then 2, with one slot each. The first takes 0, the
  # second, with the third, tries 1 and takes it; the third takes 2 at the
  # third attempt. With two attempts it stays in line 0, behind two.
  logits = jnp.log(jnp.array([[[0.5, 0.3, 0.2]] * 3]))
  real = jnp.ones((1, 3), bool)
  three, two = run(logits, real, 3, 1), run(logits, real, 2, 1)
  assert three.expert_GxSxK[0, :, 0].tolist() == [0, 1, 2]
  assert three.position_GxSxK[0, :, 0].tolist() == [0, 0, 0]
  np.testing.assert_allclose(three.gate_GxSxK[0, :, 0], [0.5, 0.3, 0.2])
  assert two.expert_GxSxK[0, :, 0].tolist() == [0, 1, 0]
  assert two.position_GxSxK[0, :, 0].tolist() == [0, 0, 2]
  assert two.kept(1)[0, :, 0].tolist() == [True, True, False]


def test_a_later_first_choice_comes_before_an_earlier_second():
  # The second token overflows expert 0, and its second choice is expert 1,
  # which the third token has as its first: that is why it is not causal.
  logits = jnp.log(jnp.array([[[0.9, 0.1], [0.8, 0.2], [0.3, 0.7]]]))
  real = jnp.ones((1, 3), bool)
  assert run(logits, real, 2, 1).kept(1)[0, :, 0].tolist() == [
    True,
    False,
    True,
  ]
  without = run(logits, real.at[0, 2].set(False), 2, 1)
  assert without.kept(1)[0, :, 0].tolist() == [True, True, False]
  assert not NoTokenLeftBehind(2, attempts=2).is_causal


@pytest.mark.parametrize('capacity', [None, 2])
def test_gates_losses_and_gradients(capacity):
  router = NoTokenLeftBehind(E, attempts=3)
  rng = np.random.default_rng(0)
  inputs = {'x': rng.normal(size=(G, S, D)), 'kernel': rng.normal(size=(D, E))}
  cotangent = rng.normal(size=(G, S))
  mask = rng.random((G, S)) < 0.8
  logits = inputs['x'] @ inputs['kernel']
  first = logits.argmax(-1)
  expert = np.where(mask, first, E)
  if capacity is not None:
    expert, _ = by_definition(logits, mask, 3, capacity)
    assert (expert != first)[mask].any()

  def total(inputs):
    logits = inputs['x'] @ inputs['kernel']
    gates = sum(
      oracle.softmax(logits[g, s])[expert[g, s]] * cotangent[g, s]
      for g, s in np.argwhere(mask)
    )
    balance, z = oracle.losses(logits, first[..., None], mask=mask)
    return gates + 3 * balance + 0.5 * z

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def run(arrays):
    assignment, aux = router.apply(
      {'params': {'kernel': arrays['kernel']}},
      arrays['x'],
      mask_GxS=jnp.asarray(mask),
      capacity=capacity,
    )
    weighted = (assignment.gate_GxSxK[..., 0] * cotangent).sum()
    losses = aux.losses
    return (
      weighted + 3 * losses['load_balance'] + 0.5 * losses['router_z'],
      assignment,
    )

  (value, assignment), grads = run(jax.tree.map(jnp.float32, inputs))
  np.testing.assert_array_equal(assignment.expert_GxSxK[..., 0], expert)
  np.testing.assert_allclose(value, total(inputs), rtol=1e-5)
  for name, array in oracle.gradient(total, inputs).items():
    np.testing.assert_allclose(grads[name], array, rtol=1e-3, atol=1e-4)


def test_with_room_for_all_it_is_switch():
  logits = jnp.float32(np.random.default_rng(1).normal(size=(G, S, E)))
  ours = run(logits, jnp.ones((G, S), bool), 4, S)
  switch, _ = jax.jit(route)(logits)
  jax.tree.map(np.testing.assert_array_equal, ours, switch)


@pytest.mark.parametrize(
  'options, message',
  [
    ({'attempts': 5}, 'in 1 to num_experts=4 attempts, got k=1 and attempts=5'),
    ({'k': 2}, 'makes k=1 choice .* got k=2'),
  ],
)
def test_wrong_arguments_are_named(options, message):
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(
      NoTokenLeftBehind(E, **options).init, KEY, jnp.ones((1, 2, 3))
    )

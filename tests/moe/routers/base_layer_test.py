"""BASE layers: the auction against the optimum, gates against the oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from sparse_experts.moe.routers.base_layer import BalancedAssignment, balanced

G, S, E, D = 2, 13, 4, 5


def optimum(scores):
  """Highest total of one group's tokens [T, E] with loads floor or ceil T / E.

  As a square assignment: an expert has ceil slots, the first of which a dummy
  may take for nothing.
  """
  T = len(scores)
  slots = -(-T // E)
  tokens = np.repeat(scores, slots, axis=1)
  dummies = np.tile(np.where(np.arange(slots) == 0, 0, -1e9), E)
  dummies = np.tile(dummies, (E * slots - T, 1))
  rows, columns = linear_sum_assignment(-np.concatenate([tokens, dummies]))
  return sum(tokens[r, c] for r, c in zip(rows, columns) if r < T)


def run(scores, mask, epsilon=1e-2):
  return np.asarray(
    jax.jit(balanced, static_argnames='epsilon')(
      scores, mask_GxS=mask, epsilon=epsilon
    )
  )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
  st.integers(0, 2**16),
  st.sampled_from(['normal', 'equal', 'ties', 'one favourite', 'large']),
  st.floats(0, 1),
)
def test_balanced_and_within_epsilon_of_the_optimum(seed, kind, share):
  rng = np.random.default_rng(seed)
  scores = rng.normal(size=(G, S, E)).astype(np.float32)
  if kind == 'equal':
    scores[:] = 3
  elif kind == 'ties':
    scores = scores[:, rng.integers(0, 3, S)]
  elif kind == 'one favourite':
    scores = 0.01 * scores + np.array([10, 0, 0, 0], np.float32)
  elif kind == 'large':
    scores *= 1e4
  mask = rng.random((G, S)) < 0.2 + 0.8 * share
  for epsilon in (1e-2, 1e-3):
    expert = run(scores, mask, epsilon)
    for g in range(G):
      mine = scores[g][mask[g]].astype(float)
      T = len(mine)
      assert (expert[g][~mask[g]] == E).all()
      loads = np.bincount(expert[g][mask[g]], minlength=E)
      assert len(loads) == E
      assert loads.min() >= T // E and loads.max() <= -(-T // E)
      if T:
        total = mine[np.arange(T), expert[g][mask[g]]].sum()
        slack = (T + E) * epsilon * (mine.max() - mine.min())
        assert total >= optimum(mine) - slack - 1e-4 * np.abs(mine).max()


def test_a_fine_epsilon_is_optimal():
  # Totals of integers differ by 1 at least: within less than 1 is optimal.
  rng = np.random.default_rng(0)
  scores = rng.integers(0, 20, (G, S, E)).astype(np.float32)
  expert = run(scores, np.ones((G, S), bool), 1 / (20 * (S + E) + 1))
  for g in range(G):
    assert scores[g][np.arange(S), expert[g]].sum() == optimum(scores[g])


def test_by_hand():
  # Two experts, two tokens each. All but the last prefer expert 0, by 3, 1 and
  # 9; the last prefers 1 by 1. One must leave 0: the one that loses 1.
  scores = jnp.array([[[3.0, 0], [2, 1], [9, 0], [4, 5]]])
  assert balanced(scores).tolist() == [[0, 1, 0, 1]]
  # Without token 0 there is room: floor(3 / 2) = 1 to ceil = 2.
  mask = jnp.array([[False, True, True, True]])
  assert balanced(scores, mask_GxS=mask).tolist() == [[2, 0, 0, 1]]


@pytest.mark.parametrize('num_experts', [1, 16])
def test_one_expert_and_more_experts_than_tokens(num_experts):
  scores = np.random.default_rng(0).normal(size=(G, S, num_experts))
  expert = np.asarray(balanced(jnp.asarray(scores, jnp.float32)))
  for g in range(G):
    loads = np.bincount(expert[g], minlength=num_experts)
    assert loads.max() == -(-S // num_experts) and loads.sum() == S


def test_what_is_not_finite_counts_as_the_lowest():
  inf = np.inf
  scores = jnp.array([[[inf, 1.0], [np.nan, 2], [5, -inf], [4, 0]]])
  # inf, nan and -inf count as 0: losses of expert 0's tokens by moving are
  # -1, -2, 5 and 4.
  assert balanced(scores).tolist() == [[1, 1, 0, 0]]


def test_epsilon_out_of_range_is_refused():
  with pytest.raises(ValueError, match='from 1e-5 to 1, got 1e-06'):
    balanced(jnp.zeros((1, 2, 2)), epsilon=1e-6)


def arrays():
  rng = np.random.default_rng(1)
  return {'x': rng.normal(size=(G, S, D)), 'kernel': rng.normal(size=(D, E))}


MASK = np.arange(S)[None] < np.array([[S], [S - 3]])


@pytest.mark.parametrize('deterministic', [True, False])
def test_router_and_gradients_are_the_oracle(deterministic):
  inputs = arrays()
  router = BalancedAssignment(E)
  weight = np.random.default_rng(2).normal(size=(G, S))

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def ours(inputs):
    assignment, aux = router.apply(
      {'params': {'kernel': inputs['kernel']}},
      inputs['x'],
      mask_GxS=MASK,
      deterministic=deterministic,
    )
    return (assignment.gate_GxSxK[..., 0] * weight).sum(), (assignment, aux)

  (value, (assignment, aux)), grads = ours(
    jax.tree.map(functools.partial(jnp.asarray, dtype=jnp.float32), inputs)
  )
  assert aux.losses == {}
  expert = np.asarray(assignment.expert_GxSxK[..., 0])
  logits = inputs['x'] @ inputs['kernel']
  if deterministic:
    np.testing.assert_array_equal(expert, np.where(MASK, logits.argmax(-1), E))
  else:
    for g in range(G):
      loads = np.bincount(expert[g], minlength=E)[:E]
      tokens = MASK[g].sum()
      assert loads.min() == tokens // E and loads.max() == -(-tokens // E)
    assert (expert != logits.argmax(-1))[MASK].any()
  for g, e in np.ndindex(G, E):  # Lines are in token order.
    line = assignment.position_GxSxK[g, :, 0][expert[g] == e]
    assert line.tolist() == list(range(len(line)))

  def theirs(inputs):
    logits = inputs['x'] @ inputs['kernel']
    return sum(
      weight[g, s] / (1 + np.exp(-logits[g, s, expert[g, s]]))
      for g, s in np.argwhere(MASK)
    )

  np.testing.assert_allclose(value, theirs(inputs), rtol=1e-5)
  for name, expected in oracle.gradient(theirs, inputs).items():
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(grads[name], expected, rtol=1e-3, atol=1e-5)


def test_kernel_starts_orthogonal_with_gain_a_tenth():
  params = BalancedAssignment(E).init(jax.random.key(0), jnp.ones((1, 2, 8)))
  kernel = params['params']['kernel'].value
  np.testing.assert_allclose(kernel.T @ kernel, 0.01 * np.eye(E), atol=1e-6)


def test_a_token_has_one_expert():
  with pytest.raises(ValueError, match='k=1 expert, not 2'):
    BalancedAssignment(E, k=2).init(jax.random.key(0), jnp.ones((1, 2, 8)))

"""Expert choice against a slow oracle, and what its cap promises."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from sparse_experts.moe.routers import expert_choice
from sparse_experts.moe.routers.expert_choice import ExpertChoice, choose

G, S, E, D = 2, 9, 4, 5


def log_plan(scores, *, n, b, mask, entropy, iterations):
  """Dykstra's algorithm for one group, entry by entry, in logarithms."""
  tokens = [s for s in range(S) if mask[s]]
  share = min(n, len(tokens), len(tokens) * b / E)
  a = {(s, e): scores[s, e] / entropy for s in tokens for e in range(E)}
  of_token, of_entry = dict.fromkeys(tokens, 0.0), dict.fromkeys(a, 0.0)

  def total(entries):
    return np.logaddexp.reduce([a[entry] for entry in entries])

  for _ in range(iterations):
    for e in range(E):
      excess = total((s, e) for s in tokens) - np.log(share)
      for s in tokens:
        a[s, e] -= excess
    for s in tokens:
      for e in range(E):
        a[s, e] += of_token[s]
      of_token[s] = max(total((s, e) for e in range(E)) - np.log(b), 0)
      for e in range(E):
        a[s, e] -= of_token[s]
    for entry in a:
      a[entry] += of_entry[entry]
      of_entry[entry] = max(a[entry], 0)
      a[entry] -= of_entry[entry]
  return a


def decide(scores, mask, *, n, b=None, entropy=0.05, iterations=100):
  """The list of tokens of each expert of one group, best first."""
  tokens = [s for s in range(S) if mask[s]]
  keys = {(s, e): (scores[s, e],) for s in tokens for e in range(E)}
  if b is not None:
    plan = log_plan(
      scores, n=n, b=b, mask=mask, entropy=entropy, iterations=iterations
    )
    keys = {entry: (plan[entry], scores[entry]) for entry in keys}
  lists = [
    sorted(tokens, key=lambda s, e=e: [-v for v in keys[s, e]] + [s])[:n]
    for e in range(E)
  ]
  if b is None:
    return lists
  keep = {}
  for s in tokens:
    mine = [e for e in range(E) if s in lists[e]]
    keep[s] = sorted(mine, key=lambda e, s=s: (-keys[s, e][0], e))[:b]
  return [[s for s in lists[e] if e in keep[s]] for e in range(E)]


def lists_of(assignment, g):
  """The same of an Assignment."""
  lists = []
  for e in range(E):
    line = {
      int(assignment.place_GxSxK[g, s, j]): int(s)
      for s, j in np.argwhere(assignment.expert_GxSxK[g] == e)
    }
    assert sorted(line) == list(range(len(line)))  # No gaps, none twice.
    lists.append([line[place] for place in range(len(line))])
  return lists


def probs_of(logits):
  return np.apply_along_axis(oracle.softmax, -1, np.asarray(logits, float))


@functools.partial(jax.jit, static_argnames=('k', 'max_experts', 'entropy'))
def run(logits, mask, k=2, max_experts=None, entropy=0.05):
  return choose(
    logits, k=k, max_experts=max_experts, mask_GxS=mask, entropy=entropy
  )


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
  st.integers(0, 2**16),
  st.sampled_from([None, 2, 3]),
  st.booleans(),
  st.booleans(),
)
def test_choices_are_the_oracle(seed, cap, masked, ties):
  rng = np.random.default_rng(seed)
  logits = rng.normal(size=(G, S, E)).astype(np.float32)
  if ties and cap is None:  # Equal tokens; the plan's ties are round-off's.
    logits = logits[:, rng.integers(0, 3, S)]
  mask = rng.random((G, S)) < 0.6 if masked else np.ones((G, S), bool)
  assignment, aux = jax.tree.map(np.asarray, run(logits, mask, max_experts=cap))
  n = 4  # round(9 * 2 / 4) = round(4.5), to even.
  probs = probs_of(logits)
  # Equal in float32 where the oracle's float64 might see a difference.
  scores = np.asarray(jax.nn.softmax(jnp.asarray(logits)), float)
  for g in range(G):
    expected = decide(scores[g], mask[g], n=n, b=cap)
    assert lists_of(assignment, g) == expected
    for e, line in enumerate(expected):
      for s in line:
        gate = assignment.gate_GxSxK[g, s][assignment.expert_GxSxK[g, s] == e]
        np.testing.assert_allclose(gate, probs[g, s, e], rtol=1e-5)
  chosen = assignment.chosen()
  assert (assignment.gate_GxSxK[~chosen] == 0).all()
  assert chosen.shape[-1] == (cap or E) and not chosen[~mask].any()
  if cap is None:  # Every expert is full, or has all tokens there are.
    full = np.minimum(n, mask.sum(1))[:, None]
    assert (chosen.sum(1) == full).all()
  entropy = -(probs * np.log(probs))[mask].sum()
  np.testing.assert_allclose(aux.metrics['entropy'], entropy, rtol=1e-4)
  np.testing.assert_allclose(
    aux.metrics['confidence'], probs.max(-1)[mask].sum(), rtol=1e-5
  )
  assert aux.losses == {}


def test_two_experts_choose_one_of_two_tokens_each():
  # Scores (.9, .1) and (.6, .4): n = round(2 * 1 / 2) = 1. Expert 0 takes token
  # 0 (.9 > .6), expert 1 token 1 (.4 > .1).
  logits = jnp.log(jnp.array([[[0.9, 0.1], [0.6, 0.4]]]))
  assignment, _ = choose(logits, k=1)
  assert assignment.expert_GxSxK.tolist() == [[[0, 2], [2, 1]]]
  np.testing.assert_allclose(
    assignment.gate_GxSxK, [[[0.9, 0], [0, 0.4]]], rtol=1e-6
  )


def test_a_cap_spreads_what_all_experts_want():
  # k = 1, n = 1. Without a cap experts 1 and 2 both take token 0 (.31, .30) and
  # expert 0 token 1. Capped at one, the best total of a matching of tokens
  # (0, 1, 2) to experts, of
  #   (0, 1, 2) .39 + .25 + .25 = .89    (0, 2, 1) .39 + .15 + .15 = .69
  #   (1, 0, 2) .31 + .60 + .25 = 1.16   (1, 2, 0) .31 + .15 + .60 = 1.06
  #   (2, 0, 1) .30 + .60 + .15 = 1.05   (2, 1, 0) .30 + .25 + .60 = 1.15
  scores = np.array([[0.39, 0.31, 0.3], [0.6, 0.25, 0.15], [0.6, 0.15, 0.25]])
  logits = jnp.log(jnp.asarray(scores))[None]
  assignment, _ = choose(logits, k=1)
  assert assignment.expert_GxSxK.tolist() == [[[3, 1, 2], [0, 3, 3], [3] * 3]]
  assignment, _ = choose(logits, k=1, max_experts=1, iterations=500)
  assert assignment.expert_GxSxK[0, :, 0].tolist() == [1, 0, 2]
  np.testing.assert_allclose(
    assignment.gate_GxSxK[0, :, 0], [0.31, 0.6, 0.25], rtol=1e-5
  )


def test_the_plan_solves_its_linear_programme():
  # lambda H(A) is at most lambda * S E / e, so the plan's value is within that
  # of the optimum, which scipy finds; and its sums are as demanded.
  rng = np.random.default_rng(0)
  # Tokens that are nearly indifferent, whom all experts want, and others.
  logits = rng.normal(size=(S, E)) * np.where(np.arange(S) < 4, 0.3, 6)[:, None]
  scores = probs_of(logits)
  n, b, entropy = 4, 2, 1e-2
  plan = np.exp(
    expert_choice.capped_log_plan(
      jnp.asarray(scores[None], jnp.float32),
      n=n,
      max_experts=b,
      mask_GxS=jnp.ones((1, S), bool),
      entropy=entropy,
      iterations=3000,
    )
  )[0]
  experts = np.kron(np.ones(S), np.eye(E))
  tokens = np.kron(np.eye(S), np.ones(E))
  best = linprog(
    -scores.ravel(),
    A_eq=experts,
    b_eq=np.full(E, n),
    A_ub=tokens,
    b_ub=np.full(S, b),
    bounds=(0, 1),
  )
  # So the cap binds: without it the experts' top n are worth more.
  assert -best.fun < np.sort(scores, 0)[-n:].sum() - 0.01
  assert plan.max() <= 1 and (plan.sum(1) <= b + 1e-2).all()
  np.testing.assert_allclose(plan.sum(0), n, atol=1e-2)
  gap = -best.fun - (plan * scores).sum()
  assert -0.01 < gap < entropy * S * E / np.e


@pytest.mark.parametrize('cap', [None, 2])
def test_gradients_are_the_oracle(cap):
  rng = np.random.default_rng(1)
  inputs = {
    'x': rng.normal(size=(G, S, D)),
    'kernel': rng.normal(size=(D, E)),
  }
  mask = np.arange(S)[None] < np.array([S, S - 2])[:, None]
  router = ExpertChoice(E, max_experts=cap, entropy=0.05)
  weight = rng.normal(size=(G, S, cap or E))

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def ours(inputs):
    assignment, _ = router.apply(
      {'params': {'kernel': inputs['kernel']}}, inputs['x'], mask_GxS=mask
    )
    return (assignment.gate_GxSxK * weight).sum(), assignment

  (value, assignment), grads = ours(
    jax.tree.map(functools.partial(jnp.asarray, dtype=jnp.float32), inputs)
  )
  expert = np.asarray(assignment.expert_GxSxK)

  def theirs(inputs):
    probs = probs_of(inputs['x'] @ inputs['kernel'])
    return sum(
      weight[g, s, j] * probs[g, s, expert[g, s, j]]
      for g, s, j in np.argwhere(expert < E)
    )

  np.testing.assert_allclose(value, theirs(inputs), rtol=1e-5)
  for name, expected in oracle.gradient(theirs, inputs).items():
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(grads[name], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('cap', [None, 2])
def test_extreme_logits_and_nan_padding_stay_finite(cap):
  logits = np.array(
    [
      [1e4, 0, -1e4, 0],
      [-np.inf, 2, 1, 0],
      [-np.inf, -np.inf, 0, -1e4],
      *[[0.0] * 4] * 4,
      [np.nan] * 4,
      [np.inf] * 4,
    ],
    np.float32,
  )
  logits = np.stack([logits, np.full_like(logits, np.nan)])  # All padding.
  mask = np.arange(S)[None] < np.array([[7], [0]])

  def everything(logits):
    assignment, aux = run(logits, mask, max_experts=cap)
    return assignment.gate_GxSxK.sum(), (assignment, aux)

  grads, (assignment, aux) = jax.grad(everything, has_aux=True)(logits)
  assert not np.isnan(aux.logits).any()  # They may be infinite, as given.
  for leaf in jax.tree.leaves((grads, assignment, aux.replace(logits=None))):
    assert np.isfinite(leaf).all()
  assert not assignment.chosen()[~mask].any()
  assert assignment.chosen()[0].any()


def test_what_cannot_be_is_refused():
  logits = jnp.zeros((1, 4, 8))
  with pytest.raises(ValueError, match=r'4 \* 1 / 8 tokens each'):
    choose(logits, k=1)
  for cap in (1, 9):
    with pytest.raises(ValueError, match='from k=2 to num_experts=8'):
      choose(logits, k=2, max_experts=cap)

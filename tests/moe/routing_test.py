"""Top-k routing against the oracle, and by its invariants."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_experts.moe import TopK, route

G, S, E = 2, 8, 4  # One shape, so that little compiles.
KEY = jax.random.key(0)
OPTIONS = {
  'gates': ['all', 'chosen'],
  'policy': ['all', 'none', 'threshold', 'random'],
  'threshold': [0.2, 0.5],
  'priority': ['choice', 'token', 'confidence', 'random'],
  'balance_counts': ['first', 'all'],
  'losses_over': ['tokens', 'positions'],
}


@st.composite
def cases(draw, ties=True):
  """Logits [G, S, E], mask [G, S] or None, and arguments of `route`."""
  rng = np.random.default_rng(draw(st.integers(0, 2**16)))
  logits = rng.normal(size=(G, S, E), scale=draw(st.sampled_from([0.1, 3.0])))
  if ties and draw(st.booleans()):
    # Tokens that are the same, experts that are, and both.
    rows = rng.normal(size=(4, E))
    rows[1] = 0
    rows[2, E // 2] = rows[2, 0]
    logits = rows[rng.integers(0, 4, (G, S))]
  mask = rng.random((G, S)) < 0.7 if draw(st.booleans()) else None
  options = {name: draw(st.sampled_from(vs)) for name, vs in OPTIONS.items()}
  options['k'] = draw(st.integers(1, 2))
  return logits.astype(np.float32), mask, options


def examples(count):
  return settings(max_examples=count, deadline=None, derandomize=True)


def routed(logits, mask, options):
  mask = None if mask is None else jnp.asarray(mask)
  assignment, aux = route(
    jnp.asarray(logits), mask_GxS=mask, rng=KEY, **options
  )
  return jax.tree.map(np.asarray, (assignment, aux))


@examples(80)
@given(cases())
def test_route_is_the_oracle(case):
  logits, mask, options = case
  assignment, aux = routed(*case)
  k, over = options['k'], options['gates']
  decisions = oracle.decide(
    logits,
    k=k,
    mask=mask,
    over=over,
    policy=options['policy'],
    threshold=options['threshold'],
    draws=np.asarray(jax.random.uniform(KEY, (G, S, k))),
    priority=options['priority'],
    order=np.asarray(jax.random.uniform(jax.random.fold_in(KEY, 1), (G, S))),
  )
  expert = np.where(decisions.taken, decisions.ranked, E)
  np.testing.assert_array_equal(assignment.expert_GxSxK, expert)
  np.testing.assert_array_equal(assignment.position_GxSxK, decisions.place)
  gates = oracle.gates(logits, decisions.ranked, over) * decisions.taken
  np.testing.assert_allclose(assignment.gate_GxSxK, gates, rtol=1e-5)

  real = np.ones((G, S), bool) if mask is None else mask
  balance, z = oracle.losses(
    logits,
    decisions.ranked,
    mask=mask,
    counts=options['balance_counts'],
    over=options['losses_over'],
  )
  probs = np.apply_along_axis(oracle.softmax, -1, logits)
  expected = {
    'load_balance': balance,
    'router_z': z,
    'entropy': -(probs * np.log(probs))[real].sum(),
    'confidence': probs.max(-1)[real].sum(),
  }
  for name, value in {**aux.losses, **aux.metrics}.items():
    np.testing.assert_allclose(
      value, expected.pop(name), rtol=2e-5, atol=1e-6, err_msg=name
    )
  assert not expected


@examples(40)
@given(cases())
def test_lines_have_no_gaps_and_slots_one_token(case):
  _, mask, options = case
  assignment, _ = routed(*case)
  expert, place = assignment.expert_GxSxK, assignment.position_GxSxK
  assert expert.min() >= 0 and expert.max() <= E
  for g, e in np.ndindex(G, E):
    line = sorted(place[g][expert[g] == e])
    assert line == list(range(len(line)))
  for g, s in np.ndindex(G, S):
    chosen = [e for e in expert[g, s] if e < E]
    assert len(chosen) == len(set(chosen)) <= options['k']
    real = mask is None or mask[g, s]
    assert (expert[g, s, 0] < E) == real  # The first choice is always made.
  np.testing.assert_array_equal(assignment.chosen(), expert < E)
  # Capacity S drops nothing, for a token comes to an expert once at most.
  np.testing.assert_array_equal(assignment.kept(S), assignment.chosen())
  np.testing.assert_array_equal(assignment.kept(None), assignment.chosen())
  np.testing.assert_array_equal(
    assignment.kept(2), assignment.chosen() & (place < 2)
  )


@examples(40)
@given(cases())
def test_gates_are_shares(case):
  _, mask, options = case
  assignment, _ = routed(*case)
  gate = assignment.gate_GxSxK
  real = np.ones(gate.shape[:2], bool) if mask is None else mask
  assert (gate >= 0).all() and (gate[~assignment.chosen()] == 0).all()
  assert (gate[~real] == 0).all()
  assert (gate.sum(-1) <= 1 + 1e-6).all()
  if options['gates'] == 'chosen' and options['policy'] == 'all':
    np.testing.assert_allclose(gate.sum(-1)[real], 1, rtol=1e-6)


@examples(30)
@given(cases(ties=False), st.randoms())
def test_relabelling_experts_relabels_the_assignment(case, random):
  logits, mask, options = case
  options['policy'] = 'threshold'
  names = list(range(E))
  random.shuffle(names)  # New expert i is old expert names[i].
  old, old_aux = routed(logits, mask, options)
  new, new_aux = routed(logits[..., names], mask, options)
  renamed = np.array([*names, E])[new.expert_GxSxK]
  np.testing.assert_array_equal(renamed, old.expert_GxSxK)
  np.testing.assert_array_equal(new.position_GxSxK, old.position_GxSxK)
  np.testing.assert_allclose(new.gate_GxSxK, old.gate_GxSxK, rtol=1e-5)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
    new_aux,
    old_aux.replace(
      logits=old_aux.logits[..., names],
      balance=old_aux.balance.replace(
        counted_GxE=old_aux.balance.counted_GxE[..., names],
        score_GxE=old_aux.balance.score_GxE[..., names],
      ),
    ),
  )


def normal_logits(seed):
  return np.random.default_rng(seed).normal(size=(G, S, E)).astype(np.float32)


@pytest.mark.parametrize('priority', OPTIONS['priority'])
def test_groups_are_independent(priority):
  options = {'k': 2, 'priority': priority, 'policy': 'threshold'}
  logits, other = normal_logits(0), normal_logits(1)
  # Groups (a, b), (a, d), (c, b), (c, d).
  batches = {
    'ab': logits,
    'ad': np.stack([logits[0], other[1]]),
    'cb': np.stack([other[0], logits[1]]),
    'cd': other,
  }
  plans = {name: routed(x, None, options) for name, x in batches.items()}
  jax.tree.map(
    lambda ab, ad, cb: np.testing.assert_array_equal(
      ab, np.stack([ad[0], cb[1]])
    ),
    *(plans[name][0] for name in ('ab', 'ad', 'cb')),
  )
  # What is a mean over groups adds.
  for name in plans['ab'][1].losses:
    ab, ad, cb, cd = (plans[groups][1].losses[name] for groups in batches)
    assert ab != cd
    np.testing.assert_allclose(ab + cd, ad + cb, rtol=1e-6)


@pytest.mark.parametrize('gates', OPTIONS['gates'])
@pytest.mark.parametrize('losses_over', OPTIONS['losses_over'])
def test_extreme_logits_and_nan_padding_stay_finite(gates, losses_over):
  inf = np.inf
  logits = np.array(
    [[[1e4, 0, -1e4], [-inf, 2, 1], [-inf, -inf, -1e4], [np.nan] * 3]],
    np.float32,
  )
  mask = jnp.array([[True, True, True, False]])
  options = {'k': 2, 'gates': gates, 'losses_over': losses_over}

  def everything(logits):
    assignment, aux = route(logits, mask_GxS=mask, **options)
    total = (assignment.gate_GxSxK * jnp.array([[[1.0, 2.0]]])).sum()
    total += aux.losses['load_balance'] + aux.losses['router_z']
    # A loop's backward pass may hand zeros to what is not differentiated.
    total += 0 * sum(aux.metrics.values())
    return total, (assignment, aux)

  grad, (assignment, aux) = jax.jit(jax.grad(everything, has_aux=True))(logits)
  assert np.isfinite(grad).all() and (grad[0, 3] == 0).all()
  assert not np.isnan(aux.logits).any()  # They may be infinite, as given.
  aux = aux.replace(logits=None)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(aux))
  assert assignment.expert_GxSxK[0, :, 0].tolist() == [0, 1, 2, 3]
  # e^-1 / (1 + e^-1) is the second of (2, 1); all other seconds have nothing.
  first = 1 / (1 + math.exp(-1))
  np.testing.assert_allclose(
    assignment.gate_GxSxK[0],
    [[1, 0], [first, 1 - first], [1, 0], [0, 0]],
    rtol=1e-6,
  )
  entropy = -first * math.log(first) - (1 - first) * math.log(1 - first)
  np.testing.assert_allclose(aux.metrics['entropy'], entropy, rtol=1e-6)


@pytest.mark.parametrize('priority', OPTIONS['priority'])
@pytest.mark.parametrize('k', [1, 2])
def test_is_causal_is_what_changing_later_tokens_shows(k, priority):
  options = {'k': k, 'priority': priority}
  early, leaks = S // 2, False
  for seed in range(20):
    logits, changed = normal_logits(seed), normal_logits(seed + 100)
    changed[:, :early] = logits[:, :early]
    (before, _), (after, _) = (
      routed(x, None, options) for x in (logits, changed)
    )
    np.testing.assert_array_equal(
      before.expert_GxSxK[:, :early], after.expert_GxSxK[:, :early]
    )
    leaks |= (before.kept(2) != after.kept(2))[:, :early].any()
  assert leaks == (not TopK(E, k=k, priority=priority).is_causal)


def test_the_random_policy_takes_in_proportion_to_the_gate():
  # GShard, Algorithm 1: 2 g2 > rnd, so g2 = .2 is taken in 40% of cases and
  # .5 in all. 4096 draws: standard deviation .008.
  @jax.jit
  def taken(probs, rng):
    logits = jnp.broadcast_to(jnp.log(probs), (1, 4096, 2))
    assignment, _ = route(logits, k=2, policy='random', threshold=0.5, rng=rng)
    return assignment.chosen()

  draws = [taken(np.array([0.8, 0.2]), jax.random.key(i)) for i in (0, 1)]
  assert all(draw[..., 0].all() for draw in draws)
  assert all(abs(draw[..., 1].mean() - 0.4) < 0.04 for draw in draws)
  assert (draws[0] != draws[1]).any()
  assert taken(np.array([0.5, 0.5]), KEY).all()


def test_with_one_chosen_gate_the_router_learns_nothing():
  def total(logits, gates):
    return route(logits, gates=gates)[0].gate_GxSxK.sum()

  grad = jax.jit(jax.grad(total), static_argnums=1)
  assert np.abs(grad(normal_logits(0), 'all')).max() > 1e-2
  assert np.abs(grad(normal_logits(0), 'chosen')).max() < 1e-6


@pytest.mark.parametrize(
  'options, message',
  [
    ({'k': 0}, 'k must be from 1 to num_experts=3, got 0'),
    ({'k': 4}, 'k must be from 1 to num_experts=3, got 4'),
    ({'gates': 'both'}, "gates must be one of all, chosen, not 'both'"),
    ({'policy': 'some'}, 'policy must be one of all, none, threshold, random'),
    ({'k': 2, 'policy': 'random'}, 'pass rng'),
    ({'priority': 'age'}, "priority must be .* not 'age'"),
    ({'balance_counts': 'last'}, 'balance_counts must be one of first, all'),
    ({'losses_over': 'time'}, 'losses_over must be one of tokens, positions'),
  ],
)
def test_wrong_arguments_are_named(options, message):
  with pytest.raises(ValueError, match=message):
    route(jnp.zeros((1, 2, 3)), **options)

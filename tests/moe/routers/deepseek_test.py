"""DeepSeek's routing against its equations; see balance_bias_test.py."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_experts.layers.mlp import Mlp
from sparse_experts.moe import MoE
from sparse_experts.moe.routers.deepseek import DeepSeek, route_scores

G, S, D, E = 2, 6, 3, 8
KEY = jax.random.key(0)
NAMES = (
  *('k', 'renormalise', 'scale', 'expert_groups', 'limited_groups'),
  *('group_score', 'balance_counts'),
)
OPTIONS = [
  dict(zip(NAMES, values))
  for values in [
    (1, False, 1.0, 1, 1, 'max', 'chosen'),
    (2, True, 2.5, 1, 1, 'max', 'scores'),
    (2, False, 2.5, 4, 2, 'top2', 'chosen'),
    (4, True, 1.0, 4, 2, 'max', 'scores'),
    (3, True, 2.5, 2, 1, 'top2', 'scores'),
    (2, False, 1.0, 4, 3, 'max', 'chosen'),
    (2, True, 1.0, 2, 2, 'top2', 'chosen'),
  ]
]


def ranked(values, count):
  return sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]


def choose(row, bias, *, k, expert_groups, limited_groups, group_score, **_):
  """Experts of one token."""
  biased = row + bias
  size = E // expert_groups
  members = [range(p * size, (p + 1) * size) for p in range(expert_groups)]
  best = {'max': 1, 'top2': 2}[group_score]
  worth = [
    sum(biased[e] for e in sorted(run, key=lambda e: -biased[e])[:best])
    for run in members
  ]
  within = sorted(
    itertools.chain(*(members[p] for p in ranked(worth, limited_groups)))
  )
  return [within[i] for i in ranked(biased[within], k)]


def by_definition(scores, bias, mask, options):
  """Experts, gates and the balance loss of scores."""
  k = options['k']
  experts, gates = np.full((G, S, k), E), np.zeros((G, S, k))
  balance = 0.0
  for g in range(G):
    f, P, n = np.zeros(E), np.zeros(E), max(mask[g].sum(), 1)
    for s in np.flatnonzero(mask[g]):
      row = scores[g, s]
      experts[g, s] = choose(row, bias, **options)
      gates[g, s] = row[experts[g, s]] * options['scale']
      if options['renormalise']:
        gates[g, s] /= row[experts[g, s]].sum()
      counted = experts[g, s]
      if options['balance_counts'] == 'scores':
        counted = ranked(row, k)
      f[counted] += E / (k * n)
      P += row / row.sum() / n
    balance += (f * P).sum() * mask[g].sum() / max(mask.sum(), 1)
  return experts, gates, balance


@st.composite
def cases(draw):
  """Scores with ties or without, bias, mask and arguments."""
  rng = np.random.default_rng(draw(st.integers(0, 2**16)))
  # Multiples of 1/64, so that sums are exact and ties are ties.
  levels = draw(st.sampled_from([4, 64]))
  scores = rng.integers(1, levels, (G, S, E)) / levels
  bias = rng.integers(-levels, levels, E) / levels
  bias *= draw(st.sampled_from([0, 1]))
  mask = rng.random((G, S)) < draw(st.sampled_from([0.5, 1.1]))
  return scores, bias, mask, draw(st.sampled_from(OPTIONS))


routed = jax.jit(route_scores, static_argnames=NAMES)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(cases())
def test_choices_gates_and_balance_are_the_equations(case):
  scores, bias, mask, options = case
  assignment, aux = routed(
    jnp.float32(np.where(mask[..., None], scores, np.nan)),
    bias_E=jnp.float32(bias),
    mask_GxS=jnp.asarray(mask),
    **options,
  )
  experts, gates, balance = by_definition(scores, bias, mask, options)
  np.testing.assert_array_equal(assignment.expert_GxSxK, experts)
  np.testing.assert_allclose(assignment.gate_GxSxK, gates, rtol=1e-5)
  np.testing.assert_allclose(
    aux.losses['load_balance'], balance, rtol=1e-5, atol=1e-7
  )


@pytest.mark.parametrize(
  'options',
  [
    {'scores': 'softmax', 'k': 2, 'scale': 16.0},
    {'scores': 'sigmoid', 'k': 3, 'renormalise': True, 'balance_bias': True},
    {
      'scores': 'sigmoid',
      'k': 2,
      'expert_groups': 4,
      'limited_groups': 2,
      'group_score': 'top2',
      'balance_bias': True,
    },
  ],
)
def test_gradients_are_the_equations_and_the_bias_has_none(options):
  rng = np.random.default_rng(0)
  inputs = {'x': rng.normal(size=(G, S, D)), 'kernel': rng.normal(size=(D, E))}
  bias = rng.normal(size=E, scale=0.2)
  cotangent = rng.normal(size=(G, S, options['k']))
  mask = rng.random((G, S)) < 0.7
  router = DeepSeek(E, **options)
  biased = options.get('balance_bias', False)

  def scores_of(inputs):
    logits = inputs['x'] @ inputs['kernel']
    if options['scores'] == 'sigmoid':
      return 1 / (1 + np.exp(-logits))
    return np.apply_along_axis(oracle.softmax, -1, logits)

  full = {
    'renormalise': False,
    'scale': 1.0,
    'expert_groups': 1,
    'limited_groups': 1,
    'group_score': 'max',
    'balance_counts': 'scores',
    **options,
  }

  def total(inputs):
    _, gates, balance = by_definition(
      scores_of(inputs), bias * biased, mask, full
    )
    return (gates * cotangent).sum() + 3 * balance

  @jax.jit
  @functools.partial(jax.value_and_grad, argnums=(0, 1))
  def run(params, x):
    assignment, aux = router.apply({'params': params}, x, mask_GxS=mask)
    weighted = (assignment.gate_GxSxK * cotangent).sum()
    return weighted + 3 * aux.losses['load_balance']

  params = {'kernel': jnp.float32(inputs['kernel'])}
  if biased:
    params['balance_bias'] = jnp.float32(bias)
  value, (grads, grad_x) = run(params, jnp.float32(inputs['x']))
  np.testing.assert_allclose(value, total(inputs), rtol=1e-4)
  expected = oracle.gradient(total, inputs)
  np.testing.assert_allclose(grad_x, expected['x'], rtol=1e-3, atol=1e-4)
  np.testing.assert_allclose(
    grads['kernel'], expected['kernel'], rtol=1e-3, atol=1e-4
  )
  if biased:
    assert (grads['balance_bias'] == 0).all()


def test_the_bias_chooses_but_is_no_gate():
  # Scores (.6, .5, .1), bias (0, .2, .3): biased (.6, .7, .4). Expert 1, then
  # 0, with gates of the scores alone: .5 and .6, of their sum 5/11 and 6/11.
  assignment, _ = route_scores(
    jnp.array([[[0.6, 0.5, 0.1]]]),
    k=2,
    bias_E=jnp.array([0, 0.2, 0.3]),
    renormalise=True,
  )
  assert assignment.expert_GxSxK.tolist() == [[[1, 0]]]
  np.testing.assert_allclose(
    assignment.gate_GxSxK[0, 0], [5 / 11, 6 / 11], rtol=1e-6
  )


@pytest.mark.parametrize('by, experts', [('max', [0, 1]), ('top2', [2, 3])])
def test_groups_by_hand(by, experts):
  # Groups (.8, .1) and (.6, .5): the best expert is in the first, the best
  # two together are the second's. Its members are all that is left to choose.
  assignment, _ = route_scores(
    jnp.array([[[0.8, 0.1, 0.6, 0.5]]]),
    k=2,
    expert_groups=2,
    limited_groups=1,
    group_score=by,
  )
  assert assignment.expert_GxSxK.tolist() == [[experts]]


def test_balance_is_one_where_all_is_even():
  # Token s is all for experts s and s + 1: each is chosen twice of eight times.
  scores = jnp.eye(4) + jnp.roll(jnp.eye(4), 1, axis=1)
  _, aux = route_scores(scores[None], k=2)
  np.testing.assert_allclose(aux.losses['load_balance'], 1, rtol=1e-6)


@pytest.mark.parametrize('scores', ['softmax', 'sigmoid'])
def test_extreme_logits_stay_finite(scores):
  router = DeepSeek(4, k=2, scores=scores, renormalise=True)

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def run(params, x):
    assignment, aux = router.apply({'params': params}, x)
    return assignment.gate_GxSxK.sum() + aux.losses['load_balance'], aux

  for scale in (1e4, -1e4):
    params, x = {'kernel': jnp.ones((3, 4))}, scale * jnp.ones((1, 2, 3))
    results = run(params, x)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(results))


def test_shared_experts_are_added_once_to_the_routed_ones():
  def make_layer(**arguments):
    return MoE(
      make_router=functools.partial(DeepSeek, num_experts=4, k=2),
      make_expert=functools.partial(Mlp, hidden_width=3),
      **arguments,
    )

  shared = functools.partial(Mlp, hidden_width=6)
  layer = make_layer(make_shared_expert=shared)
  rng = np.random.default_rng(0)
  x = jnp.float32(rng.normal(size=(G, S, D)))
  mask = jnp.arange(S)[None] < jnp.array([[S], [S - 2]])
  shapes = jax.eval_shape(layer.init, KEY, x)['params']
  assert shapes['shared_expert']['wi']['kernel'].names == ('embed', 'mlp')
  params = jax.tree.map(
    lambda leaf: jnp.float32(rng.normal(size=leaf.shape)), nn.unbox(shapes)
  )
  y, _ = layer.apply({'params': params}, x, mask_BxL=mask)
  beside = shared().apply({'params': params.pop('shared_expert')}, x)
  routed, _ = make_layer().apply({'params': params}, x, mask_BxL=mask)
  beside = jnp.where(mask[..., None], beside, 0)
  np.testing.assert_allclose(y, routed + beside, rtol=1e-5, atol=1e-6)
  assert np.abs(beside).max() > 0.1 and (y[1, -1] == 0).all()


@pytest.mark.parametrize(
  'options, message',
  [
    ({'scores': 'tanh'}, "scores must be 'softmax' or 'sigmoid', not 'tanh'"),
    ({'expert_groups': 3}, 'expert_groups=3 must divide num_experts=4'),
    ({'limited_groups': 2}, 'limited_groups=2 be from 1 to expert_groups'),
    ({'k': 3, 'expert_groups': 2}, 'from 1 to the 2 experts of 1 of 2 groups'),
    (
      {'expert_groups': 4, 'group_score': 'top2'},
      "not 'top2' for groups of 1",
    ),
    ({'balance_counts': 'all'}, "be 'chosen' or 'scores', not 'all'"),
  ],
)
def test_wrong_arguments_are_named(options, message):
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(DeepSeek(4, **options).init, KEY, jnp.ones((1, 2, 3)))


def test_gates_of_very_negative_logits_sum_to_the_scale():
  # Sigmoids near exp(-25), exp(-60) and exp(-86): all normal float32.
  for level in (-25.0, -60.0, -86.0):
    logits = jnp.array([[[level, level - 1, level - 2, level + 0.5]]])

    def gates(logits):
      assignment, aux = route_scores(
        jax.nn.sigmoid(logits), k=2, renormalise=True, scale=2.5
      )
      return assignment.gate_GxSxK, aux

    (gate, _), gradient = (
      gates(logits),
      jax.grad(lambda logits: gates(logits)[0][0, 0, 0])(logits),
    )
    # Shares of exp(.5) and exp(0): 2.5 times their logistic function.
    share = 1 / (1 + np.exp(-0.5))
    np.testing.assert_allclose(
      gate[0, 0], [2.5 * share, 2.5 * (1 - share)], rtol=1e-5
    )
    slope = 2.5 * share * (1 - share)
    np.testing.assert_allclose(
      gradient[0, 0], [-slope, 0, 0, slope], rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize('level', [-60.0, -86.0, -90.0, -200.0])
def test_the_router_s_gates_hold_where_sigmoids_underflow(level):
  # A sigmoid below -87 is 0 in float32, and 1 over one of -86 times 100 is inf.
  # x is 1 and the kernel the logits. Shares of exp(.5) and exp(0) as above; a
  # bias chooses experts 0 and 3 where all scores are 0.
  router = DeepSeek(
    4, k=2, scores='sigmoid', renormalise=True, scale=2.5, balance_bias=True
  )
  kernel = jnp.array([[level, level - 1, level - 2, level + 0.5]])
  bias = jnp.array([1.0, 0, 0, 1.0])

  def run(kernel):
    params = {'kernel': kernel, 'balance_bias': bias}
    assignment, aux = router.apply({'params': params}, jnp.ones((1, 1, 1)))
    gate = (
      jnp.zeros(4)
      .at[assignment.expert_GxSxK.ravel()]
      .set(assignment.gate_GxSxK.ravel())
    )
    return gate, aux.losses['load_balance']

  gate, _ = run(kernel)
  share = 1 / (1 + np.exp(-0.5))
  expected = [2.5 * (1 - share), 0, 0, 2.5 * share]
  np.testing.assert_allclose(gate, expected, rtol=1e-4)
  slope = 100 * 2.5 * share * (1 - share)
  gradient = jax.grad(lambda kernel: 100 * run(kernel)[0][3])(kernel)
  np.testing.assert_allclose(
    gradient[0], [-slope, 0, 0, slope], rtol=1e-3, atol=1e-4
  )
  gradient = jax.grad(lambda kernel: 100 * run(kernel)[1])(kernel)
  assert np.isfinite(gradient).all() and np.abs(gradient).max() > 1


def test_a_bias_that_balances_the_choice_leaves_the_loss_its_lesson():
  # All four tokens prefer expert 0, a bias sends each to one of its own. By the
  # chosen all is even; by scores f = (4, 0, 0, 0), P_0 = .4 of .4 + 3 * .2.
  scores = jnp.full((1, 4, 4), 0.2).at[..., 0].set(0.4)
  scores += 1e-3 * jnp.eye(4)[None]
  bias = jnp.array([-0.2, 0, 0, 0])

  def loss(scores, balance_counts):
    assignment, aux = route_scores(
      scores, k=1, bias_E=bias, balance_counts=balance_counts
    )
    assert sorted(assignment.expert_GxSxK.ravel().tolist()) == [0, 1, 2, 3]
    return aux.losses['load_balance']

  np.testing.assert_allclose(loss(scores, 'chosen'), 1, rtol=2e-3)
  np.testing.assert_allclose(loss(scores, 'scores'), 1.6, rtol=2e-3)
  norms = {
    by: float(jnp.linalg.norm(jax.grad(loss)(scores, by)))
    for by in ('chosen', 'scores')
  }
  assert norms['chosen'] < 1e-2 * norms['scores']
  # What the router does by default.
  router = DeepSeek(4, k=1, balance_bias=True)
  assert router.balance_counts == 'scores'


def test_log_z_is_of_the_logits():
  router = DeepSeek(2, k=1)
  params = {'kernel': jnp.log(jnp.array([[3.0, 1.0]]))}
  _, aux = router.apply({'params': params}, jnp.ones((1, 1, 1)))
  np.testing.assert_allclose(aux.log_z, np.log(4), rtol=1e-6)
  # And what is recorded of it, and the z-loss, in a layer.
  layer = MoE(
    make_router=functools.partial(DeepSeek, num_experts=2, k=1),
    make_expert=functools.partial(Mlp, hidden_width=1),
  )
  one = {'kernel': jnp.ones((2, 1, 1))}
  variables = {'params': {'router': params, 'expert': {'wi': one, 'wo': one}}}
  _, aux = layer.apply(variables, jnp.ones((1, 3, 1)), record=True)
  np.testing.assert_allclose(aux.record.log_z_BxL, np.log(4), rtol=1e-6)
  np.testing.assert_allclose(aux.losses['router_z'], np.log(4) ** 2, rtol=1e-6)

"""RL-R, WPL and bandit: what they choose, learn from, and in the end prefer."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_experts.models import policy_gradient
from sparse_experts.moe.outputs import Aux
from sparse_experts.moe.routers.bandit import Bandit
from sparse_experts.moe.routers.policy import act, entropy
from sparse_experts.moe.routers.rl_r import RLR
from sparse_experts.moe.routers.wpl import WPL

G, S, D, E = 2, 5, 3, 4
MASK = np.array([[True] * 5, [True] * 3 + [False] * 2])
KEY = jax.random.key(0)
ROUTERS = {'rl_r': RLR, 'wpl': WPL, 'bandit': Bandit}


def arrays(name):
  random = np.random.default_rng(0)
  width = E if name == 'bandit' else 1
  shapes = {'value_kernel': (D, width), 'value_bias': (width,)}
  if name != 'bandit':
    shapes['kernel'] = (D, E)
  inputs = {n: random.normal(size=shape) for n, shape in shapes.items()}
  return {'x': random.normal(size=(G, S, D)), **inputs}


def total_of(aux, rewards):
  """All losses of a layer, with weights, for given rewards [G, S]."""
  terms = policy_gradient.terms(rewards, **aux.decisions)
  weighted = sum(
    (i + 2) * (t * MASK).sum() for i, t in enumerate(terms.values())
  )
  return weighted + sum(3 * loss for loss in aux.losses.values())


def slow_total(name, inputs, fixed, expert, rewards):
  """The same in python, with the decisions, and what is constant, held fixed.

  Args:
    inputs: arrays, moved by the finite differences.
    fixed: arrays at the point itself, for what no gradient goes through.
    expert: chosen, [G, S].
  """
  total, balance, negative_entropy = 0.0, 0.0, 0.0
  for g in range(G):
    f, P, sum_plogp = np.zeros(E), np.zeros(E), 0.0
    n = MASK[g].sum()
    for s in range(S):
      if not MASK[g, s]:
        continue
      e, r = expert[g, s], rewards[g, s]

      def value_of(arrays, g=g, s=s, e=e):
        # x is a constant here: no gradient reaches it from the value.
        values = (
          fixed['x'][g, s] @ arrays['value_kernel'] + arrays['value_bias']
        )
        return values[e if name == 'bandit' else 0]

      total += 2 * (value_of(inputs) - r) ** 2
      if name == 'bandit':
        continue
      p = oracle.softmax(inputs['x'][g, s] @ inputs['kernel'])
      p_fixed = oracle.softmax(fixed['x'][g, s] @ fixed['kernel'])[e]
      advantage = r - value_of(fixed)
      weight = 1.0
      if name == 'wpl':
        weight = 1 - p_fixed if advantage > 0 else p_fixed
      total -= 3 * weight * advantage * math.log(p[e])
      f[e] += 1 / n
      P += p / n
      sum_plogp += (p * np.log(p)).sum() / n
    weight = MASK[g].sum() / MASK.sum()
    balance += weight * E * (f * P).sum()
    negative_entropy += weight * sum_plogp
  if name == 'rl_r':
    total += 3 * (balance + negative_entropy)
  return total


@pytest.mark.parametrize('deterministic', [True, False])
@pytest.mark.parametrize('name', ROUTERS)
def test_losses_and_gradients_are_the_oracle(name, deterministic):
  router = ROUTERS[name](E)
  inputs = arrays(name)
  rewards = -np.random.default_rng(1).exponential(size=(G, S))

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def run(inputs):
    params = {n: a for n, a in inputs.items() if n != 'x'}
    assignment, aux = router.apply(
      {'params': params},
      # NaN, too, would be zeros by then: the layer sees to it.
      jnp.where(MASK[..., None], inputs['x'], 1e30),
      mask_GxS=jnp.asarray(MASK),
      deterministic=deterministic,
      rngs={'dropout': KEY},
    )
    return total_of(aux, jnp.asarray(rewards, jnp.float32)), (assignment, aux)

  (total, (assignment, aux)), grads = run(
    {n: jnp.asarray(a, jnp.float32) for n, a in inputs.items()}
  )
  expert = np.asarray(assignment.expert_GxSxK[..., 0])
  assert (expert[~MASK] == E).all() and (expert[MASK] < E).all()
  np.testing.assert_array_equal(assignment.gate_GxSxK[..., 0], MASK)
  for decision in aux.decisions.values():
    assert decision.shape == (G, S) and (decision[~MASK] == 0).all()
  best = (
    inputs['x'] @ inputs['value_kernel'] + inputs['value_bias']
    if name == 'bandit'
    else inputs['x'] @ inputs['kernel']
  ).argmax(-1)
  if deterministic:
    np.testing.assert_array_equal(expert[MASK], best[MASK])
  elif name != 'bandit':
    assert (expert[MASK] != best[MASK]).any()

  slow = functools.partial(
    slow_total, name, fixed=inputs, expert=expert, rewards=rewards
  )
  np.testing.assert_allclose(total, slow(inputs), rtol=1e-5)
  for n, gradient in oracle.gradient(slow, inputs).items():
    np.testing.assert_allclose(
      grads[n], gradient, rtol=1e-3, atol=1e-4, err_msg=n
    )
  if name == 'rl_r':
    p = np.apply_along_axis(oracle.softmax, -1, inputs['x'] @ inputs['kernel'])
    chosen = np.take_along_axis(p, np.minimum(expert, E - 1)[..., None], -1)
    expected = {
      'entropy': -(p * np.log(p)).sum(-1)[MASK].sum(),
      'confidence': chosen[..., 0][MASK].sum(),
    }
    for metric, value in aux.metrics.items():
      np.testing.assert_allclose(value, expected.pop(metric), rtol=1e-5)
    assert not expected


@pytest.mark.parametrize('expert', [0, 1])
@pytest.mark.parametrize('r', [-1.0, -4.0])
def test_reinforce_by_hand(expert, r):
  # One token, two experts, logits (log 3, 0): pi = (3/4, 1/4); value -2, so the
  # advantage is 1 or -2. d log pi(e) / d logits = onehot(e) - pi: (1/4, -1/4)
  # for e = 0, (-3/4, 3/4) for e = 1. The loss is -advantage log pi(e).
  advantage = r + 2
  log_grad = {0: np.array([0.25, -0.25]), 1: np.array([-0.75, 0.75])}[expert]
  pi = {0: 0.75, 1: 0.25}[expert]

  def loss(logits, router):
    log_pi = jax.nn.log_softmax(logits)[:, expert][None]
    weight = {
      'rl_r': (1, 1),
      'wpl': (1 - pi, pi),  # Of gain and of pain.
    }[router]
    terms = policy_gradient.terms(
      jnp.array([[r]]),
      value=jnp.array([[-2.0]]),
      gain=weight[0] * log_pi,
      pain=weight[1] * log_pi,
    )
    return terms['policy'].sum()

  logits = jnp.array([[math.log(3), 0.0]])
  gradient = jax.grad(loss)(logits, 'rl_r')[0]
  np.testing.assert_allclose(gradient, -advantage * log_grad, rtol=1e-6)
  gradient = jax.grad(loss)(logits, 'wpl')[0]
  weight = 1 - pi if advantage > 0 else pi
  np.testing.assert_allclose(
    gradient, -advantage * weight * log_grad, rtol=1e-6
  )


def decisions_of(router, params, key):
  """What a router of one constant token decides, and its Aux."""
  return router.apply(
    {'params': params},
    jnp.ones((1, 64, 1)),
    deterministic=False,
    rngs={'dropout': key},
  )


@pytest.mark.parametrize('name', ROUTERS)
def test_the_better_expert_is_learned(name):
  # Expert 0 earns -3, expert 1 earns -1, expert 2 earns -2, whatever the token.
  earns = jnp.array([-3.0, -1.0, -2.0, 0.0])
  router = ROUTERS[name](3)
  width = 3 if name == 'bandit' else 1
  params = {
    'value_kernel': jnp.zeros((1, width)),
    'value_bias': jnp.zeros(width),
  }
  if name != 'bandit':
    params['kernel'] = jnp.array([[1.0, 0.0, 0.0]])  # It prefers the worst.

  def loss(params, key):
    assignment, aux = decisions_of(router, params, key)
    rewards = earns[assignment.expert_GxSxK[..., 0]]
    return sum(
      t.mean() for t in policy_gradient.terms(rewards, **aux.decisions).values()
    )

  @jax.jit
  def train(params):
    def step(params, key):
      grads = jax.grad(loss)(params, key)
      return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), None

    return jax.lax.scan(step, params, jax.random.split(KEY, 300))[0]

  trained = train(params)
  assignment, _ = router.apply({'params': trained}, jnp.ones((1, 1, 1)))
  assert assignment.expert_GxSxK.item() == 1
  values = trained['value_kernel'][0] + trained['value_bias']
  if name == 'bandit':
    # Means of what each earns.
    np.testing.assert_allclose(values, earns[:3], atol=0.05)
  else:
    probability = jax.nn.softmax(trained['kernel'][0])[1]
    assert probability > 0.8
    # The baseline is the reward to be expected: nearly all of it -1.
    assert -1.5 < values[0] < -0.9


def test_epsilon_is_how_often_it_explores():
  # Q prefers expert 1 of 4. It is taken 1 - eps + eps / 4 of the time:
  # .7 + .075 = .775 of 6400, deviation .0052; the others .075 each, .0033.
  router = Bandit(4, epsilon=0.3)
  params = {
    'value_kernel': jnp.zeros((1, 4)),
    'value_bias': jnp.array([0.0, 1.0, 0.0, 0.0]),
  }
  run = jax.jit(functools.partial(decisions_of, router, params))
  experts = [run(jax.random.key(i))[0].expert_GxSxK for i in range(100)]
  share = np.bincount(np.ravel(experts), minlength=4) / 6400
  assert abs(share[1] - 0.775) < 0.025
  assert np.abs(np.delete(share, 1) - 0.075).max() < 0.015
  never = Bandit(4, epsilon=0.0)
  assert (decisions_of(never, params, KEY)[0].expert_GxSxK == 1).all()


def test_the_policy_draws_by_its_probabilities():
  # pi = (3/4, 1/4), 6400 draws, deviation .0054.
  logits = jnp.broadcast_to(jnp.log(jnp.array([3.0, 1.0])), (1, 6400, 2))
  assignment, log_prob, _ = jax.jit(act)(logits, None, KEY)
  expert = np.asarray(assignment.expert_GxSxK[..., 0])
  assert abs((expert == 0).mean() - 0.75) < 0.025
  np.testing.assert_allclose(
    log_prob, np.log(np.where(expert == 0, 0.75, 0.25)), rtol=1e-6
  )


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(0, 2**16), st.booleans())
def test_extreme_logits_stay_finite(seed, draws):
  random = np.random.default_rng(seed)
  values = np.array([1e4, -1e4, -np.inf, 0.0, 1.0], np.float32)
  logits = random.choice(values, (G, S, E))
  logits[..., 0] = random.choice(values[[0, 1, 3, 4]], (G, S))

  finite, gradient, expert = extremes(draws)(logits)
  assert finite and np.isfinite(gradient).all()
  # An expert ruled out is never taken.
  chosen = np.take_along_axis(logits, np.minimum(expert, E - 1), -1)
  assert (chosen[MASK] > -np.inf).all() and (expert[~MASK] == E).all()


@functools.cache
def extremes(draws):
  def total(logits):
    assignment, log_prob, metrics = act(logits, MASK, KEY if draws else None)
    h = jnp.where(MASK, entropy(jnp.where(MASK[..., None], logits, 0)), 0)
    finite = jnp.isfinite(jnp.stack(list(metrics.values()))).all()
    return log_prob.sum() + h.sum(), (finite, assignment.expert_GxSxK)

  def run(logits):
    gradient, (finite, expert) = jax.grad(total, has_aux=True)(logits)
    return finite, gradient, expert

  return jax.jit(run)


@pytest.mark.parametrize('name', ROUTERS)
def test_one_expert_a_token(name):
  with pytest.raises(ValueError, match='k must be 1, got 2'):
    ROUTERS[name](E, k=2).apply({}, jnp.ones((1, 1, 1)))
  with pytest.raises(ValueError, match='epsilon must be from 0 to 1, got 2'):
    Bandit(E, epsilon=2).apply({}, jnp.ones((1, 1, 1)))


def test_an_aux_without_decisions_is_left_alone():
  auxes = {'decoder/layers_0': Aux(losses={'a': jnp.ones(())}, metrics={})}
  assert policy_gradient.losses(auxes, {}, None) == auxes

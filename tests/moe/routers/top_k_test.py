"""The learned router: its precision, its noise, its policies."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_experts.moe import TopK, route
from sparse_experts.moe.routers.deepseek import DeepSeek
from sparse_experts.moe.routers.hierarchical import Hierarchical
from sparse_experts.moe.routers.noisy_top_k import NoisyTopK
from sparse_experts.moe.routers.prototyping import Prototyping
from sparse_experts.moe.routers.sentence import Sentence
from sparse_experts.moe.routers.task_gating import TaskGating

KEY = jax.random.key(0)


@functools.partial(jax.jit, static_argnums=(0, 3))
def apply(router, kernel, x, deterministic=True):
  """Routes with a given kernel; noise is drawn from one key."""
  return router.apply(
    {'params': {'kernel': kernel}},
    x,
    deterministic=deterministic,
    rngs={'dropout': KEY},
  )


def test_parameters_are_float32_and_named():
  x = jnp.ones((1, 2, 3), jnp.bfloat16)
  params = jax.eval_shape(TopK(4).init, KEY, x)['params']
  assert list(params) == ['kernel']
  assert params['kernel'].names == ('embed', 'router')
  assert params['kernel'].value.shape == (3, 4)
  assert params['kernel'].value.dtype == jnp.float32


def test_bfloat16_tokens_choose_as_float32_ones_do():
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(2, 64, 16)), jnp.bfloat16)
  kernel = jnp.asarray(rng.normal(size=(16, 8)), jnp.float32)
  router = TopK(8, k=2)
  ours, aux = apply(router, kernel, x)
  exact, exact_aux = apply(router, kernel, x.astype(jnp.float32))
  jax.tree.map(np.testing.assert_array_equal, (ours, aux), (exact, exact_aux))
  assert ours.gate_GxSxK.dtype == jnp.float32
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(aux))
  # Logits in bfloat16 would have flipped some of these choices.
  rounded = jnp.einsum('GSD,DE->GSE', x, kernel.astype(jnp.bfloat16))
  _, flipped = jax.lax.top_k(rounded, 2)
  assert (flipped != exact.expert_GxSxK).any()


def test_jitter_multiplies_the_input():
  # One expert, x = W = 1: a token's logit is its factor u, its z is u^2, and
  # the mean of u^2 over uniform(.5, 1.5) is 1 + .5^2 / 3.
  router = TopK(1, jitter=0.5)
  x, kernel = jnp.ones((1, 4096, 1)), jnp.ones((1, 1))
  _, aux = apply(router, kernel, x, deterministic=False)
  np.testing.assert_allclose(aux.losses['router_z'], 1 + 0.25 / 3, rtol=0.03)
  _, aux = apply(router, kernel, 0 * x, deterministic=False)
  assert aux.losses['router_z'] == 0  # Nothing is added.
  _, aux = apply(router, kernel, x)
  assert aux.losses['router_z'] == 1


def test_noise_is_added_to_the_logits_in_units_of_one_over_experts():
  # Two experts, x = 0: logits are noise of deviation d = .2 / 2, their
  # difference has deviation d sqrt(2), and to first order the confidence is
  # 1/2 + |difference| / 4, of mean 1/2 + d sqrt(2) sqrt(2 / pi) / 4.
  router = TopK(2, noise=0.2)
  x, kernel = jnp.zeros((1, 4096, 3)), jnp.ones((3, 2))
  _, aux = apply(router, kernel, x, deterministic=False)
  excess = aux.metrics['confidence'] / 4096 - 0.5
  np.testing.assert_allclose(excess, 0.1 / math.sqrt(math.pi) / 2, rtol=0.05)
  _, aux = apply(router, kernel, x)
  assert aux.metrics['confidence'] == 2048


@pytest.mark.parametrize('deterministic', [True, False])
def test_policies_of_training_and_evaluation(deterministic):
  # Two experts, x = 0: gates (.5, .5), so a threshold of .6 takes no second.
  x, kernel = jnp.zeros((1, 4, 3)), jnp.ones((3, 2))
  for train, evaluate, trains, evaluates in [
    ('threshold', 'all', False, True),
    # With a threshold under the gate, its probability is 1.
    ('random', 'threshold', True, False),
  ]:
    threshold = 0.4 if train == 'random' and not deterministic else 0.6
    router = TopK(
      2, k=2, policy_train=train, policy_eval=evaluate, threshold=threshold
    )
    assignment, _ = apply(router, kernel, x, deterministic)
    chosen = assignment.chosen()
    assert chosen[..., 0].all()
    expected = evaluates if deterministic else trains
    assert (chosen[..., 1] == expected).all()


def test_evaluation_draws_nothing():
  # No rng stream is given: neither jitter nor noise nor policy may ask for it.
  router = TopK(
    2, k=2, jitter=0.1, noise=1.0, policy_train='random', policy_eval='all'
  )
  variables = {'params': {'kernel': jnp.ones((3, 2))}}
  jax.eval_shape(router.apply, variables, jnp.ones((1, 4, 3)))


def test_rounding_tokens_to_bfloat16_changes_few_choices():
  # It moves a logit of standard deviation 0.16 by some 2e-4, while the best two
  # of eight are some 0.1 apart.
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(4, 1024, 64)), jnp.float32)
  kernel = jnp.asarray(rng.normal(size=(64, 8), scale=0.02), jnp.float32)
  exact, _ = apply(TopK(8), kernel, x)
  rounded, _ = apply(TopK(8), kernel, x.astype(jnp.bfloat16))
  same = (exact.expert_GxSxK == rounded.expert_GxSxK).mean()
  assert 0.99 <= same < 1


def test_saturated_logits_are_ranked_as_they_are():
  # Probabilities of all but expert 0 round to 0. By them the second choice is
  # the first zero.
  logits = jnp.array([[[200.0, 0.0, 90.0, -5.0]]])
  for choose_by, experts in [('logits', [0, 2, 1]), ('probs', [0, 1, 2])]:
    assignment, _ = route(logits, k=3, choose_by=choose_by)
    assert assignment.expert_GxSxK.tolist() == [[experts]]
  # Top 1 of what rounds to the same.
  near = jnp.array([[[0.0, 200.0, 200.00002]]])
  assert route(near)[0].expert_GxSxK.tolist() == [[[2]]]


def test_random_order_drops_anyone_alike():
  # All 8 tokens want expert 0, which has 2 slots: each keeps one in a quarter
  # of draws, of 800 with a deviation of .0153. Places are a permutation.
  router = TopK(2, priority='random')
  params = {'kernel': jnp.array([[1.0, 0.0]])}

  @jax.jit
  @jax.vmap
  def places(key):
    assignment, _ = router.apply(
      {'params': params},
      jnp.ones((1, 8, 1)),
      deterministic=False,
      rngs={'dropout': key},
    )
    return assignment.position_GxSxK[0, :, 0]

  drawn = np.asarray(places(jax.random.split(KEY, 800)))
  assert (np.sort(drawn, axis=1) == np.arange(8)).all()
  np.testing.assert_allclose((drawn < 2).mean(0), 0.25, atol=0.065)
  assert router.needs == ('rng',) and not router.is_causal
  # Evaluation draws nothing: token order.
  assignment = apply(router, params['kernel'], jnp.ones((1, 8, 1)))[0]
  assert assignment.position_GxSxK[0, :, 0].tolist() == list(range(8))
  with pytest.raises(ValueError, match="priority='random' draws numbers"):
    route(jnp.zeros((1, 2, 2)), priority='random')


def gradient_of_the_task(router):
  """The largest gradient of a mix of gates by parameters."""
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 4)), jnp.float32)
  given = {}
  if 'task_ids' in router.needs:
    given['task_ids_GxS'] = jnp.arange(12).reshape(2, 6) % 3
  boxed = jax.eval_shape(functools.partial(router.init, **given), KEY, x)[
    'params'
  ]
  random = np.random.default_rng(1)
  params = jax.tree.map(
    lambda box: jnp.asarray(random.normal(size=box.value.shape), jnp.float32),
    boxed,
    is_leaf=lambda box: hasattr(box, 'names'),
  )

  def task(params):
    assignment, _ = router.apply({'params': params}, x, **given)
    weight = jnp.arange(1.0, assignment.gate_GxSxK.size + 1)
    return (assignment.gate_GxSxK.ravel() * weight).sum()

  grads = jax.jit(jax.grad(task))(params)
  return max(np.abs(leaf).max() for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize(
  'make, ways',
  [
    (functools.partial(TopK, gates='chosen'), [{'k': 2}, {'gates': 'all'}]),
    (
      functools.partial(DeepSeek, renormalise=True, scores='sigmoid'),
      [{'k': 2}, {'renormalise': False}],
    ),
    (functools.partial(DeepSeek, renormalise=True), [{'k': 2}]),
    (NoisyTopK, [{'k': 2}]),
    (functools.partial(Hierarchical, primary_k=1), [{'k': 2}]),
    (functools.partial(Sentence, gates='chosen'), [{'gates': 'all'}]),
    (
      functools.partial(TaskGating, num_tasks=3, gates='chosen'),
      [{'gates': 'all'}],
    ),
  ],
  ids=lambda value: getattr(getattr(value, 'func', value), '__name__', 'ways'),
)
def test_gates_without_gradient_are_refused(make, ways):
  router = make(num_experts=4, k=1)
  with pytest.raises(ValueError, match='no gradient from the task: .*no_grad'):
    gradient_of_the_task(router)
  # Nothing reaches the router, which is why.
  assert gradient_of_the_task(router.clone(allow_no_gradient=True)) < 1e-5
  for way in ways:
    assert gradient_of_the_task(router.clone(**way)) > 1e-3


def test_prototypes_of_one_expert_are_refused():
  router = Prototyping(num_experts=4, k=4)
  with pytest.raises(ValueError, match='one expert a prototype'):
    gradient_of_the_task(router)
  assert gradient_of_the_task(router.clone(allow_no_gradient=True)) < 1e-5
  assert gradient_of_the_task(router.clone(k=2)) > 1e-3

"""The learned router: its precision, its noise, its policies."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_experts.moe import TopK

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

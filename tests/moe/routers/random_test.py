"""Random experts: whom a draw is for, and what evaluation does without one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_experts.layers.mlp import Mlp
from sparse_experts.moe import MoE
from sparse_experts.moe.routers.hash import RandomTable
from sparse_experts.moe.routers.random import Random

G, S, E, V = 6, 40, 4, 50
X = jnp.ones((G, S, 3))
IDS = jnp.asarray(np.random.default_rng(0).integers(0, V, (G, S)))


@functools.partial(jax.jit, static_argnums=(0, 1))
def route(router, deterministic, key, mask=None):
  ids = IDS if 'token_ids' in router.needs else None
  return router.apply(
    {},
    X,
    token_ids_GxS=ids,
    mask_GxS=mask,
    deterministic=deterministic,
    rngs={'dropout': key},
  )[0]


def drawn(seed=0, **options):
  router = Random(E, vocab_size=V, **options)
  return route(router, False, jax.random.key(seed))


@pytest.mark.parametrize('k', [1, 3])
def test_whom_a_draw_is_for(k):
  experts = {
    draw: np.asarray(drawn(draw=draw, k=k).expert_GxSxK)
    for draw in ('token', 'sequence', 'batch')
  }
  for expert in experts.values():
    assert expert.shape == (G, S, k)
    assert expert.min() >= 0 and expert.max() < E
    assert all(len(set(row)) == k for row in expert.reshape(-1, k))
  assert (experts['batch'] == experts['batch'][0, 0]).all()
  by_row = experts['sequence']
  assert (by_row == by_row[:, :1]).all() and (by_row != by_row[0, 0]).any()
  by_token = experts['token']
  assert (by_token != by_token[:, :1]).any(1).all()
  # Uniform: 240 tokens, 60 an expert and choice, of deviation 6.7.
  for choice in by_token.reshape(-1, k).T:
    assert np.abs(np.bincount(choice, minlength=E) - 60).max() < 30
  again, other = drawn(draw='token', k=k), drawn(1, draw='token', k=k)
  np.testing.assert_array_equal(again.expert_GxSxK, by_token)
  assert (other.expert_GxSxK != by_token).any()


def test_gates_sum_to_one_and_padding_has_none():
  mask = jnp.arange(S)[None] < jnp.arange(0, G)[:, None] * 8
  router = Random(E, k=2, vocab_size=V)
  for deterministic in (False, True):
    plan = route(router, deterministic, jax.random.key(0), mask)
    np.testing.assert_array_equal(plan.gate_GxSxK.sum(-1), mask)
    assert (plan.expert_GxSxK[~mask] == E).all()
    assert (plan.expert_GxSxK[mask] < E).all()


def test_evaluation_is_by_token_id():
  router = Random(E, k=2, vocab_size=V, seed=3)
  plan = router.apply({}, X, token_ids_GxS=IDS)[0]  # No rng.
  np.testing.assert_array_equal(
    plan.expert_GxSxK, RandomTable(seed=3)(V, E, 2)[np.asarray(IDS)]
  )


def test_evaluation_by_the_mean_is_the_ensemble():
  layer = MoE(
    make_router=functools.partial(Random, num_experts=E, evaluation='mean'),
    make_expert=functools.partial(Mlp, hidden_width=5),
  )
  x = jax.random.normal(jax.random.key(1), (2, 3, 4))
  variables = layer.init(jax.random.key(0), x)
  y, _ = layer.apply(variables, x)
  experts = variables['params']['expert']
  outputs = [
    Mlp(hidden_width=5).apply(
      {'params': jax.tree.map(lambda w, e=e: w[e], experts)}, x
    )
    for e in range(E)
  ]
  assert np.abs(outputs[0] - outputs[1]).max() > 0.01
  np.testing.assert_allclose(y, sum(outputs) / E, rtol=1e-5, atol=1e-6)


def test_training_is_one_expert_for_all_of_a_thor_batch():
  layer = MoE(
    make_router=functools.partial(
      Random, num_experts=E, draw='batch', evaluation='mean'
    ),
    make_expert=functools.partial(Mlp, hidden_width=5),
  )
  x = jax.random.normal(jax.random.key(1), (2, 3, 4))
  variables = layer.init(jax.random.key(0), x)
  used = set()
  for seed in range(6):
    y, aux = layer.apply(
      variables,
      x,
      deterministic=False,
      rngs={'dropout': jax.random.key(seed)},
    )
    e = int(np.argmax(aux.metrics['chosen_E']))
    used.add(e)
    assert aux.metrics['chosen_E'][e] == 6
    params = jax.tree.map(lambda w, e=e: w[e], variables['params']['expert'])
    expected = Mlp(hidden_width=5).apply({'params': params}, x)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
  assert len(used) > 1


@pytest.mark.parametrize(
  'options, message',
  [
    ({'draw': 'word'}, "draw must be one of token, sequence, batch, not 'w"),
    ({'evaluation': 'best'}, 'evaluation must be one of token_ids, mean, not'),
    ({'vocab_size': 0}, "Random needs vocab_size.*'mean' needs none"),
    ({'k': 5}, 'k must be from 1 to num_experts=4, got 5'),
  ],
)
def test_wrong_arguments_are_named(options, message):
  router = Random(**{'num_experts': E, 'vocab_size': V, **options})
  with pytest.raises(ValueError, match=message):
    router.apply({}, X, token_ids_GxS=IDS)


def test_sequences_are_needed_where_they_are_drawn_for():
  needs = {d: Random(E, draw=d).needs for d in ('token', 'sequence', 'batch')}
  assert 'sequences' in needs['sequence']
  assert 'sequences' not in needs['token'] + needs['batch']
  assert 'token_ids' not in Random(E, evaluation='mean').needs

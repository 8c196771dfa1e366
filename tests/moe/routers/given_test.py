"""Experts given by the task, by hand."""

import jax.numpy as jnp
import pytest

from sparse_experts.layers.mlp import Mlp
from sparse_experts.moe import MoE
from sparse_experts.moe.routers.given import Given

TASKS = jnp.array([[0, 0, 2, 5, 1], [1, 6, 2, 2, 0]])
MASK = jnp.array([[True] * 4 + [False], [True] * 5])


def route(router):
  x = jnp.full((2, 5, 3), jnp.nan)
  return router.apply({}, x, task_ids_GxS=TASKS, mask_GxS=MASK)[0]


def test_modulo_by_hand():
  plan = route(Given(4))
  assert plan.expert_GxSxK[..., 0].tolist() == [
    [0, 0, 2, 1, 4],
    [1, 2, 2, 2, 0],
  ]
  assert plan.position_GxSxK[..., 0].tolist() == [
    [0, 1, 0, 0, 0],
    [0, 0, 1, 2, 0],
  ]
  assert plan.gate_GxSxK[..., 0].tolist() == [[1, 1, 1, 1, 0], [1] * 5]


def test_several_experts_by_hand():
  plan = route(Given(4, k=2))
  assert plan.expert_GxSxK[0].tolist() == [
    [0, 1], [0, 1], [2, 3], [1, 2], [4, 4],
  ]  # fmt: skip
  # Token by token: 0 1 | 0 1 | 2 3 | 1 2 are places 0 0 | 1 1 | 0 0 | 2 1.
  assert plan.position_GxSxK[0].tolist() == [
    [0, 0], [1, 1], [0, 0], [2, 1], [0, 0],
  ]  # fmt: skip
  assert plan.gate_GxSxK[0].tolist() == [[0.5, 0.5]] * 4 + [[0, 0]]


def test_a_table_by_hand():
  # Tasks 5 and 6 are not in it, so they have no expert.
  plan = route(Given(4, table=(3, 3, 1)))
  assert plan.expert_GxSxK[..., 0].tolist() == [
    [3, 3, 1, 4, 4],
    [3, 4, 1, 1, 3],
  ]
  assert plan.gate_GxSxK[..., 0].tolist() == [[1, 1, 1, 0, 0], [1, 0, 1, 1, 1]]
  plan = route(Given(4, k=2, table=((3, 0), (2, 1), (1, 3))))
  assert plan.expert_GxSxK[1].tolist() == [
    [2, 1], [4, 4], [1, 3], [1, 3], [3, 0],
  ]  # fmt: skip


@pytest.mark.parametrize(
  'options',
  [
    {'table': (0, 4)},
    {'table': (-1,)},
    {'table': ()},
    {'table': ((0, 1), (2, 3))},
    {'table': (0, 1), 'k': 2},
  ],
)
def test_wrong_tables_are_named(options):
  with pytest.raises(ValueError, match='table must have k=. experts from 0 to'):
    route(Given(4, **options))


def test_a_layer_without_tasks_says_so():

  layer = MoE(
    make_router=lambda name: Given(4, name=name),
    make_expert=lambda **kwargs: Mlp(hidden_width=2, **kwargs),
  )
  with pytest.raises(ValueError, match='Given needs task_ids: pass task_ids_B'):
    layer.apply({}, jnp.ones((1, 2, 3)))

"""Places in line by hand."""

import jax.numpy as jnp
import pytest

from sparse_experts.moe.assignment import positions


def test_a_later_first_choice_evicts_an_earlier_second_choice():
  # Token 0 wants experts (0, 1). Only where a later token's first choice is
  # expert 1, and in GShard's order, is token 0 not the first in its line.
  for priority, place in [('choice', 1), ('token', 0)]:
    for later, expected in [((1, 0), place), ((0, 1), 0)]:
      choices = jnp.array([[(0, 1), (2, 0), (2, 0), later]])
      line = positions(choices, 3, priority=priority)
      assert line[0, 0].tolist() == [0, expected]


# (first, second) choices of four tokens for three experts.
CHOICES = [(0, 1), (1, 0), (0, 1), (0, 2)]


@pytest.mark.parametrize(
  'priority, expected',
  [
    # Expert 0 serves tokens 0, 2, 3, then second choices: token 1. Expert 1
    # serves token 1, then 0 and 2. Expert 2 serves token 3.
    ('choice', [[0, 1], [0, 3], [1, 2], [2, 0]]),
    # Expert 0 serves 0, 1, 2, 3; expert 1 serves 0, 1, 2; expert 2 serves 3.
    ('token', [[0, 0], [1, 1], [2, 2], [3, 0]]),
    # As 'choice', with the tokens in the order 3, 1, 0, 2 (0 and 2 tie):
    # expert 0 serves 3, 0, 2, then 1; expert 1 serves 1, then 0 and 2.
    ('confidence', [[1, 1], [0, 3], [2, 2], [0, 0]]),
  ],
)
def test_positions_by_hand(priority, expected):
  position = positions(
    jnp.array([CHOICES]),
    3,
    priority=priority,
    confidence_GxS=jnp.array([[0.6, 0.7, 0.6, 0.8]]),
  )
  assert position[0].tolist() == expected


def test_a_choice_not_made_takes_no_position():
  # Token 1 makes no second choice: token 2's second comes first in line.
  position = positions(jnp.array([[(0, 3), (0, 3), (0, 1)]]), 3)
  assert position[0].tolist() == [[0, 0], [1, 0], [2, 0]]

"""Counts of a toy assignment, recounted by hand; the fractions read from it."""

import jax
import jax.numpy as jnp
import numpy as np
from toy_assignment import MASK, TOY

from sparse_experts.moe import summary
from sparse_experts.moe.metrics import counts


def assert_counts(capacity, expected):
  result = counts(TOY, capacity, MASK)
  assert result.keys() == expected.keys()
  assert all(value.dtype == jnp.float32 for value in result.values())
  for name, value in expected.items():
    np.testing.assert_allclose(result[name], value, 1e-6, err_msg=name)


def test_counts_under_a_capacity_of_one():
  # Place 0 fits: in group 0 token 0 with both choices, in group 1 both tokens
  # with their first. Tokens 1 and 2 of group 0 reach no expert.
  assert_counts(
    1,
    {
      'tokens': 5,
      'padding': 1,
      'chosen_E': [5, 2, 2, 0],
      'kept_E': [2, 1, 1, 0],
      'gate_mass_E': [0.6 + 0.8, 0.3, 0.7, 0],
      'left_out': 2,
      'slots': 8,  # 2 groups x 4 experts x 1.
    },
  )


def test_counts_without_a_capacity():
  assert_counts(
    None,
    {
      'tokens': 5,
      'padding': 1,
      'chosen_E': [5, 2, 2, 0],
      'kept_E': [5, 2, 2, 0],
      'gate_mass_E': [0.6 + 0.9 + 0.5 + 0.2 + 0.8, 0.7, 0.8, 0],
      'left_out': 0,
      'slots': 0,
    },
  )


def test_no_mask_is_no_padding():
  result = counts(TOY, 1, None)
  # Then the last token is one that found no expert.
  assert (result['tokens'], result['padding'], result['left_out']) == (6, 0, 3)


def test_summary_by_hand():
  router = {'entropy': 2.0, 'confidence': 3.5}  # Sums over five tokens.
  result = summary(counts(TOY, 1, MASK) | router)
  expected = {
    'load_E': [5 / 9, 2 / 9, 2 / 9, 0],
    'gate_mass_E': [1.4 / 2, 0.3, 0.7, 0],
    'imbalance': 5 / (9 / 4),  # The mean load is 9 choices over 4 experts.
    'dropped': 5 / 9,
    'left_out': 2 / 5,
    'padding': 1 / 6,
    'dead': 1,
    'fill': 4 / 8,
    'entropy': 0.4,
    'confidence': 0.7,
  }
  assert result.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_allclose(result[name], value, 1e-6, err_msg=name)


def test_counts_of_two_halves_add_up_to_those_of_the_whole():
  halves = [
    counts(jax.tree.map(lambda x, g=g: x[g : g + 1], TOY), 1, MASK[g : g + 1])
    for g in range(2)
  ]
  jax.tree.map(
    lambda whole, a, b: np.testing.assert_allclose(whole, a + b, 1e-6),
    counts(TOY, 1, MASK),
    *halves,
  )


def test_summary_of_nothing_is_zeros():
  nothing = jax.tree.map(jnp.zeros_like, counts(TOY, 1, MASK))
  result = summary(nothing)
  assert result.pop('dead') == 4
  assert all(np.all(value == 0) for value in result.values())

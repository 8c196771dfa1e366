"""The losses of four tokens and two experts, by hand."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from sparse_experts.moe import route

# Softmax rows and the logsumexp given to each, so that z = their mean square.
PROBS = [[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.7, 0.3]]
LOGSUMEXP = [1.0, 2.0, 0.0, -1.0]


@pytest.mark.parametrize(
  'options, masked, balance, z',
  [
    # f = (3, 1) / 4, P = (2.4, 1.6) / 4: 2 (.75 * .6 + .25 * .4) = 1.1.
    ({}, False, 1.1, (1 + 4 + 0 + 1) / 4),
    # Both choices count, f = (1, 1): 2 (.6 + .4) = 2.
    ({'k': 2, 'balance_counts': 'all'}, False, 2.0, 1.5),
    ({'k': 2, 'balance_counts': 'first'}, False, 1.1, 1.5),
    # The second choices that are not taken count all the same.
    ({'k': 2, 'balance_counts': 'all', 'policy': 'none'}, False, 2.0, 1.5),
    # Without the last token f = (2, 1) / 3, P = (1.7, 1.3) / 3:
    # 2 (2 * 1.7 + 1.3) / 9 = 9.4 / 9.
    ({}, True, 9.4 / 9, (1 + 4 + 0) / 3),
    # It counts as zeros: f = (2, 1) / 4, P = (1.7, 1.3) / 4, 9.4 / 16; its
    # zero logits have logsumexp log 2.
    (
      {'losses_over': 'positions'},
      True,
      9.4 / 16,
      (1 + 4 + 0 + math.log(2) ** 2) / 4,
    ),
  ],
)
def test_losses_by_hand(options, masked, balance, z):
  logits = jnp.log(jnp.array([PROBS])) + jnp.array([LOGSUMEXP])[..., None]
  mask = jnp.array([[True, True, True, False]]) if masked else None
  _, aux = route(logits, mask_GxS=mask, **options)
  np.testing.assert_allclose(aux.losses['load_balance'], balance, rtol=1e-6)
  np.testing.assert_allclose(aux.losses['router_z'], z, rtol=1e-5)

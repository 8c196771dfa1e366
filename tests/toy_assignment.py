"""An assignment to recount by hand."""

import jax.numpy as jnp

from sparse_experts.moe import Assignment

# Two groups of three tokens, two choices, four experts; 4 is no choice. Expert
# 3 is dead; the last token of group 1 is padding.
TOY = Assignment(
  expert_GxSxK=jnp.array([[[0, 1], [0, 4], [0, 1]], [[2, 0], [0, 2], [4, 4]]]),
  gate_GxSxK=jnp.array(
    [[[0.6, 0.3], [0.9, 0], [0.5, 0.4]], [[0.7, 0.2], [0.8, 0.1], [0, 0]]]
  ),
  position_GxSxK=jnp.array(
    [[[0, 0], [1, 0], [2, 1]], [[0, 1], [0, 1], [0, 0]]]
  ),
  num_experts=4,
)
MASK = jnp.array([[True, True, True], [True, True, False]])

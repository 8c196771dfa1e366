"""Every expert sees every token; gates pick. Exact, without capacity.

Costs E / K times the useful arithmetic, so it is for few tokens, as in
decoding, where reading the experts' weights costs more than multiplying by
them. Nothing is dropped, and a token's output does not depend on its
neighbours. On an expert axis the tokens go to the weights: the few tokens are
gathered, each shard runs its own experts, the sum is scattered.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sparse_experts.letters import Array
from sparse_experts.moe.assignment import Assignment, require_hard
from sparse_experts.moe.experts import Experts
from sparse_experts.sharding import constrain


def all_experts(
  experts: Experts, x_GxSxD: Array, assignment: Assignment, capacity: int | None
) -> Array:
  """The output of the assignment, [G, S, D]; exact where capacity is None.

  Args:
    experts: E of them.
    x_GxSxD: tokens in groups.
    assignment: who goes where.
    capacity: slots C of an expert for a group; None: nothing is dropped.

  Raises:
    ValueError: the assignment is soft.
  """
  require_hard(assignment, 'all_experts')
  E = assignment.num_experts
  with jax.named_scope('dispatch'):
    x_GxSxD = constrain(x_GxSxD, 'expert_group', None, 'act_embed')
    x_ExGxSxD = jnp.broadcast_to(x_GxSxD, (E, *x_GxSxD.shape))
  y_ExGxSxD = experts(x_ExGxSxD)
  with jax.named_scope('combine'):
    gate_GxSxE = jnp.einsum(
      'GSK,GSKE->GSE',
      assignment.gate_GxSxK * assignment.kept(capacity),
      jax.nn.one_hot(assignment.expert_GxSxK, E),
    )
    return jnp.einsum(
      'EGSD,GSE->GSD', y_ExGxSxD, gate_GxSxE.astype(x_GxSxD.dtype)
    )

"""Dispatch by one-hot masks: the readable reference.

The only form for soft assignments, best for tiny groups; its masks cost
S * E * C * D multiplications each way.

References:
  Lepikhin et al. 2020 (GShard), https://arxiv.org/abs/2006.16668, section 3.2.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sparse_experts.letters import Array
from sparse_experts.moe.assignment import Assignment, SoftAssignment
from sparse_experts.moe.expert_parallel import exchange
from sparse_experts.moe.experts import Experts


def einsum(
  experts: Experts,
  x_GxSxD: Array,
  assignment: Assignment | SoftAssignment,
  capacity: int | None,
) -> Array:
  """Sends tokens to experts and mixes their outputs, [G, S, D].

  Args:
    experts: E of them.
    x_GxSxD: tokens in groups.
    assignment: hard, or soft weights, which have their own C.
    capacity: slots C of an expert for a group; None: nothing is dropped.
  """
  with jax.named_scope('dispatch'):
    if isinstance(assignment, Assignment):
      slots = x_GxSxD.shape[1] if capacity is None else capacity
      assignment = soften(assignment, slots)
    dispatch_GxSxExC = assignment.dispatch_GxSxExC.astype(x_GxSxD.dtype)
    x_GxExCxD = jnp.einsum('GSEC,GSD->GECD', dispatch_GxSxExC, x_GxSxD)
  y_GxExCxD = exchange(experts, x_GxExCxD)
  with jax.named_scope('combine'):
    combine_GxSxExC = assignment.combine_GxSxExC.astype(x_GxSxD.dtype)
    return jnp.einsum('GSEC,GECD->GSD', combine_GxSxExC, y_GxExCxD)


def soften(assignment: Assignment, capacity: int) -> SoftAssignment:
  """Choices as weights: 1 where a choice holds a slot, and its gate."""
  expert_GxSxKxE = jax.nn.one_hot(
    assignment.expert_GxSxK, assignment.num_experts
  )
  slot_GxSxKxC = jax.nn.one_hot(assignment.position_GxSxK, capacity)
  return SoftAssignment(
    dispatch_GxSxExC=jnp.einsum(
      'GSKE,GSKC->GSEC', expert_GxSxKxE, slot_GxSxKxC
    ),
    combine_GxSxExC=jnp.einsum(
      'GSK,GSKE,GSKC->GSEC',
      assignment.gate_GxSxK,
      expert_GxSxKxE,
      slot_GxSxKxC,
    ),
  )

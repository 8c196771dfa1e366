"""Dispatch by one-hot masks: the readable reference.

The only form for soft assignments later, best for tiny groups; its masks cost
S * E * C * D multiplications each way.

References:
  Lepikhin et al. 2020 (GShard), https://arxiv.org/abs/2006.16668, section 3.2.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sparse_experts.arrays import Array
from sparse_experts.moe.assignment import Assignment
from sparse_experts.moe.expert_parallel import Experts, exchange


def einsum(
  experts: Experts, x_GxSxD: Array, assignment: Assignment, capacity: int
) -> Array:
  """Sends tokens to experts and mixes their outputs, [G, S, D]."""
  E = assignment.num_experts
  kept_GxSxK = assignment.kept(capacity)
  # [G, S, K, E, C]: choice k of token s holds slot c of expert e.
  expert_GxSxKxE = jax.nn.one_hot(
    assignment.expert_GxSxK, E, dtype=x_GxSxD.dtype
  )
  slot_GxSxKxC = jax.nn.one_hot(
    assignment.place_GxSxK, capacity, dtype=x_GxSxD.dtype
  ) * kept_GxSxK[..., None].astype(x_GxSxD.dtype)
  dispatch_GxSxExC = jnp.einsum('GSKE,GSKC->GSEC', expert_GxSxKxE, slot_GxSxKxC)
  combine_GxSxExC = jnp.einsum(
    'GSK,GSKE,GSKC->GSEC',
    assignment.gate_GxSxK.astype(x_GxSxD.dtype),
    expert_GxSxKxE,
    slot_GxSxKxC,
  )
  x_GxExCxD = jnp.einsum('GSEC,GSD->GECD', dispatch_GxSxExC, x_GxSxD)
  y_GxExCxD = exchange(experts, x_GxExCxD)
  return jnp.einsum('GSEC,GECD->GSD', combine_GxSxExC, y_GxExCxD)

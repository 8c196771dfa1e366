"""Tokens to groups and back.

A group is a run of consecutive tokens of the batch, flattened sequence by
sequence; experts have `capacity` slots for each. The number of groups is a
multiple of the number of data shards, never of the number of experts.
"""

from __future__ import annotations

from sparse_experts.letters import Array


def split(x_BxLx___: Array, group_size: int | None) -> Array:
  """[B, L, ...] to [G, S, ...]; group_size None makes each sequence a group.

  Raises:
    ValueError: the tokens do not divide into groups, or a group would hold
      part of one sequence and part of another.
  """
  B, L = x_BxLx___.shape[:2]
  S = L if group_size is None else group_size
  if S < 1 or B * L % S or (S % L and L % S):
    raise ValueError(
      f'group_size={S} does not fit {B} sequences of {L} tokens: it must '
      f'divide {B * L}, and be a multiple or a divisor of {L}; None takes one '
      'sequence as a group.'
    )
  return x_BxLx___.reshape(B * L // S, S, *x_BxLx___.shape[2:])

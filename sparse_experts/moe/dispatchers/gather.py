"""Dispatch by integer indices; every move of a token is a gather.

A token's choice knows its slot and a slot knows its token's choice, so the
gradient of either gather is a gather by the other index: no scatter-add
anywhere, forward or backward.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sparse_experts.letters import Array
from sparse_experts.moe.assignment import Assignment, require_hard
from sparse_experts.moe.expert_parallel import exchange
from sparse_experts.moe.experts import Experts


def gather(
  experts: Experts, x_GxSxD: Array, assignment: Assignment, capacity: int | None
) -> Array:
  """Sends tokens to experts and mixes their outputs, [G, S, D].

  Args:
    experts: E of them.
    x_GxSxD: tokens in groups.
    assignment: who goes where.
    capacity: slots C of an expert for a group; None: nothing is dropped.

  Raises:
    ValueError: the assignment is soft.
  """
  require_hard(assignment, 'gather')
  G, S, D = x_GxSxD.shape
  E, C = assignment.num_experts, S if capacity is None else capacity
  with jax.named_scope('dispatch'):
    slot_GxSxK, choice_GxEC = _indices(assignment, C)
    x_GxECxD = to_slots(x_GxSxD, slot_GxSxK, choice_GxEC)
  y_GxExCxD = exchange(experts, x_GxECxD.reshape(G, E, C, D))
  with jax.named_scope('combine'):
    return from_slots(
      y_GxExCxD.reshape(G, E * C, D),
      assignment.gate_GxSxK.astype(x_GxSxD.dtype),
      slot_GxSxK,
      choice_GxEC,
    )


def _indices(assignment: Assignment, capacity: int) -> tuple[Array, Array]:
  """Slot of each choice, and choice (s * K + k) of each slot.

  A dropped choice's slot is E * C and an empty slot's choice is S * K: one past
  the end, where a gather with mode 'fill' reads zero.
  """
  G, S, K = assignment.expert_GxSxK.shape
  num_slots = assignment.num_experts * capacity
  slot_GxSxK = jnp.where(
    assignment.kept(capacity),
    assignment.expert_GxSxK * capacity + assignment.position_GxSxK,
    num_slots,
  )
  choices_SK = jnp.arange(S * K, dtype=jnp.int32)

  def invert(slot_SK):
    empty = jnp.full(num_slots, S * K, jnp.int32)
    return empty.at[slot_SK].set(choices_SK, mode='drop')

  return slot_GxSxK, jax.vmap(invert)(slot_GxSxK.reshape(G, S * K))


def _take(x_GxIxD: Array, index_GxO: Array) -> Array:
  """Rows of x by index, [G, O, D]; zeros where the index is past the end."""
  return jnp.take_along_axis(
    x_GxIxD, index_GxO[..., None], axis=1, mode='fill', fill_value=0
  )


def _take_choices(y_GxECxD: Array, slot_GxSxK: Array) -> Array:
  """The expert output of every choice, [G, S, K, D]."""
  G, S, K = slot_GxSxK.shape
  return _take(y_GxECxD, slot_GxSxK.reshape(G, S * K)).reshape(G, S, K, -1)


@jax.custom_vjp
def to_slots(x_GxSxD: Array, slot_GxSxK: Array, choice_GxEC: Array) -> Array:
  """The token of each slot, [G, EC, D].

  Args:
    x_GxSxD: tokens.
    slot_GxSxK: slot of each choice; EC or more for none.
    choice_GxEC: choice (s * K + k) of each slot; S * K or more for none.
  """
  K = slot_GxSxK.shape[-1]
  return _take(x_GxSxD, choice_GxEC // K)


def _to_slots_forward(x_GxSxD, slot_GxSxK, choice_GxEC):
  return to_slots(x_GxSxD, slot_GxSxK, choice_GxEC), slot_GxSxK


def _to_slots_backward(slot_GxSxK, dx_GxECxD):
  return _take_choices(dx_GxECxD, slot_GxSxK).sum(2), None, None


to_slots.defvjp(_to_slots_forward, _to_slots_backward)


@jax.custom_vjp
def from_slots(
  y_GxECxD: Array, gate_GxSxK: Array, slot_GxSxK: Array, choice_GxEC: Array
) -> Array:
  """Sum of the outputs in a token's slots, weighted by gates, [G, S, D].

  Args:
    y_GxECxD: outputs of all slots of a group, expert by expert.
    gate_GxSxK: weights of a token's choices.
    slot_GxSxK: int32, the slot e * C + c of each choice; E * C: none.
    choice_GxEC: int32, the choice s * K + k in each slot; S * K: none.
  """
  return jnp.einsum(
    'GSKD,GSK->GSD', _take_choices(y_GxECxD, slot_GxSxK), gate_GxSxK
  )


def _from_slots_forward(y_GxECxD, gate_GxSxK, slot_GxSxK, choice_GxEC):
  y_GxSxD = from_slots(y_GxECxD, gate_GxSxK, slot_GxSxK, choice_GxEC)
  return y_GxSxD, (y_GxECxD, gate_GxSxK, slot_GxSxK, choice_GxEC)


def _from_slots_backward(residuals, dy_GxSxD):
  y_GxECxD, gate_GxSxK, slot_GxSxK, choice_GxEC = residuals
  G, S, K = gate_GxSxK.shape
  dy_GxECxD = _take(dy_GxSxD, choice_GxEC // K)
  # A gate's gradient where its slot is: no second gather of the outputs.
  dgate_GxECx1 = jnp.einsum('GRD,GRD->GR', y_GxECxD, dy_GxECxD)[..., None]
  gate_GxECx1 = _take(gate_GxSxK.reshape(G, S * K, 1), choice_GxEC)
  return (
    dy_GxECxD * gate_GxECx1,
    _take_choices(dgate_GxECx1, slot_GxSxK)[..., 0],
    None,
    None,
  )


from_slots.defvjp(_from_slots_forward, _from_slots_backward)

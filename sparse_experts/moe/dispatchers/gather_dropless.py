"""Capped buffers, and nothing dropped: what overflows goes in further passes.

The first pass is `gather`. Where an expert has more choices than slots, another
one takes the next of them through the same buffers, and so on, in a loop that
stops by itself; it has no turn where every expert of every group has room. The
buffers are those of one pass, forward and backward, at any load; the backward
pass of a further one also adds up gradients of the experts' parameters. Time
grows with the fullest expert of any group.

MaxText falls back likewise, to a branch without a cap.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sparse_experts.letters import Array
from sparse_experts.moe.assignment import Assignment, require_hard
from sparse_experts.moe.dispatchers import Dispatched
from sparse_experts.moe.dispatchers.gather import gather
from sparse_experts.moe.dispatchers.grouped import grouped
from sparse_experts.moe.experts import Experts

OVERFLOW = 'overflow'  # The scope of further passes; `planning.hlo` knows it.


def gather_dropless(
  experts: Experts,
  x_GxSxD: Array,
  assignment: Assignment,
  capacity: int | None,
  *,
  buffer_factor: float = 1.25,
) -> Dispatched:
  """Sends tokens to experts and mixes their outputs, [G, S, D].

  It is a layer's `exact_dispatch`, for training with capacity_factor=None, and
  then for evaluation, where every sequence is a group. It is `grouped` where
  slots would save nothing: in groups of fewer choices than experts, as in
  decoding, and where an expert has a slot for each token, as of routers that
  return a choice for every expert.

  Args:
    experts: E of them.
    x_GxSxD: tokens in groups.
    assignment: who goes where.
    capacity: choices whose position is beyond it are dropped; None: none are.
    buffer_factor: slots of an expert in a pass, relative to a balanced load; at
      most 2.

  Raises:
    ValueError: the assignment is soft, or a factor out of range.
  """
  require_hard(assignment, 'gather_dropless')
  if not 0 < buffer_factor <= 2:
    raise ValueError(
      f'buffer_factor must be above 0 and at most 2, not {buffer_factor}.'
    )
  (_, S, K), E = assignment.expert_GxSxK.shape, assignment.num_experts
  slots = min(S, math.ceil(buffer_factor * S * K / E))
  if S * K < E or slots == S:
    return grouped(experts, x_GxSxD, assignment, capacity)
  kept_GxSxK = assignment.kept(capacity)
  choices = _Choices(
    expert_GxSxK=jnp.where(kept_GxSxK, assignment.expert_GxSxK, E),
    position_GxSxK=jnp.where(kept_GxSxK, assignment.position_GxSxK, 0),
  )
  return _passes(slots, experts, x_GxSxD, assignment.gate_GxSxK, choices)


class _Choices(NamedTuple):
  """Of an assignment, what has no gradient."""

  expert_GxSxK: Array
  position_GxSxK: Array

  def passes(self, slots: int) -> Array:
    """How many it takes, of all groups, int32 scalar; at least one."""
    return jnp.max(self.position_GxSxK) // slots + 1


def _one_pass(
  i: Array | int,
  slots: int,
  experts: Experts,
  x_GxSxD: Array,
  gate_GxSxK: Array,
  choices: _Choices,
) -> Array:
  """The output of the choices at positions [i * slots, (i + 1) * slots)."""
  position_GxSxK = choices.position_GxSxK - i * slots
  E = experts.stacked
  now = Assignment(
    expert_GxSxK=jnp.where(position_GxSxK >= 0, choices.expert_GxSxK, E),
    gate_GxSxK=gate_GxSxK,
    position_GxSxK=jnp.maximum(position_GxSxK, 0),
    num_experts=E,
  )
  return gather(experts.fold_in(i), x_GxSxD, now, slots)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _passes(slots, experts, x_GxSxD, gate_GxSxK, choices):
  y_GxSxD = _one_pass(0, slots, experts, x_GxSxD, gate_GxSxK, choices)
  return _with_rest(y_GxSxD, slots, experts, x_GxSxD, gate_GxSxK, choices)


def _with_rest(y_GxSxD, slots, *given):
  *_, choices = given

  def add(i, y_GxSxD):
    return y_GxSxD + _one_pass(i, slots, *given)

  with jax.named_scope(OVERFLOW):
    return jax.lax.fori_loop(1, choices.passes(slots), add, y_GxSxD)


def _forward(slots, experts, x_GxSxD, gate_GxSxK, choices):
  y_GxSxD, gradients = _pass_and_gradients(
    0, slots, experts, x_GxSxD, gate_GxSxK, choices
  )
  given = experts, x_GxSxD, gate_GxSxK, choices
  return _with_rest(y_GxSxD, slots, *given), (gradients, given)


def _backward(slots, residuals, dy_GxSxD):
  gradients, (experts, *given) = residuals
  *_, choices = given

  def add(i, so_far):
    _, gradients = _pass_and_gradients(i, slots, experts, *given)
    return jax.tree.map(jnp.add, so_far, gradients(dy_GxSxD))

  with jax.named_scope(OVERFLOW):
    params, dx_GxSxD, dgate_GxSxK = jax.lax.fori_loop(
      1, choices.passes(slots), add, gradients(dy_GxSxD)
    )
  dexperts = dataclasses.replace(experts, params=params, key=None)
  return dexperts, dx_GxSxD, dgate_GxSxK, None


_passes.defvjp(_forward, _backward)


def _pass_and_gradients(i, slots, experts, x_GxSxD, gate_GxSxK, choices):
  """A pass, and cotangents of parameters, tokens and gates by that of it."""

  def of(params, x_GxSxD, gate_GxSxK):
    these = dataclasses.replace(experts, params=params)
    return _one_pass(i, slots, these, x_GxSxD, gate_GxSxK, choices)

  return jax.vjp(of, experts.params, x_GxSxD, gate_GxSxK)

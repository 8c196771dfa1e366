"""What the experts do: counts that add, and the fractions read from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from sparse_experts.letters import Array
from sparse_experts.moe.assignment import Assignment, SoftAssignment


def counts(
  assignment: Assignment | SoftAssignment,
  capacity: int | None,
  mask_GxS: Array | None,
  lost: Mapping[str, Array] | None = None,
) -> dict[str, Array]:
  """Float32 sums over all tokens of a batch.

  They add over microbatches, steps, layers and processes; counts are exact to
  2^24, and larger ones rounded to 24 bits.

  Args:
    assignment: what the router decided.
    capacity: C, or None.
    mask_GxS: False for padding, or None.
    lost: choices within the capacity that the dispatcher dropped all the same,
      boolean [G, S, K], by who had no room: 'sender', 'receiver'.

  Returns:
    tokens: unmasked tokens. padding: masked ones.
    chosen_E: choices of each expert, before any capacity.
    kept_E: choices of each expert that found a slot, and were not lost.
    gate_mass_E: sum of the gates of those.
    left_out: unmasked tokens that reached no expert at all.
    slots: slots there were (E * C * G), 0 without a capacity.
    dropped_sender, dropped_receiver: choices lost, if told which.

  Of soft weights, an expert's choices are its share of the tokens' mixtures.
  """
  if isinstance(assignment, SoftAssignment):
    return _soft_counts(assignment, mask_GxS)
  E = assignment.num_experts
  G, S, _ = assignment.expert_GxSxK.shape
  onehot_GxSxKxE = jax.nn.one_hot(assignment.expert_GxSxK, E)
  kept_GxSxK = assignment.kept(capacity)
  for lost_GxSxK in (lost or {}).values():
    kept_GxSxK &= ~lost_GxSxK
  kept_GxSxKxE = onehot_GxSxKxE * kept_GxSxK[..., None]
  real_GxS = jnp.ones((G, S), bool) if mask_GxS is None else mask_GxS
  return {
    **_positions(real_GxS),
    'chosen_E': onehot_GxSxKxE.sum((0, 1, 2)),
    'kept_E': kept_GxSxKxE.sum((0, 1, 2)),
    'gate_mass_E': jnp.einsum(
      'GSKE,GSK->E', kept_GxSxKxE, assignment.gate_GxSxK
    ),
    'left_out': (real_GxS & ~kept_GxSxK.any(-1)).sum().astype(jnp.float32),
    'slots': jnp.float32(0 if capacity is None else G * E * capacity),
    **{
      f'dropped_{who}': lost_GxSxK.sum().astype(jnp.float32)
      for who, lost_GxSxK in (lost or {}).items()
    },
  }


def _soft_counts(
  assignment: SoftAssignment, mask_GxS: Array | None
) -> dict[str, Array]:
  G, S, E, C = assignment.combine_GxSxExC.shape
  share_GxSxE = assignment.combine_GxSxExC.sum(-1)
  real_GxS = jnp.ones((G, S), bool) if mask_GxS is None else mask_GxS
  mass_E = share_GxSxE.sum((0, 1))
  return {
    **_positions(real_GxS),
    'chosen_E': mass_E,
    'kept_E': mass_E,
    'gate_mass_E': mass_E,
    'left_out': (real_GxS & (share_GxSxE.sum(-1) == 0))
    .sum()
    .astype(jnp.float32),
    'slots': jnp.float32(G * E * C),
  }


def _positions(real_GxS: Array) -> dict[str, Array]:
  tokens = real_GxS.sum().astype(jnp.float32)
  return {'tokens': tokens, 'padding': real_GxS.size - tokens}


def summary(sums: Mapping[str, ArrayLike]) -> dict[str, Any]:
  """Fractions of one layer from its summed metrics.

  Returns:
    load_E: share of the choices that went to each expert; sums to 1.
    gate_mass_E: mean gate with which an expert's kept tokens came in.
    imbalance: largest load over mean load; 1 is balance.
    dropped: share of choices without a slot, or lost on the way.
    dropped_sender, dropped_receiver: share lost for lack of room in the buffer
      of the sender or receiver, where the dispatcher has such.
    left_out: share of tokens that reached no expert. padding: share of
      positions masked.
    dead: experts that no token chose. fill: share of slots in use (0 without
      capacity).
    entropy, confidence: of the router, means over tokens, where it reports
      them (nats; probability of the first choice).
  """
  sums = {name: np.asarray(value, np.float64) for name, value in sums.items()}
  chosen, kept = sums['chosen_E'].sum(), sums['kept_E'].sum()
  load_E = sums['chosen_E'] / max(chosen, 1)
  tokens = max(sums['tokens'], 1)
  return {
    'load_E': load_E,
    'gate_mass_E': sums['gate_mass_E'] / np.maximum(sums['kept_E'], 1),
    'imbalance': float(load_E.max() * load_E.size),
    'dropped': float((chosen - kept) / max(chosen, 1)),
    'left_out': float(sums['left_out'] / tokens),
    'padding': float(
      sums['padding'] / max(sums['padding'] + sums['tokens'], 1)
    ),
    'dead': float((sums['chosen_E'] == 0).sum()),
    'fill': float(kept / max(sums['slots'], 1)) if sums['slots'] else 0.0,
    **{
      name: float(sums[name] / max(chosen, 1))
      for name in ('dropped_sender', 'dropped_receiver')
      if name in sums
    },
    **{
      name: float(sums[name] / tokens)
      for name in ('entropy', 'confidence')
      if name in sums
    },
  }

"""What routing records show of layers: load, co-activation, paths.

References:
  Muennighoff et al. 2024 (OLMoE), https://arxiv.org/abs/2409.02060, section 5.
"""

from __future__ import annotations

import collections
from typing import Any, NamedTuple

import numpy as np

from sparse_experts import moe
from sparse_experts.insight.records import Records
from sparse_experts.models.layout import LayerId
from sparse_experts.moe import FATES, Record

HOT = 2.0  # Times the mean load.


class Matrix(NamedTuple):
  """Numbers with names: values, [rows, columns]."""

  rows: tuple[str, ...]
  columns: tuple[str, ...]
  values: np.ndarray


def recount(record: Record) -> dict[str, np.ndarray | np.float64]:
  """The sums of `moe.metrics.counts`, from the record of the same tokens."""
  E, fate_BxLxK = record.num_experts, record.fate_BxLxK
  real_BxL, chosen_BxLxK = ~is_padding(record), is_choice(record)
  kept_BxLxK = fate_BxLxK == FATES.index('kept')

  def by_expert(which_BxLxK, weight_BxLxK=None):
    weight = None if weight_BxLxK is None else weight_BxLxK[which_BxLxK]
    return np.bincount(record.expert_BxLxK[which_BxLxK], weight, E)

  groups = real_BxL.size // record.group_size
  sums = {
    'tokens': real_BxL.sum(),
    'padding': (~real_BxL).sum(),
    'chosen_E': by_expert(chosen_BxLxK),
    'kept_E': by_expert(kept_BxLxK),
    'gate_mass_E': by_expert(kept_BxLxK, record.gate_BxLxK),
    'left_out': (real_BxL & ~kept_BxLxK.any(-1)).sum(),
    'slots': 0 if record.capacity is None else groups * E * record.capacity,
  }
  for who in ('sender', 'receiver'):
    if (lost := (fate_BxLxK == FATES.index(who)).sum()) > 0:
      sums[f'dropped_{who}'] = lost
  if record.entropy_BxL is not None:
    sums['entropy'] = record.entropy_BxL.sum()
    sums['confidence'] = record.confidence_BxL.sum()
  return {name: np.float64(value) for name, value in sums.items()}


def summary(record: Record) -> dict[str, Any]:
  """What `moe.summary` says of a layer, and more.

  'hot': experts of twice the mean load or more. 'log_z': of the router's
  logits, the mean over tokens, where it has some.
  """
  sums = recount(record)
  result = moe.summary(sums)
  load_E = result['load_E']
  result['hot'] = float((load_E >= HOT / load_E.size).sum())
  if record.log_z_BxL is not None:
    result['log_z'] = float(record.log_z_BxL.sum() / max(sums['tokens'], 1))
  return result


def is_padding(record: Record) -> np.ndarray:
  """Boolean [B, L]."""
  return record.fate_BxLxK[..., 0] == FATES.index('padding')


def is_choice(record: Record) -> np.ndarray:
  """Boolean [B, L, K]: the choice was made, whether or not it was dropped."""
  return record.expert_BxLxK < record.num_experts


def first_choice(record: Record) -> np.ndarray:
  """Int [B, L], the expert of the largest gate; num_experts for none."""
  gate_BxLxK = np.where(is_choice(record), record.gate_BxLxK, -np.inf)
  best_BxLx1 = gate_BxLxK.argmax(-1)[..., None]
  return np.take_along_axis(record.expert_BxLxK, best_BxLx1, -1)[..., 0]


def chosen(record: Record) -> np.ndarray:
  """Float [B, L, E], 1 where a token chose an expert."""
  E = record.num_experts
  return (record.expert_BxLxK[..., None] == np.arange(E)).any(-2).astype(float)


def line_lengths(record: Record) -> np.ndarray:
  """Int [G, E], choices of each expert in each group, kept or not."""
  chosen_BxLxE = chosen(record)
  E = record.num_experts
  return chosen_BxLxE.reshape(-1, record.group_size, E).sum(1).astype(int)


def coactivation(record: Record) -> Matrix:
  """Row i, column j: of the tokens that chose expert i, the share that chose j.

  NaN on the diagonal and for experts that nobody chose. OLMoE, section 5.2:
  N_ij / N_i.
  """
  chosen_BLxE = chosen(record).reshape(-1, record.num_experts)
  both_ExE = chosen_BLxE.T @ chosen_BLxE
  np.fill_diagonal(both_ExE, np.nan)
  count_Ex1 = chosen_BLxE.sum(0)[:, None]
  share_ExE = both_ExE / np.where(count_Ex1, count_Ex1, np.nan)
  return Matrix(experts(record), experts(record), share_ExE)


def experts(record: Record) -> tuple[str, ...]:
  """Names of experts, for tables."""
  return tuple(map(str, range(record.num_experts)))


def overview(records: Records) -> Matrix:
  """One row a layer; columns are numbers of `summary`, 0 where not reported."""
  columns = (
    *('imbalance', 'hot', 'dead', 'dropped', 'left_out', 'fill'),
    *('entropy', 'confidence', 'log_z'),
  )
  rows = {name: summary(layer) for name, layer in records.layers.items()}
  values = [[row.get(name, 0.0) for name in columns] for row in rows.values()]
  return Matrix(tuple(rows), columns, np.array(values))


class Path(NamedTuple):
  """The experts that a token meets in the layers of a stack, in turn."""

  experts: tuple[int, ...]
  share: float  # Of the tokens.
  by_chance: float  # The same if layers chose independently.


def paths(records: Records, stack: str, most: int = 20) -> list[Path]:
  """The most frequent paths of first choices through a stack's sparse layers.

  Tokens that miss a layer's experts, as padding does, are left out.

  Args:
    records: of a split.
    stack: its name, such as 'decoder'.
    most: paths at most.

  Raises:
    ValueError: the stack has no sparse layer.
  """
  first_NxBL = [
    first_choice(layer).ravel()
    for name, layer in records.layers.items()
    if _in_stack(name, stack)
  ]
  sizes = [
    layer.num_experts
    for name, layer in records.layers.items()
    if _in_stack(name, stack)
  ]
  if not sizes:
    raise ValueError(
      f'{stack!r} has no sparse layer; the records have '
      f'{", ".join(records.layers)}.'
    )
  whole_BL = np.all([first < E for first, E in zip(first_NxBL, sizes)], axis=0)
  first_IxN = np.stack(first_NxBL, -1)[whole_BL]
  total = max(len(first_IxN), 1)
  load_NxE = [
    np.bincount(first_I, minlength=E) / total
    for first_I, E in zip(first_IxN.T, sizes)
  ]
  counted = collections.Counter(map(tuple, first_IxN.tolist()))
  return [
    Path(
      path,
      count / total,
      float(np.prod([load_E[e] for load_E, e in zip(load_NxE, path)])),
    )
    for path, count in counted.most_common(most)
  ]


def transitions(first: Record, second: Record) -> Matrix:
  """Of the tokens with each first choice in a layer, the share with each in
  another; NaN in rows of experts that no token chose."""
  E, F = first.num_experts, second.num_experts
  a_BxL, b_BxL = first_choice(first), first_choice(second)
  both_BxL = (a_BxL < E) & (b_BxL < F)
  count_ExE = np.zeros((E, F))
  np.add.at(count_ExE, (a_BxL[both_BxL], b_BxL[both_BxL]), 1)
  count_Ex1 = count_ExE.sum(1, keepdims=True)
  share_ExE = count_ExE / np.where(count_Ex1, count_Ex1, np.nan)
  return Matrix(experts(first), experts(second), share_ExE)


def _in_stack(layer: str, stack: str) -> bool:
  return LayerId.parse(layer).stack == stack

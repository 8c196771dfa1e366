"""Agreement of two routers on the same tokens, or of one at two steps.

References:
  Muennighoff et al. 2024 (OLMoE), https://arxiv.org/abs/2409.02060, section 5.
"""

from __future__ import annotations

import numpy as np

from sparse_experts.insight.records import Records
from sparse_experts.insight.routing import chosen, first_choice, is_padding
from sparse_experts.moe import Record


def agreement(some: Record, others: Record) -> dict[str, float]:
  """How far two routers agree on the same tokens.

  Returns:
    first_choice: share of tokens with the same first choice.
    overlap: mean share of the second's choices that the first makes too; of
      two checkpoints of a run, earlier and later, the router saturation of
      OLMoE, section 5.1.
    information: mutual information of the first choices over their mean
      entropy, 0 to 1. Blind to the numbering of experts, so it also compares
      runs that share nothing; with few tokens chance lifts it.

  Raises:
    ValueError: the records are of different tokens.
  """
  if (
    is_padding(some).shape != is_padding(others).shape
    or (is_padding(some) != is_padding(others)).any()
  ):
    raise ValueError(
      'routers are compared on the same tokens: record both on the same task, '
      'split, batch size and number of batches.'
    )
  a_BxLxE, b_BxLxE = chosen(some), chosen(others)
  both_BxL = a_BxLxE.any(-1) & b_BxLxE.any(-1)
  if not both_BxL.any():
    raise ValueError('no token meets experts of both routers.')
  first_a, first_b = (first_choice(r)[both_BxL] for r in (some, others))
  joint_ExE = np.zeros((some.num_experts, others.num_experts))
  np.add.at(joint_ExE, (first_a, first_b), 1 / len(first_a))
  entropy_a, entropy_b, entropy_ab = (
    _entropy(p) for p in (joint_ExE.sum(1), joint_ExE.sum(0), joint_ExE)
  )
  E = min(some.num_experts, others.num_experts)
  shared_BxL = (a_BxLxE[..., :E] * b_BxLxE[..., :E]).sum(-1)
  mean = (entropy_a + entropy_b) / 2
  return {
    'first_choice': float((first_a == first_b).mean()),
    'overlap': float((shared_BxL[both_BxL] / b_BxLxE[both_BxL].sum(-1)).mean()),
    'information': float((2 * mean - entropy_ab) / mean) if mean else 1.0,
  }


def saturation(earlier: Records, final: Records) -> dict[str, float]:
  """Router saturation of every layer (OLMoE, section 5.1).

  The share of the final choices that the earlier checkpoint made too.
  """
  if not same_tokens(earlier, final):
    raise ValueError(
      f'records of {dict(earlier.facts)} and {dict(final.facts)} are of '
      'different tokens: record both on the same task, split, batch size and '
      'number of batches.'
    )
  return {
    name: agreement(earlier.layers[name], layer)['overlap']
    for name, layer in final.layers.items()
  }


def same_tokens(some: Records, others: Records) -> bool:
  """Whether two records are of the same tokens, so that they compare."""
  inputs = {r.facts['inputs'] for r in (some, others) if 'inputs' in r.facts}
  if len(inputs) > 1:  # Records of earlier versions do not say.
    return False
  return some.tokens.keys() == others.tokens.keys() and all(
    np.array_equal(ids_BxL, others.tokens[stack])
    for stack, ids_BxL in some.tokens.items()
  )


def _entropy(p: np.ndarray) -> float:
  return float(-(p * np.log(np.where(p > 0, p, 1))).sum())

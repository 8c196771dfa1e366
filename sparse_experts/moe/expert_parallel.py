"""Tokens to the devices of their experts and back.

Written as two sharding constraints: before, groups are split over the data
shards and every device holds its groups' slots of all experts; between, each
device holds its own experts' slots of all groups. XLA turns the change into
one all-to-all each way.
"""

from __future__ import annotations

from sparse_experts.letters import Array
from sparse_experts.moe.experts import Experts
from sparse_experts.sharding import constrain


def exchange(experts: Experts, x_GxExCxD: Array) -> Array:
  """Runs experts on dispatched slots, [G, E, C, D], wherever experts live."""
  x_GxExCxD = constrain(x_GxExCxD, 'group', None, None, 'act_embed')
  x_ExGxCxD = constrain(
    x_GxExCxD.swapaxes(0, 1), 'expert', 'expert_group', None, 'act_embed'
  )
  y_ExGxCxD = constrain(
    experts(x_ExGxCxD), 'expert', 'expert_group', None, 'act_embed'
  )
  return constrain(y_ExGxCxD.swapaxes(0, 1), 'group', None, None, 'act_embed')

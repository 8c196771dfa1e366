"""What objectives say of batches: sums that add."""

from __future__ import annotations

from typing import Any

import numpy as np
from flax import struct

from sparse_experts import moe
from sparse_experts.letters import Array
from sparse_experts.models.layout import LayerId

Sums = dict[str, Any]


@struct.dataclass
class Mean:
  """A mean of what many batches hold: sums that add; float32 scalars.

  Or arrays [I], whose means add up: a sum of several losses.
  """

  total: Array
  weight: Array


def summary(sums: Sums) -> dict[str, Any]:
  """Metrics from the sums of `Objective.loss`, added over batches.

  Returns:
    The objective's means and counts ('loss', 'accuracy', 'targets' of language,
    in nats per target); one mean per auxiliary loss; layers: name ->
    `moe.summary` of that layer.
  """
  return {
    **{
      name: float(np.sum(mean.total / np.maximum(mean.weight, 1)))
      for name, mean in sums['means'].items()
    },
    **{name: float(count) for name, count in sums['counts'].items()},
    **{
      name: float(value) / float(sums['batches'])
      for name, value in sums['aux_losses'].items()
    },
    'layers': {
      name: moe.summary(layer)
      for name, layer in sorted(
        sums['layers'].items(), key=lambda item: LayerId.parse(item[0])
      )
    },
  }

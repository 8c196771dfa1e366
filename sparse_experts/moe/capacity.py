"""How many slots an expert has for a group of tokens."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction

_ROUNDING = {'floor': math.floor, 'round': round, 'ceil': math.ceil}


@dataclasses.dataclass(frozen=True)
class CapacityRule:
  """From a capacity factor to the capacity C of one expert for one group.

      C = rounding(factor * S * (K if per_choice else 1) / E)

  at least `minimum` and, with `clip`, at most S. The code bases disagree on
  every part of it:

  | code                | per_choice | rounding | minimum | clip |
  |---------------------|------------|----------|---------|------|
  | Mesh TF (papers' own) | no       | floor    | 4       | yes  |
  | flaxformer          | no         | round    | 4       | no   |
  | V-MoE               | yes        | ceil     | 1       | no   |

  Example:
    >>> CapacityRule()(1.25, tokens=4096, num_experts=64, k=1)
    80
  """

  per_choice: bool = True
  rounding: str = 'ceil'
  minimum: int = 4
  clip: bool = True

  def __post_init__(self):
    if self.rounding not in _ROUNDING:
      raise ValueError(
        f'rounding must be one of {", ".join(_ROUNDING)}, not '
        f'{self.rounding!r}.'
      )

  def __call__(
    self, factor: float, *, tokens: int, num_experts: int, k: int
  ) -> int:
    """Slots of one expert for one group of `tokens` tokens."""
    if not factor > 0:
      raise ValueError(
        f'capacity_factor must be above 0, got {factor}; None drops nothing.'
      )
    choices = tokens * (k if self.per_choice else 1)
    # The factor as written: in floats 1.1 * 100 / 10 is more than 11.
    share = Fraction(str(factor)) * choices / num_experts
    slots = max(_ROUNDING[self.rounding](share), self.minimum)
    return min(slots, tokens) if self.clip else slots

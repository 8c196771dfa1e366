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

  at least `minimum`, then up to the next multiple of `multiple_of` and, with
  `clip`, at most S. The code bases disagree on every part of it:

  | code       | per_choice | rounding | minimum | multiple_of | clip |
  |------------|------------|----------|---------|-------------|------|
  | Mesh TF    | no         | floor    | 4       | 1           | yes  |
  | flaxformer | no         | round    | 4       | 1           | no   |
  | V-MoE      | yes        | ceil     | 1       | 4           | no   |
  | praxis     | no         | floor    | 1       | 4           | no   |
  | DeepSpeed  | yes        | ceil     | 4       | 1           | no   |

  Mesh TF is the papers' own (Switch, ST-MoE), praxis GLaM's.

  Example:
    >>> CapacityRule()(1.25, tokens=4096, num_experts=64, k=1)
    80
    >>> v_moe = CapacityRule(minimum=1, multiple_of=4, clip=False)
    >>> v_moe(1.05, tokens=784, num_experts=32, k=1)
    28
  """

  per_choice: bool = True
  rounding: str = 'ceil'
  minimum: int = 4
  clip: bool = True
  multiple_of: int = 1

  def __post_init__(self):
    if self.rounding not in _ROUNDING:
      raise ValueError(
        f'rounding must be one of {", ".join(_ROUNDING)}, not '
        f'{self.rounding!r}.'
      )
    if self.minimum < 1 or self.multiple_of < 1:
      raise ValueError(
        'an expert has one slot or more: minimum and multiple_of must be at '
        f'least 1, got {self.minimum} and {self.multiple_of}.'
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
    slots += -slots % self.multiple_of
    return min(slots, tokens) if self.clip else slots

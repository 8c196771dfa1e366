"""Dropout of a rate that is one."""

from __future__ import annotations

from flax import linen as nn


class Dropout(nn.Dropout):
  """Flax's, which scales and zeroes by any number, within its range.

  Raises:
    ValueError: the rate is not in [0, 1).
  """

  def __post_init__(self):
    if not 0 <= self.rate < 1:
      raise ValueError(
        f'dropout_rate={self.rate} must be at least 0, none, and below 1.'
      )
    super().__post_init__()

"""A run of a sweep, before, while and after it runs."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

from sparse_experts.sweeps import results
from sparse_experts.sweeps.grid import Point


@dataclasses.dataclass(frozen=True)
class Run:
  """A run of the sweep.

  Attributes:
    point: of the grid.
    model_dir: where it lies; its name is its digest.
    arguments: of `train`, as of a user.
    config: all that these say, as the text of one gin file.
    steps: that it is to take.
    flops_per_step: useful ones, see `planning.ledger`.
    inputs: digest of its data, files and own modules, see `identity.inputs`.
  """

  point: Point
  model_dir: pathlib.Path
  arguments: list[str]
  config: str
  steps: int
  flops_per_step: int
  inputs: str

  @property
  def is_finished(self) -> bool:
    """Whether it has saved its last step."""
    return results.steps_taken(self.model_dir) >= self.steps

  def result(self) -> dict[str, Any]:
    """Its line of results.jsonl."""
    return results.of(
      self.model_dir, self.point, self.flops_per_step, self.inputs
    )

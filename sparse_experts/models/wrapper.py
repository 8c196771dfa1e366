"""Objectives made of another objective."""

from __future__ import annotations

from typing import Any

from sparse_experts.models.objective import Objective


@Objective.register
class Wrapper:
  """An objective made of another: it has all that it does not change.

  A wrapper calls `outputs` and `judge` of the one inside, and gives its own.
  """

  objective: Objective

  loss = Objective.loss

  def __getattr__(self, name: str) -> Any:
    if name.startswith('__') or name == 'objective':  # Not made yet.
      raise AttributeError(name)
    return getattr(self.objective, name)

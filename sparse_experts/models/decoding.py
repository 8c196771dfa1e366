"""Writing tokens one by one: greedy, sampled, or by beam search.

A strategy is a value, `Sampling` or `BeamSearch`, that says which tokens the
answers go on with; the loop is the same for both. Which tokens end an answer
and which fill it up is the model's to say, by its `SpecialTokens`.
"""

from __future__ import annotations

from typing import Any, Protocol

from sparse_experts.data.special_tokens import SpecialTokens
from sparse_experts.letters import Array
from sparse_experts.models.beam_search import BeamSearch
from sparse_experts.models.sampling import GREEDY, Sampling

__all__ = [
  'GREEDY', 'BeamSearch', 'Decodable', 'Sampling', 'check_decodable',
  'is_decodable',
]  # fmt: skip


class Decodable(Protocol):
  """An objective that writes text, see `language.Language`, `is_decodable`."""

  special_tokens: SpecialTokens

  def score(self, params: Any, batch: Any) -> Array:
    """Log-probability of each row's targets, float32 [B]."""
    ...

  def decode(
    self, params: Any, batch: Any, keys_B: Array | None, *, max_tokens: int
  ) -> tuple[Array, Array]:
    """Answers, int32 [B, T], and their log-probabilities, float32 [B].

    Args:
      params: unboxed.
      batch: questions, as `features.prompt` makes them, B rows.
      keys_B: a random key for each row; None where nothing is drawn.
      max_tokens: T, of an answer.
    """
    ...


def is_decodable(objective: Any) -> bool:
  """Whether an objective is `Decodable`.

  `isinstance` of a protocol says from Python 3.12 on that a wrapper is none,
  for it no longer sees what `__getattr__` hands on.
  """
  return all(
    hasattr(objective, name) for name in ('special_tokens', 'score', 'decode')
  )


def check_decodable(objective: Any) -> None:
  """Raises ValueError unless the objective writes text."""
  if not is_decodable(objective):
    raise ValueError(
      f'{type(objective).__name__} writes no text: answers come from Language '
      'and what wraps it, by recipes such as gin/quickstart.gin.'
    )

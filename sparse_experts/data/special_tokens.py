"""Token ids that are no text: padding, ends, and a decoder's first input."""

from __future__ import annotations

import dataclasses
import functools
import operator

from sparse_experts.letters import Array

NO_TOKEN = -1  # No id of any vocabulary.


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
  """What a model's token ids mean beside text; T5's by default.

  Attributes:
    pad: fills rows up and has no part in anything. NO_TOKEN where a model has
      no such id: then every id is a token.
    eos: each of them ends an answer; none: answers never end by themselves.
    start: a decoder's first input, before all that it writes or is asked; None:
      it begins with the first token of its prompt.
    suppressed: never written.

  Example:
    >>> mixtral = SpecialTokens(pad=NO_TOKEN, eos=2, start=1, suppressed=())
    >>> mixtral.eos
    (2,)

  Raises:
    ValueError: padding would be an end of an answer.
  """

  pad: int = 0
  eos: tuple[int, ...] = (1,)
  start: int | None = 0
  suppressed: tuple[int, ...] = (0,)

  def __post_init__(self):
    for name in ('eos', 'suppressed'):
      ids = getattr(self, name)
      ids = (ids,) if isinstance(ids, int) else tuple(ids)
      object.__setattr__(self, name, ids)
    if self.pad in self.eos:
      raise ValueError(
        f'padding {self.pad} is among the ends of an answer {self.eos}, and '
        f'padding is no token; set the pad to {NO_TOKEN}, no id of the '
        'vocabulary.'
      )

  def outside(self, size: int) -> tuple[int, ...]:
    """Those that are no ids of a vocabulary of `size`."""
    pad = () if self.pad == NO_TOKEN else (self.pad,)
    start = () if self.start is None else (self.start,)
    ids = (*pad, *self.eos, *start, *self.suppressed)
    return tuple(i for i in ids if not 0 <= i < size)

  def is_token(self, tokens: Array) -> Array:
    """Where there is no padding, boolean."""
    return tokens != self.pad

  def is_eos(self, tokens: Array) -> Array:
    """Where an answer ends, boolean."""
    return _is_one_of(tokens, self.eos)

  def may_be_written(self, tokens: Array) -> Array:
    """Where a token is not suppressed, boolean."""
    return ~_is_one_of(tokens, self.suppressed)

  def first(self) -> int:
    """`start`, where a decoder's row has to begin with one.

    Raises:
      ValueError: there is none.
    """
    if self.start is None:
      raise ValueError(
        'the model has no start token, and rows of targets begin with one: '
        'set START_ID, for instance to the end of the text before.'
      )
    return self.start


T5 = SpecialTokens()


def _is_one_of(tokens: Array, ids: tuple[int, ...]) -> Array:
  none = tokens != tokens
  return functools.reduce(operator.or_, (tokens == i for i in ids), none)

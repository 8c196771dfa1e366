"""How the axes of one of our parameters lie in a foreign tensor.

A rule such as 'DHA = (HA)D' names the axes of ours, one letter each, and of
theirs, where letters in brackets are one axis. It reads both ways, so the way
back is the inverse of the way there by construction. The empty rule changes
nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np


def to_theirs(x: np.ndarray, rule: str) -> np.ndarray:
  """Our array as they have it.

  Example:
    >>> x_DxHxA = np.arange(12).reshape(2, 2, 3)
    >>> to_theirs(x_DxHxA, 'DHA = (HA)D').shape
    (6, 2)
  """
  if not rule:
    return x
  ours, groups = _parse(rule)
  y = x.transpose([ours.index(letter) for letter in ''.join(groups)])
  return y.reshape(their_shape(x.shape, rule))


def to_ours(y: np.ndarray, rule: str, shape: Sequence[int]) -> np.ndarray:
  """Their array as we have it.

  Args:
    y: theirs, of `their_shape(shape, rule)`.
    rule: how its axes lie.
    shape: of ours.

  Raises:
    ValueError: the array has another number of entries.

  Example:
    >>> y_HAxD = np.arange(12).reshape(6, 2)
    >>> to_ours(y_HAxD, 'DHA = (HA)D', (2, 2, 3)).shape
    (2, 2, 3)
  """
  if not rule:
    return y
  ours, groups = _parse(rule)
  theirs = ''.join(groups)
  y = y.reshape([shape[ours.index(letter)] for letter in theirs])
  return y.transpose([theirs.index(letter) for letter in ours])


def their_shape(shape: Sequence[int], rule: str) -> tuple[int, ...]:
  """Shape of their tensor for our `shape`.

  Example:
    >>> their_shape((2, 5, 3), 'DHA = (HA)D')
    (15, 2)
  """
  if not rule:
    return tuple(shape)
  ours, groups = _parse(rule)
  return tuple(
    math.prod(shape[ours.index(letter)] for letter in group) for group in groups
  )


def _parse(rule: str) -> tuple[str, list[str]]:
  ours, theirs = rule.split(' = ')
  groups = [group.strip('()') for group in re.findall(r'\(\w+\)|\w', theirs)]
  return ours, groups

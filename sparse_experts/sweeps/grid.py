"""The runs of a sweep: every combination of a grid's values, and every seed."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

_PAIRS = {')': '(', ']': '[', '}': '{'}


class Point(NamedTuple):
  """One run of a sweep.

  Attributes:
    overrides: the grid's values as they were written, by name.
    seed: its SEED.
  """

  overrides: Mapping[str, str]
  seed: int

  @property
  def bindings(self) -> list[str]:
    """As `config.parse` takes them."""
    values = {**self.overrides, 'SEED': str(self.seed)}
    return [f'{name}={value}' for name, value in values.items()]

  @property
  def name(self) -> str:
    """For people: 'NUM_EXPERTS=8 seed 1'."""
    values = (f'{name}={value}' for name, value in self.overrides.items())
    return ' '.join([*values, f'seed {self.seed}'])


def points(grid: Sequence[str], seeds: Sequence[int]) -> list[Point]:
  """The runs of a grid, seeds innermost.

  Args:
    grid: 'NAME=VALUE,VALUE,...' of each axis; a comma inside brackets or quotes
      parts no values.
    seeds: of every combination.

  Raises:
    ValueError: an axis is there twice, has a value twice or none, or is SEED or
      MODEL_DIR.

  Example:
    >>> found = points(['NUM_EXPERTS=2,4', 'SPARSE_LAYERS=(0,),(0, 1)'], [0])
    >>> [point.name for point in found][1:3]
    ['NUM_EXPERTS=2 SPARSE_LAYERS=(0, 1) seed 0', \
'NUM_EXPERTS=4 SPARSE_LAYERS=(0,) seed 0']
  """
  axes: dict[str, list[str]] = {}
  for axis in grid:
    name, _, text = axis.partition('=')
    if name in axes:
      raise ValueError(
        f'--grid.{name} is there twice; give all values at once.'
      )
    if name == 'SEED':
      raise ValueError('--grid.SEED: seeds are --seeds=N, from --gin.SEED on.')
    if name == 'MODEL_DIR':
      raise ValueError('--grid.MODEL_DIR: a sweep says where its runs lie.')
    axes[name] = values = split(text)
    if not all(values) or len(set(values)) < len(values):
      raise ValueError(
        f'--grid.{axis} must have values, each once, parted by commas.'
      )
  return [
    Point(dict(zip(axes, values)), seed)
    for values in itertools.product(*axes.values())
    for seed in seeds
  ]


def split(text: str) -> list[str]:
  """Values of an axis.

  >>> split("2, (1, 2), 'a,b'")
  ['2', '(1, 2)', "'a,b'"]
  """
  found, open_, quote = [''], [], ''
  for character in text:
    if quote:
      quote = '' if character == quote else quote
    elif character in '"\'':
      quote = character
    elif character in '([{':
      open_.append(character)
    elif open_ and _PAIRS.get(character) == open_[-1]:
      open_.pop()
    elif character == ',' and not open_:
      found.append('')
      continue
    found[-1] += character
  return [value.strip() for value in found]

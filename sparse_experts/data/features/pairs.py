"""Features of pairs: two inputs that belong together."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from sparse_experts.data.features.base import Features

if typing.TYPE_CHECKING:
  import tensorflow as tf

SIDES = ('left', 'right')


@dataclasses.dataclass(frozen=True)
class Side:
  """One of the two inputs: token ids, or an array of one shape.

  Attributes:
    feature: what the task calls it.
    shape: of an array; None: token ids, as many as there is a length for.
    dtype: of an array; ids are int32.
    pad: fills ids up.
    num_ids: that a model knows; None: any.
  """

  feature: str
  shape: tuple[int, ...] | None = None
  dtype: str = 'float32'
  pad: int = 0
  num_ids: int | None = None

  @property
  def is_text(self) -> bool:
    """Whether it is of token ids."""
    return self.shape is None


@dataclasses.dataclass(frozen=True)
class Pairs(Features):
  """Of two inputs: `left`, `right`, [B, ...], and `weight` [B].

  `weight` is float32, 1 for a pair and 0 for rows that fill a batch up. Token
  ids are int32 [B, L], cut or filled up to their length; arrays are as they
  are. With `task_ids`, `left_task_ids` and `right_task_ids` say the task of
  every token.

  Attributes:
    left, right: the two; of different features.

  Example:
    >>> features = Pairs(Side('image', (8, 8, 1)), Side('caption'))
    >>> shapes = features.shapes({'caption': 5}, batch_size=2)
    >>> {name: x.shape for name, x in shapes.items()}
    {'left': (2, 8, 8, 1), 'right': (2, 5), 'weight': (2,)}
  """

  left: Side
  right: Side

  name = 'pairs'

  def __post_init__(self):
    if self.left.feature == self.right.feature:
      raise ValueError(
        f'both inputs of a pair are {self.left.feature!r}; name two features '
        'of the task.'
      )

  def shapes(
    self,
    feature_lengths: Mapping[str, int],
    batch_size: int,
    *,
    pack: bool = False,
    task_ids: bool = False,
  ) -> dict[str, jax.ShapeDtypeStruct]:
    self._check(feature_lengths, pack)
    shapes = {}
    for name, side in self._sides.items():
      shape, dtype = side.shape, side.dtype
      if side.is_text:
        shape, dtype = (feature_lengths[side.feature],), 'int32'
      shapes[name] = (shape, dtype)
      if side.is_text and task_ids:
        shapes[f'{name}_task_ids'] = (shape, dtype)
    shapes['weight'] = ((), 'float32')
    return {
      name: jax.ShapeDtypeStruct((batch_size, *shape), np.dtype(dtype))
      for name, (shape, dtype) in shapes.items()
    }

  def rows(
    self,
    dataset: tf.data.Dataset,
    feature_lengths: Mapping[str, int],
    *,
    pack: bool = False,
    task_ids: bool = False,
  ) -> tf.data.Dataset:
    """Rows of the examples.

    Raises:
      ValueError: arrays have another shape or dtype; task ids are asked for,
        and examples have none.
    """
    import tensorflow as tf

    self._check(feature_lengths, pack)
    for side in self._sides.values():
      self._check_side(side, dataset.element_spec, task_ids)

    def fit(x, length, fill):
      x = tf.cast(x[:length], tf.int32)
      x = tf.pad(x, [[0, length - tf.size(x)]], constant_values=fill)
      return tf.ensure_shape(x, [length])

    def row(example):
      found = {}
      for name, side in self._sides.items():
        x = example[side.feature]
        if side.is_text:
          length = feature_lengths[side.feature]
          x = fit(x, length, side.pad)
          if task_ids:
            ids = example[f'{side.feature}_task_ids']
            found[f'{name}_task_ids'] = fit(ids, length, 0)
        found[name] = x
      return {**found, 'weight': tf.constant(1.0)}

    return dataset.map(row, num_parallel_calls=tf.data.AUTOTUNE)

  def of_task(self, feature_lengths: Mapping[str, int]) -> set[str]:
    del feature_lengths
    return {side.feature for side in self._sides.values()}

  def example_lengths(self) -> dict[str, int]:
    """Texts have CLIP's 76 tokens."""
    return dict.fromkeys(self._texts, 76)

  def size(self, feature_lengths: Mapping[str, int]) -> str:
    """As '8 x 8 x 1 image, 76 caption'."""
    return ', '.join(
      f'{feature_lengths[side.feature]} {side.feature}'
      if side.shape is None
      else f'{" x ".join(map(str, side.shape))} {side.feature}'
      for side in self._sides.values()
    )

  def fill(self, feature: str) -> int:
    side = self._sides.get(feature)
    return side.pad if side is not None and side.is_text else 0

  def identity(self) -> dict[str, Any]:
    pads = {
      f'{name}_pad': side.pad
      for name, side in self._sides.items()
      if side.is_text
    }
    names = {name: side.feature for name, side in self._sides.items()}
    return {**super().identity(), **names, **pads}

  @property
  def _sides(self) -> dict[str, Side]:
    return dict(zip(SIDES, (self.left, self.right)))

  @property
  def _texts(self) -> list[str]:
    """The features that are token ids."""
    return [side.feature for side in self._sides.values() if side.is_text]

  def _check(self, feature_lengths: Mapping[str, int], pack: bool) -> None:
    if set(feature_lengths) != set(self._texts):
      raise ValueError(
        f'{type(self).__name__} takes lengths of {self._texts}, its token ids, '
        f'not of {sorted(feature_lengths)}: set TASK_FEATURE_LENGTHS so.'
      )
    if pack:
      raise ValueError(
        f'{type(self).__name__} has one pair a row and packs none: set PACK = '
        'False.'
      )

  @staticmethod
  def _check_side(
    side: Side, element_spec: Mapping[str, Any], task_ids: bool
  ) -> None:
    """Raises ValueError where examples do not have what a side reads."""
    spec = element_spec.get(side.feature)
    found = spec and (tuple(spec.shape.as_list()), spec.dtype.name)
    said = 'none' if found is None else f'{found[1]} {found[0]}'
    if side.is_text:
      fits = spec is not None and spec.shape.rank == 1 and spec.dtype.is_integer
      wanted = 'token ids, whole numbers (n,)'
    else:
      fits = found == (side.shape, side.dtype)
      wanted = f'{side.dtype} {side.shape}'
    if not fits:
      raise ValueError(
        f'the model takes {side.feature!r} as {wanted}, but examples of the '
        f'task have {said}: take another task, or another tower.'
      )
    ids = f'{side.feature}_task_ids'
    if side.is_text and task_ids and ids not in element_spec:
      raise ValueError(
        f'task ids are asked for, but the examples of the task have no {ids}: '
        'add them as sparse_experts/data/tasks/docs.py does, or set TASK_IDS = '
        'False.'
      )

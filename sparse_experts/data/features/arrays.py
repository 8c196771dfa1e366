"""Features of what is no text: arrays of one shape, and their labels."""

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

LABEL = 'label'  # The feature of a task, and of a batch.


@dataclasses.dataclass(frozen=True)
class Labelled(Features):
  """Of an array and its label: `input`, `label`, `weight`, [B, ...].

  Rows come from a seqio task with two output features, such as

      {'image': seqio.ContinuousFeature(dtype=tf.float32, rank=3),
       'label': seqio.Feature(seqio.PassThroughVocabulary(10), add_eos=False,
                              dtype=tf.int32, rank=0)}

  Nothing in an example varies in length, so TASK_FEATURE_LENGTHS is {}: seqio
  then cuts nothing off, and an example of another shape is an error here.
  `weight` is float32, 1 for an example and 0 for rows that fill a batch up.

  Attributes:
    input: what the task calls the array.
    shape, dtype: of one array.
    label_shape, label_dtype: of one label: int32 () is a class, int32 (V,) has
      zeros and ones for each of V classes, float32 is a number or several.

  Example:
    >>> features = Labelled('image', (8, 8, 1))
    >>> {name: x.shape for name, x in features.shapes({}, 2).items()}
    {'input': (2, 8, 8, 1), 'label': (2,), 'weight': (2,)}
  """

  input: str
  shape: tuple[int, ...]
  dtype: str = 'float32'
  label_shape: tuple[int, ...] = ()
  label_dtype: str = 'int32'

  name = 'labelled'

  def shapes(
    self,
    feature_lengths: Mapping[str, int],
    batch_size: int,
    *,
    pack: bool = False,
    task_ids: bool = False,
  ) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a batch; there is no task of a token, whatever `task_ids`."""
    del task_ids
    self._check(feature_lengths, pack)
    return {
      'input': self._array((batch_size, *self.shape), self.dtype),
      LABEL: self._array((batch_size, *self.label_shape), self.label_dtype),
      'weight': self._array((batch_size,), 'float32'),
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
      ValueError: the examples have other features, shapes or dtypes.
    """
    import tensorflow as tf

    self._check(feature_lengths, pack)
    if task_ids:
      raise ValueError(
        f'{type(self).__name__} has no tokens that a task could be of: set '
        'TASK_IDS = False.'
      )
    specs: Any = dataset.element_spec
    wanted = {
      self.input: (self.shape, self.dtype),
      LABEL: (self.label_shape, self.label_dtype),
    }
    for name, (shape, dtype) in wanted.items():
      spec = specs.get(name)
      found = spec and (tuple(spec.shape.as_list()), spec.dtype.name)
      if found != (shape, dtype):
        said = 'none' if found is None else f'{found[1]} {found[0]}'
        raise ValueError(
          f'the model takes {name!r} as {dtype} {shape}, but examples of the '
          f'task have {said}: take another task, or give the model its shape.'
        )
    return dataset.map(
      lambda example: {
        'input': example[self.input],
        LABEL: example[LABEL],
        'weight': tf.constant(1.0),
      }
    )

  def of_task(self, feature_lengths: Mapping[str, int]) -> set[str]:
    del feature_lengths
    return {self.input, LABEL}

  def example_lengths(self) -> dict[str, int]:
    """None: every example has the same shape."""
    return {}

  def size(self, feature_lengths: Mapping[str, int]) -> str:
    """As '8 x 8 x 1 image'."""
    del feature_lengths
    return f'{" x ".join(map(str, self.shape))} {self.input}'

  def _check(self, feature_lengths: Mapping[str, int], pack: bool) -> None:
    if feature_lengths:
      raise ValueError(
        f'{type(self).__name__} takes no lengths, as every example has the '
        f'shape {self.shape}, but TASK_FEATURE_LENGTHS is '
        f'{dict(feature_lengths)}: set it to {{}}.'
      )
    if pack:
      raise ValueError(
        f'{type(self).__name__} has one example a row, of {self.size({})}, and '
        'packs none: set PACK = False.'
      )

  @staticmethod
  def _array(shape: tuple[int, ...], dtype: str) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, np.dtype(dtype))

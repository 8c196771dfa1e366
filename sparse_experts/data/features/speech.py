"""Features of speech: frames of a spectrogram, and what is said in them."""

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

_TAKES = ('frames', 'labels')


@dataclasses.dataclass(frozen=True)
class Speech(Features):
  """Of frames and labels that are not aligned; lengths of both vary.

      frames         float32 [B, frames, bands]   zeros after the last
      frame_lengths  int32 [B]
      labels         int32 [B, labels]            0 after the last
      label_lengths  int32 [B]
      weight         float32 [B]                  0 for rows that fill a batch

  Rows come from a seqio task with two output features, such as

      {'frames': seqio.ContinuousFeature(dtype=tf.float32, rank=2),
       'labels': seqio.Feature(seqio.PassThroughVocabulary(10), add_eos=False,
                               dtype=tf.int32)}

  Without its last frames an example would not be what its labels say, so
  nothing is cut off: one that is longer than TASK_FEATURE_LENGTHS is an error.

  Attributes:
    bands: values of a frame, such as of a log-mel filter bank.

  Example:
    >>> shapes = Speech(80).shapes({'frames': 100, 'labels': 12}, 2)
    >>> {name: x.shape for name, x in shapes.items()}
    ... # doctest: +NORMALIZE_WHITESPACE
    {'frames': (2, 100, 80), 'frame_lengths': (2,), 'labels': (2, 12),
     'label_lengths': (2,), 'weight': (2,)}
  """

  bands: int

  name = 'speech'

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

    def array(dtype, *shape):
      return jax.ShapeDtypeStruct((batch_size, *shape), np.dtype(dtype))

    return {
      'frames': array('float32', feature_lengths['frames'], self.bands),
      'frame_lengths': array('int32'),
      'labels': array('int32', feature_lengths['labels']),
      'label_lengths': array('int32'),
      'weight': array('float32'),
    }

  def rows(
    self,
    dataset: tf.data.Dataset,
    feature_lengths: Mapping[str, int],
    *,
    pack: bool = False,
    task_ids: bool = False,
  ) -> tf.data.Dataset:
    """Rows of the examples; lengths are theirs, even where rows are shorter.

    Raises:
      ValueError: the examples have other features, shapes or dtypes.
    """
    import tensorflow as tf

    self._check(feature_lengths, pack)
    if task_ids:
      raise ValueError(
        'Speech has no tokens that a task could be of: set TASK_IDS = False.'
      )
    specs: Any = dataset.element_spec
    wanted = {
      'frames': ((None, self.bands), 'float32'),
      'labels': ((None,), 'int32'),
    }
    for name, (shape, dtype) in wanted.items():
      spec = specs[name]
      if spec.shape.rank != len(shape) or (
        (tuple(spec.shape.as_list()[1:]), spec.dtype.name) != (shape[1:], dtype)
      ):
        raise ValueError(
          f'the model takes {name!r} as {dtype} {shape}, but examples of the '
          f'task have {spec.dtype.name} {spec.shape}: take another task, or '
          'give the model its bands.'
        )

    def row(example):
      padded = {}
      for name, length in feature_lengths.items():
        x = example[name][:length]
        missing = [[0, length - tf.shape(x)[0]]] + [[0, 0]] * (x.shape.rank - 1)
        padded[name] = tf.ensure_shape(
          tf.pad(x, missing), [length, *x.shape[1:]]
        )
      return {
        'frames': padded['frames'],
        'frame_lengths': tf.shape(example['frames'])[0],
        'labels': padded['labels'],
        'label_lengths': tf.shape(example['labels'])[0],
        'weight': tf.constant(1.0),
      }

    return dataset.map(row)

  def of_task(self, feature_lengths: Mapping[str, int]) -> set[str]:
    del feature_lengths
    return set(_TAKES)

  def cut_to(self, feature_lengths: Mapping[str, int]) -> dict[str, int]:
    """Nothing is cut off."""
    del feature_lengths
    return {}

  def check_rows(self, rows: Mapping[str, np.ndarray]) -> None:
    """Raises ValueError where an example is longer than rows are."""
    for name, lengths in (
      ('frames', rows['frame_lengths']),
      ('labels', rows['label_lengths']),
    ):
      room = rows[name].shape[1]
      if len(lengths) and lengths.max() > room:
        raise ValueError(
          f'an example has {lengths.max()} {name}, and TASK_FEATURE_LENGTHS '
          f'has room for {room}: raise it, or let the task leave out what is '
          'longer; nothing is cut off.'
        )

  def example_lengths(self) -> dict[str, int]:
    """Ten seconds of a hundred frames each, and letters said in them."""
    return {'frames': 1000, 'labels': 150}

  def _check(self, feature_lengths: Mapping[str, int], pack: bool) -> None:
    if set(feature_lengths) != set(_TAKES):
      raise ValueError(
        f'Speech takes lengths of {" and ".join(_TAKES)}, but '
        f'TASK_FEATURE_LENGTHS is {dict(feature_lengths)}.'
      )
    if pack:
      raise ValueError(
        'Speech has one example a row, and packs none: set PACK = False.'
      )

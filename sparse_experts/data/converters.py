"""From examples of a task to rows of model features: seqio's converters."""

from __future__ import annotations

import typing
from collections.abc import Mapping

if typing.TYPE_CHECKING:
  import seqio
  import tensorflow as tf

# More than any vocabulary has, and small enough for 2,047 tasks in an int32.
STRIDE = 1 << 20


def make(
  converter: str, pack: bool, task_ids: bool = False
) -> seqio.FeatureConverter | WithTaskIds:
  """The converter of a model, see `batches.shapes`.

  Args:
    converter: 'encoder_decoder' or 'decoder'.
    pack: several examples share a row.
    task_ids: rows say the task of every token.
  """
  import seqio

  made = {
    'encoder_decoder': seqio.EncDecFeatureConverter,
    'decoder': seqio.DecoderFeatureConverter,
  }[converter](pack=pack)
  return WithTaskIds(made) if task_ids else made


class WithTaskIds:
  """A converter that also gives `encoder_task_ids` and `decoder_task_ids`.

  A decoder's are those of its targets. Converters only move tokens and pad them
  with zeros, so a token is sent through as

      token + STRIDE * task id

  and comes out in its place, however rows are packed.
  """

  def __init__(self, converter: seqio.FeatureConverter):
    self._converter = converter

  def __getattr__(self, name: str):
    return getattr(self._converter, name)

  def __call__(
    self, dataset: tf.data.Dataset, task_feature_lengths: Mapping[str, int]
  ) -> tf.data.Dataset:
    """Rows of the examples, which have '<feature>_task_ids' for each feature.

    Raises:
      ValueError: they have none.
    """
    lengths = task_feature_lengths  # The name by which seqio may call it.
    missing = {f'{f}_task_ids' for f in lengths} - set(dataset.element_spec)
    if missing:
      raise ValueError(
        f'task ids are asked for, but the examples of the task have no '
        f'{", ".join(sorted(missing))}: add them as sparse_experts/data/tasks/'
        'docs.py does, or set TASK_IDS = False.'
      )

    def join(example):
      return {
        f: example[f] + STRIDE * example[f'{f}_task_ids'] for f in lengths
      }

    def split(row):
      ids = {
        f'{stack}_task_ids': row[tokens] // STRIDE
        for stack, tokens in (
          ('encoder', 'encoder_input_tokens'),
          ('decoder', 'decoder_target_tokens'),
        )
        if tokens in row
      }
      tokens = {
        name: x % STRIDE if name.endswith('_tokens') else x
        for name, x in row.items()
      }
      return tokens | ids

    return self._converter(dataset.map(join), lengths).map(split)

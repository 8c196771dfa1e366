"""From examples of a task to rows of model features: seqio's converters."""

from __future__ import annotations

import typing
from collections.abc import Mapping

from sparse_experts.data.special_tokens import T5, SpecialTokens

if typing.TYPE_CHECKING:
  import seqio
  import tensorflow as tf

# More than any vocabulary has, and small enough for 2,047 tasks in an int32.
STRIDE = 1 << 20


def make(
  converter: str,
  pack: bool,
  task_ids: bool = False,
  special_tokens: SpecialTokens = T5,
) -> seqio.FeatureConverter | WithTaskIds | WithSpecialTokens:
  """The converter of a model, see `batches.shapes`.

  Args:
    converter: 'encoder_decoder' or 'decoder'.
    pack: several examples share a row.
    task_ids: rows say the task of every token.
    special_tokens: the model's.

  Raises:
    ValueError: the model has no start token.
  """
  import seqio

  made = {
    'encoder_decoder': seqio.EncDecFeatureConverter,
    'decoder': seqio.DecoderFeatureConverter,
  }[converter](pack=pack)
  for ours in (WithTaskIds, WithSpecialTokens):
    seqio.FeatureConverter.register(ours)  # `seqio.get_dataset` asks.
  made = WithTaskIds(made) if task_ids else made
  if (special_tokens.pad, special_tokens.first()) == (0, 0):  # seqio's.
    return made
  return WithSpecialTokens(made, special_tokens)


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


class WithSpecialTokens:
  """A converter whose rows have the padding and the start token of a model.

  seqio's fill rows up with 0 and begin decoders with 0, whatever 0 means. A
  token is sent through as token + 1, so that each 0 that comes out is theirs.
  """

  def __init__(
    self,
    converter: seqio.FeatureConverter | WithTaskIds,
    special_tokens: SpecialTokens,
  ):
    self._converter = converter
    self._pad, self._start = special_tokens.pad, special_tokens.first()

  def __getattr__(self, name: str):
    return getattr(self._converter, name)

  def __call__(
    self, dataset: tf.data.Dataset, task_feature_lengths: Mapping[str, int]
  ) -> tf.data.Dataset:
    """Rows of the examples."""
    import tensorflow as tf

    def send(example):
      tokens = {f: example[f] + 1 for f in task_feature_lengths}
      return {**example, **tokens}

    def receive(row):
      targets = row['decoder_target_tokens']
      start = tf.where(targets == 0, self._pad, self._start)
      theirs = {'decoder_input_tokens': start}
      tokens = {
        name: tf.where(x == 0, theirs.get(name, self._pad), x - 1)
        for name, x in row.items()
        if name.endswith('_tokens')
      }
      return {**row, **tokens}

    return self._converter(dataset.map(send), task_feature_lengths).map(receive)

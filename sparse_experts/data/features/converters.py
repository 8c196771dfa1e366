"""From examples of a task to rows of tokens, as seqio and T5X call it."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from typing import ClassVar

import seqio
import tensorflow as tf

from sparse_experts.data.features import packing
from sparse_experts.data.features.packing import Columns

if typing.TYPE_CHECKING:
  from sparse_experts.data.features.text import Text, TextToText

_TOKENS = seqio.FeatureConverter.FeatureSpec(dtype=tf.int32)


def make(
  features: Text | TextToText,
  *,
  pack: bool,
  task_ids: bool = False,
  task_id: int | None = None,
) -> seqio.FeatureConverter:
  """The converter of text: seqio's own where it is right.

  Positions in data that were saved under seqio's own go on with them.

  Args:
    features: of the rows; they have the special tokens.
    pack: several examples may share a row.
    task_ids: rows say the task of every token. Examples do, in
      '<feature>_task_ids' for each feature, unless `task_id` does.
    task_id: of all tokens, where it is one.

  Raises:
    ValueError: the model has no start token.
  """
  special_tokens = features.special_tokens
  if task_ids or (special_tokens.pad, special_tokens.first()) != (0, 0):
    return Converter(features, pack, task_ids, task_id)
  if features.name == 'encoder_decoder':
    return seqio.EncDecFeatureConverter(pack=pack)
  return seqio.DecoderFeatureConverter(pack=pack)


class Converter(seqio.FeatureConverter):
  """Rows of tokens with any special tokens, and the task of each; see `make`.

  seqio's own take a 0 for no token wherever they look, fill rows up with 0 and
  begin decoders with 0. Here what is said of a token travels beside it, through
  trimming, packing and padding, and `segment_ids` say where a token is; the
  model's padding and start are put in afterwards.
  """

  # They are among `MODEL_FEATURES`.
  PACKING_FEATURE_DTYPES: ClassVar[Mapping[str, tf.DType]] = {}

  def __init__(
    self,
    features: Text | TextToText,
    pack: bool,
    task_ids: bool,
    task_id: int | None,
  ):
    self._features, self._pad = features, features.special_tokens.pad
    self._task_ids, self._task_id = task_ids, task_id
    super().__init__(pack=pack, bos_id=features.special_tokens.first())

  @property
  def TASK_FEATURES(self) -> Mapping[str, seqio.FeatureConverter.FeatureSpec]:
    """All that examples may have; the lengths say what they do."""
    return dict.fromkeys(sorted(set().union(*self._features.takes)), _TOKENS)

  @property
  def MODEL_FEATURES(self) -> Mapping[str, seqio.FeatureConverter.FeatureSpec]:
    """All that rows may have."""
    lengths = dict.fromkeys(self.TASK_FEATURES, 1)
    return dict.fromkeys(self.get_model_feature_lengths(lengths), _TOKENS)

  def get_model_feature_lengths(
    self, task_feature_lengths: Mapping[str, int]
  ) -> dict[str, int]:
    """Length of each feature of a row."""
    shapes = self._features.shapes(
      task_feature_lengths, 1, pack=self.pack, task_ids=self._task_ids
    )
    return {name: struct.shape[1] for name, struct in shapes.items()}

  def __call__(
    self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, int]
  ) -> tf.data.Dataset:
    """Rows of the examples; seqio names the arguments.

    Raises:
      ValueError: lengths are of other features; task ids are asked for, and
        examples have none.
    """
    lengths = dict(task_feature_lengths)
    self._features.check(lengths)
    self._check_task_ids(ds, lengths)
    ds = self._validate_dataset(
      ds,
      expected_features=dict.fromkeys(lengths, _TOKENS),
      expected_lengths=lengths,
      strict=False,
      error_label='input_validation',
    )
    return self._convert_features(ds, lengths)

  def _check_task_ids(
    self, ds: tf.data.Dataset, lengths: Mapping[str, int]
  ) -> None:
    if not self._task_ids or self._task_id is not None:
      return
    missing = {f'{f}_task_ids' for f in lengths} - set(ds.element_spec)
    if missing:
      raise ValueError(
        'task ids are asked for, but the examples of the task have no '
        f'{", ".join(sorted(missing))}: add them as sparse_experts/data/tasks/'
        "docs.py does, or set TASK_IDS = 'mixture', where the tasks of a "
        'mixture are numbered, or TASK_IDS = False.'
      )

  def _convert_features(
    self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, int]
  ) -> tf.data.Dataset:
    names = list(self.get_model_feature_lengths(task_feature_lengths))
    lengths = dict(task_feature_lengths)
    is_alone = self._features.name == 'decoder'
    if is_alone:  # It reads its question and answer as one sequence.
      lengths = {'targets': sum(lengths.values())}

    def send(example: Columns) -> dict[str, Columns]:
      sent = {
        feature: self._columns(example, feature)
        for feature in sorted(task_feature_lengths)  # Inputs are first.
      }
      if not is_alone:
        return sent
      joined = {
        column: tf.concat([columns[column] for columns in sent.values()], 0)
        for column in sent['targets']
      }
      return {'targets': joined}

    def receive(packed: dict[str, Columns]) -> Columns:
      sides = {'decoder': self._targets(packed['targets'])}
      if not is_alone:
        sides['encoder'] = self._inputs(packed['inputs'])
      row = {
        f'{side}_{feature}': x
        for side, columns in sides.items()
        for feature, x in columns.items()
      }
      return {name: row[name] for name in names}

    ds = ds.map(send, num_parallel_calls=tf.data.AUTOTUNE)
    ds = packing.rows(ds, lengths, self.pack)
    return ds.map(receive, num_parallel_calls=tf.data.AUTOTUNE)

  def _columns(self, example: Columns, feature: str) -> Columns:
    """The tokens of a feature, and what is said of each."""
    tokens = example[feature]
    is_asked = tf.fill(tf.shape(tokens), int(feature == 'inputs'))
    columns = {'tokens': tokens, 'is_asked': is_asked}
    if self._task_id is not None:
      columns['task_ids'] = tf.fill(tf.shape(tokens), self._task_id)
    elif self._task_ids:
      columns['task_ids'] = example[f'{feature}_task_ids']
    return columns

  def _inputs(self, columns: Columns) -> Columns:
    """Of an encoder."""
    is_token = columns['segment_ids'] > 0
    tokens = tf.where(is_token, columns['tokens'], self._pad)
    return {**columns, 'input_tokens': tokens}

  def _targets(self, columns: Columns) -> Columns:
    """Of a decoder, which reads each token when it has written it."""
    is_token = columns['segment_ids'] > 0
    is_first = columns['positions'] == 0
    is_asked = columns['is_asked']
    tokens = tf.where(is_token, columns['tokens'], self._pad)
    read = tf.where(is_first & is_token, self.bos_id, tf.roll(tokens, 1, 0))
    # What is read after the last token of the question writes the answer.
    causal = tf.where(is_first, 1, tf.roll(is_asked, 1, 0))
    if self.pack:  # Else the last token is read, too.
      read = tf.where(is_token, read, self._pad)
      causal = tf.where(is_token, causal, 0)
    return {
      **columns,
      'target_tokens': tokens,
      'input_tokens': read,
      'loss_weights': tf.cast(is_token, tf.int32) * (1 - is_asked),
      'causal_attention': causal,
    }

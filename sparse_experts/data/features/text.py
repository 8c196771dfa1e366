"""Features of language: token ids in, token ids out."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import numpy as np

from sparse_experts.data.features.base import Features, TokenIds
from sparse_experts.data.special_tokens import T5, SpecialTokens

if typing.TYPE_CHECKING:
  import seqio
  import tensorflow as tf

# The features of seqio's converters; packing adds the last two of each side.
_DECODER = ('target_tokens', 'input_tokens', 'loss_weights')
_PACKED = ('segment_ids', 'positions')


@dataclasses.dataclass(frozen=True)
class _TokenFeatures(Features):
  """Of token ids, int32 [B, L], by the names of seqio's converters."""

  special_tokens: SpecialTokens = T5

  takes: ClassVar[tuple[frozenset[str], ...]]
  token_ids: ClassVar = {
    stack: TokenIds(f'{stack}_input_tokens', f'{stack}_task_ids', feature)
    for stack, feature in (('encoder', 'inputs'), ('decoder', 'targets'))
  }

  def rows(
    self,
    dataset: tf.data.Dataset,
    feature_lengths: Mapping[str, int],
    *,
    pack: bool = False,
    task_ids: bool = False,
  ) -> tf.data.Dataset:
    self.check(feature_lengths)
    convert = self.seqio_converter(pack=pack, task_ids=task_ids)
    return convert(dataset, dict(feature_lengths))

  def seqio_converter(
    self,
    *,
    pack: bool = False,
    task_ids: bool = False,
    task_id: int | None = None,
  ) -> seqio.FeatureConverter:
    """A feature converter as seqio and T5X call one; see `converters.make`."""
    from sparse_experts.data.features import converters

    return converters.make(self, pack=pack, task_ids=task_ids, task_id=task_id)

  def fill(self, feature: str) -> int:
    return self.special_tokens.pad if feature.endswith('_tokens') else 0

  def identity(self) -> dict[str, Any]:
    return {
      **super().identity(),
      'pad': self.special_tokens.pad,
      'start': self.special_tokens.first(),
    }

  def check(self, feature_lengths: Mapping[str, int]) -> None:
    """Raises ValueError where lengths of other features are given."""
    if set(feature_lengths) not in self.takes:
      allowed = ' or '.join(str(sorted(features)) for features in self.takes)
      raise ValueError(
        f'{type(self).__name__} takes lengths of {allowed}, not of '
        f'{sorted(feature_lengths)}: set TASK_FEATURE_LENGTHS so, or take a '
        'task that was made for such models.'
      )

  def prompt(self, tokens: np.ndarray, length: int) -> dict[str, np.ndarray]:
    """One question of at most `length` tokens, padded to it, int32 [length]."""
    raise NotImplementedError

  def question(self, row: Mapping[str, np.ndarray]) -> np.ndarray:
    """The tokens of a row that are asked; without padding."""
    raise NotImplementedError

  def answer(self, row: Mapping[str, np.ndarray]) -> np.ndarray:
    """The tokens of a row that are its targets; empty where none are."""
    return row['decoder_target_tokens'][row['decoder_loss_weights'] > 0]

  def _padded(self, tokens: np.ndarray, length: int) -> np.ndarray:
    fill = (0, length - len(tokens))
    return np.pad(tokens, fill, constant_values=self.special_tokens.pad)


class TextToText(_TokenFeatures):
  """Of an encoder-decoder: `inputs` to read and `targets` to write.

  >>> list(TextToText().shapes({'inputs': 8, 'targets': 4}, 2))
  ... # doctest: +NORMALIZE_WHITESPACE
  ['encoder_input_tokens', 'decoder_target_tokens', 'decoder_input_tokens',
   'decoder_loss_weights']
  """

  name = 'encoder_decoder'
  takes = (frozenset({'inputs', 'targets'}),)

  def shapes(
    self,
    feature_lengths: Mapping[str, int],
    batch_size: int,
    *,
    pack: bool = False,
    task_ids: bool = False,
  ) -> dict[str, jax.ShapeDtypeStruct]:
    self.check(feature_lengths)
    more = _PACKED * pack + ('task_ids',) * task_ids
    sides = {
      'encoder': (('input_tokens', *more), feature_lengths['inputs']),
      'decoder': ((*_DECODER, *more), feature_lengths['targets']),
    }
    return {
      f'{side}_{feature}': _int32(batch_size, length)
      for side, (features, length) in sides.items()
      for feature in features
    }

  def example_lengths(self) -> dict[str, int]:
    """T5's."""
    return {'inputs': 512, 'targets': 114}

  def check_rows(self, rows: Mapping[str, np.ndarray]) -> None:
    """Raises ValueError where inputs would meet targets of another example.

    seqio numbers the inputs and the targets of a packed row apart. It packs
    rows of T5's special tokens without task ids, see `converters.make`.
    """
    is_seqios = self.special_tokens == T5 and 'encoder_task_ids' not in rows
    if not (is_seqios and 'encoder_segment_ids' in rows):
      return
    inputs_B, targets_B = (
      rows[f'{side}_segment_ids'].max(1) for side in ('encoder', 'decoder')
    )
    if (inputs_B != targets_B).any():
      raise ValueError(
        'an example has no inputs, or no targets, and seqio numbers those of a '
        'packed row apart: later examples would meet the inputs of others. Set '
        "PACK = False, or TASK_IDS = 'mixture', whose rows are numbered once."
      )

  def prompt(self, tokens: np.ndarray, length: int) -> dict[str, np.ndarray]:
    """An encoder's inputs.

    >>> TextToText().prompt(np.array([7, 8]), 3)['encoder_input_tokens']
    array([7, 8, 0], dtype=int32)
    """
    padded = self._padded(tokens.astype(np.int32), length)
    return {'encoder_input_tokens': padded}

  def question(self, row: Mapping[str, np.ndarray]) -> np.ndarray:
    inputs = np.asarray(row['encoder_input_tokens'], int)
    return inputs[self.special_tokens.is_token(inputs)]


class Text(_TokenFeatures):
  """Of a decoder alone: `targets` to write, maybe after `inputs`.

  >>> list(Text().shapes({'targets': 8}, 2))
  ['decoder_target_tokens', 'decoder_input_tokens', 'decoder_loss_weights']
  """

  name = 'decoder'
  takes = (frozenset({'targets'}), frozenset({'inputs', 'targets'}))

  def shapes(
    self,
    feature_lengths: Mapping[str, int],
    batch_size: int,
    *,
    pack: bool = False,
    task_ids: bool = False,
  ) -> dict[str, jax.ShapeDtypeStruct]:
    self.check(feature_lengths)
    features = (*_DECODER, *_PACKED * pack, *('task_ids',) * task_ids)
    features += ('causal_attention',) * ('inputs' in feature_lengths)
    length = sum(feature_lengths.values())
    return {f'decoder_{f}': _int32(batch_size, length) for f in features}

  def example_lengths(self) -> dict[str, int]:
    """As many tokens as of T5's."""
    return {'targets': sum(TextToText().example_lengths().values())}

  def prompt(self, tokens: np.ndarray, length: int) -> dict[str, np.ndarray]:
    """A prompt, after room for a start token.

    Raises:
      ValueError: there is nothing to begin with.

    >>> Text().prompt(np.array([7, 8]), 3)['decoder_input_tokens']
    array([0, 7, 8, 0], dtype=int32)
    """
    tokens, length = tokens.astype(np.int32), length + 1
    if self.special_tokens.start is not None:
      tokens = np.append(np.int32(self.special_tokens.start), tokens)
    if not len(tokens):
      raise ValueError(
        'a prompt is empty, and the model has no start token to begin with: '
        'give each at least one token.'
      )
    is_prompt = np.arange(length) < len(tokens)
    return {
      'decoder_input_tokens': self._padded(tokens, length),
      'decoder_causal_attention': is_prompt.astype(np.int32),
    }

  def question(self, row: Mapping[str, np.ndarray]) -> np.ndarray:
    if 'decoder_causal_attention' not in row:
      return np.zeros(0, int)
    asked = row['decoder_target_tokens'][row['decoder_loss_weights'] <= 0]
    return asked[self.special_tokens.is_token(asked)]


def _int32(batch_size: int, length: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct((batch_size, length), np.int32)

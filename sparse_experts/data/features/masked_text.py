"""Features of text that is read: tokens, those that are masked, and labels."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np

from sparse_experts.data.features.base import Features, TokenIds
from sparse_experts.data.special_tokens import T5, SpecialTokens

if typing.TYPE_CHECKING:
  import tensorflow as tf

TOKENS = 'tokens'
MASKS = {'targets': 'int32', 'weights': 'float32'}


class Label(NamedTuple):
  """Labels of a row, or of each of its tokens.

  Attributes:
    shape, dtype: of one label.
    of_tokens: each token has one.
  """

  shape: tuple[int, ...] = ()
  dtype: str = 'int32'
  of_tokens: bool = False


@dataclasses.dataclass(frozen=True)
class MaskedText(Features):
  """Of an encoder that reads text, one example a row.

      tokens    int32 [B, L]    what is read, masks in place of some tokens
      targets   int32 [B, L]    what was there
      weights   float32 [B, L]  1 where a token is to be predicted, else 0
      <label>   [B, ...]        or [B, L, ...], of each token
      task_ids  int32 [B, L]    where they are asked for

  Rows come from a seqio task with these output features, so it is the task that
  masks, see `masking.mask_tokens`; they are padded here. Whatever is
  longer than L is cut, as seqio cuts.

  Attributes:
    labels: by name; the task calls them so, too.
    has_masks: there are 'targets' and 'weights'.
    special_tokens: which id pads.

  Example:
    >>> features = MaskedText({'next_sentence': Label()})
    >>> {k: x.shape for k, x in features.shapes({'tokens': 8}, 2).items()}
    ... # doctest: +NORMALIZE_WHITESPACE
    {'tokens': (2, 8), 'targets': (2, 8), 'weights': (2, 8),
     'next_sentence': (2,)}
  """

  labels: Mapping[str, Label] = dataclasses.field(default_factory=dict)
  has_masks: bool = True
  special_tokens: SpecialTokens = T5

  name = 'masked_text'
  token_ids: ClassVar = {'encoder': TokenIds(TOKENS, 'task_ids', TOKENS)}

  def shapes(
    self,
    feature_lengths: Mapping[str, int],
    batch_size: int,
    *,
    pack: bool = False,
    task_ids: bool = False,
  ) -> dict[str, jax.ShapeDtypeStruct]:
    self._check(feature_lengths, pack)
    of_examples = self._of_examples(feature_lengths)
    if task_ids:
      of_examples['task_ids'] = (feature_lengths[TOKENS],), 'int32'
    return {
      name: jax.ShapeDtypeStruct((batch_size, *shape), np.dtype(dtype))
      for name, (shape, dtype) in of_examples.items()
    }

  def rows(
    self,
    dataset: tf.data.Dataset,
    feature_lengths: Mapping[str, int],
    *,
    pack: bool = False,
    task_ids: bool = False,
  ) -> tf.data.Dataset:
    """Rows of the examples, which for task ids have 'tokens_task_ids'.

    Raises:
      ValueError: the examples have other features, ranks or dtypes.
    """
    import tensorflow as tf

    self._check(feature_lengths, pack)
    wanted = {
      name: (name, shape, dtype)
      for name, (shape, dtype) in self._of_examples(feature_lengths).items()
    }
    if task_ids:
      ids = f'{TOKENS}_task_ids'
      wanted['task_ids'] = (ids, (feature_lengths[TOKENS],), 'int32')
    specs: Any = dataset.element_spec
    for name, shape, dtype in wanted.values():
      spec = specs.get(name)
      found = spec and (spec.shape.rank, spec.dtype.name)
      if found != (len(shape), dtype):
        said = 'none' if found is None else f'{found[1]} of rank {found[0]}'
        raise ValueError(
          f'the model takes {name!r} as {dtype} of rank {len(shape)}, but '
          f'examples of the task have {said}: take another task, or give the '
          'model other heads, or set TASK_IDS = False.'
        )

    def row(example):
      return {
        feature: self._padded(tf, feature, example[name], shape)
        for feature, (name, shape, _) in wanted.items()
      }

    return dataset.map(row)

  def of_task(self, feature_lengths: Mapping[str, int]) -> set[str]:
    return {*feature_lengths, *(MASKS if self.has_masks else ()), *self.labels}

  def example_lengths(self) -> dict[str, int]:
    """BERT's."""
    return {TOKENS: 512}

  def fill(self, feature: str) -> int:
    return self.special_tokens.pad if feature in (TOKENS, 'targets') else 0

  def identity(self) -> dict[str, Any]:
    return {**super().identity(), 'pad': self.special_tokens.pad}

  def _of_examples(
    self, feature_lengths: Mapping[str, int]
  ) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of each feature in a row."""
    length = (feature_lengths[TOKENS],)
    masks = MASKS if self.has_masks else {}
    tokens = {TOKENS: 'int32', **masks}
    return {
      **{name: (length, dtype) for name, dtype in tokens.items()},
      **{
        name: (length * label.of_tokens + label.shape, label.dtype)
        for name, label in self.labels.items()
      },
    }

  def _padded(self, tf, feature: str, x: tf.Tensor, shape: tuple[int, ...]):
    """The value of a feature, as long as its row."""
    label = self.labels.get(feature)
    if label is None or label.of_tokens:
      x = x[: shape[0]]
      missing = [[0, shape[0] - tf.shape(x)[0]], *[[0, 0]] * (len(shape) - 1)]
      fill = tf.cast(self.fill(feature), x.dtype)
      x = tf.pad(x, missing, constant_values=fill)
    return tf.ensure_shape(x, shape)

  def _check(self, feature_lengths: Mapping[str, int], pack: bool) -> None:
    if set(feature_lengths) != {TOKENS}:
      raise ValueError(
        f'{type(self).__name__} takes a length of {TOKENS!r} alone, but '
        f'TASK_FEATURE_LENGTHS is {dict(feature_lengths)}.'
      )
    if pack:
      raise ValueError(
        f'{type(self).__name__} has one example a row, since heads judge rows, '
        'and packs none: set PACK = False.'
      )

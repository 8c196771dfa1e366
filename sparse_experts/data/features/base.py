"""Features: what the rows of a batch look like, and where they come from."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np

if typing.TYPE_CHECKING:
  import tensorflow as tf


class TokenIds(NamedTuple):
  """What the token ids are called that a stack reads.

  Attributes:
    tokens, task_ids: in a batch, where they are in it.
    feature: of the task, whose vocabulary they are of.
  """

  tokens: str
  task_ids: str
  feature: str


@dataclasses.dataclass(frozen=True)
class Features:
  """The features of a batch, without reading data, and of rows of a task.

  An objective names the features that it takes; whoever needs to know what a
  batch is asks them: the data, the ledger, `precompile`, `plan`, `init`.

  Attributes:
    name: what saved positions in data call it.
    token_ids: by stack; none where tokens have no ids.
  """

  name: ClassVar[str]
  token_ids: ClassVar[Mapping[str, TokenIds]] = {}

  def shapes(
    self,
    feature_lengths: Mapping[str, int],
    batch_size: int,
    *,
    pack: bool = False,
    task_ids: bool = False,
  ) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a batch, by the names its objective reads.

    Args:
      feature_lengths: length of each feature of the task.
      batch_size: rows; the first axis of every feature is `batch`.
      pack: several examples may share a row.
      task_ids: rows say the task of every token.

    Raises:
      ValueError: these features do not take such lengths, or `pack`.
    """
    raise NotImplementedError

  def rows(
    self,
    dataset: tf.data.Dataset,
    feature_lengths: Mapping[str, int],
    *,
    pack: bool = False,
    task_ids: bool = False,
  ) -> tf.data.Dataset:
    """Rows of a batch from a seqio task; arguments as of `shapes`."""
    raise NotImplementedError

  def cut_to(self, feature_lengths: Mapping[str, int]) -> Mapping[str, int]:
    """Lengths that features of an example are cut to, by default all."""
    return feature_lengths

  def check_rows(self, rows: Mapping[str, np.ndarray]) -> None:
    """Raises ValueError where rows of a batch are none of these features."""

  def of_task(self, feature_lengths: Mapping[str, int]) -> set[str]:
    """The features of the task: by default those that have lengths."""
    return set(feature_lengths)

  def example_lengths(self) -> dict[str, int]:
    """Feature lengths that counts of a model are given for by default."""
    raise NotImplementedError

  def size(self, feature_lengths: Mapping[str, int]) -> str:
    """That of an example, for people: '512 inputs, 114 targets'."""
    return ', '.join(f'{n} {name}' for name, n in feature_lengths.items())

  def fill(self, feature: str) -> int:
    """What fills a row of `feature` that no example is in; 0 weighs nothing."""
    del feature
    return 0

  def identity(self) -> dict[str, Any]:
    """What rows are a function of, beside the examples; goes into JSON."""
    return {'converter': self.name}

"""The rows that the examples of a task make."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from sparse_experts.data import examples, host_tensorflow, tasks
from sparse_experts.data.features.base import Features

if typing.TYPE_CHECKING:
  import tensorflow as tf


@dataclasses.dataclass(frozen=True)
class Rows:
  """Of a split; attributes are those of `dataset.Dataset`.

  Raises:
    ValueError: `task_ids` is none of `examples.TASK_IDS`.
  """

  task_name: str
  split: str
  feature_lengths: Mapping[str, int]
  features: Features
  pack: bool
  task_ids: bool | str
  modules: Sequence[str] = ()

  def __post_init__(self):
    examples.check_task_ids(self.task_ids)

  def identity(self) -> dict[str, Any]:
    """What rows are a function of; goes into JSON."""
    found = {
      'task': self.task_name,
      'split': self.split,
      'feature_lengths': dict(self.feature_lengths),
      'pack': self.pack,
      'task_ids': self.task_ids,
      **self.features.identity(),
      'corpus': examples.digests(self.task_name, self.modules),
    }
    if self.task_ids == 'mixture':
      names = examples.task_names(self.task_name, self.task_ids, self.modules)
      found['task_names'] = list(names)
    return found

  def read(
    self,
    *,
    shuffle: bool,
    seed: int,
    shard: tuple[int, int] = (0, 1),
    num_epochs: int | None = 1,
  ) -> tf.data.Dataset:
    """The rows, one by one; arguments and errors as of `examples.read`."""
    tf = host_tensorflow.load()
    found = examples.read(
      tasks.find(self.task_name, self.modules),
      self.split,
      self.features.cut_to(self.feature_lengths),
      features=self.features.of_task(self.feature_lengths),
      task_ids=self.task_ids,
      shuffle=shuffle,
      seed=seed,
      shard=shard,
      num_epochs=num_epochs,
    )
    rows = self.features.rows(
      found,
      self.feature_lengths,
      pack=self.pack,
      task_ids=bool(self.task_ids),
    )
    options = tf.data.Options()
    options.deterministic = True
    return rows.with_options(options)

  def check_savable(self, rows: tf.data.Dataset) -> None:
    """Raises ValueError where a position in these rows cannot be saved."""
    examples.check_savable(
      rows,
      tasks.find(self.task_name, self.modules),
      self.split,
      self.feature_lengths,
    )

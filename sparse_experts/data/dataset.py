"""What a run reads: a task, a split, lengths and a batch size."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from sparse_experts.data import examples, streams, token_text
from sparse_experts.data.features.base import Features
from sparse_experts.data.special_tokens import T5, SpecialTokens
from sparse_experts.numbers import Count, Seed


@dataclasses.dataclass(frozen=True)
class Dataset:
  """A split of a task or mixture in global batches.

  Attributes:
    mixture_or_task_name: as registered with seqio.
    feature_lengths: tokens by feature, e.g. {'inputs': 256, 'targets': 58}; of
      features that vary in length, so {} for images.
    batch_size: global number of rows.
    split: of the task.
    pack: several examples share a row.
    task_ids: rows say the task of every token, for routers that need it. True:
      what the task knows, as docs_... do (the domain of the document).
      'mixture': the number of a mixture's task among them all, sorted by name.
    shuffle: in training.
    seed: of order and noise, in training.
    num_shards: streams that a global batch is made of in training; see
      `streams`. Embedded tasks take 1; on pods, a multiple of the hosts.
    num_batches: of an evaluation, at most; None takes the split.
    modules: modules to import that register further tasks.
  """

  mixture_or_task_name: str
  feature_lengths: Mapping[str, Count]
  batch_size: Count
  split: str = 'train'
  pack: bool = True
  task_ids: bool | str = False
  shuffle: bool = True
  seed: Seed = 0
  num_shards: Count = 1
  num_batches: Count | None = None
  modules: Sequence[str] = ()

  def __post_init__(self):
    examples.check_task_ids(self.task_ids)
    if isinstance(self.modules, str):
      raise ValueError(
        f'modules are several, but {self.modules!r} is one text: write '
        f'TASK_MODULES = ({self.modules!r},).'
      )

  def shapes(self, features: Features) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of its batches; reads nothing."""
    return features.shapes(
      self.feature_lengths,
      self.batch_size,
      pack=self.pack,
      task_ids=bool(self.task_ids),
    )

  def training(self, features: Features, rows: slice) -> streams.Batches:
    """The endless stream of these rows of each global batch."""
    return streams.Batches(
      self.mixture_or_task_name,
      self.split,
      self.feature_lengths,
      self.batch_size,
      features,
      seed=self.seed,
      pack=self.pack,
      task_ids=self.task_ids,
      shuffle=self.shuffle,
      num_shards=self.num_shards,
      rows=rows,
      modules=self.modules,
    )

  def evaluation(self, features: Features) -> streams.WholeBatches:
    """The split once, in order, whole batches in every process."""
    return streams.eval_batches(
      self.mixture_or_task_name,
      self.split,
      self.feature_lengths,
      self.batch_size,
      features,
      pack=self.pack,
      task_ids=self.task_ids,
      num_batches=self.num_batches,
      modules=self.modules,
    )

  def check_vocabulary(
    self, embeddings: int, special_tokens: SpecialTokens = T5
  ) -> None:
    """Raises ValueError where the task's ids are not those of the model."""
    token_text.check_vocabulary(
      self.mixture_or_task_name, embeddings, self.modules, special_tokens
    )

  def vocabulary_size(self, feature: str) -> int:
    """How many ids, or classes, a feature of the task has."""
    return token_text.vocabulary_size(
      self.mixture_or_task_name, self.modules, feature
    )

  def corpus(self) -> dict[str, str]:
    """Digests of the data it reads, by task, where its source has one."""
    return examples.digests(self.mixture_or_task_name, self.modules)

  def task_names(self) -> tuple[str, ...]:
    """What task ids mean; empty for a task that knows none."""
    return examples.task_names(
      self.mixture_or_task_name, self.task_ids, self.modules
    )

  def pieces(
    self, feature: str, ids: Sequence[int] | np.ndarray
  ) -> dict[int, str]:
    """The text of each token id by itself."""
    return token_text.token_pieces(
      self.mixture_or_task_name, feature, ids, self.modules
    )

  def text(self, feature: str, ids: Sequence[int] | np.ndarray) -> str:
    """The text of token ids of a feature."""
    return token_text.decode_tokens(
      self.mixture_or_task_name, feature, ids, self.modules
    )

"""Texts of one's own, in the place of a task's split."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sparse_experts.data.dataset import Dataset
from sparse_experts.data.features.text import Text, TextToText
from sparse_experts.data.prompts import Tokenized
from sparse_experts.data.streams import Batch
from sparse_experts.inference.batch_decoding import Answers
from sparse_experts.models import language_model
from sparse_experts.models.decoding import check_decodable
from sparse_experts.models.objective import Objective


def features_of(model: Objective) -> TextToText | Text:
  """What a model's rows are, which texts alone can be.

  Raises:
    ValueError: they are more than that.
  """
  features = model.features
  if not isinstance(features, (TextToText, Text)):
    raise ValueError(
      f'{type(model).__name__} reads {features.name}, which a text alone is '
      'not: record a split of its task, without --text and --input.'
    )
  return features


def answered(
  batches: Iterable[Batch],
  given: Sequence[Tokenized],
  model: Any,
  params: Any,
  mesh: Mesh,
  dataset: Dataset,
) -> Iterator[Batch]:
  """Batches in which a decoder that has no targets reads the model's answer.

  The answer is greedy, as of `infer`. A decoder alone reads its text.

  Args:
    batches: of `prompts.batches`.
    given: what they are of.
    model: whose batches they are, with `params` on `mesh`.
    params: unboxed.
    mesh: whose data shards a batch is split over.
    dataset: that has the lengths and the size of a batch.

  Raises:
    ValueError: the model writes no text.
  """
  lacks = np.array(['targets' not in text.texts for text in given])
  if not isinstance(model.features, TextToText) or not lacks.any():
    yield from batches
    return
  check_decodable(model)
  T, B = dataset.feature_lengths['targets'], dataset.batch_size
  answers = Answers(model, params, mesh, B, max_tokens=T)
  for i, batch in enumerate(batches):
    rows = [{name: x[b] for name, x in batch.items()} for b in range(B)]
    answers_BxT, _ = answers(rows, range(B))
    lacks_B = lacks[i * B : (i + 1) * B]
    lacks_Bx1 = np.pad(lacks_B, (0, B - len(lacks_B)))[:, None]
    targets_BxT = jnp.asarray(batch['decoder_target_tokens'])
    whole = language_model.answered(
      {name: jnp.asarray(x) for name, x in batch.items()},
      jnp.where(lacks_Bx1, answers_BxT, targets_BxT),
      model.special_tokens,
    )
    yield {name: np.asarray(whole[name], x.dtype) for name, x in batch.items()}

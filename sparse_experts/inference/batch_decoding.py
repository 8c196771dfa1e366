"""Answers of a model to many examples, batch by batch."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from sparse_experts import sharding
from sparse_experts.letters import Array
from sparse_experts.models.decoding import GREEDY, BeamSearch, Sampling
from sparse_experts.models.language import Language
from sparse_experts.training import global_batch


class Answers:
  """Decodes examples in batches of one shape; the last one is filled up.

  An answer depends on the example and its index, not on its batch.
  """

  def __init__(
    self,
    model: Language,
    params,
    mesh: Mesh,
    batch_size: int,
    *,
    max_tokens: int,
    strategy: Sampling | BeamSearch = GREEDY,
    seed: int = 0,
  ):
    self._params, self._mesh, self._batch_size = params, mesh, batch_size
    self._key = jax.random.key(seed)
    self._decode = jax.jit(
      functools.partial(model.decode, max_tokens=max_tokens, strategy=strategy),
      out_shardings=sharding.replicated(mesh),
    )

  def use(self, params) -> None:
    """Answers with other parameters from now on; nothing compiles again."""
    self._params = params

  def __call__(
    self, examples: Sequence[Mapping[str, np.ndarray]], indices: Sequence[int]
  ) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [B, T] and log-probabilities [B] of B examples.

    Of a beam search, tokens [B, W, T] and scores [B, W].
    """
    tokens, scores = [], []
    for start in range(0, len(examples), self._batch_size):
      part = examples[start : start + self._batch_size]
      keys = [
        jax.random.fold_in(self._key, int(i))
        for i in indices[start : start + self._batch_size]
      ]
      keys += [self._key] * (self._batch_size - len(part))
      batch = place(part, self._mesh, self._batch_size)
      tokens_BxT, score_B = self._decode(
        self._params, batch, jax.numpy.stack(keys)
      )
      tokens.append(np.asarray(tokens_BxT)[: len(part)])
      scores.append(np.asarray(score_B)[: len(part)])
    return np.concatenate(tokens), np.concatenate(scores)


def place(
  examples: Sequence[Mapping[str, np.ndarray]], mesh: Mesh, batch_size: int
) -> dict[str, Array]:
  """At most `batch_size` examples as one batch on a mesh; zeros fill it up.

  Args:
    examples: arrays by feature, of one shape each.
    mesh: whose data shards the rows are split over.
    batch_size: B, rows of the batch.
  """
  fill = batch_size - len(examples)
  batch = {
    name: np.stack([e[name] for e in examples] + [np.zeros_like(first)] * fill)
    for name, first in examples[0].items()
  }
  return global_batch.place(batch, mesh, batch_size, 0)

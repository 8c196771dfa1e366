"""The loss on held-out data."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax

from sparse_experts import sharding
from sparse_experts.data.dataset import Dataset
from sparse_experts.models.objective import Batch, Objective
from sparse_experts.models.sums import summary
from sparse_experts.training import global_batch, step
from sparse_experts.training.total import Total


class LossEvaluation:
  """The model's metrics on a dataset, at evaluation's capacity."""

  def __init__(
    self, model: Objective, dataset: Dataset, mesh: jax.sharding.Mesh
  ):
    """Reads the first batch, in which mistakes of the data show.

    Raises:
      ValueError: the data is none of the model's, or there is no example.
    """
    model.check_data(dataset)
    self._model, self._dataset, self._mesh = model, dataset, mesh
    self._step = jax.jit(
      functools.partial(step.eval_step, model=model),
      out_shardings=sharding.replicated(mesh),
    )
    if next(self._batches(), None) is None:
      raise ValueError(
        f'{dataset.mixture_or_task_name} has no example in split '
        f'{dataset.split!r}; choose another split.'
      )

  def __call__(self, params) -> dict[str, Any]:
    """Metrics over the dataset, see `models.sums.summary`."""
    total = Total()
    for batch in self._batches():
      total.add(self._step(params, batch))
    return summary(total.sums())

  def _batches(self) -> Iterator[Batch]:
    for batch in self._dataset.evaluation(self._model.features):
      yield global_batch.place(batch, self._mesh, self._dataset.batch_size, 0)

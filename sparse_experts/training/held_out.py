"""The loss on held-out data."""

from __future__ import annotations

import functools
from typing import Any

import jax

from sparse_experts import sharding
from sparse_experts.data.dataset import Dataset
from sparse_experts.models.objective import Objective
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
    self._batches = dataset.evaluation(model.features)
    self._batch_size, self._mesh = dataset.batch_size, mesh
    self._step = jax.jit(
      functools.partial(step.eval_step, model=model),
      out_shardings=sharding.replicated(mesh),
    )
    if next(iter(self._batches), None) is None:
      raise ValueError(
        f'{dataset.mixture_or_task_name} has no example in split '
        f'{dataset.split!r}; choose another split.'
      )

  def __call__(self, params) -> dict[str, Any]:
    """Metrics over the dataset, see `models.sums.summary`."""
    total = Total()
    for batch in self._batches:
      placed = global_batch.place(batch, self._mesh, self._batch_size, 0)
      total.add(self._step(params, placed))
    return summary(total.sums())

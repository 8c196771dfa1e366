"""All that can be wrong with a run, built and checked before it is written."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import optax
from flax import linen as nn

from sparse_experts import sharding
from sparse_experts.data.dataset import Dataset
from sparse_experts.models.objective import Objective
from sparse_experts.moe import expert_check
from sparse_experts.training import (
  checkpoints,
  frozen,
  global_batch,
  replaying,
  state,
  step,
)
from sparse_experts.training.held_out import LossEvaluation
from sparse_experts.training.saver import DataArgs


@dataclasses.dataclass(frozen=True)
class Prepared:
  """A run that can begin: what it is made of, but for its arrays.

  Attributes:
    mesh: built of its placement.
    shapes: of a batch.
    boxed, placed: shapes, names and shardings of the state.
    optimizer: the optimizer.
    take_step: `step.jit_train_step`.
    key: of the seed.
    beside: shapes of what is frozen.
    feed: global batches, from the first on.
    evaluation: of held-out data, if there is any.
    start: step of the checkpoint to go on from; None: a new run.
  """

  mesh: jax.sharding.Mesh
  shapes: dict[str, jax.ShapeDtypeStruct]
  boxed: state.TrainState
  placed: state.TrainState
  optimizer: optax.GradientTransformation
  take_step: Callable
  key: jax.Array
  beside: dict[str, Any]
  feed: Feed
  evaluation: LossEvaluation | None
  start: int | None


def prepare(
  model: Objective,
  model_dir: str,
  dataset: Dataset,
  *,
  optimizer: Callable[..., optax.GradientTransformation],
  learning_rate: float | optax.Schedule,
  eval_dataset: Dataset | None,
  placement: sharding.Placement,
  initial_checkpoint: str | None,
  microbatches: int,
  seed: int,
  replay: int | None,
) -> Prepared:
  """Builds a run as far as it can be without memory; writes nothing.

  Tracing shows the model's mistakes, opening the data its own, and names and
  shapes in a checkpoint whether it can be read.

  Args:
    model, model_dir, dataset: as of `train.train`, as all others are.
    optimizer, learning_rate: the optimizer, and the rate that it is given.
    eval_dataset: held-out data; None, or in a replay: no evaluation.
    placement: the mesh, and which of its axes arrays are split over.
    initial_checkpoint: where a new run has its parameters from.
    microbatches: parts a batch is run in.
    seed: of all randomness.
    replay: a step to take once more, from the newest checkpoint before it;
      None: the run goes on from its newest.

  Raises:
    ValueError, OSError: something does not fit the rest, or is not there.
  """
  if replay is not None:
    start = replaying.checkpoint_before(model_dir, replay)
  else:
    start = max(checkpoints.steps(model_dir), default=None)
  if start is None and initial_checkpoint is not None:
    checkpoints.find(initial_checkpoint)
  mesh = placement.mesh
  shapes = dataset.shapes(model.features)
  # Outside the mesh, so that what does not divide over it is found by name.
  with expert_check.checking():
    boxed, built_optimizer = state.abstract(
      model, shapes, functools.partial(optimizer, learning_rate=learning_rate)
    )
  with placement.use():
    placed = state.shardings(boxed, mesh)
    take_step = step.jit_train_step(
      model,
      built_optimizer,
      mesh,
      placed,
      batch_size=dataset.batch_size,
      microbatches=microbatches,
    )
    key = jax.random.key(seed)
    beside = frozen.abstract(model, shapes)
    take_step.eval_shape(nn.unbox(boxed), shapes, key, nn.unbox(beside))
    model.check_data(dataset)
    if start is not None:
      at = checkpoints.directory_of(model_dir) / str(start)
      checkpoints.check_state(at, boxed)
    elif initial_checkpoint is not None:
      checkpoints.check_params(initial_checkpoint, boxed.params)
    frozen.check(model, model_dir, beside, begun=start is not None)
    feed = Feed(model, dataset, mesh)
    evaluation = None
    if eval_dataset is not None and replay is None:
      evaluation = LossEvaluation(model, eval_dataset, mesh)
  return Prepared(
    mesh,
    shapes,
    boxed,
    placed,
    built_optimizer,
    take_step,
    key,
    beside,
    feed,
    evaluation,
    start,
  )


class Feed(Iterator):
  """Global batches of a dataset on a mesh."""

  def __init__(
    self, model: Objective, dataset: Dataset, mesh: jax.sharding.Mesh
  ):
    self._mesh, self._batch_size = mesh, dataset.batch_size
    process = jax.process_index()
    rows = global_batch.rows_of_process(mesh, dataset.batch_size, process)
    self._first_row = rows.start
    batches = dataset.training(model.features, rows)
    global_batch.check_same_on_all_processes(batches.identity)
    self.batches = batches
    self.to_save = DataArgs(
      batches,
      global_batch.streams_written(
        mesh, dataset.batch_size, dataset.num_shards, process
      ),
    )

  def __next__(self):
    return global_batch.place(
      next(self.batches), self._mesh, self._batch_size, self._first_row
    )

"""A step of a run once more, to look at what it did."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from etils import epath

from sparse_experts import sharding
from sparse_experts.models.objective import Objective
from sparse_experts.training import checkpoints, spike, step
from sparse_experts.training.loop import Run


def checkpoint_before(model_dir: epath.PathLike, replay: int) -> int:
  """The newest complete step of a run before step `replay`.

  Raises:
    ValueError: `replay` is no step. FileNotFoundError: there is none before.
  """
  if replay < 1:
    raise ValueError(f'replay is a step, 1 the first, not {replay}.')
  there = checkpoints.steps(model_dir)
  before = [step for step in there if step < replay]
  if not before:
    raise FileNotFoundError(
      f'no complete checkpoint before step {replay} in {model_dir}, which has '
      f'{", ".join(map(str, there)) or "none"}; replay a later step, or train '
      'with a smaller CHECKPOINT_PERIOD and KEEP_CHECKPOINTS=None.'
    )
  return max(before)


def replay(
  run: Run,
  model: Objective,
  mesh: jax.sharding.Mesh,
  microbatches: int,
  seed: int,
) -> dict[str, Any]:
  """Takes the steps up to `run.stop`, and says what the last of them did.

  Data, draws and arithmetic are those of the run, so its numbers are the run's,
  bit for bit, on the same mesh and kind of device, in as many microbatches.

  Args:
    run: restored from a checkpoint before the step; it goes on to the step.
    model: the run's.
    mesh: that the run is on.
    microbatches: parts a batch is run in, the run's.
    seed: of its draws, the run's.

  Returns:
    'step', 'from' (where the run stood), 'metrics' (`spike.metrics`),
    'batch' and 'record', the step's batch and its records in training,
    as numpy arrays; 'capacity_factor' of the record.

  Raises:
    ValueError: a step is more than one pass over the batch.
  """
  record = jax.jit(
    lambda now, batch, key: (
      batch,
      step.record_train_step(
        now,
        batch,
        key,
        model=model,
        microbatches=microbatches,
        data_shards=sharding.data_shards(mesh),
      ),
    ),
    out_shardings=sharding.replicated(mesh),
  )
  while run.step < run.stop - 1:
    run.advance()
  batch = next(run.batches)
  seen = record(run.state, batch, jax.random.key(seed))
  run.advance(batch)
  seen_batch, seen_record = jax.tree.map(np.asarray, seen)
  return {
    'step': run.step,
    'from': run.start,
    'metrics': spike.metrics(run.summary, run.sums),
    'batch': seen_batch,
    'record': seen_record,
    'capacity_factor': model.capacity_factor_train,
  }

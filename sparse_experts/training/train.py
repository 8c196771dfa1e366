"""Training: the loop, and nothing that has a meaning of its own."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import optax
from etils import epath
from flax import linen as nn

from sparse_experts import sharding
from sparse_experts.data.dataset import Dataset
from sparse_experts.models.objective import Objective, summary
from sparse_experts.moe import expert_check
from sparse_experts.training import (
  checkpoints,
  global_batch,
  schedules,
  state,
  step,
)
from sparse_experts.training.hardware import write_hardware
from sparse_experts.training.preemption import Preemption
from sparse_experts.training.progress import Progress
from sparse_experts.training.total import Total
from sparse_experts.training.writers import Writers


def train(
  model: Objective,
  model_dir: str,
  dataset: Dataset,
  train_steps: int,
  *,
  optimizer: Callable[..., optax.GradientTransformation],
  learning_rate: float | optax.Schedule,
  eval_dataset: Dataset | None = None,
  placement: sharding.Placement = sharding.DATA_PARALLEL,
  initial_checkpoint: str | None = None,
  microbatches: int = 1,
  seed: int = 0,
  checkpoint_period: int = 1000,
  keep_checkpoints: int | None = 3,
  eval_period: int = 1000,
  log_period: int = 100,
  max_skipped_in_a_row: int = 10,
  profile: tuple[int, int] | None = None,
  on_start: Callable[[epath.Path], None] | None = None,
) -> dict[str, Any]:
  """Trains to `train_steps`, from the latest checkpoint in `model_dir` if any.

  The global batch and all randomness of a step are functions of seed and step:
  stopping, resuming, and the number of processes change nothing.

  Args:
    model: the model.
    model_dir: for checkpoints, metrics and TensorBoard; local or gs://.
    dataset: what to train on.
    train_steps: step to train to; no schedule reads it.
    optimizer: (names, learning_rate=) -> optax optimizer, see `optimizers`.
    learning_rate: step -> rate, see `schedules`; or a constant one.
    eval_dataset: held-out data; its loss is taken before the first step, every
      `eval_period` steps and at the end. None: no evaluation.
    placement: the mesh, and which of its axes arrays are split over.
    initial_checkpoint: a MODEL_DIR, or one checkpoints/<step> of it, whose
      parameters a new run begins with, at step 0 with a fresh optimizer.
    microbatches: parts a batch is run in, to save memory.
    seed: of initialisation, dropout and jitter.
    checkpoint_period: steps between checkpoints; the last step has one too.
    keep_checkpoints: how many stay; None: all.
    eval_period, log_period: steps.
    max_skipped_in_a_row: a step with a loss, gradient or update that is not
      finite is skipped and counted; so many in a row stop the run.
    profile: (start, stop), steps to trace into MODEL_DIR/profile: those of
      them that this call takes.
    on_start: called with MODEL_DIR in process 0, once the state is there.

  Returns:
    'step', 'train' metrics up to it, 'eval' and 'eval_step', the latest and
    where it was taken, 'eval_before' at the first step of this call,
    'preempted'.

  Raises:
    ValueError: an argument, the data or the checkpoint does not fit the rest,
      or an expert is none, see `moe.expert_check`.
    FloatingPointError: too many steps in a row were not finite.
  """
  if keep_checkpoints is not None:
    _check_counts(keep_checkpoints=keep_checkpoints)
  _check_counts(
    train_steps=train_steps,
    batch_size=dataset.batch_size,
    checkpoint_period=checkpoint_period,
    eval_period=eval_period,
    log_period=log_period,
    microbatches=microbatches,
    max_skipped_in_a_row=max_skipped_in_a_row,
  )
  built_mesh = placement.mesh
  # Outside the mesh, so that what does not divide over it is found by name.
  with expert_check.checking():
    boxed, built_optimizer = state.abstract(
      model,
      dataset.shapes(model.features),
      functools.partial(optimizer, learning_rate=learning_rate),
    )
  with placement.use():
    run = _begin(
      model,
      model_dir,
      dataset,
      built_mesh,
      boxed,
      built_optimizer,
      initial_checkpoint,
      microbatches,
      seed,
      keep_checkpoints,
    )
    if on_start is not None and jax.process_index() == 0:
      on_start(epath.Path(model_dir))
    write_hardware(model_dir, built_mesh)
    now, start, feed = run.state, run.start, run.feed
    writers, preemption = Writers(model_dir), Preemption()
    positions = model.positions(dataset.shapes(model.features))
    progress = Progress(start, train_steps, positions)
    if start:
      progress.say(f'resumed at step {start}')
    if start >= train_steps:
      progress.say(f'TRAIN_STEPS={train_steps} are done; nothing left to train')
    if profile and not (start < profile[1] and profile[0] < train_steps):
      progress.say(f'no step to trace from {start} to {train_steps}')
    evaluate = None
    if eval_dataset is not None:
      evaluate = LossEvaluation(model, eval_dataset, built_mesh)

    def held_out(at):
      if evaluate is None:
        return None
      metrics = evaluate(now.params)
      writers.write('eval', at, metrics)
      progress.say(f'step {at}  held-out loss {metrics["loss"]:.4f} nats')
      return metrics

    eval_before = eval_now = held_out(start)
    eval_step = start
    train_metrics, preempted, tracing = None, False, False
    rate = schedules.as_schedule(learning_rate)
    total, skipped, guard = Total(), None, _Guard(max_skipped_in_a_row)
    try:
      for i in range(start, train_steps):
        if profile and profile[0] <= i < profile[1] and not tracing:
          jax.profiler.start_trace(str(epath.Path(model_dir) / 'profile'))
          tracing = True
        now, sums = run.take_step(now, feed.next())
        # Both look at the step before, which keeps this one in flight.
        total.add(sums)
        guard.check(i, skipped)
        skipped = sums['skipped']
        done, last = i + 1, i + 1 == train_steps
        progress.step(done)
        if tracing and (last or done == profile[1]):
          jax.block_until_ready(now)
          jax.profiler.stop_trace()
          tracing = False
        if last or done % log_period == 0:
          sums = total.sums()
          train_metrics = step.summary(sums, microbatches)
          # Of the last update: the optimizer has not counted the steps that
          # were skipped. Before any update, of the first.
          update = max(i - int(now.skipped), 0)
          train_metrics['learning_rate'] = float(rate(update))
          train_metrics |= progress.report(done, train_metrics, sums['tokens'])
          writers.write('train', done, train_metrics)
          total = Total()
        if last or done % eval_period == 0:
          eval_now, eval_step = held_out(done), done
        preempted = preemption.reached(done)
        if last or preempted or done % checkpoint_period == 0:
          guard.check(done, skipped)
          skipped = None
          run.checkpoints.save(now, feed.data_args)
        if preempted and not last:
          progress.say(f'SIGTERM: stopping after step {done}')
          break
    finally:
      if tracing:
        jax.profiler.stop_trace()
      run.checkpoints.close()
      writers.close()
      progress.close()
      preemption.close()
    return {
      'step': int(now.step),
      'train': train_metrics,
      'eval': eval_now,
      'eval_step': eval_step,
      'eval_before': eval_before,
      'preempted': preempted,
    }


@dataclasses.dataclass(frozen=True)
class _Run:
  """What the loop turns on: the state at step `start`, and what moves it."""

  start: int
  state: state.TrainState
  take_step: Callable[..., Any]
  feed: _Feed
  checkpoints: checkpoints.Checkpoints


def _begin(
  model: Objective,
  model_dir: str,
  dataset: Dataset,
  mesh: jax.sharding.Mesh,
  boxed: state.TrainState,
  optimizer: optax.GradientTransformation,
  initial_checkpoint: str | None,
  microbatches: int,
  seed: int,
  keep_checkpoints: int | None,
) -> _Run:
  """Creates or restores the state on the mesh, with its step and data."""
  shapes = dataset.shapes(model.features)
  placed = state.shardings(boxed, mesh)
  take_step = step.jit_train_step(
    model,
    optimizer,
    mesh,
    placed,
    batch_size=dataset.batch_size,
    seed=seed,
    microbatches=microbatches,
  )
  take_step.eval_shape(nn.unbox(boxed), shapes)  # Mistakes show in tracing.
  model.check_data(dataset)
  feed = _Feed(model, dataset, mesh)
  saver = checkpoints.Checkpoints(model_dir, keep_checkpoints)
  start = saver.latest()
  if start is not None:
    now = saver.restore(start, boxed, placed, feed.data_args)
  elif initial_checkpoint is not None:
    params, _ = checkpoints.load_params(
      initial_checkpoint, boxed.params, placed.params
    )
    now = state.begin(params, optimizer, placed, boxed)
  else:
    now = state.create(model, shapes, optimizer, placed, seed)
  return _Run(start or 0, now, take_step, feed, saver)


class LossEvaluation:
  """The model's metrics on a dataset, at evaluation's capacity."""

  def __init__(
    self, model: Objective, dataset: Dataset, mesh: jax.sharding.Mesh
  ):
    model.check_data(dataset)
    self._model, self._dataset, self._mesh = model, dataset, mesh
    self._step = jax.jit(
      functools.partial(step.eval_step, model=model),
      out_shardings=sharding.replicated(mesh),
    )

  def __call__(self, params) -> dict[str, Any]:
    """Metrics over the dataset, see `models.objective.summary`.

    Raises:
      ValueError: the dataset has no example.
    """
    total = Total()
    for batch in self._dataset.evaluation(self._model.features):
      batch = global_batch.place(batch, self._mesh, self._dataset.batch_size, 0)
      total.add(self._step(params, batch))
    sums = total.sums()
    if sums is None:
      raise ValueError(
        f'{self._dataset.mixture_or_task_name} has no example in split '
        f'{self._dataset.split!r}; choose another split.'
      )
    return summary(sums)


class _Feed:
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
    self._batches = batches
    self.data_args = checkpoints.DataArgs(
      batches,
      global_batch.streams_written(
        mesh, dataset.batch_size, dataset.num_shards, process
      ),
    )

  def next(self):
    return global_batch.place(
      next(self._batches), self._mesh, self._batch_size, self._first_row
    )


def _check_counts(**counts: int) -> None:
  for name, value in counts.items():
    if not isinstance(value, int) or value < 1:
      raise ValueError(
        f'{name} must be a whole number, at least 1, got {value!r}.'
      )


class _Guard:
  """Stops a run that skips too many steps in a row."""

  def __init__(self, limit: int):
    self._limit, self._in_a_row = limit, 0

  def check(self, step: int, skipped) -> None:
    """Counts whether `step` was skipped (None: counted already)."""
    if skipped is None:
      return
    self._in_a_row = self._in_a_row + 1 if int(skipped) else 0
    if self._in_a_row >= self._limit:
      raise FloatingPointError(
        f'{self._limit} steps in a row up to step {step} had a loss, gradient '
        'or update that is not finite; lower the learning rate, or continue '
        'from an earlier checkpoint with other dropout and jitter, by another '
        '--gin.train.train.seed.'
      )

"""Training: what a run is made of, put together."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax
from etils import epath

from sparse_experts import sharding
from sparse_experts.data.dataset import Dataset
from sparse_experts.models.objective import Objective
from sparse_experts.numbers import Count, Seed
from sparse_experts.training import (
  checkpoints,
  directories,
  frozen,
  replaying,
  schedules,
  state,
  step,
)
from sparse_experts.training.hardware import write_hardware
from sparse_experts.training.hooks import Evaluate, Every, Log, Save, Trace
from sparse_experts.training.lease import Lease
from sparse_experts.training.loop import Guard, Hook, Run, loop
from sparse_experts.training.preemption import Preemption
from sparse_experts.training.prepare import Prepared, prepare
from sparse_experts.training.progress import Progress
from sparse_experts.training.saver import Saver
from sparse_experts.training.writers import Writers


def train(
  model: Objective,
  model_dir: str,
  dataset: Dataset,
  train_steps: Count,
  *,
  optimizer: Callable[..., optax.GradientTransformation],
  learning_rate: float | optax.Schedule,
  eval_dataset: Dataset | None = None,
  placement: sharding.Placement = sharding.DATA_PARALLEL,
  initial_checkpoint: str | None = None,
  microbatches: int = 1,
  seed: Seed = 0,
  checkpoint_period: int = 1000,
  keep_checkpoints: int | None = 3,
  eval_period: int = 1000,
  log_period: int = 100,
  max_skipped_in_a_row: int = 10,
  hooks: Sequence[Hook] = (),
  profile: tuple[int, int] | None = None,
  replay: int | None = None,
  dry_run: bool = False,
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
    hooks: functions of the `loop.Run`, called in order before the first step
      and after each, when it is logged and evaluated and not yet saved;
      `hooks.Every` calls one from time to time.
    profile: (start, stop), steps to trace into MODEL_DIR/profile: those of
      them that this call takes.
    replay: a step that was taken: from the newest checkpoint before it, the run
      goes there once more and stops. It writes nothing, and calls no hook.
    dry_run: check all that can be wrong, down to the first batch, and return
      {}; nothing is written.
    on_start: called with MODEL_DIR in process 0, once the state is there.

  Returns:
    'step', 'train' metrics up to it, 'eval' and 'eval_step', the latest and
    where it was taken, 'eval_before' at the first step of this call,
    'preempted', if so by which 'signal', and what hooks add. Of a replay what
    `replaying.replay` does.

  Raises:
    ValueError: an argument, the data or the checkpoint does not fit the rest,
      an expert is none, see `moe.expert_check`, or another trains there.
    OSError: MODEL_DIR cannot be written, at the start or later.
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
  preemption = Preemption()  # Of a run that writes nothing, it takes nothing.
  with contextlib.ExitStack() as closing:
    if replay is None:
      directories.check_new(model_dir)
      if not dry_run:
        closing.enter_context(preemption)
        lease = closing.enter_context(Lease(model_dir, preemption.leave_by))
    ready = prepare(
      model,
      model_dir,
      dataset,
      optimizer=optimizer,
      learning_rate=learning_rate,
      eval_dataset=eval_dataset,
      placement=placement,
      initial_checkpoint=initial_checkpoint,
      microbatches=microbatches,
      seed=seed,
      replay=replay,
    )
    closing.enter_context(placement.use())
    if dry_run:
      _draw(ready, model_dir)
      return {}
    run = _begin(
      ready,
      model,
      model_dir,
      train_steps if replay is None else replay,
      initial_checkpoint,
      microbatches,
      seed,
    )
    if replay is not None:
      return replaying.replay(run, model, ready.mesh, microbatches, seed)
    preemption.listen()
    saver = Saver(model_dir, keep_checkpoints, lease.check)
    closing.callback(saver.close)
    if on_start is not None and jax.process_index() == 0:
      on_start(run.model_dir)
    _open(run, ready.mesh, model.positions(ready.shapes), closing)
    trace = _trace(run, profile, closing)
    guard = Guard(max_skipped_in_a_row)
    log = Log(run.progress, schedules.as_schedule(learning_rate))
    save = Save(saver, ready.feed.to_save, (guard.check,))
    before = [lease, guard, trace.stop, log.add, Every(log_period, log)]
    before += _evaluations(ready, model, eval_period)
    after = [preemption, Every(checkpoint_period, save), trace.start]
    return loop(run, [*before, *hooks, *after])


def _evaluations(ready: Prepared, model: Objective, period: int) -> list[Hook]:
  """What takes the held-out loss, if there is held-out data."""
  if ready.evaluation is None:
    return []
  evaluate = Evaluate(ready.evaluation, model.headline)
  return [Every(period, evaluate, at_start=True)]


def _draw(ready: Prepared, model_dir: str) -> None:
  """Draws the batch that the run would begin with."""
  if ready.start is not None:
    checkpoints.restore_data(model_dir, ready.start, ready.feed.batches)
  next(ready.feed)


def _begin(
  ready: Prepared,
  model: Objective,
  model_dir: str,
  stop: int,
  initial_checkpoint: str | None,
  microbatches: int,
  seed: Seed,
) -> Run:
  """The state, created or restored, with its step and data."""
  start, boxed, placed = ready.start, ready.boxed, ready.placed
  kept = frozen.load(
    model,
    model_dir,
    ready.beside,
    sharding.shardings(ready.beside, ready.mesh),
  )
  if start is not None:
    batches = ready.feed.batches
    now = checkpoints.restore(model_dir, start, boxed, placed, batches)
  elif initial_checkpoint is not None:
    params, _ = checkpoints.load_params(
      initial_checkpoint, boxed.params, placed.params
    )
    now = state.begin(params, ready.optimizer, placed, boxed)
  else:
    now = state.create(model, ready.shapes, ready.optimizer, placed, seed)
  return Run(
    model_dir=epath.Path(model_dir),
    start=start or 0,
    stop=stop,
    state=now,
    batches=ready.feed,
    take=lambda now, batch: ready.take_step(now, batch, ready.key, kept),
    summary=functools.partial(step.summary, microbatches=microbatches),
  )


def _open(
  run: Run,
  mesh: jax.sharding.Mesh,
  positions: int,
  closing: contextlib.ExitStack,
) -> None:
  """Gives a run its writers, and says where it stands and on what."""
  write_hardware(run.model_dir, mesh)
  run.progress = Progress(run.start, run.stop, positions)
  closing.callback(run.progress.close)
  run.writers = Writers(run.model_dir, run.start or -1)  # 0 is anew.
  closing.callback(run.writers.close)
  if run.start:
    run.say(f'resumed at step {run.start}')
  if run.ending:
    run.say(f'TRAIN_STEPS={run.stop} are done; nothing left to train')
  run.results = dict.fromkeys(('train', 'eval', 'eval_step', 'eval_before'))


def _trace(
  run: Run, profile: tuple[int, int] | None, closing: contextlib.ExitStack
) -> Trace:
  """What traces the steps of `profile`; says so if this call takes none."""
  trace = Trace(run.model_dir / 'profile', profile)
  closing.callback(trace.close)
  if profile and not (run.start < profile[1] and profile[0] < run.stop):
    run.say(f'no step to trace from {run.start} to {run.stop}')
  return trace


def _check_counts(**counts: int) -> None:
  for name, value in counts.items():
    if not isinstance(value, int) or value < 1:
      raise ValueError(
        f'{name} must be a whole number, at least 1, got {value!r}.'
      )

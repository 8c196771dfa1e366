"""Training: what a run is made of, put together."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import optax
from etils import epath
from flax import linen as nn

from sparse_experts import sharding
from sparse_experts.data.dataset import Dataset
from sparse_experts.models.objective import Objective
from sparse_experts.models.sums import summary
from sparse_experts.moe import expert_check
from sparse_experts.training import (
  checkpoints,
  frozen,
  global_batch,
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
from sparse_experts.training.progress import Progress
from sparse_experts.training.saver import DataArgs, Saver
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
  hooks: Sequence[Hook] = (),
  profile: tuple[int, int] | None = None,
  replay: int | None = None,
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
  _check_values(model_dir, optimizer, seed, hooks)
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
  with contextlib.ExitStack() as closing:
    if replay is None:
      lease = closing.enter_context(contextlib.closing(Lease(model_dir)))
    # Outside the mesh, so that what does not divide over it is found by name.
    with expert_check.checking():
      boxed, built_optimizer = state.abstract(
        model,
        dataset.shapes(model.features),
        functools.partial(optimizer, learning_rate=learning_rate),
      )
    closing.enter_context(placement.use())
    preemption = closing.enter_context(contextlib.closing(Preemption()))
    run, saver = _begin(
      model,
      model_dir,
      dataset,
      train_steps,
      built_mesh,
      boxed,
      built_optimizer,
      initial_checkpoint,
      microbatches,
      seed,
      keep_checkpoints,
      replay,
    )
    if replay is not None:
      return replaying.replay(run, model, built_mesh, microbatches, seed)
    closing.callback(saver.close)
    if on_start is not None and jax.process_index() == 0:
      on_start(run.model_dir)
    write_hardware(model_dir, built_mesh)
    _open(run, model.positions(dataset.shapes(model.features)), closing)
    preemption.listen()
    trace = _trace(run, profile, closing)
    guard = Guard(max_skipped_in_a_row)
    log = Log(run.progress, schedules.as_schedule(learning_rate))
    evaluation = []
    if eval_dataset is not None:
      loss = LossEvaluation(model, eval_dataset, built_mesh)
      evaluate = Evaluate(loss, model.headline)
      evaluation = [Every(eval_period, evaluate, at_start=True)]
    save = Save(saver, run.batches.to_save, (lease.check, guard.check))
    before = [lease, guard, trace.stop, log.add]
    before += [Every(log_period, log), *evaluation]
    after = [preemption, Every(checkpoint_period, save), trace.start]
    return loop(run, [*before, *hooks, *after])


def _begin(
  model: Objective,
  model_dir: str,
  dataset: Dataset,
  train_steps: int,
  mesh: jax.sharding.Mesh,
  boxed: state.TrainState,
  optimizer: optax.GradientTransformation,
  initial_checkpoint: str | None,
  microbatches: int,
  seed: int,
  keep_checkpoints: int | None,
  replay: int | None,
) -> tuple[Run, Saver | None]:
  """The state, created or restored, with its step and data.

  And what saves it, unless it is a replay, which leaves all as it is.
  """
  start, saver = None, None
  if replay is not None:
    start, train_steps = replaying.checkpoint_before(model_dir, replay), replay
  shapes = dataset.shapes(model.features)
  placed = state.shardings(boxed, mesh)
  take_step = step.jit_train_step(
    model,
    optimizer,
    mesh,
    placed,
    batch_size=dataset.batch_size,
    microbatches=microbatches,
  )
  key = jax.random.key(seed)
  # Mistakes show in tracing.
  beside = frozen.abstract(model, shapes)
  take_step.eval_shape(nn.unbox(boxed), shapes, key, nn.unbox(beside))
  model.check_data(dataset)
  feed = _Feed(model, dataset, mesh)
  if replay is None:
    saver = Saver(model_dir, keep_checkpoints)
    start = saver.latest()
  kept = frozen.load(
    model,
    model_dir,
    beside,
    sharding.shardings(beside, mesh),
    begun=start is not None,
  )
  if start is not None:
    now = checkpoints.restore(model_dir, start, boxed, placed, feed.batches)
  elif initial_checkpoint is not None:
    params, _ = checkpoints.load_params(
      initial_checkpoint, boxed.params, placed.params
    )
    now = state.begin(params, optimizer, placed, boxed)
  else:
    now = state.create(model, shapes, optimizer, placed, seed)
  run = Run(
    model_dir=epath.Path(model_dir),
    start=start or 0,
    stop=train_steps,
    state=now,
    batches=feed,
    take=lambda now, batch: take_step(now, batch, key, kept),
    summary=functools.partial(step.summary, microbatches=microbatches),
  )
  return run, saver


def _open(run: Run, positions: int, closing: contextlib.ExitStack) -> None:
  """Gives a run its writers, and says where it stands."""
  run.progress = Progress(run.start, run.stop, positions)
  closing.callback(run.progress.close)
  run.writers = Writers(run.model_dir, run.start)
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
    """Metrics over the dataset, see `models.sums.summary`.

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


class _Feed(Iterator):
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


def _check_values(
  model_dir: str, optimizer: Any, seed: Any, hooks: Any
) -> None:
  """Raises ValueError where one is of another kind than `train` says."""
  if not model_dir:
    raise ValueError(
      f'model_dir={model_dir!r} is no folder; say MODEL_DIR, where checkpoints '
      'and metrics go.'
    )
  if not callable(optimizer):
    raise ValueError(
      f'optimizer={optimizer!r} cannot be called; name a function, such as '
      'OPTIMIZER = @optimizers.adafactor.'
    )
  if not isinstance(seed, int):
    raise ValueError(f'seed={seed!r} must be a whole number, such as 0.')
  if not isinstance(hooks, (list, tuple)) or not all(map(callable, hooks)):
    raise ValueError(
      f'hooks={hooks!r} must be a list of functions of the run, such as '
      'HOOKS = [@spike.Spikes()].'
    )


def _check_counts(**counts: int) -> None:
  for name, value in counts.items():
    if not isinstance(value, int) or value < 1:
      raise ValueError(
        f'{name} must be a whole number, at least 1, got {value!r}.'
      )

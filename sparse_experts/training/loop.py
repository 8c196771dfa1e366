"""The loop: take a step, run what is due.

A hook is a function of the `Run`. All are called in order before the first step
and after each; `hooks.Every` calls an action when it is due.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from etils import epath

from sparse_experts.models.objective import Batch
from sparse_experts.models.sums import Sums
from sparse_experts.training.progress import Progress
from sparse_experts.training.state import TrainState
from sparse_experts.training.writers import Writers


@dataclasses.dataclass
class Run:
  """A run as it stands: all that a hook sees, and what it may ask for.

  Attributes:
    model_dir: where it is written.
    start, stop: the steps that this call goes from and to.
    state: after `step` steps. The next one takes its memory: a hook that wants
      an array of it later makes a copy.
    batches: global batches, from the next one on.
    take: (state, batch) -> (state, sums), `step.train_step`.
    summary: sums of steps -> metrics, see `step.summary`.
    batch, sums: of the step that was taken last, on all devices; None before
      the first. Reading sums waits for the step.
    preempted: whether the run was asked to stop after this step, once all but
      what saves it have seen the step.
    results: what `train` returns; a hook may add to it.
    writers, progress: see `write` and `say`.
    seconds: of the steps of this call but the first, which compiles; without
      what is done `apart`.
  """

  model_dir: epath.Path
  start: int
  stop: int
  state: TrainState
  batches: Iterator[Batch]
  take: Callable[[TrainState, Batch], tuple[TrainState, Sums]]
  summary: Callable[[Sums], dict[str, Any]]
  writers: Writers | None = None
  progress: Progress | None = None
  batch: Batch | None = None
  sums: Sums | None = None
  preempted: bool = False
  results: dict[str, Any] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    self.step = self.start
    self._seconds, self._since = 0.0, None

  @property
  def ending(self) -> bool:
    """Whether no step follows."""
    return self.preempted or self.step >= self.stop

  def advance(self, batch: Batch | None = None) -> None:
    """Takes a step, with the next batch unless one is given."""
    self.batch = next(self.batches) if batch is None else batch
    self.state, self.sums = self.take(self.state, self.batch)
    self.step += 1
    if self._since is None:
      jax.block_until_ready(self.sums)
      self._since = time.monotonic()

  @property
  def seconds(self) -> float:
    running = 0.0 if self._since is None else time.monotonic() - self._since
    return self._seconds + running

  @contextlib.contextmanager
  def apart(self) -> Iterator[None]:
    """What is done inside has no part in `seconds`; the step is waited for."""
    jax.block_until_ready(self.sums)
    begun, self._seconds = self._since is not None, self.seconds
    self._since = None
    try:
      yield
    finally:
      self._since = time.monotonic() if begun else None

  def write(self, name: str, metrics: Mapping[str, Any]) -> None:
    """Writes a (nested) dictionary of numbers, of this step, as `name`."""
    self.writers.write(name, self.step, metrics)

  def say(self, text: str) -> None:
    """A line on stderr."""
    self.progress.say(text)


Hook = Callable[[Run], None]


def loop(run: Run, hooks: Sequence[Hook]) -> dict[str, Any]:
  """Runs to `run.stop`, or until a hook sets `run.preempted`.

  Returns:
    'step', `run.results` and 'preempted'.
  """
  for hook in hooks:
    hook(run)
  while not run.ending:
    run.advance()
    for hook in hooks:
      hook(run)
  if run.preempted and run.step < run.stop:
    signal = run.results.get('signal', 'SIGTERM')
    run.say(f'{signal}: stopping after step {run.step}')
  return {'step': run.step, **run.results, 'preempted': run.preempted}


class Guard:
  """A hook that stops a run which skips too many steps in a row.

  It looks at the step before, which keeps the last one in flight.
  """

  def __init__(self, limit: int):
    self._limit, self._in_a_row = limit, 0
    self._last: tuple[int, Any] | None = None

  def __call__(self, run: Run) -> None:
    self.check()
    if run.sums is not None:
      self._last = (run.step, run.sums['skipped'])

  def check(self) -> None:
    """Counts the last step too, and waits for it.

    Raises:
      FloatingPointError: too many steps in a row were not finite.
    """
    if self._last is None:
      return
    (step, skipped), self._last = self._last, None
    self._in_a_row = self._in_a_row + 1 if int(skipped) else 0
    if self._in_a_row >= self._limit:
      raise FloatingPointError(
        f'{self._limit} steps in a row up to step {step} had a loss, gradient '
        'or update that is not finite; lower the learning rate, or continue '
        'from an earlier checkpoint with other dropout and jitter, by another '
        '--gin.train.train.seed.'
      )

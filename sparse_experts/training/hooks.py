"""What a run does beside its steps: log, evaluate, save, trace.

Each is a function of the `loop.Run`, called before the first step and after
every step. `train` puts them in order, and those of the caller among them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax
from etils import epath

from sparse_experts.training.loop import Hook, Run
from sparse_experts.training.progress import Progress
from sparse_experts.training.saver import DataArgs, Saver
from sparse_experts.training.total import Total


@dataclasses.dataclass(frozen=True)
class Every:
  """Calls `action(run)` after every `period` steps, and after the last one.

  Attributes:
    period: steps.
    action: a function of the run, such as

        def parameters(run):
          run.write('parameters', {'norm': optax.tree.norm(run.state.params)})

    at_start: also before the first step of a call, where `run.sums` is None.

  Raises:
    ValueError: the period is no whole number of steps.

  Example:
    >>> import contextlib, types
    >>> hook = Every(2, lambda run: print(run.step))
    >>> run = types.SimpleNamespace(start=4, apart=contextlib.nullcontext)
    >>> for run.step in range(4, 8):
    ...   run.ending = run.step == 7
    ...   hook(run)
    6
    7
  """

  period: int
  action: Hook
  at_start: bool = False

  def __post_init__(self):
    if not isinstance(self.period, int) or self.period < 1:
      raise ValueError(
        f'Every.period must be a whole number of steps, at least 1, not '
        f'{self.period!r}.'
      )

  def __call__(self, run: Run) -> None:
    if run.step == run.start:
      due = self.at_start
    else:
      due = run.ending or run.step % self.period == 0
    if due:
      with run.apart():
        self.action(run)


class Log:
  """Metrics of the steps since it was last called, written and shown.

  `seconds_per_step` is the mean of these steps, see `Run.seconds`; speeds are
  means since the first step of the call, with all that was done between.
  """

  def __init__(self, progress: Progress, rate: optax.Schedule):
    """Shows them by `progress`, with the learning rate at each."""
    self._progress, self._rate, self._total = progress, rate, Total()
    self._timed: tuple[int, float] | None = None

  def add(self, run: Run) -> None:
    """A hook for every step: it waits for the step before alone."""
    if run.sums is not None:
      self._total.add(run.sums)
      self._progress.step(run.step)
      self._timed = self._timed or (run.step, run.seconds)  # The first is not.

  def __call__(self, run: Run) -> None:
    sums, self._total = self._total.sums(), Total()
    metrics = run.summary(sums)
    # Of the last update: the optimizer has not counted the steps that were
    # skipped. Before any update, of the first.
    update = max(run.step - 1 - int(run.state.skipped), 0)
    metrics['learning_rate'] = float(self._rate(update))
    metrics |= self._progress.report(run.step, metrics, sums['tokens'])
    if self._timed is not None and run.step > self._timed[0]:
      step, seconds = self._timed
      metrics['seconds_per_step'] = (run.seconds - seconds) / (run.step - step)
      self._timed = run.step, run.seconds
    run.write('train', metrics)
    run.results['train'] = metrics


@dataclasses.dataclass(frozen=True)
class Evaluate:
  """The held-out loss of the parameters as they are, written and shown.

  Attributes:
    evaluation: parameters -> metrics with 'loss', see `held_out`.
    headline: another of them to show, see `Objective.headline`; or None.
  """

  evaluation: Callable[[Any], dict[str, Any]]
  headline: str | None = None

  def __call__(self, run: Run) -> None:
    metrics = self.evaluation(run.state.params)
    if run.step > run.start or not run.start:  # Else no step was taken since.
      run.write('eval', metrics)
    text = f'step {run.step}  held-out loss {metrics["loss"]:.4f}'
    if self.headline is not None:  # '-name' where less is better.
      name = self.headline.removeprefix('-')
      text += f'  {name} {metrics[name]:.4f}'
    run.say(text)
    if run.step == run.start:
      run.results['eval_before'] = metrics
    run.results |= {'eval': metrics, 'eval_step': run.step}


@dataclasses.dataclass(frozen=True)
class Save:
  """Saves a checkpoint, once `checks` find nothing wrong with the run."""

  saver: Saver
  data: DataArgs
  checks: Sequence[Callable[[], None]]

  def __call__(self, run: Run) -> None:
    for check in self.checks:
      check()
    self.saver.save(run.state, self.data)


class Trace:
  """Traces a range of steps for a profiler, by two hooks.

  `stop` comes before all that is not the step, `start` after it.
  """

  def __init__(self, directory: epath.Path, steps: tuple[int, int] | None):
    """Steps (start, stop) of a run, into `directory`; None: nothing."""
    self._directory, self._steps = directory, steps or (0, 0)
    self._tracing = False

  def start(self, run: Run) -> None:
    first, stop = self._steps
    if first <= run.step < stop and not (self._tracing or run.ending):
      jax.profiler.start_trace(str(self._directory))
      self._tracing = True

  def stop(self, run: Run) -> None:
    if run.step in (self._steps[1], run.stop):
      if self._tracing:
        jax.block_until_ready(run.state)
      self.close()

  def close(self) -> None:
    """Ends a trace that is not complete."""
    if self._tracing:
      jax.profiler.stop_trace()
      self._tracing = False

"""SIGTERM asks a run to save and stop; every process stops at one step."""

from __future__ import annotations

import signal
import threading

import jax
from jax.experimental import multihost_utils

from sparse_experts.training.loop import Run


class Preemption:
  """Whether the run was asked to stop."""

  def __init__(self):
    self._asked = False
    alone = jax.process_count() == 1
    if alone and threading.current_thread() is threading.main_thread():
      self._previous = signal.signal(signal.SIGTERM, self._ask)

  def reached(self, step: int) -> bool:
    """True at the step after which all processes are to save and stop."""
    if jax.process_count() == 1:
      return self._asked
    return multihost_utils.reached_preemption_sync_point(step)

  def __call__(self, run: Run) -> None:
    """A hook: the run is to stop after a step at which it was asked to."""
    if run.step > run.start:
      run.preempted = self.reached(run.step)

  def close(self) -> None:
    """Hands SIGTERM back to whoever had it."""
    if hasattr(self, '_previous'):
      signal.signal(signal.SIGTERM, self._previous)

  def _ask(self, *_):
    self._asked = True

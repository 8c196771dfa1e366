"""SIGTERM and Ctrl-C ask a run to save and stop, all processes at one step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import multihost_utils

from sparse_experts.training.loop import Run


class Preemption:
  """Whether the run was asked to stop.

  Until it listens there is nothing to save: a signal ends the process as it did
  before. The second Ctrl-C ends it at once, and leaves the last complete step.
  """

  def __init__(self):
    self._leave: Callable[[], None] = lambda: None
    self._heard: signal.Signals | None = None
    self._heeded = False
    self._previous = {}

  def leave_by(self, leave: Callable[[], None]) -> None:
    """Calls `leave` first where a signal ends what has not begun."""
    self._leave = leave

  def listen(self, which: signal.Signals = signal.SIGTERM) -> None:
    """Takes a signal. SIGTERM of several processes is JAX's to take."""
    self._take(which, self._ask)

  def reached(self, step: int) -> bool:
    """True at the step after which all processes are to save and stop."""
    if jax.process_count() == 1:
      return self._heard is not None
    return multihost_utils.reached_preemption_sync_point(step)

  def __call__(self, run: Run) -> None:
    """A hook: the run is to stop after a step at which it was asked to."""
    if run.step == run.start:  # Until now there was nothing to save.
      self.listen(signal.SIGINT)
    elif self.reached(run.step):
      run.preempted = self._heeded = True
      run.results['signal'] = (self._heard or signal.SIGTERM).name

  def __enter__(self) -> Preemption:
    for which in (signal.SIGTERM, signal.SIGINT):
      if signal.getsignal(which) not in (signal.SIG_IGN, None):
        self._take(which, self._end)
    return self

  def __exit__(self, kind, *_) -> None:
    """Hands the signals back, and a Ctrl-C that came too late to be heeded.

    Raises:
      KeyboardInterrupt: it came after the last step, and nothing else is wrong.
    """
    for which, previous in self._previous.items():
      signal.signal(which, previous)
    if kind is None and self._heard == signal.SIGINT and not self._heeded:
      raise KeyboardInterrupt

  def _take(self, which: signal.Signals, handler: Callable) -> None:
    alone = jax.process_count() == 1 or which != signal.SIGTERM
    if alone and threading.current_thread() is threading.main_thread():
      self._previous.setdefault(which, signal.getsignal(which))
      signal.signal(which, handler)

  def _end(self, which: int, frame: Any) -> None:
    """Ends the process as the signal would have."""
    self._leave()
    previous = self._previous[which]
    signal.signal(which, previous)
    if callable(previous):
      previous(which, frame)
    else:
      signal.raise_signal(which)

  def _ask(self, which: int, _) -> None:
    self._heard = signal.Signals(which)
    if self._heard == signal.SIGINT:
      signal.signal(signal.SIGINT, signal.SIG_DFL)
      if jax.process_count() > 1:
        signal.raise_signal(signal.SIGTERM)

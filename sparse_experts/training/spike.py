"""Spikes: steps whose loss stands out are written down, to be replayed."""

from __future__ import annotations

import collections
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from sparse_experts.models.sums import Sums
from sparse_experts.training.loop import Run


class Spikes:
  """A hook that writes MODEL_DIR/spikes/<step>.json for each spike.

  A step is a spike where

      loss > mean + deviations * standard deviation

  of the losses of the `window` steps before it, spikes among them, so that a
  loss which stays high is soon none. The loss is what was trained on, with its
  auxiliary ones. Steps that were skipped are spikes too, and not in the window.
  Before the window is full no other is. It begins empty in every call: a run
  that is resumed judges `window` steps later.

  It reads the losses of the step before, so no step waits for it. The file has
  'step', 'metrics' (see `metrics`), and the 'mean' and 'deviation' it was
  judged by; `train --replay=STEP` records what the step's tokens did.
  """

  def __init__(self, window: int = 100, deviations: float = 6.0):
    """Judges steps by the last `window` of them.

    Raises:
      ValueError: a window without a deviation, or deviations not positive.
    """
    if not isinstance(window, int) or window < 2:
      raise ValueError(
        f'Spikes.window must be a number of steps, at least 2, not {window!r}.'
      )
    if not deviations > 0:
      raise ValueError(
        f'Spikes.deviations must be above 0, not {deviations!r}; 6 is rare.'
      )
    self._deviations = deviations
    self._losses = collections.deque(maxlen=window)
    self._last: tuple[int, Sums] | None = None

  def __call__(self, run: Run) -> None:
    self._judge(run)
    if run.sums is not None:
      self._last = (run.step, run.sums)
    if run.ending:
      self._judge(run)

  def _judge(self, run: Run) -> None:
    """Judges the step that is waiting, if any."""
    if self._last is None:
      return
    (step, sums), self._last = self._last, None
    skipped = bool(sums['skipped'])
    loss = math.nan if skipped else _objective(jax.device_get(sums))
    judged_by = {}
    if len(self._losses) == self._losses.maxlen:
      mean, deviation = np.mean(self._losses), np.std(self._losses, ddof=1)
      judged_by = {'mean': float(mean), 'deviation': float(deviation)}
    if not skipped:
      self._losses.append(loss)
    if skipped or (
      judged_by
      and loss > judged_by['mean'] + self._deviations * judged_by['deviation']
    ):
      found = metrics(run.summary, sums)
      path = run.model_dir / 'spikes' / f'{step}.json'
      write(path, {'step': step, 'metrics': found, **judged_by})
      run.say(f'step {step} is a spike: {path}')


def metrics(
  summary: Callable[[Sums], Mapping[str, Any]], sums: Sums
) -> dict[str, Any]:
  """Metrics of one step, for JSON, with what was trained on as 'objective'.

  Args:
    summary, sums: as of the `loop.Run`.
  """
  sums = jax.tree.map(np.float64, jax.device_get(sums))
  found = dict(summary(sums))
  if not found['skipped']:
    found['objective'] = _objective(sums)
  return jax.tree.map(lambda x: np.asarray(x).tolist(), found)


def _objective(sums: Sums) -> float:
  """Mean over microbatches."""
  return float(sums['objective']) / float(sums['batches'])


def write(path: epath.Path, facts: Mapping[str, Any]) -> None:
  """Writes a JSON file, whole or not at all, in process 0."""
  if jax.process_index() == 0:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.parent / f'{path.name}.partial'
    partial.write_text(json.dumps(facts, indent=2) + '\n')
    partial.replace(path)

"""Where metrics go: TensorBoard through clu, and metrics.jsonl beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from sparse_experts import storage

# What every line has; all else are metrics.
_KINDS = {'step': (int, 'a whole number'), 'name': (str, 'a text')}


class Writers:
  """Scalars to MODEL_DIR/tensorboard/<name>/ and MODEL_DIR/metrics.jsonl.

  Process 0 writes; the others do nothing.
  """

  def __init__(self, model_dir: epath.PathLike, step: int | None = None):
    """Opens them for more, without half a line at their end.

    Args:
      model_dir: of the run.
      step: where it goes on. Lines of later steps, which a kill has cost it,
        are cut off; TensorBoard's files keep theirs.
    """
    self._dir = epath.Path(model_dir)
    self._lines = self._dir / 'metrics.jsonl'
    self._summaries: dict[str, Any] = {}
    if jax.process_index() == 0:
      storage.mend_lines(self._lines)
      if step is not None:
        self._forget_after(step)

  def write(self, name: str, step: int, metrics: Mapping[str, Any]) -> None:
    """Writes metrics of a step, in process 0.

    Args:
      name: whose they are, such as 'train': a folder of tensorboard/.
      step: the run's.
      metrics: numbers, [E] arrays, whose entries are written by index, and
        dictionaries of such.
    """
    if jax.process_index() != 0:
      return
    scalars = dict(_scalars(metrics))
    line = json.dumps({'step': step, 'name': name, **scalars})
    with self._writing():
      # First, for it makes no folder: one that was deleted stays so.
      with self._lines.open('a') as file:
        file.write(line + '\n')
      if name not in self._summaries:
        from clu import metric_writers  # Imports TensorFlow.

        self._summaries[name] = metric_writers.SummaryWriter(
          str(self._dir / 'tensorboard' / name)
        )
      self._summaries[name].write_scalars(step, scalars)

  def close(self) -> None:
    with self._writing():
      for summary in self._summaries.values():
        summary.close()

  def _forget_after(self, step: int) -> None:
    """Leaves the lines that a run has written up to a step."""
    if not self._lines.exists():
      return
    lines = read(self._lines)
    kept = [line for line in lines if line['step'] <= step]
    if kept != lines:
      text = ''.join(json.dumps(line) + '\n' for line in kept)
      storage.replace(self._lines, text.encode())

  def _writing(self):
    return storage.writing(
      f'metrics in {self._dir}',
      'the same command goes on from the latest step once that is mended',
    )


def read(path: epath.Path) -> list[dict[str, Any]]:
  """The lines of a metrics.jsonl: 'step', 'name', and numbers.

  Raises:
    ValueError: a line is damaged, or something else.
  """
  return storage.read_lines(path, _check)


def _check(line: Mapping[str, Any]) -> None:
  for name, value in {**dict.fromkeys(_KINDS), **line}.items():
    kind, what = _KINDS.get(name, ((int, float), 'a number'))
    if not isinstance(value, kind) or isinstance(value, bool):
      raise ValueError(f'{name!r} must be {what}, not {value!r:.80}')


def _scalars(metrics: Mapping[str, Any], prefix: str = ''):
  for name, value in metrics.items():
    if isinstance(value, Mapping):
      yield from _scalars(value, f'{prefix}{name}/')
    elif np.ndim(value):
      for i, element in enumerate(value):
        yield f'{prefix}{name}/{i}', float(element)
    else:
      yield f'{prefix}{name}', float(value)

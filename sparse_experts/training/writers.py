"""Where metrics go: TensorBoard through clu, and metrics.jsonl beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath


class Writers:
  """Scalars to MODEL_DIR/tensorboard/<name>/ and MODEL_DIR/metrics.jsonl.

  Process 0 writes; the others do nothing.
  """

  def __init__(self, model_dir: epath.PathLike):
    self._dir = epath.Path(model_dir)
    self._summaries: dict[str, Any] = {}

  def write(self, name: str, step: int, metrics: Mapping[str, Any]) -> None:
    """Writes a (nested) dictionary of metrics; per-expert arrays by index."""
    if jax.process_index() != 0:
      return
    scalars = dict(_scalars(metrics))
    if name not in self._summaries:
      from clu import metric_writers  # Imports TensorFlow.

      self._summaries[name] = metric_writers.SummaryWriter(
        str(self._dir / 'tensorboard' / name)
      )
    self._summaries[name].write_scalars(step, scalars)
    line = json.dumps({'step': step, 'name': name, **scalars})
    with (self._dir / 'metrics.jsonl').open('a') as file:
      file.write(line + '\n')

  def close(self) -> None:
    for summary in self._summaries.values():
      summary.close()


def _scalars(metrics: Mapping[str, Any], prefix: str = ''):
  for name, value in metrics.items():
    if isinstance(value, Mapping):
      yield from _scalars(value, f'{prefix}{name}/')
    elif np.ndim(value):
      for i, element in enumerate(value):
        yield f'{prefix}{name}/{i}', float(element)
    else:
      yield f'{prefix}{name}', float(value)

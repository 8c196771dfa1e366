"""What a run has written down: its curves, by name and step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from etils import epath

from sparse_experts.training import writers


class Curve(NamedTuple):
  """Values at steps, both [T], in order of steps."""

  steps: np.ndarray
  values: np.ndarray


class Band(NamedTuple):
  """The least, mean and largest values at steps, all [T]."""

  steps: np.ndarray
  low: np.ndarray
  mean: np.ndarray
  high: np.ndarray


def read(model_dir: epath.PathLike) -> dict[str, dict[str, Curve]]:
  """The curves of MODEL_DIR/metrics.jsonl.

  Of a step that stands there twice, as after a kill, the later one counts.

  Returns:
    'train', 'eval', 'evaluation/...' -> 'loss', 'learning_rate',
    'layers/decoder/layers_1/imbalance', ... -> Curve.

  Raises:
    FileNotFoundError: there is none. ValueError: it is damaged.
  """
  path = epath.Path(model_dir) / 'metrics.jsonl'
  if not path.exists():
    raise FileNotFoundError(
      f'{model_dir} has no metrics.jsonl; give the MODEL_DIR of a run that has '
      'logged a step.'
    )
  points: dict[str, dict[str, dict[int, float]]] = {}
  for metrics in writers.read(path):
    name, step = metrics.pop('name'), metrics.pop('step')
    for key, value in metrics.items():
      points.setdefault(name, {}).setdefault(key, {})[step] = value
  return {
    name: {key: _curve(at) for key, at in curves.items()}
    for name, curves in points.items()
  }


def layers(curves: Mapping[str, Curve]) -> list[str]:
  """The sparse layers that curves tell of, in the order they were written."""
  names = (
    key.removeprefix('layers/').rpartition('/')[0]
    for key in curves
    if key.startswith('layers/') and key.endswith('/imbalance')
  )
  return list(dict.fromkeys(names))


def load_over_time(
  curves: Mapping[str, Curve], layer: str
) -> tuple[np.ndarray, np.ndarray]:
  """Steps [T], and the load of each expert of a layer at each, [T, E]."""
  loads = []
  while (key := f'layers/{layer}/load_E/{len(loads)}') in curves:
    loads.append(curves[key])
  if not loads:
    raise ValueError(
      f'no curve tells the load of {layer!r}; there are '
      f'{", ".join(layers(curves)) or "no sparse layers"}.'
    )
  return loads[0].steps, np.stack([curve.values for curve in loads], -1)


def seconds(train: Mapping[str, Curve]) -> Curve | None:
  """Of training up to each step: without compiling, evaluating and saving.

  The first step of a call, which compiles, counts as those that follow. What
  was done twice, because a run was stopped, counts once.

  Args:
    train: curves of a run's training.

  Returns:
    from (0, 0) to the last step that was logged; None: the run did not measure.
  """
  if 'seconds_per_step' not in train:
    return None
  steps, per_step = train['seconds_per_step']
  last = max(curve.steps[-1] for curve in train.values())
  if last > steps[-1]:  # A call that took one step measured none.
    steps, per_step = np.append(steps, last), np.append(per_step, per_step[-1])
  taken = np.diff(steps, prepend=0) * per_step
  return Curve(np.insert(steps, 0, 0), np.insert(np.cumsum(taken), 0, 0.0))


def band(of: Sequence[Curve]) -> Band:
  """Curves of several seeds as one, where all of them are.

  Between its own steps a curve is a straight line.
  """
  low = max(curve.steps[0] for curve in of)
  high = min(curve.steps[-1] for curve in of)
  at = np.unique(np.concatenate([curve.steps for curve in of]))
  at = at[(low <= at) & (at <= high)]
  values = np.stack([np.interp(at, *curve) for curve in of])
  return Band(at, values.min(0), values.mean(0), values.max(0))


def _curve(at: dict[int, float]) -> Curve:
  steps = sorted(at)
  return Curve(np.array(steps), np.array([at[step] for step in steps], float))

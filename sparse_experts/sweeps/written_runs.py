"""A run as it has written itself down: its settings and its curves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from sparse_experts import earlier
from sparse_experts.config import provenance
from sparse_experts.insight import curves
from sparse_experts.insight.curves import Curve
from sparse_experts.training import checkpoints

BUDGETS = ('steps', 'FLOPs', 'seconds')
_OF_A_RUN = ('SEED', 'MODEL_DIR')  # What runs of a group differ in.
# What a step or an evaluation writes that is not what it has reached.
_NO_METRICS = (
  'targets', 'skipped', 'gradient_norm', 'learning_rate', 'steps_per_second',
  'seconds_per_step', 'tokens_per_second_with_padding',
  'tokens_per_second_without_padding',
)  # fmt: skip


class Run(NamedTuple):
  """A run as it has written itself down.

  Attributes:
    model_dir: where it lies.
    seed: its SEED; 0 where its configuration has none.
    settings: values of its configuration as text, by name, but for its seed
      and its place; and 'data', digests of what it has read.
    metrics: curves by name, such as 'loss': held-out ones where there are any,
      else those of training.
    held_out: whether they are.
    evaluated: settings of evaluations of tasks, as text, by task and split.
    machine: what it ran on, where it says so; '' else.
    seconds: of training up to a step; None where it did not measure.
    flops: useful ones of a step; None where they cannot be counted.
  """

  model_dir: epath.Path
  seed: int
  settings: Mapping[str, str]
  metrics: Mapping[str, Curve]
  held_out: bool
  evaluated: Mapping[str, str]
  machine: str
  seconds: Curve | None
  flops: int | None

  def by(self, budget: str, metric: str) -> Curve | None:
    """A metric over what it cost: one of BUDGETS."""
    steps, values = self.metrics[metric]
    if budget == 'steps':
      return Curve(steps, values)
    if budget == 'FLOPs' and self.flops is not None:
      return Curve(steps * float(self.flops), values)
    if budget == 'seconds' and self.seconds is not None:
      return Curve(np.interp(steps, *self.seconds), values)
    return None


def read(model_dir: epath.PathLike) -> Run:
  """A run from its folder, whose FLOPs are not counted.

  Args:
    model_dir: of a run.

  Raises:
    FileNotFoundError: it has no metrics.jsonl or no config.gin.
  """
  root = epath.Path(model_dir)
  history = curves.read(root)
  file = root / 'config.gin'
  if not file.exists():
    raise FileNotFoundError(
      f'{model_dir} has no config.gin, which says what its runs differ in: '
      'give the MODEL_DIR of a run that `train` has made.'
    )
  bindings = provenance.written(earlier.translate(file.read_text()))
  seed: Any = bindings.get('SEED', 0)
  while provenance.is_macro(seed):
    seed = bindings.get(seed[1:])
  if type(seed) is not int:
    raise ValueError(f'{file} has SEED = {seed!r}, which is no whole number.')
  settings = {k: repr(v) for k, v in bindings.items() if k not in _OF_A_RUN}
  if data := _data(root):
    settings['data'] = data
  metrics = _held_out(history)
  seconds = curves.seconds(history['train']) if 'train' in history else None
  return Run(
    root,
    seed,
    settings,
    metrics or _metrics(history.get('train', {})),
    bool(metrics),
    _evaluated(root),
    _machine(root),
    seconds,
    flops=None,
  )


def _held_out(history: Mapping[str, Mapping[str, Curve]]) -> dict[str, Curve]:
  """Metrics of evaluations; those of tasks with the task's name before it."""
  found = _metrics(history.get('eval', {}))
  for name, of_task in history.items():
    if name.startswith('evaluation/'):
      task = name.removeprefix('evaluation/')
      found |= {f'{task}/{k}': v for k, v in _metrics(of_task).items()}
  return found


def _metrics(found: Mapping[str, Curve]) -> dict[str, Curve]:
  return {
    name: curve
    for name, curve in found.items()
    if not name.startswith('layers/') and name not in _NO_METRICS
  }


def _data(root: epath.Path) -> str | None:
  """Digests of the data of a run, as its last checkpoint has them."""
  steps = checkpoints.steps(root)
  if not steps:
    return None
  file = checkpoints.directory_of(root) / str(steps[-1]) / 'data/batches.json'
  if not file.exists():
    return None
  corpus = json.loads(file.read_text()).get('corpus') or {}
  return ', '.join(f'{name} {digest}' for name, digest in corpus.items())


def _evaluated(root: epath.Path) -> dict[str, str]:
  """Settings of the last evaluation of each task and split."""
  found = {}
  for file in sorted((root / 'evaluation').glob('*.json')):
    results = json.loads(file.read_text())
    name = file.stem.rpartition('-')[0]
    if isinstance(results, dict) and 'settings' in results:
      found[name] = json.dumps(results['settings'])
  return found


def _machine(root: epath.Path) -> str:
  file = root / 'hardware.json'
  if not file.exists():
    return ''
  facts = json.loads(file.read_text())
  return ', '.join(str(facts.get(name)) for name in ('devices', 'host'))

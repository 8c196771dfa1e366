"""What the runs of a sweep came to, and what of them stays on the disk."""

from __future__ import annotations

import ast
import json
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from sparse_experts import storage
from sparse_experts.insight import curves
from sparse_experts.sweeps import identity
from sparse_experts.sweeps.grid import Point
from sparse_experts.training import checkpoints, checksums

FILE = 'results.jsonl'


def steps_taken(model_dir: pathlib.Path) -> int:
  """The last step that a run has saved, 0 before the first."""
  return max(checkpoints.steps(model_dir), default=0)


def of(
  model_dir: pathlib.Path, point: Point, flops_per_step: int, inputs: str
) -> dict[str, Any]:
  """A line of results.jsonl.

  Args:
    model_dir: of a run that is finished.
    point: which it is.
    flops_per_step: useful ones, see `planning.ledger`.
    inputs: of the run, see `identity.inputs`.

  Returns:
    'overrides', values by name; 'seed'; 'run', its folder's name; 'step', the
    last one; 'eval', the last metrics of an evaluation but those of layers, {}
    where nothing is held out; 'seconds', of its steps' training, without
    compiling and evaluating; 'flops' of all its steps; 'code', the digest of
    the package's source; 'inputs', that of its data, files and own modules.
  """
  found = curves.read(model_dir)
  seconds = curves.seconds(found['train'])
  step = steps_taken(model_dir)
  last = {
    name: _number(curve.values[-1])
    for name, curve in found.get('eval', {}).items()
    if not name.startswith('layers/')
  }
  return {
    'overrides': {k: _plain(v) for k, v in point.overrides.items()},
    'seed': point.seed,
    'run': model_dir.name,
    'step': step,
    'eval': last,
    'seconds': None if seconds is None else round(float(seconds.values[-1]), 2),
    'flops': flops_per_step * step,
    'code': identity.code(),
    'inputs': inputs,
  }


def _plain(value: str) -> Any:
  """A number, text or tuple, where JSON has one; it has lists for tuples."""
  try:
    found = ast.literal_eval(value)
    json.dumps(found, allow_nan=False)
    return found
  except (ValueError, SyntaxError, TypeError):  # '@top_k.TopK', a path, a set.
    return value


def _number(value: float) -> float | None:
  """JSON has none that are not finite."""
  return float(value) if np.isfinite(value) else None


class Seen(dict):
  """The last step and held-out loss of runs, read where they wrote more."""

  def of(self, model_dir: pathlib.Path) -> tuple[int, str]:
    file = epath.Path(model_dir) / 'metrics.jsonl'
    size = file.stat().length if file.exists() else 0
    if self.get(model_dir, (-1,))[0] != size:
      found = curves.read(model_dir) if size else {}
      losses = [kind['loss'] for kind in found.values() if 'loss' in kind]
      step = max((int(curve.steps[-1]) for curve in losses), default=0)
      held_out = found.get('eval', {}).get('loss')
      loss = '' if held_out is None else f'{held_out.values[-1]:.4f}'
      self[model_dir] = size, (step, loss)
    return self[model_dir][1]


def write(folder: epath.PathLike, lines: list[dict[str, Any]]) -> int:
  """Writes results.jsonl, whole or not at all.

  Lines of other runs that are there, of an earlier sweep of this folder by the
  same code, stay before these, which follow in the order given, whichever was
  written first. A run that both asked for has one line, with the overrides of
  both.

  Returns:
    how many lines of other code were there, and are no more.
  """
  folder = epath.Path(folder)
  if not folder.exists():
    raise ValueError(
      f'{folder} is not there, so nothing was run in it: start its runs first, '
      'or give the --output that they were started with.'
    )
  before = {line['run']: line for line in _lines(folder)}
  there = [
    line for line in before.values() if (folder / 'runs' / line['run']).exists()
  ]
  code = identity.code()
  kept = {x['run']: x for x in there if x.get('code', code) == code}
  for line in lines:
    earlier = kept.pop(line['run'], {}).get('overrides', {})
    both = {**earlier, **line.get('overrides', {})}
    kept[line['run']] = {**line, 'overrides': both}
  text = ''.join(
    json.dumps(line, allow_nan=False) + '\n' for line in kept.values()
  )
  storage.replace(folder / FILE, text.encode())
  return sum(line.get('code', code) != code for line in there)


def finished(folder: epath.Path) -> list[epath.Path] | None:
  """MODEL_DIRs of the finished runs of a sweep; None: it is not a sweep's."""
  if not (folder / FILE).exists():
    return None
  return [folder / 'runs' / line['run'] for line in _lines(folder)]


def _lines(folder: epath.PathLike) -> list[dict[str, Any]]:
  path = epath.Path(folder) / FILE
  return storage.read_lines(path, _check) if path.exists() else []


def _check(line: Mapping[str, Any]) -> None:
  if not isinstance(line.get('run'), str):
    raise ValueError("it must have 'run', the name of a folder")


def slim(model_dir: pathlib.Path) -> None:
  """Leaves the parameters of the last step, and their average if it has one.

  The optimizer's state goes, so that the run cannot go on; not where the
  average of the parameters is in it, see `training.ema`.
  """
  kept = steps_taken(model_dir)
  folder = checkpoints.directory_of(model_dir)
  for step in checkpoints.steps(model_dir):
    path = pathlib.Path(folder / str(step))
    if step != kept:
      shutil.rmtree(path)
    elif (path / 'optimizer').exists() and not checkpoints.has_average(path):
      checksums.forget(path, 'optimizer')
      shutil.rmtree(path / 'optimizer')


def gigabytes(folder: pathlib.Path) -> float:
  """Of all files below a folder."""
  total = 0
  for root, _, names in os.walk(folder):
    for name in names:
      try:
        total += (pathlib.Path(root) / name).stat().st_size
      except FileNotFoundError:  # A run's, renamed just now.
        continue
  return total / 1e9

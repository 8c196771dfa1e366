"""What the runs of a sweep came to, and what of them stays on the disk."""

from __future__ import annotations

import ast
import json
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

from etils import epath

from sparse_experts import storage
from sparse_experts.insight import curves
from sparse_experts.sweeps.grid import Point
from sparse_experts.training import checkpoints, checksums

FILE = 'results.jsonl'


def steps_taken(model_dir: pathlib.Path) -> int:
  """The last step that a run has saved, 0 before the first."""
  return max(checkpoints.steps(model_dir), default=0)


def of(
  model_dir: pathlib.Path, point: Point, flops_per_step: int
) -> dict[str, Any]:
  """A line of results.jsonl.

  Args:
    model_dir: of a run that is finished.
    point: which it is.
    flops_per_step: useful ones, see `planning.ledger`.

  Returns:
    'overrides', values by name; 'seed'; 'run', its folder's name; 'step', the
    last one; 'eval', the last metrics of an evaluation but those of layers, {}
    where nothing is held out; 'seconds', of its steps' training, without
    compiling and evaluating; 'flops' of all its steps.
  """
  found = curves.read(model_dir)
  seconds = curves.seconds(found['train'])
  step = steps_taken(model_dir)
  last = {
    name: float(curve.values[-1])
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
  }


def _plain(value: str) -> Any:
  """A number, text or tuple, where it is one; JSON has lists for tuples."""
  try:
    return ast.literal_eval(value)
  except (ValueError, SyntaxError):  # '@top_k.TopK', a path.
    return value


def write(folder: pathlib.Path, lines: list[dict[str, Any]]) -> None:
  """Writes results.jsonl, whole or not at all.

  Lines of other runs that are there, of an earlier sweep of this folder, stay
  before these.
  """
  ours = {line['run'] for line in lines}
  others = [
    line
    for line in _lines(folder)
    if line['run'] not in ours and (folder / 'runs' / line['run']).exists()
  ]
  text = ''.join(json.dumps(line) + '\n' for line in [*others, *lines])
  storage.replace(epath.Path(folder / FILE), text.encode())


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
  """Leaves the parameters of the last step, which is all that is read of it.

  The optimizer's state goes, so that the run cannot go on.
  """
  kept = steps_taken(model_dir)
  folder = checkpoints.directory_of(model_dir)
  for step in checkpoints.steps(model_dir):
    path = pathlib.Path(folder / str(step))
    if step != kept:
      shutil.rmtree(path)
    elif (path / 'optimizer').exists():
      shutil.rmtree(path / 'optimizer')
      checksums.forget(path, 'optimizer')


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

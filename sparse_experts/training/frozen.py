"""Parameters beside those that are trained, such as a teacher's.

    MODEL_DIR/frozen/<name>/{config.gin, checkpoints/<step>/params, origin.json}

They are copied there once, by files, from the run that they come from, which
the run here needs no more: the copy is itself a run's directory, with one
checkpoint that has parameters alone. They are in no checkpoint, gradient or
optimizer; the step is given them, and its loss finds them among the parameters
by their names (`Objective.frozen`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath
from jax.experimental import multihost_utils

from sparse_experts.models.objective import Frozen, Objective
from sparse_experts.training import checkpoints, checksums, directories

_PART = 2**24  # Bytes read at once.


def copy_of(model_dir: epath.PathLike, name: str) -> epath.Path:
  """Where a run keeps the parameters of this name."""
  return directories.absolute(model_dir) / 'frozen' / name


def abstract(
  model: Objective, shapes: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, Any]:
  """Shapes and axis names of all frozen parameters; costs no memory.

  Args:
    model: the model.
    shapes: of a batch.

  Raises:
    ValueError: the module has parameters of such a name.
  """
  if not model.frozen:
    return {}

  def init(objective):  # Of a key that is no array: there may be no device.
    return jax.eval_shape(lambda: objective.init(jax.random.key(0), shapes))

  own = init(model)
  for name in model.frozen:
    if name in own:
      raise ValueError(
        f'the module has parameters {name!r}, the name of frozen ones: rename '
        'the submodule.'
      )
  return {name: init(of.objective) for name, of in model.frozen.items()}


def check(
  model: Objective,
  model_dir: epath.PathLike,
  boxed: Mapping[str, Any],
  *,
  begun: bool,
) -> None:
  """Whether `load` will find what is frozen; writes nothing.

  Args:
    model: the model.
    model_dir: of the run.
    boxed: from `abstract`.
    begun: the run has a checkpoint, so it has copies.

  Raises:
    FileNotFoundError: there is no checkpoint to copy.
    ValueError: a copy is missing, of another architecture, or not of the
      checkpoint that is asked for. One that is not there any more is not asked.
  """
  for name, of in model.frozen.items():
    copy = copy_of(model_dir, name)
    if copy.exists():
      _check_same(copy, of)
    elif begun:
      raise ValueError(
        f'{model_dir} has checkpoints, but not the {name} they were trained '
        f'with, {copy}: restore it, or begin another MODEL_DIR.'
      )
    source = copy if copy.exists() else of.directory
    checkpoints.check_params(source, boxed[name])


def load(
  model: Objective,
  model_dir: epath.PathLike,
  boxed: Mapping[str, Any],
  placed: Mapping[str, Any],
) -> dict[str, Any]:
  """All frozen parameters, once `check` has passed, each where `placed` says.

  Args:
    model: the model.
    model_dir: of the run; what it does not have yet is copied there.
    boxed, placed: from `abstract`, and its shardings.
  """
  found = {}
  for name, of in model.frozen.items():
    copy = copy_of(model_dir, name)
    if not copy.exists():
      _copy(of, copy)
    found[name], _ = checkpoints.load_params(copy, boxed[name], placed[name])
  return found


def _copy(of: Frozen, copy: epath.Path) -> None:
  """Copies the newest checkpoint's parameters; whole or not at all."""
  path, step = checkpoints.find(of.directory)
  checkpoints.verify(path, 'params')
  if jax.process_index() == 0:
    partial = copy.parent / f'{copy.name}.partial'
    if partial.exists():
      partial.rmtree()
    params = partial / 'checkpoints' / str(step) / 'params'
    for name in checksums.files(path / 'params'):
      (params / name).parent.mkdir(parents=True, exist_ok=True)
      (path / 'params' / name).copy(params / name)
    config = checkpoints.root_of(of.directory) / 'config.gin'
    if config.exists():
      config.copy(partial / 'config.gin')
    origin = {
      'directory': str(of.directory),
      'step': step,
      'files_sha256': _digest(params),
    }
    checksums.write(params.parent)
    (partial / 'origin.json').write_text(json.dumps(origin, indent=2) + '\n')
    partial.rename(copy)
  multihost_utils.sync_global_devices(f'copied {copy}')


def _check_same(copy: epath.Path, of: Frozen) -> None:
  """Raises where another checkpoint is asked for than the one copied."""
  try:
    path, _ = checkpoints.find(of.directory)
  except FileNotFoundError:  # It may be gone: that is what a copy is for.
    return
  origin = json.loads((copy / 'origin.json').read_text())
  if _digest(path / 'params') != origin['files_sha256']:
    raise ValueError(
      f'this run has its {copy.name} from {origin["directory"]} at step '
      f'{origin["step"]}, and {path} is another one: give {copy}, where it is '
      'kept, or begin another MODEL_DIR.'
    )


def _digest(directory: epath.Path) -> str:
  """SHA-256 of names and bytes of all files."""
  sha = hashlib.sha256()
  for name in checksums.files(directory):
    sha.update(f'{name} {(directory / name).stat().length}\n'.encode())
    with (directory / name).open('rb') as file:
      while part := file.read(_PART):
        sha.update(part)
  return sha.hexdigest()

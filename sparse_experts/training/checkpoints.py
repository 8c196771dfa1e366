"""Checkpoints: parameters, optimizer and data iterator of a step, read.

    MODEL_DIR/checkpoints/<step>/{params,optimizer,data}/

`saver.Saver` writes them. What is read and what is said of damage are one
subject, hence more lines than others have.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import shlex
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import linen as nn
from jax.sharding import Mesh

from sparse_experts import sharding, storage
from sparse_experts.data.dataset import Dataset
from sparse_experts.data.streams import Batches
from sparse_experts.models.objective import Objective
from sparse_experts.training import checksums, directories
from sparse_experts.training.state import TrainState


def directory_of(model_dir: epath.PathLike) -> epath.Path:
  """Where the steps of a run lie."""
  return directories.absolute(model_dir) / 'checkpoints'


def root_of(path: epath.PathLike) -> epath.Path:
  """The MODEL_DIR of a path that `find` takes."""
  path = directories.absolute(path)
  return path.parent.parent if _names_step(path) else path


def steps(model_dir: epath.PathLike) -> list[int]:
  """The complete steps of a run, in order.

  Raises:
    ValueError: there is something else where they lie.
  """
  directory = directory_of(model_dir)
  if not directory.exists():
    return []
  if not directory.is_dir():
    raise ValueError(
      f'{directory} is a file, where the steps of a run lie: move it '
      'elsewhere, or choose another MODEL_DIR.'
    )
  paths = ocp.utils.checkpoint_steps_paths(directory)
  for path in paths:
    if not _is_number(path.name):  # Orbax takes it for a step.
      raise ValueError(
        f'{path} is no step of a run, which is named by a number such as 10: '
        'move it out of checkpoints.'
      )
  return sorted(int(path.name) for path in paths)


def find(path: epath.PathLike) -> tuple[epath.Path, int]:
  """The step directory at `path`: itself one, or a MODEL_DIR's latest.

  Raises:
    FileNotFoundError: there is no complete step.
  """
  path = directories.absolute(path)
  directory = directory_of(root_of(path))
  there = steps(root_of(path))
  step = int(path.name) if _names_step(path) else max(there, default=None)
  if step not in there:
    raise FileNotFoundError(
      f'no complete checkpoint in {path}; give a MODEL_DIR that was trained '
      'in, or one of its checkpoints/<step>.'
    )
  return directory / str(step), step


def saved_at(path: epath.PathLike, step: int) -> str:
  """When the parameters of a run's step were written, as ISO 8601.

  Tells one run's checkpoints from another's. `path` is as in `find`.
  """
  file = directory_of(root_of(path)) / str(step) / 'params' / '_METADATA'
  written = datetime.datetime.fromtimestamp(file.stat().mtime, datetime.UTC)
  return written.isoformat()


def load_params(
  path: epath.PathLike, boxed: Any = None, placed: Any = None
) -> tuple[Any, int]:
  """The parameters of a checkpoint, and its step.

  Args:
    path: see `find`.
    boxed, placed: shapes and shardings to restore to. Without, the arrays come
      as the checkpoint has them, on the host.

  Raises:
    FileNotFoundError: no checkpoint. ValueError: of another architecture, or
      damaged.
  """
  path, step = find(path)
  verify(path, 'params')
  if boxed is None:
    restore_args = jax.tree.map(
      lambda _: ocp.RestoreArgs(restore_type=np.ndarray),
      _saved_tree(path, 'params'),
    )
    args = ocp.args.PyTreeRestore(restore_args=restore_args)
    return _read(path, 'params', args), step
  return _read_to(path, 'params', nn.unbox(boxed), placed), step


def load_average(
  path: epath.PathLike, boxed: Any, placed: Any
) -> tuple[Any, int]:
  """The average of the parameters (`ema.averaged`), and its step.

  Args:
    path: see `find`.
    boxed, placed: shapes and shardings of the parameters.

  Raises:
    FileNotFoundError: no checkpoint. ValueError: of another architecture, or
      without an average, or damaged.
  """
  step = check_average(path, boxed)
  path, _ = find(path)
  verify(path, 'optimizer')
  target, placed = _averages(nn.unbox(boxed)), _averages(placed)
  optimizer = _read_to(path, 'optimizer', target, placed, partial=True)
  return optimizer['opt_state']['average'], step


def has_average(step: epath.PathLike) -> bool:
  """Whether the optimizer's state of a checkpoint has an `ema.averaged`."""
  saved = _saved_tree(epath.Path(step), 'optimizer')['opt_state']
  return isinstance(saved, Mapping) and 'average' in saved


def check_average(path: epath.PathLike, boxed: Any) -> int:
  """Raises as `load_average` would, by names and shapes; returns the step."""
  path, step = find(path)
  if not has_average(path):
    raise ValueError(
      f'checkpoint {path} has no average of the parameters; train with '
      "--gin_file=gin/ema.gin, or take those trained: PARAMETERS='trained'."
    )
  _check_same(path, 'optimizer', _averages(nn.unbox(boxed)), partial=True)
  return step


def _averages(tree: Any) -> dict[str, Any]:
  """Where the averages of a tree lie under `optimizer`."""
  return {'opt_state': {'average': tree}}


def restore(
  model_dir: epath.PathLike,
  step: int,
  boxed: TrainState,
  placed: TrainState,
  batches: Batches,
) -> TrainState:
  """The state of a run at `step`, each array where `placed` says.

  Any mesh and any number of processes will do. Nothing there changes.

  Args:
    model_dir: of the run.
    step: of one of its checkpoints.
    boxed, placed: shapes and shardings of the state.
    batches: continue where the run's did.

  Raises:
    ValueError: the checkpoint is of another architecture or other data, or
      damaged.
  """
  path = directory_of(model_dir) / str(step)
  verify(path)
  target = nn.unbox(boxed)
  params, optimizer = (
    _read_to(path, item, of(target), of(placed))
    for item, of in (
      ('params', lambda state: state.params),
      ('optimizer', optimizer_item),
    )
  )
  restore_data(model_dir, step, batches)
  return TrainState(params=params, **optimizer)


def restore_data(
  model_dir: epath.PathLike, step: int, batches: Batches
) -> None:
  """The part of `restore` that is the data.

  Args:
    model_dir: of the run.
    step: of one of its checkpoints.
    batches: continue where the run's did.

  Raises:
    ValueError: the checkpoint is of other data, or damaged.
  """
  path = directory_of(model_dir) / str(step)
  with _reading(path, checked=True):
    batches.restore(path / 'data')


def check_params(path: epath.PathLike, boxed: Any) -> int:
  """Raises as `load_params` would, by names and shapes; returns the step."""
  path, step = find(path)
  _check_same(path, 'params', nn.unbox(boxed), partial=False)
  return step


def check_state(path: epath.PathLike, boxed: TrainState) -> None:
  """Raises as `restore` would, by names and shapes."""
  check_params(path, boxed.params)
  path, _ = find(path)
  _check_same(path, 'optimizer', optimizer_item(nn.unbox(boxed)), partial=False)


# How they are read, and looked at.
PARAMETERS = {
  'trained': (load_params, check_params),
  'ema': (load_average, check_average),
}


def restore_params(
  model: Objective,
  model_dir: epath.PathLike,
  dataset: Dataset,
  mesh: Mesh,
  parameters: str = 'trained',
  dry_run: bool = False,
) -> tuple[Any, int]:
  """Unboxed parameters of a checkpoint on a mesh, and its step; see `find`.

  Args:
    parameters: those 'trained', or 'ema', the average that `ema.averaged` kept.
    dry_run: look whether they can be read, by names and shapes, and return
      None in their place.

  Raises:
    FileNotFoundError: no checkpoint. ValueError: of another architecture, or
      without such parameters.
  """
  if parameters not in PARAMETERS:
    raise ValueError(
      f'parameters are {" or ".join(PARAMETERS)}, not {parameters!r}.'
    )
  shapes = dataset.shapes(model.features)
  boxed = jax.eval_shape(lambda: model.init(jax.random.key(0), shapes))
  load, check = PARAMETERS[parameters]
  if dry_run:
    return None, check(model_dir, boxed)
  return load(model_dir, boxed, sharding.shardings(boxed, mesh))


def verify(path: epath.Path, *items: str) -> None:
  """Raises where a file of a step is not as it was written.

  Args:
    path: the step.
    items: 'params', 'optimizer', 'data'; all of them unless given. All
      processes ask for the same, and each reads its share.

  Raises:
    ValueError: one is not. Steps without checksums pass; a line says so.
  """
  if not checksums.there(path) and jax.process_index() == 0:
    print(
      f'{path} has no {checksums.NAME}: what is read of it is not verified',
      file=sys.stderr,
    )
  with _reading(path, checked=True):
    if found := checksums.damage(path, items, together=True):
      raise _damaged(path, found)


def digest(params: Mapping[str, Any]) -> str:
  """SHA-256 over names, shapes, dtypes and bytes of a tree of arrays."""
  sha = hashlib.sha256()
  for name, leaf in sorted(flatten(params).items()):
    leaf = np.asarray(leaf)
    sha.update(f'{name} {leaf.shape} {leaf.dtype}\n'.encode())
    sha.update(np.ascontiguousarray(leaf).tobytes())
  return sha.hexdigest()


def flatten(tree: Any) -> dict[str, Any]:
  """Leaves by `a/b/c` path."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): leaf
    for path, leaf in leaves
  }


def optimizer_item(state: TrainState) -> dict[str, Any]:
  """What lies under `optimizer`: all of the state but its parameters."""
  item = {
    'step': state.step,
    'opt_state': state.opt_state,
    'skipped': state.skipped,
  }
  return item | ({'balance': state.balance} if state.balance else {})


def _names_step(path: epath.Path) -> bool:
  return _is_number(path.name) and path.parent.name == 'checkpoints'


def _is_number(name: str) -> bool:
  """Whether a name is as `str` writes a number: not '007'."""
  return name.isdecimal() and name == str(int(name))


def _read_to(
  path: epath.Path, item: str, target: Any, placed: Any, partial: bool = False
) -> Any:
  """A saved item (`partial`: a part of it), of these shapes in these places."""
  _check_same(path, item, target, partial)
  restore_args = jax.tree.map(
    lambda leaf, sharding: ocp.ArrayRestoreArgs(
      sharding=sharding, global_shape=leaf.shape, dtype=leaf.dtype
    ),
    target,
    placed,
  )
  args = ocp.args.PyTreeRestore(
    target, restore_args=restore_args, partial_restore=partial
  )
  return _read(path, item, args)


def _read(path: epath.Path, item: str, args: ocp.args.PyTreeRestore) -> Any:
  checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
  with _reading(path):
    return checkpointer.restore(path / item, args=args)


def _check_same(
  path: epath.Path, item: str, target: Any, partial: bool
) -> None:
  """Raises where the saved item's names or shapes are not the target's."""
  saved = {
    name: tuple(leaf.shape)
    for name, leaf in flatten(_saved_tree(path, item)).items()
  }
  ours = {name: tuple(leaf.shape) for name, leaf in flatten(target).items()}
  for name in sorted(ours if partial else saved.keys() | ours.keys()):
    if saved.get(name) != ours.get(name):
      raise ValueError(
        f'checkpoint {path} is of another architecture: {item}/{name} is '
        f'{saved.get(name, "absent")} there and {ours.get(name, "absent")} in '
        'this model; use its own gin files, or another MODEL_DIR.'
      )


def _saved_tree(path: epath.Path, item: str) -> Any:
  """Shapes and dtypes of a saved item."""
  checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
  with _reading(path):
    metadata = checkpointer.metadata(path / item).item_metadata
    if metadata is None:
      raise FileNotFoundError(f'{item} has no metadata')
    return metadata.tree


@contextlib.contextmanager
def _reading(path: epath.Path, checked: bool = False) -> Iterator[None]:
  """Turns whatever reading a damaged checkpoint raises into one line.

  Args:
    path: the step.
    checked: a plain ValueError is the reader's own line about other data.
  """
  try:
    yield
  except Exception as error:
    if checked and type(error) is ValueError:
      raise
    reason = str(error).strip().splitlines() or [type(error).__name__]
    raise _damaged(path, reason[0][:200]) from error


def _damaged(path: epath.Path, reason: str) -> ValueError:
  """The error that names a damaged step, and the whole one before it."""
  root, step = root_of(path), int(path.name)
  remedy = 'no step before it is whole, so begin another MODEL_DIR.'
  for before in reversed(steps(root)):
    other = path.parent / str(before)
    if before < step and checksums.damage(other) is None:
      move = 'mv' if storage.is_local(root) else 'gcloud storage mv'
      aside = root / f'damaged-{step}'
      remedy = (
        f'step {before} before it is whole: read {other}, or let everything go '
        f'on from there by `{move} {_quoted(path)} {_quoted(aside)}`.'
      )
      break
  return ValueError(
    f'checkpoint {path} is damaged or incomplete ({reason}); {remedy}'
  )


def _quoted(path: epath.Path) -> str:
  return shlex.quote(str(path))

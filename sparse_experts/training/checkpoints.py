"""Checkpoints: parameters, optimizer and data iterator, committed together.

    MODEL_DIR/checkpoints/<step>/{params,optimizer,data}/

Orbax writes a step beside its final name and renames it when it is complete,
so a kill at any instant leaves the last complete step usable. The position in
the data lies inside the step and is committed with it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import linen as nn
from jax.sharding import Mesh

from sparse_experts import sharding
from sparse_experts.data.dataset import Dataset
from sparse_experts.models.model import Model
from sparse_experts.training.state import TrainState


@dataclasses.dataclass
class DataArgs(ocp.args.CheckpointArgs):
  """The batches to save or restore; see `data.streams.Batches`.

  Attributes:
    batches: this process's stream of batches.
    streams: those that this process writes.
  """

  batches: Any
  streams: tuple[int, ...] = ()


class DataHandler(ocp.CheckpointHandler):
  """Writes the position in the data before the step is committed."""

  def save(self, directory: epath.Path, args: DataArgs) -> None:
    args.batches.save(directory, args.streams)

  def restore(self, directory: epath.Path, args: DataArgs) -> None:
    args.batches.restore(directory)


class Checkpoints:
  """The checkpoints of one run.

  Saving is asynchronous: arrays are copied to the host, and written while
  training goes on. `saved step N` on stderr means that step N is complete.
  """

  def __init__(
    self,
    model_dir: epath.PathLike,
    keep: int | None = 3,
    *,
    read_only: bool = False,
  ):
    """Opens MODEL_DIR/checkpoints, keeping the last `keep` steps (None: all).

    With `read_only` nothing there changes, neither what another process is
    about to write.

    Raises:
      ValueError: the directory cannot be written.
    """
    self._announcer: threading.Thread | None = None
    directory = directory_of(model_dir)
    try:
      if not read_only:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise ValueError(
        f'MODEL_DIR {model_dir} cannot be written ({error.strerror}); choose '
        'a directory that can, by --gin.MODEL_DIR.'
      ) from error
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    for args in (ocp.args.StandardSave, ocp.args.StandardRestore):
      for item in ('params', 'optimizer'):
        registry.add(item, args, ocp.StandardCheckpointHandler)
    registry.add('data', DataArgs, DataHandler)
    self._manager = ocp.CheckpointManager(
      directory,
      options=ocp.CheckpointManagerOptions(read_only=True)
      if read_only
      else ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        cleanup_tmp_directories=True,  # What a kill left half-written.
      ),
      handler_registry=registry,
    )

  def latest(self) -> int | None:
    """The latest complete step, if any."""
    return self._manager.latest_step()

  def save(self, state: TrainState, data: DataArgs) -> None:
    """Saves `state` and where its data stands."""
    self._wait()
    step = int(state.step)
    self._manager.save(
      step,
      args=ocp.args.Composite(
        params=ocp.args.StandardSave(state.params),
        optimizer=ocp.args.StandardSave(_optimizer_item(state)),
        data=data,
      ),
    )
    # Not orbax's post_finalization_callback, which comes before the rename.
    self._announcer = threading.Thread(target=self._announce, args=(step,))
    self._announcer.start()

  def restore(
    self, step: int, boxed: TrainState, placed: TrainState, data: DataArgs
  ) -> TrainState:
    """The state at `step`, every array where `placed` says, and its data.

    Any mesh and any number of processes will do.

    Raises:
      ValueError: the checkpoint is of another architecture or other data, or
        damaged.
    """
    target = jax.tree.map(
      lambda leaf, sharding: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=sharding
      ),
      nn.unbox(boxed),
      placed,
    )
    path = self._manager.directory / str(step)
    _check_same(path, 'params', target.params)
    _check_same(path, 'optimizer', _optimizer_item(target))
    with _reading(path):
      restored = self._manager.restore(
        step,
        args=ocp.args.Composite(
          params=ocp.args.StandardRestore(target.params),
          optimizer=ocp.args.StandardRestore(_optimizer_item(target)),
        ),
      )
    with _reading(path, checked=True):
      self._manager.restore(step, args=ocp.args.Composite(data=data))
    return TrainState(params=restored.params, **restored.optimizer)

  def close(self) -> None:
    """Waits until what was saved is complete."""
    self._wait()
    self._manager.close()

  def _wait(self) -> None:
    self._manager.wait_until_finished()
    if self._announcer is not None:
      self._announcer.join()

  def _announce(self, step: int) -> None:
    try:
      self._manager.wait_until_finished()
    except Exception:  # It reaches the main thread too, in `_wait`.
      return
    if jax.process_index() == 0:
      print(f'saved step {step}', file=sys.stderr, flush=True)


def directory_of(model_dir: epath.PathLike) -> epath.Path:
  """Where the steps of a run lie."""
  return epath.Path(model_dir).absolute() / 'checkpoints'


def root_of(path: epath.PathLike) -> epath.Path:
  """The MODEL_DIR of a path that `find` takes."""
  path = epath.Path(path).absolute()
  return path.parent.parent if _names_step(path) else path


def steps(model_dir: epath.PathLike) -> list[int]:
  """The complete steps of a run, in order."""
  directory = directory_of(model_dir)
  if not directory.exists():
    return []
  return sorted(ocp.utils.checkpoint_steps(directory))


def find(path: epath.PathLike) -> tuple[epath.Path, int]:
  """The step directory at `path`: itself one, or a MODEL_DIR's latest.

  Raises:
    FileNotFoundError: there is no complete step.
  """
  path = epath.Path(path).absolute()
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
  if boxed is None:
    restore_args = jax.tree.map(
      lambda _: ocp.RestoreArgs(restore_type=np.ndarray),
      _saved_tree(path, 'params'),
    )
    args = ocp.args.PyTreeRestore(restore_args=restore_args)
  else:
    target = nn.unbox(boxed)
    _check_same(path, 'params', target)
    args = ocp.args.PyTreeRestore(
      target,
      restore_args=jax.tree.map(
        lambda leaf, sharding: ocp.ArrayRestoreArgs(
          sharding=sharding, global_shape=leaf.shape, dtype=leaf.dtype
        ),
        target,
        placed,
      ),
    )
  checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
  with _reading(path):
    return checkpointer.restore(path / 'params', args=args), step


def restore_params(
  model: Model, model_dir: epath.PathLike, dataset: Dataset, mesh: Mesh
) -> tuple[Any, int]:
  """Unboxed parameters of a checkpoint on a mesh, and its step; see `find`.

  Raises:
    FileNotFoundError: no checkpoint. ValueError: of another architecture.
  """
  shapes = dataset.shapes(model.converter)
  boxed = jax.eval_shape(lambda: model.init(jax.random.key(0), shapes))
  return load_params(model_dir, boxed, sharding.shardings(boxed, mesh))


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


def _names_step(path: epath.Path) -> bool:
  return path.name.isdigit() and path.parent.name == 'checkpoints'


def _optimizer_item(state: TrainState) -> dict[str, Any]:
  item = {
    'step': state.step,
    'opt_state': state.opt_state,
    'skipped': state.skipped,
  }
  return item | ({'balance': state.balance} if state.balance else {})


def _check_same(path: epath.Path, item: str, target: Any) -> None:
  """Raises where the saved item's names or shapes are not the target's."""
  saved = {
    name: tuple(leaf.shape)
    for name, leaf in flatten(_saved_tree(path, item)).items()
  }
  ours = {name: tuple(leaf.shape) for name, leaf in flatten(target).items()}
  for name in sorted(saved.keys() | ours.keys()):
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
    raise ValueError(
      f'checkpoint {path} is damaged or incomplete ({reason[0][:200]}); '
      'delete that step and continue from an earlier one.'
    ) from error

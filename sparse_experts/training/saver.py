"""Writes checkpoints: parameters, optimizer and data, committed together.

Orbax writes a step beside its final name and renames it when it is complete,
so a kill at any instant leaves the last complete step usable. The position in
the data lies inside the step and is committed with it.
"""

from __future__ import annotations

import dataclasses
import sys
import threading
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from sparse_experts.training import checkpoints
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


class Saver:
  """Writes the checkpoints of one run.

  Saving is asynchronous: arrays are copied to the host, and written while
  training goes on. `saved step N` on stderr means that step N is complete.
  """

  def __init__(self, model_dir: epath.PathLike, keep: int | None = 3):
    """Opens MODEL_DIR/checkpoints, keeping the last `keep` steps (None: all).

    Raises:
      ValueError: the directory cannot be written.
    """
    self._announcer: threading.Thread | None = None
    directory = checkpoints.directory_of(model_dir)
    try:
      directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise ValueError(
        f'MODEL_DIR {model_dir} cannot be written ({error.strerror}); choose '
        'a directory that can, by --gin.MODEL_DIR.'
      ) from error
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    for item in ('params', 'optimizer'):
      registry.add(item, ocp.args.StandardSave, ocp.StandardCheckpointHandler)
    registry.add('data', DataArgs, DataHandler)
    self._manager = ocp.CheckpointManager(
      directory,
      options=ocp.CheckpointManagerOptions(
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
        optimizer=ocp.args.StandardSave(checkpoints.optimizer_item(state)),
        data=data,
      ),
    )
    # Not orbax's post_finalization_callback, which comes before the rename.
    self._announcer = threading.Thread(target=self._announce, args=(step,))
    self._announcer.start()

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

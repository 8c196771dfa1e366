"""Writes checkpoints: parameters, optimizer and data, committed together.

Orbax writes a step beside its final name and renames it when it is complete,
so a kill at any instant leaves the last complete step usable. The position in
the data and the checksums of all files lie inside the step and are committed
with it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.future import Future

from sparse_experts import storage
from sparse_experts.training import checkpoints, checksums
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


class ArraysHandler(ocp.StandardCheckpointHandler):
  """Writes arrays, and remembers what failed.

  Orbax tells of it once all processes have met, and where one has failed, they
  never do.

  Attributes:
    failures: of this process.
  """

  def __init__(self):
    super().__init__()
    self.failures: list[Exception] = []

  async def async_save(
    self, directory, item=None, save_args=None, args=None
  ) -> list[Future]:
    futures = await super().async_save(directory, item, save_args, args)
    return [_Watched(future, self.failures) for future in futures or ()]


@dataclasses.dataclass
class _Watched(Future):
  """A write whose failure is put down."""

  future: Future
  failures: list[Exception]

  def result(self, timeout: float | None = None) -> Any:
    try:
      return self.future.result(timeout)
    except Exception as error:
      self.failures.append(error)
      raise

  def cancel(self) -> None:
    self.future.cancel()


class Saver:
  """Writes the checkpoints of one run.

  Saving is asynchronous: arrays are copied to the host, and written while
  training goes on. `saved step N` on stderr means that step N is complete.
  """

  def __init__(
    self,
    model_dir: epath.PathLike,
    keep: int | None = 3,
    check: Callable[[], None] = lambda: None,
  ):
    """Opens MODEL_DIR/checkpoints, keeping the last `keep` steps (None: all).

    Args:
      model_dir: of the run.
      keep: steps.
      check: raises where MODEL_DIR is this run's no more, FileNotFoundError
        where it is gone; asked before a step is written and before it counts.

    Raises:
      OSError: the directory cannot be written.
    """
    self._check = check
    self._announcer: threading.Thread | None = None
    self._model_dir, self._step, self._failed = model_dir, 0, False
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    self._handlers = {item: ArraysHandler() for item in ('params', 'optimizer')}
    for item, handler in self._handlers.items():
      registry.add(item, ocp.args.StandardSave, handler)
    registry.add('data', DataArgs, DataHandler)
    with storage.writing(
      f'MODEL_DIR {model_dir}',
      'choose a directory that can, by --gin.MODEL_DIR',
    ):
      self._directory = checkpoints.directory_of(model_dir)
      self._directory.mkdir(parents=True, exist_ok=True)
      self._manager = ocp.CheckpointManager(
        self._directory,
        options=ocp.CheckpointManagerOptions(
          max_to_keep=keep,
          cleanup_tmp_directories=True,  # What a kill left half-written.
          async_options=ocp.AsyncOptions(
            post_finalization_callback=self._write_checksums,
            # Else a save waits minutes for a directory that cannot be made.
            create_directories_asynchronously=False,
          ),
        ),
        handler_registry=registry,
      )

  def latest(self) -> int | None:
    """The latest complete step, if any."""
    return self._manager.latest_step()

  def save(self, state: TrainState, data: DataArgs) -> None:
    """Saves `state` and where its data stands.

    Raises:
      OSError: this step, or the one before, cannot be written.
      ValueError: MODEL_DIR is another's.
    """
    self._wait()
    self._check()
    self._step = int(state.step)
    with self._saving():
      self._manager.save(
        self._step,
        args=ocp.args.Composite(
          params=ocp.args.StandardSave(state.params),
          optimizer=ocp.args.StandardSave(checkpoints.optimizer_item(state)),
          data=data,
        ),
      )
    # Not orbax's post_finalization_callback, which comes before the rename.
    self._announcer = threading.Thread(
      target=self._announce, args=(self._step,)
    )
    self._announcer.start()

  def close(self) -> None:
    """Waits until what was saved is complete."""
    if not self._failed:
      self._wait()
      self._manager.close()

  @contextlib.contextmanager
  def _saving(self) -> Iterator[None]:
    """Says in one line which step could not be saved, and what stays."""
    try:
      there = checkpoints.steps(self._model_dir)
      stays = f'step {max(there)} is whole' if there else 'no step is there yet'
      with storage.writing(
        f'step {self._step} in {self._directory}',
        f'{stays}, and the same command goes on from there once that is mended',
      ):
        yield
    except Exception:
      self._failed = True
      self._check_after_failure()
      raise

  def _check_after_failure(self) -> None:
    """Says what is behind a failure where MODEL_DIR is lost.

    What was being written has made a deleted MODEL_DIR again; that goes.
    """
    try:
      self._check()
    except FileNotFoundError:
      if self._announcer is not None:
        self._announcer.join(10)  # Then nothing is written any more.
      with contextlib.suppress(Exception):
        for part in self._directory.glob(f'{self._step}.orbax-checkpoint-tmp*'):
          part.rmtree()
        self._directory.rmdir()  # Fails where there is something in it.
      raise

  def _write_checksums(self) -> None:
    """Of the step being saved, just before orbax commits it by a rename."""
    self._check()
    name = f'{self._step}.orbax-checkpoint-tmp*'
    renamed = self._directory / str(self._step)  # Or written in place.
    checksums.write(next(iter(self._directory.glob(name)), renamed))

  def _wait(self) -> None:
    with self._saving():
      while self._announcer is not None and self._announcer.is_alive():
        self._announcer.join(0.1)
        for handler in self._handlers.values():
          for failure in handler.failures:
            raise failure
      self._manager.wait_until_finished()

  def _announce(self, step: int) -> None:
    try:
      self._manager.wait_until_finished()
    except Exception:  # It reaches the main thread too, in `_wait`.
      return
    if jax.process_index() == 0:
      print(f'saved step {step}', file=sys.stderr, flush=True)

"""One trainer at a time: a lease on a MODEL_DIR, which its holder renews.

    MODEL_DIR/lease.json   who holds it, and how often it was renewed

A second trainer is refused while the holder lives. Whether it does, no clock
tells: on the same machine its process does, known by id and start; elsewhere,
that the lease is renewed while one watches, so hosts may differ in their time.
The lease of a process that is gone, or that is not renewed, is taken over. A
library of file locks would not do: it knows nothing of other hosts, and where
file systems have locks at all, one may outlive its holder.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import pathlib
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from sparse_experts import storage
from sparse_experts.training import process

RENEWED_EVERY = 5.0  # Seconds.
EXPIRES_AFTER = 20.0  # Seconds in which no renewal is seen.
# Seconds until who else was about to take a lease over has done so.
_SETTLES = 0.3
_LOOKS = 5  # At what cannot be read: it may be just being written.
_MOST = 1000  # Bytes of a message that processes share.


class Lease:
  """What a run holds of its MODEL_DIR until it is closed.

  Several processes of one run are one owner: process 0 holds it for all.
  """

  def __init__(
    self,
    model_dir: epath.PathLike,
    announce: Callable[[Callable[[], None]], None] = lambda close: None,
  ):
    """Takes the lease, in all processes or in none.

    Args:
      model_dir: of the run.
      announce: is given `close` before anything is written, for what may end
        the process at any moment.

    Raises:
      ValueError: another trainer holds it.
      OSError: MODEL_DIR cannot be written.
    """
    self._path = epath.Path(model_dir) / 'lease.json'
    self._lost: Exception | None = None
    self._closed, self._mutex = threading.Event(), threading.RLock()
    self._made: list[pathlib.Path] = []  # Folders, the innermost first.
    self._found_empty, self._begun = False, False
    self._creates = False  # There, but without the text that says whose it is.
    self._holder = {
      'host': socket.gethostname(),
      'pid': os.getpid(),
      'machine': process.machine(),
      'started': process.started(os.getpid()),
      'since': f'{datetime.datetime.now().astimezone():%Y-%m-%d %H:%M:%S %z}',
      'owner': uuid.uuid4().hex,
      'renewals': 0,
    }
    self._holds = jax.process_index() == 0
    announce(self.close)
    refusal = None
    if self._holds:
      try:
        self._take()
      except Exception as error:  # The others wait to hear of it.
        refusal = error
        self.close()
    _share(refusal)
    if self._holds:
      threading.Thread(target=self._keep, daemon=True).start()

  def __call__(self, run: Any = None) -> None:
    """A hook: a run that has lost its lease stops.

    Raises:
      ValueError: another trainer took it over.
      FileNotFoundError: it is gone, and MODEL_DIR with it.
    """
    self._begun |= run is not None and run.step > run.start
    if self._lost is not None:
      raise self._lost

  def __enter__(self) -> Lease:
    return self

  def __exit__(self, kind, error, _) -> None:
    """Closes it; what cannot be written in a MODEL_DIR that is lost, is that.

    Raises:
      ValueError, FileNotFoundError: as a call, in place of an OSError.
    """
    try:
      if isinstance(error, OSError):
        self.check()
    finally:
      self.close()

  def check(self) -> None:
    """As a call, and looks; before something is written that matters."""
    if self._holds:
      self._renew()
    self()

  def close(self) -> None:
    """Gives the lease back; a run that took no step leaves nothing."""
    with self._mutex, contextlib.suppress(Exception):  # Others may clean up.
      self._closed.set()
      seen = _read(self._path)
      ours = self._creates or _owner(seen) == self._holder['owner']
      if self._holds and seen is not None and ours:
        if self._found_empty and not self._begun:
          for path in self._path.parent.iterdir():
            path.rmtree() if path.is_dir() else path.unlink()
        else:
          self._path.unlink()
      for folder in self._made:
        folder.rmdir()  # Fails where there is something in it.

  def _take(self) -> None:
    """Creates the lease, or takes over one whose holder is gone."""
    looks = 0
    while not self._create():
      try:
        seen = _read(self._path)
        holder = _parse(seen)
      except (OSError, ValueError) as error:
        looks += 1
        if looks == _LOOKS:
          raise ValueError(
            f'{self._path} cannot be read as a lease ({storage.cause(error)}): '
            'remove it if no trainer runs there.'
          ) from error
        time.sleep(_SETTLES)
        continue
      looks = 0
      self._refuse_unless_gone(seen, holder)
      if _read(self._path) == seen:
        self._write()
        time.sleep(_SETTLES)
      if _owner(_read(self._path)) == self._holder['owner']:
        return

  def _create(self) -> bool:
    """Writes the lease if there is none."""
    with storage.writing(
      f'MODEL_DIR {self._path.parent}',
      'choose a directory that can, by --gin.MODEL_DIR',
    ):
      if not storage.is_local(self._path):  # There, nothing is exclusive.
        if self._path.exists():
          return False
        self._found_empty = not any(self._path.parent.glob('*'))
        self._write()
        return True
      path = pathlib.Path(self._path)
      self._made += [folder for folder in path.parents if not folder.exists()]
      path.parent.mkdir(parents=True, exist_ok=True)
      self._found_empty = not any(path.parent.iterdir())
      try:
        file = path.open('x')
      except FileExistsError:
        return False
      self._creates = True
      try:
        with file:
          file.write(json.dumps(self._holder))
      except OSError:
        path.unlink()
        raise
      finally:
        self._creates = False
    return True

  def _write(self) -> None:
    storage.replace(self._path, json.dumps(self._holder).encode())

  def _refuse_unless_gone(
    self, seen: str | None, holder: dict[str, Any]
  ) -> None:
    """Returns once the holder is known to be gone.

    Raises:
      ValueError: it is not.
    """
    lives = process.lives_here(holder)
    if lives is False:
      return
    if lives is None:
      print(
        f'{self._path} is of {_name(holder)}: watching for {EXPIRES_AFTER:.0f} '
        'seconds whether it is renewed',
        file=sys.stderr,
      )
      ends = time.monotonic() + EXPIRES_AFTER
      while (now := _read(self._path)) == seen:
        if time.monotonic() > ends:
          return
        time.sleep(0.5)
      if now is None:
        return
    raise ValueError(
      f'MODEL_DIR {self._path.parent} is being trained in, by '
      f'{_name(holder)}: stop that one, or choose another --gin.MODEL_DIR.'
    )

  def _keep(self) -> None:
    while not self._closed.wait(RENEWED_EVERY) and not self._lost:
      self._renew()

  def _renew(self) -> None:
    """Shows that the holder lives, or finds that the lease is lost."""
    with self._mutex:
      if self._closed.is_set() or self._lost:
        return
      try:
        self._lost = self._loss()
        if self._lost is None:
          self._holder['renewals'] += 1
          self._write()
      except Exception:  # A full disk, a bucket away: the next save will tell.
        pass

  def _loss(self) -> Exception | None:
    """What has become of the lease, if it is not this run's any more."""
    model_dir, seen = self._path.parent, _read(self._path)
    if seen is None:
      what = 'was emptied, or made anew' if model_dir.exists() else 'is gone'
      return FileNotFoundError(
        f'MODEL_DIR {model_dir} {what}: put back what was there and start '
        'again, or begin another.'
      )
    if _owner(seen) == self._holder['owner']:
      return None
    try:
      who = _name(_parse(seen))
    except ValueError:
      who = 'someone whose lease cannot be read'
    return ValueError(
      f'MODEL_DIR {model_dir} was taken over by {who}, as this trainer had not '
      f'renewed its lease for {EXPIRES_AFTER:.0f} seconds: only one can go on.'
    )


def is_held_here(model_dir: epath.PathLike) -> bool:
  """Whether a process of this machine, which lives, trains there."""
  try:
    holder = _parse(_read(epath.Path(model_dir) / 'lease.json'))
  except ValueError:
    return False
  return bool(process.lives_here(holder))


def _read(path: epath.Path) -> str | None:
  """A lease, whatever its bytes; None if there is no file."""
  try:
    # To read a pipe would wait for ever; epath takes it for a file.
    if storage.is_local(path) and not pathlib.Path(path).is_file():
      return None
    return path.read_bytes().decode(errors='replace')
  except FileNotFoundError:
    return None


def _parse(text: str | None) -> dict[str, Any]:
  """The holder that a lease names.

  Raises:
    ValueError: it names none.
  """
  if text is None:
    raise ValueError('it is no file')
  try:
    holder = json.loads(text)
  except RecursionError as error:
    raise ValueError('nested too deep') from error
  if not isinstance(holder, dict) or type(holder.get('pid')) is not int:
    raise ValueError('it names no process')
  return holder


def _owner(text: str | None) -> str | None:
  try:
    return _parse(text).get('owner')
  except ValueError:
    return None


def _name(holder: dict[str, Any]) -> str:
  return (
    f'process {holder.get("pid")} on {holder.get("host")} since '
    f'{holder.get("since")}'
  )


def _share(refusal: Exception | None) -> None:
  """Raises process 0's refusal in all processes."""
  if jax.process_count() > 1:
    text = np.zeros(_MOST, np.uint8)
    said = np.frombuffer(str(refusal or '').encode()[:_MOST], np.uint8)
    text[: said.size] = said
    text = np.asarray(multihost_utils.broadcast_one_to_all(text))
    text = text.tobytes().rstrip(b'\0').decode(errors='replace')
    refusal = refusal or (ValueError(text) if text else None)
  if refusal is not None:
    raise refusal

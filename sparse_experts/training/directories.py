"""What may be a MODEL_DIR, found out before anything is written there."""

from __future__ import annotations

import os
import pathlib
import threading

from etils import epath

SECONDS = 60  # That a bucket may take to answer.


def absolute(path: epath.PathLike) -> epath.Path:
  """A path of a run, local or gs://.

  Raises:
    ValueError: it is empty, begins with ~, or is of another kind.
  """
  text = os.fspath(path)
  if not text.strip():
    raise ValueError(
      f'{text!r} is no folder, maybe a variable of the shell that is not set; '
      'say one, such as --gin.MODEL_DIR=runs/first.'
    )
  check_home(path)
  scheme, found, _ = text.partition('://')
  if found and scheme != 'gs':
    raise ValueError(
      f'{text!r} is no folder: a run lies in a local one or under gs://, not '
      f'{scheme}://.'
    )
  path = epath.Path(path)
  return path if found else path.absolute()  # Which makes gs:// a local one.


def check_home(path: epath.PathLike) -> None:
  """Raises ValueError where a path begins with ~.

  A shell leaves that as it is after `--name=`, and a folder `~` would be made.
  """
  text = os.fspath(path)
  if text.startswith('~'):
    raise ValueError(
      f'{text!r} begins with ~, which the shell leaves as it is after a flag: '
      'write $HOME, as in --gin.MODEL_DIR=$HOME/runs/first.'
    )


def check_new(model_dir: epath.PathLike, by: str = '--gin.MODEL_DIR') -> None:
  """Raises ValueError where no run can be written; writes nothing itself.

  Args:
    model_dir: where it is to be written.
    by: what the user says it by.
  """
  path = absolute(model_dir)
  if str(path).startswith('gs://'):
    return _check_reachable(path)
  for folder in (path, *path.parents):
    if folder.name == 'checkpoints' and (folder.parent / 'config.gin').exists():
      raise ValueError(
        f'{model_dir} lies among the checkpoints of the run {folder.parent}; '
        'choose a folder of its own.'
      )
  there = pathlib.Path(path)
  while not there.exists():
    there = there.parent
  reason = None
  if not there.is_dir():
    reason = f'{there} is a file'
  elif not os.access(there, os.W_OK | os.X_OK):
    reason = f'no permission in {there}'
    if os.statvfs(there).f_flag & os.ST_RDONLY:
      reason = 'Read-only file system'
  if reason:
    raise ValueError(
      f'{model_dir} cannot be written ({reason}); choose a folder that can, by '
      f'{by}.'
    )


def _check_reachable(path: epath.Path) -> None:
  """Raises ValueError where a bucket does not answer, in a bounded time."""
  reasons = [f'no answer in {SECONDS} s']

  def ask():
    try:
      path.exists()
      reasons.clear()
    except Exception as error:  # Of TensorFlow, of many kinds.
      reasons[:] = [' '.join(str(error).split())[:200]]

  asking = threading.Thread(target=ask, daemon=True)
  asking.start()
  asking.join(SECONDS)
  if reasons:
    raise ValueError(
      f'MODEL_DIR {path} cannot be reached ({reasons[0]}); see to network and '
      'credentials, or choose another by --gin.MODEL_DIR.'
    )

"""Writing to storage that may be full, gone, or cut off in the middle."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath

_CAUSES = tuple(
  os.strerror(code)
  for code in (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES),
    *(errno.EPERM, errno.EIO, errno.ESTALE, errno.ENOTDIR, errno.ENOENT),
  )
)


def cause(error: BaseException) -> str:
  """What went wrong, in the system's words where an error has them.

  Libraries wrap them: TensorFlow, tensorstore and orbax each otherwise.

  >>> cause(ValueError('RESOURCE_EXHAUSTED: a/b: No space left on device [1]'))
  'No space left on device'
  """
  text = str(error)
  for known in _CAUSES:
    if known in text:
      return known
  lines = text.strip().splitlines()
  return lines[0][:200] if lines else type(error).__name__


@contextlib.contextmanager
def writing(what: epath.PathLike, remedy: str) -> Iterator[None]:
  """Turns what fails inside into one line, unless it is a mistake of ours.

  Raises:
    OSError: `what` cannot be written, why not, and what to do.
  """
  try:
    yield
  except (TypeError, AttributeError, NameError, LookupError, AssertionError):
    raise
  except Exception as error:
    raise OSError(
      f'{what} cannot be written ({cause(error)}): {remedy}.'
    ) from error


def mend_lines(path: epath.Path) -> None:
  """Cuts off what a kill or a full disk left of a last line; says so."""
  if not path.exists() or not _torn(path):
    return
  time.sleep(0.1)  # Someone may be just writing it.
  if torn := _torn(path):
    content = path.read_bytes()
    replace(path, content[: len(content) - torn])
    print(
      f'{path}: half a line at its end, {torn} bytes, was cut off',
      file=sys.stderr,
    )


def read_lines(
  path: epath.Path, check: Callable[[dict[str, Any]], None]
) -> list[dict[str, Any]]:
  """The JSON objects of a file's lines, but for half a one at its end.

  Args:
    path: of the file.
    check: raises ValueError where an object is not one of this file's.

  Raises:
    ValueError: a line is none.
  """
  whole, _, _ = path.read_bytes().rpartition(b'\n')
  found = []
  for i, line in enumerate(whole.splitlines(), 1):
    try:
      value = json.loads(line)
      if not isinstance(value, dict):
        raise ValueError('no JSON object')
      check(value)
    except (ValueError, RecursionError) as error:
      raise ValueError(
        f'{path} is damaged in line {i} ({error}): mend it, or move the file '
        'elsewhere.'
      ) from error
    found.append(value)
  return found


def replace(path: epath.Path, content: bytes) -> None:
  """Writes a file anew: a reader or a kill finds all of it, or the old one."""
  if not is_local(path):  # An object is replaced whole.
    path.write_bytes(content)
    return
  beside = path.parent / f'{path.name}.{uuid.uuid4().hex[:8]}'
  try:
    beside.write_bytes(content)
    beside.replace(path)
  except OSError:
    beside.unlink(missing_ok=True)
    raise


def given(path: epath.PathLike, by: str) -> epath.Path:
  """A path to read, as a user gives it; `~` is their home.

  Args:
    path: of the file system, or gs://; whether it is there is not asked.
    by: what the user says it by, such as 'VOCABULARY'.

  Raises:
    ValueError: it is of another kind.
  """
  scheme, found, _ = os.fspath(path).partition('://')
  if found and scheme != 'gs':
    raise ValueError(
      f'{by} has {os.fspath(path)!r}: files are read from the file system or '
      f'from gs://, not {scheme}://; copy it here first.'
    )
  return epath.Path(path).expanduser()


def decoded(path: epath.PathLike, data: bytes) -> str:
  """The text of a file's bytes, without a byte-order mark.

  Raises:
    ValueError: it is no UTF-8; the message has the file and the line.
  """
  try:
    return data.decode('utf-8-sig')
  except UnicodeDecodeError as error:
    line = error.object.count(b'\n', 0, error.start) + 1
    byte = error.object[error.start]
    raise ValueError(
      f'{os.fspath(path)}:{line} has the byte 0x{byte:02x}, which is no UTF-8; '
      'save the file as UTF-8, for example by iconv -f LATIN1 -t UTF-8.'
    ) from error


def check_regular(path: epath.Path, by: str) -> None:
  """Raises ValueError of what is there, and can be read once or without end."""
  if is_local(path) and os.path.exists(path):
    kind = os.stat(path).st_mode
    if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
      raise ValueError(
        f'{by} has {path}, a pipe or a device, and such files are read more '
        'than once: write it to a file first.'
      )


def is_local(path: epath.PathLike) -> bool:
  """Whether a path is one of the file system, not gs:// or the like."""
  return '://' not in os.fspath(path)


def _torn(path: epath.Path) -> int:
  """How many bytes follow the last end of a line."""
  with path.open('rb') as file:
    size = file.seek(0, os.SEEK_END)
    for length in (2**16, size):  # Few lines are longer.
      file.seek(max(size - length, 0))
      end = file.read().rfind(b'\n')
      if end >= 0:
        return min(length, size) - end - 1
  return size

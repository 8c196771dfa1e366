"""How a command ends that failed: one line, and what the process returns."""

from __future__ import annotations

import os
import pathlib
import re
import sys
import tempfile
import traceback
from collections.abc import Iterator
from typing import IO

# What says of itself what is wrong, in a line that a user can act on.
EXPECTED = (ValueError, OSError, ImportError, FloatingPointError)
USER, INTERNAL, INTERRUPTED, BROKEN_PIPE = 2, 1, 130, 141  # 128 + the signal.
_NO_MEMORY = 'RESOURCE_EXHAUSTED|[Oo]ut of memory'
_PACKAGE = pathlib.Path(__file__).resolve().parent


def end(error: BaseException, verbose: bool) -> int:
  """Says on stderr why a command failed; returns the process's exit code.

  Args:
    error: what it raised.
    verbose: also print the traceback.
  """
  if isinstance(error, BrokenPipeError):  # Nobody reads what is printed.
    _send_nowhere(sys.stdout, sys.stderr)
    return BROKEN_PIPE
  if any(isinstance(of, KeyboardInterrupt) for of in _causes(error)):
    print('interrupted', file=sys.stderr)
    return INTERRUPTED
  if verbose:
    traceback.print_exception(error)
  code, line = _explained(error)
  print(f'error: {line}', file=sys.stderr)
  return code


def _explained(error: BaseException) -> tuple[int, str]:
  try:
    from sparse_experts.config import overrides
  except ImportError:
    return USER, (
      f'{sys.executable} lacks a library ({error}); use the environment that '
      'sparse_experts is installed in, in a checkout .venv/bin/python.'
    )
  line = overrides.first_line(error)
  if isinstance(error, MemoryError) or re.search(_NO_MEMORY, line):
    return USER, (
      f'out of memory in {_where(error)}: {line[:200]}; take a smaller '
      'BATCH_SIZE, more MICROBATCHES or REMAT, a smaller model, or split it '
      'over more devices by MESH and RULES; `plan` says what fits.'
    )
  if isinstance(error, EXPECTED) or overrides.lacks_argument(error):
    return USER, line
  if isinstance(error, OverflowError):  # Of what XLA counts by.
    return USER, f'a size is too large: {line[:200]}; take a smaller one.'
  if _of_files(error):
    return USER, f'a file cannot be read or written: {line[:300]}'
  return INTERNAL, (
    f'internal: {type(error).__name__}: {line[:300]} (a fault of '
    f'sparse_experts; traceback in {_written(error)})'
  )


def _send_nowhere(*streams: IO[str]) -> None:
  """What is still to be printed there, at exit too, goes nowhere."""
  nowhere = os.open(os.devnull, os.O_WRONLY)
  for stream in streams:
    try:
      os.dup2(nowhere, stream.fileno())
    except (OSError, ValueError):  # A stream that is no file.
      continue


def _causes(error: BaseException | None) -> Iterator[BaseException]:
  """An error and what it was raised from or while handling."""
  while error is not None:
    yield error
    error = error.__cause__ or error.__context__


def _where(error: BaseException) -> str:
  """Our innermost function that an error came through."""
  found = 'a library'
  for frame in traceback.extract_tb(error.__traceback__):
    path = pathlib.Path(frame.filename)
    if _PACKAGE in path.parents:
      module = '.'.join(path.relative_to(_PACKAGE).with_suffix('').parts)
      found = f'{module}.{frame.name}'
  return found


def _of_files(error: BaseException) -> bool:
  """Whether TensorFlow, which reads and writes gs://, says what is wrong."""
  names = {of.__name__ for of in type(error).__mro__}
  return 'OpError' in names and not names & {'InternalError', 'UnknownError'}


def _written(error: BaseException) -> str:
  """The path of a new file that has the traceback."""
  text = ''.join(traceback.format_exception(error))
  try:
    with tempfile.NamedTemporaryFile(
      'w', prefix='sparse_experts-', suffix='.txt', delete=False
    ) as file:
      file.write(text)
    return file.name
  except OSError as full:
    return f'no file, {full.strerror}: --verbose prints it'

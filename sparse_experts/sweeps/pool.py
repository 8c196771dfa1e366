"""Commands as processes of their own, so many at a time."""

from __future__ import annotations

import contextlib
import fcntl
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from sparse_experts.sweeps import identity

_LOOK = 0.5  # Seconds between two looks at what is running.


class Job(NamedTuple):
  """A command to run.

  Attributes:
    name: tells it from the others.
    arguments: of `python -m sparse_experts`.
    log: the file that what it prints is appended to.
  """

  name: str
  arguments: Sequence[str]
  log: pathlib.Path


def run(
  jobs: Iterable[Job],
  parallel: int,
  *,
  started: Callable[[Job], None],
  ended: Callable[[Job, int], None],
  look: Callable[[], None],
) -> None:
  """Runs all of them; returns when the last has ended.

  They end with this process, see `follow`. Where it is interrupted they are
  asked to stop, and waited for.

  Args:
    jobs: asked for the next one whenever there is room, so that it may depend
      on those before.
    parallel: how many run at once.
    started: called when one has started.
    ended: called when one has ended, with its exit code.
    look: called now and then.
  """
  running: dict[subprocess.Popen, Job] = {}
  waiting = iter(jobs)
  more = True
  try:
    while running or more:
      while more and len(running) < parallel:
        job = next(waiting, None)
        more = job is not None
        if job is not None:
          running[_start(job)] = job
          started(job)
      for process in [p for p in running if p.poll() is not None]:
        ended(running.pop(process), process.returncode)
      look()
      if running:
        time.sleep(_LOOK)
  except BaseException:
    for process in running:
      process.terminate()
    for process, job in running.items():
      ended(job, process.wait())
    raise


@contextlib.contextmanager
def alone(folder: pathlib.Path) -> Iterator[None]:
  """One sweep at a time on this machine works in a folder.

  Raises:
    ValueError: another one does.
  """
  folder.mkdir(parents=True, exist_ok=True)
  with (folder / 'sweep.lock').open('a') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      raise ValueError(
        f'another sweep works in {folder}: wait for it, or give another '
        '--output.'
      ) from error
    yield


def _start(job: Job) -> subprocess.Popen:
  job.log.parent.mkdir(parents=True, exist_ok=True)
  with job.log.open('ab') as log:
    return subprocess.Popen(
      [
        *(sys.executable, '-m', 'sparse_experts.sweeps.follow'),
        *(identity.code(), *job.arguments),
      ],
      stdin=subprocess.PIPE,  # Whose other end closes with this process.
      stdout=log,
      stderr=subprocess.STDOUT,
      start_new_session=True,  # Ctrl-C is for this process, which asks them.
    )

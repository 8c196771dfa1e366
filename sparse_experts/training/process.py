"""Which process is which, beyond its id, which another may have later."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import Any


def machine() -> str | None:
  """Where a process id means one process: a boot, and a container in it.

  None where that is not known; there renewals tell.
  """
  try:
    boot = pathlib.Path('/proc/sys/kernel/random/boot_id').read_text().strip()
    return f'{boot} {os.readlink("/proc/self/ns/pid")}'
  except OSError:
    return None


def started(pid: int) -> int | None:
  """When a process started, in ticks since boot; None if there is none."""
  try:
    stat = pathlib.Path(f'/proc/{pid}/stat').read_text()
  except OSError:
    return None
  state, *fields = stat.rpartition(')')[2].split()
  return None if state in 'ZX' else int(fields[18])


def lives_here(holder: Mapping[str, Any]) -> bool | None:
  """Whether a process is alive; None: it is of another machine.

  Args:
    holder: its 'pid', and, if known, its 'machine' and when it 'started'.
  """
  if not holder.get('machine') or holder['machine'] != machine():
    return None
  now = started(holder['pid'])
  return now is not None and holder.get('started') in (None, now)

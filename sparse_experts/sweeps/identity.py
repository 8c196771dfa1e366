"""What a run is a function of: its configuration, this code, and its data.

Runs of one digest are equal but for rounding, so a finished one is not run
again, whichever sweep of a folder asks for it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import pathlib
from collections.abc import Mapping

_PACKAGE = pathlib.Path(__file__).resolve().parent.parent


def digest(config_text: str, data: Mapping[str, str]) -> str:
  """Of a run, 12 hexadecimal digits.

  Args:
    config_text: all of what was parsed but MODEL_DIR, see `configuration`.
    data: digests of its tasks' data, where their sources have one.
  """
  parts = [config_text, code(), sorted(data.items())]
  return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def configuration(text: str) -> str:
  """A gin file's text without where the run lies, which makes it no other."""
  lines = text.splitlines()
  return '\n'.join(line for line in lines if not line.startswith('MODEL_DIR ='))


@functools.cache
def code() -> str:
  """Of the package's Python files."""
  hashed = hashlib.sha256()
  for path in sorted(_PACKAGE.rglob('*.py')):
    hashed.update(str(path.relative_to(_PACKAGE)).encode() + b'\0')
    hashed.update(path.read_bytes() + b'\0')
  return hashed.hexdigest()

"""A file of JSON lines that a run continues where another was stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from sparse_experts import storage


class ResumableLines:
  """JSON objects, one a line, appended whole.

  Beside the file lies <file>.settings.json, what its lines are a function of; a
  run of other settings does not continue it. Process 0 writes.

  Attributes:
    done: the objects of the whole lines that are there.
  """

  def __init__(
    self,
    path: epath.PathLike,
    settings: Mapping[str, Any],
    *,
    anew: bool = False,
  ):
    """Reads what is there.

    Args:
      path: of the file; its folder is made.
      settings: JSON.
      anew: what is there is replaced.

    Raises:
      ValueError: the lines there were made with other settings, or by others.
    """
    self._path = epath.Path(path)
    beside = epath.Path(f'{self._path}.settings.json')
    self.done: list[dict[str, Any]] = []
    if self._path.exists() and not anew:
      if not beside.exists():
        raise ValueError(
          f'{self._path} exists, but {beside.name} does not, so it cannot be '
          'continued: give another output file.'
        )
      self._check(_parse(beside.read_text(), beside), settings)
      self.done = self._read()
    self._path.parent.mkdir(parents=True, exist_ok=True)
    if jax.process_index() == 0 and not self.done:
      beside.write_text(json.dumps(settings, indent=2) + '\n')
      self._path.write_text('')
    if jax.process_count() > 1:  # Process 0 may have begun to write.
      count = np.int32(len(self.done))
      count = int(multihost_utils.broadcast_one_to_all(count))
      self.done = self.done[:count]

  def append(self, objects: Sequence[dict[str, Any]]) -> None:
    """Adds lines, by one write."""
    self.done += objects
    if jax.process_index() == 0:
      lines = ''.join(json.dumps(item) + '\n' for item in objects)
      with self._path.open('a') as file:
        file.write(lines)

  def _check(self, theirs, ours) -> None:
    for name in sorted(theirs.keys() | ours.keys()):
      if theirs.get(name) != ours.get(name):
        raise ValueError(
          f'{self._path} was made with {name} {theirs.get(name)!r}, now it is '
          f'{ours.get(name)!r}: give that, or another output file.'
        )

  def _read(self) -> list[dict[str, Any]]:
    """The whole lines; what was left of half a line is cut off."""
    if jax.process_index() == 0:
      storage.mend_lines(self._path)
    content = self._path.read_bytes()
    whole = content[: content.rfind(b'\n') + 1]
    return [_parse(line, self._path) for line in whole.splitlines()]


def _parse(text: str | bytes, path: epath.Path) -> dict[str, Any]:
  try:
    return json.loads(text)
  except ValueError as error:
    raise ValueError(
      f'{path} is damaged ({error}): give another output file.'
    ) from error

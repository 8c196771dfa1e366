"""Checksums of a step's files, by which damage is found.

    MODEL_DIR/checkpoints/<step>/checksums.json
      {'params/_METADATA': {'bytes': 5421, 'crc32': [3632233996]}, ...}

CRC-32 of every 16 MiB of a file. A flipped bit always changes it, and so does
any damage within 32 bits of one another; other damage goes unseen once in four
billion. SHA-256 would take ten times as long, a third of a restore, and protect
from people, not from disks. A step of before there were any has none, and is
read unverified, which is said.
"""

from __future__ import annotations

import concurrent.futures
import json
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from sparse_experts import storage

NAME = 'checksums.json'
_PART = 2**24  # Bytes that have one checksum.
_PIECE = 2**20  # Bytes that are read at once, and fit into a cache.


def write(step: epath.PathLike) -> None:
  """Writes down what the files of a step are, once they are complete.

  Args:
    step: its directory. Files directly in it are orbax's marks of a commit,
      which it writes later, and which hold nothing of the state.
  """
  step = epath.Path(step)
  names = [name for name in files(step) if '/' in name]
  sizes = {name: (step / name).stat().length for name in names}
  parts = _parts(sizes)
  sums = {name: {'bytes': sizes[name], 'crc32': []} for name in names}
  for (name, _), crc in zip(parts, _crcs(step, parts), strict=True):
    sums[name]['crc32'].append(crc)
  (step / NAME).write_text(json.dumps(sums, indent=1) + '\n')


def damage(
  step: epath.PathLike, items: Sequence[str] = (), together: bool = False
) -> str | None:
  """What of a step is not as it was written: the first file, and how.

  Args:
    step: its directory.
    items: of it, such as 'params'; all of them unless given.
    together: all processes call this at once, and each reads its share.

  Returns:
    None if there is nothing, or there are no checksums to tell.
  """
  step = epath.Path(step)
  if not there(step):
    return None
  try:
    sums = {
      name: (int(file['bytes']), list(map(int, file['crc32'])))
      for name, file in json.loads((step / NAME).read_text()).items()
      if _among(name, items)
    }
  except (ValueError, TypeError, KeyError, AttributeError):
    return f'{NAME} holds no checksums'
  for name in files(step):
    if '/' in name and name not in sums and _among(name, items):
      return f'{name} is not in {NAME}'
  for name, (size, _) in sums.items():
    found = (step / name).stat().length if (step / name).exists() else 'no'
    if found != size:
      return f'{name} has {found} bytes instead of {size}'
  parts = _parts({name: size for name, (size, _) in sums.items()})
  expected = [crc for _, crcs in sums.values() for crc in crcs]
  if len(parts) != len(expected):
    return f'{NAME} does not fit the files'
  wrong = _first_wrong(step, parts, expected, together)
  if wrong is None:
    return None
  name, start = parts[wrong]
  return f'{name} is not what was written, from byte {start} on'


def forget(step: epath.PathLike, item: str) -> None:
  """Takes an item that is no more out of a step's checksums."""
  file = epath.Path(step) / NAME
  if not file.exists():
    return
  sums = json.loads(file.read_text())
  kept = {k: v for k, v in sums.items() if not _among(k, (item,))}
  storage.replace(file, (json.dumps(kept, indent=1) + '\n').encode())


def there(step: epath.PathLike) -> bool:
  """Whether a step has checksums."""
  return (epath.Path(step) / NAME).exists()


def files(directory: epath.Path, inside: str = '') -> Iterator[str]:
  """Files in a directory and below it, in the order of their names."""
  for path in sorted((directory / inside).iterdir()):
    name = f'{inside}/{path.name}' if inside else path.name
    if path.is_dir():
      yield from files(directory, name)
    else:
      yield name


def _among(name: str, items: Sequence[str]) -> bool:
  return not items or name.partition('/')[0] in items


def _first_wrong(
  step: epath.Path,
  parts: Sequence[tuple[str, int]],
  expected: Sequence[int],
  together: bool,
) -> int | None:
  """Index of the first part that has another checksum."""
  count = jax.process_count() if together else 1
  mine = range(jax.process_index() if together else 0, len(parts), count)
  crcs = _crcs(step, [parts[i] for i in mine])
  wrong = [i for i, crc in zip(mine, crcs, strict=True) if crc != expected[i]]
  first = min(wrong, default=len(parts))
  if count > 1:
    first = int(np.min(multihost_utils.process_allgather(np.int64(first))))
  return None if first == len(parts) else first


def _parts(sizes: dict[str, int]) -> list[tuple[str, int]]:
  """(file, where a part of it begins), of all parts."""
  return [
    (name, start) for name, size in sizes.items()
    for start in range(0, max(size, 1), _PART)
  ]  # fmt: skip


def _crcs(step: epath.Path, parts: Sequence[tuple[str, int]]) -> list[int]:
  """CRC-32 of parts of files; neither reading nor summing holds Python."""

  def crc(part: tuple[str, Any]) -> int:
    (name, start), found = part, 0
    with (step / name).open('rb') as file:
      file.seek(start)
      for at in range(0, _PART, _PIECE):
        found = zlib.crc32(file.read(min(_PIECE, _PART - at)), found)
    return found

  with concurrent.futures.ThreadPoolExecutor(8) as threads:
    return list(threads.map(crc, parts))

"""Files of one's own as a source: a split is the rows of its files."""

import dataclasses
import hashlib
import itertools
import os
import sys
from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath

from sparse_experts import storage
from sparse_experts.data import file_rows
from sparse_experts.data.tasks.arrays import ArraySource, Columns

HELD_OUT = 5  # Percent of train that is validation, where none is given.
# All texts are in memory, and TensorFlow's programs hold no 2 GiB.
MAX_BYTES = 1 << 30


class FileSource(ArraySource):
  """Rows of text, JSON lines or CSV as examples of their fields, as texts.

  All splits are held in memory, in each process, and shuffled by index: a
  shuffle is complete, a saved position holds no text, and streams (shards) are
  by row. `digest` is of what was read.

      source = FileSource({'train': 'a.csv', 'test': 'b-*.csv'}, 'csv',
                          ('text', 'label'))

  Where there is a train and no validation, 5% of train is validation: those
  rows whose hash says so, so that equal rows are in one split, and at least
  one.
  """

  def __init__(
    self,
    split_files: Mapping[str, str | Sequence[str]],
    format: str,
    fields: Sequence[str] = ('text',),
    *,
    lists: Sequence[str] = (),
    documents: str = 'paragraph',
  ):
    """A source that finds its files when they are first read.

    Args:
      split_files: by split a path, a glob, or a list of these.
      format: 'text', whose only field is 'text', 'jsonl' or 'csv'.
      fields: columns, or keys, that examples have; see `data.file_rows`.
      lists: those fields of 'jsonl' that are lists of texts.
      documents: what is an example of 'text', one of `file_rows.DOCUMENTS`.
    """
    self._files, self._fields = dict(split_files), tuple(fields)
    self._lists = set(lists)
    self._read_file = {
      'text': lambda path: file_rows.text_rows(path, documents),
      'jsonl': lambda path: file_rows.jsonl_rows(path, fields, lists),
      'csv': lambda path: file_rows.csv_rows(path, fields),
    }[format]
    self._holds_out = 'train' in split_files and 'validation' not in split_files
    self._places: dict[str, list[tuple[epath.Path, int]]] = {}
    more = ('validation',) if self._holds_out else ()
    super().__init__(self._read_files, (*split_files, *more))

  def place(self, split: str, index: int) -> str:
    """Where an example is: its file and line."""
    path, line = self._places[split][index]
    return f'{path}:{line}'

  def _read_files(self) -> dict[str, Columns]:
    found = {
      split: file_rows.find(given) for split, given in self._files.items()
    }
    _check(found)
    read = {split: self._read_split(paths) for split, paths in found.items()}
    held_out = ''
    if self._holds_out:
      read['train'], read['validation'] = _hold_out(read['train'])
      held_out = ' (validation is held out of train by a hash of each row)'
    self._places = {split: examples.places for split, examples in read.items()}
    counts = ', '.join(
      f'{len(examples.places)} in {split}' for split, examples in read.items()
    )
    print(f'{_names(found)}: examples {counts}{held_out}', file=sys.stderr)
    return {split: self._columns(examples) for split, examples in read.items()}

  def _read_split(self, paths: Sequence[epath.Path]) -> '_Examples':
    examples = _Examples()
    for path in paths:
      before = len(examples.places)
      for row in self._read_file(path):
        examples.places.append((path, row.line))
        examples.values.append(tuple(map(_encoded, row.values)))
        if self._holds_out:
          hashed = hashlib.sha256(row.whole.encode()).digest()
          examples.hashes.append(int.from_bytes(hashed[:8], 'big'))
      if len(examples.places) == before:
        raise ValueError(f'{path} has no row; give a file that has examples.')
    return examples

  def _columns(self, examples: '_Examples') -> Columns:
    columns = {
      name: [values[i] for values in examples.values]
      for i, name in enumerate(self._fields)
    }
    return {
      name: column if name in self._lists else np.array(column, object)
      for name, column in columns.items()
    }


@dataclasses.dataclass
class _Examples:
  """Of a split, in order."""

  places: list[tuple[epath.Path, int]] = dataclasses.field(default_factory=list)
  values: list[tuple] = dataclasses.field(default_factory=list)
  hashes: list[int] = dataclasses.field(default_factory=list)

  def those(self, are: Sequence[bool]) -> '_Examples':
    """The examples that are."""
    return _Examples(
      list(itertools.compress(self.places, are)),
      list(itertools.compress(self.values, are)),
    )


def _encoded(value: str | list[str]) -> bytes | np.ndarray:
  if isinstance(value, list):
    return np.array([text.encode() for text in value], object)
  return value.encode()


def _hold_out(train: _Examples) -> tuple[_Examples, _Examples]:
  """What stays in train, and what is validation.

  Raises:
    ValueError: nothing would stay.
  """
  held_out = [hashed % 100 < HELD_OUT for hashed in train.hashes]
  if not any(held_out):
    least = min(train.hashes)
    held_out = [hashed == least for hashed in train.hashes]
  if all(held_out):
    raise ValueError(
      f'{train.places[0][0]} has {len(set(train.hashes))} different '
      "example(s), too few to hold out a share: give FILES a 'validation', or "
      'more in train.'
    )
  return train.those([not held for held in held_out]), train.those(held_out)


def _check(found: Mapping[str, Sequence[epath.Path]]) -> None:
  """Raises ValueError where a file is there twice, or they are too large."""
  split_of = {}
  for split, paths in found.items():
    for path in paths:
      real = _identity(path)
      if real in split_of:
        raise ValueError(
          f'{path} is in FILES twice, in {split_of[real]} and in {split}; an '
          'example has one place.'
        )
      split_of[real] = split
  size = sum(path.stat().length for paths in found.values() for path in paths)
  if size > MAX_BYTES:
    raise ValueError(
      f'{_names(found)} have {size / 2**30:.1f} GiB, and files are held in '
      f'memory, {MAX_BYTES / 2**30:.0f} GiB at most: write what is larger as '
      'TFRecord and register a task on it, see docs/own_data.md.'
    )


def _identity(path: epath.Path):
  """Of a file, however it is spelt and linked."""
  if not storage.is_local(path):
    return os.fspath(path)
  status = os.stat(path)
  return status.st_dev, status.st_ino


def _names(found: Mapping[str, Sequence[epath.Path]]) -> str:
  """Of the first file, and how many others there are."""
  paths = [path for of_split in found.values() for path in of_split]
  others = f' and {len(paths) - 1} more' if len(paths) > 1 else ''
  return f'{paths[0]}{others}'

"""Files of one's own as a source: a split is the rows of its files."""

import hashlib
import sys
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from etils import epath

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
    self._readers = {
      'text': lambda path: file_rows.text_rows(path, documents),
      'jsonl': lambda path: file_rows.jsonl_rows(path, fields, lists),
      'csv': lambda path: file_rows.csv_rows(path, fields),
    }
    self._read_file = self._readers[format]
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
    rows = {split: list(self._rows(paths)) for split, paths in found.items()}
    if self._holds_out:
      rows['train'], rows['validation'] = _hold_out(rows['train'])
    self._places = {
      split: [place for place, _ in of_split]
      for split, of_split in rows.items()
    }
    counts = ', '.join(
      f'{len(of_split)} in {split}' for split, of_split in rows.items()
    )
    share = (
      f" (validation is {HELD_OUT}% of train's, by a hash of each)"
      if self._holds_out
      else ''
    )
    print(f'{_names(found)}: examples {counts}{share}', file=sys.stderr)
    return {
      split: self._columns_of(of_split) for split, of_split in rows.items()
    }

  def _rows(self, paths: Sequence[epath.Path]) -> Iterator:
    """((file, line), row) of all rows."""
    for path in paths:
      row = None
      for row in self._read_file(path):
        yield (path, row.line), row
      if row is None:
        raise ValueError(f'{path} has no row; give a file that has examples.')

  def _columns_of(self, rows: Sequence) -> Columns:
    columns = {}
    for i, name in enumerate(self._fields):
      values = [row.values[i] for _, row in rows]
      if name in self._lists:
        columns[name] = [
          np.array([text.encode() for text in texts], object)
          for texts in values
        ]
      else:
        columns[name] = np.array([text.encode() for text in values], object)
    return columns


def _hold_out(rows: Sequence) -> tuple[list, list]:
  """What stays in train, and what is validation.

  Raises:
    ValueError: none would be left.
  """
  hashes = [
    int.from_bytes(hashlib.sha256(row.whole.encode()).digest()[:8], 'big')
    for _, row in rows
  ]
  least = min(hashes)
  is_held_out = [h % 100 < HELD_OUT for h in hashes]
  if not any(is_held_out):
    is_held_out = [h == least for h in hashes]
  if all(is_held_out):
    raise ValueError(
      f'{rows[0][0][0]} and what else is in train has {len(set(hashes))} '
      'different example(s), too few to hold out a share of them: give FILES '
      "more, or a 'validation'."
    )
  kept = [row for row, held in zip(rows, is_held_out) if not held]
  return kept, [row for row, held in zip(rows, is_held_out) if held]


def _check(found: Mapping[str, Sequence[epath.Path]]) -> None:
  """Raises ValueError where a file is there twice, or they are too large."""
  split_of = {}
  for split, paths in found.items():
    for path in paths:
      if path in split_of:
        raise ValueError(
          f'{path} is in FILES twice, in {split_of[path]} and in {split}; an '
          'example has one place.'
        )
      split_of[path] = split
  size = sum(path.stat().length for path in split_of)
  if size > MAX_BYTES:
    raise ValueError(
      f'{_names(found)} have {size / 2**30:.1f} GiB, and files are held in '
      f'memory, {MAX_BYTES / 2**30:.0f} GiB at most: write what is larger as '
      'TFRecord and register a task on it, see docs/own_data.md.'
    )


def _names(found: Mapping[str, Sequence[epath.Path]]) -> str:
  """Of the first file, and how many others there are."""
  paths = [path for of_split in found.values() for path in of_split]
  others = f' and {len(paths) - 1} more' if len(paths) > 1 else ''
  return f'{paths[0]}{others}'

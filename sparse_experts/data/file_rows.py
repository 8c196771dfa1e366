"""Rows of files of one's own, each with its line: texts, JSON lines, CSV.

All are UTF-8, with or without a byte-order mark. What is wrong in a file is an
error that names the file and the line. The rows are

  text     a paragraph, what is between blank lines; or a line; or a file.
           CRLF becomes LF
  jsonl    a line's object. Fields are its keys, 'outer/inner' a nested one;
           strings, numbers as they are written, 'true' and 'false'
  csv      as Python's csv module reads it: commas, quotes, newlines inside
           fields as they are. Fields are columns, named by the first row
"""

from __future__ import annotations

import csv
import difflib
import glob
import io
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from etils import epath

from sparse_experts import storage

DOCUMENTS = ('paragraph', 'line', 'file')
_OTHER_MARKS = {  # UTF-32's first: it begins with UTF-16's.
  b'\xff\xfe\0\0': 'UTF-32',
  b'\0\0\xfe\xff': 'UTF-32',
  b'\xff\xfe': 'UTF-16',
  b'\xfe\xff': 'UTF-16',
}


class Row(NamedTuple):
  """An example.

  Attributes:
    line: of the file, where it begins; the first is 1.
    whole: all of it, fields that nobody asked for too.
    values: of the fields that were asked for, in their order; lists of texts of
      those whose lists were.
  """

  line: int
  whole: str
  values: tuple[str | list[str], ...]


def find(patterns: str | Sequence[str]) -> list[epath.Path]:
  """The files of a path, a glob (`**` is any folder), or a list of these.

  Raises:
    FileNotFoundError: one of them is no file.
  """
  found = []
  is_one = isinstance(patterns, (str, os.PathLike))
  for pattern in [patterns] if is_one else patterns:
    path = storage.given(pattern, 'FILES')
    storage.check_regular(path, 'FILES')
    if path.is_file():
      found.append(path)
      continue
    if path.is_dir():
      raise FileNotFoundError(
        f'{path} is a folder; name its files, such as {str(path / "*")!r}.'
      )
    matches = map(epath.Path, glob.iglob(os.fspath(path), recursive=True))
    matches = sorted(match for match in matches if match.is_file())
    for match in matches:
      storage.check_regular(match, 'FILES')
    if not matches:
      raise FileNotFoundError(
        f'{pattern!r} is no file and matches none; paths are relative to the '
        f'current folder, {epath.Path().absolute()}.'
      )
    found += matches
  return found


def text_rows(path: epath.Path, documents: str = 'paragraph') -> Iterator[Row]:
  """The documents of a file: its only value is the text."""
  text = _decoded(path).replace('\r\n', '\n')
  if documents == 'file':
    text = text.strip('\n')
    yield Row(1, text, (text,))
    return
  lines, first = [], 1
  # A blank line more, so that the last paragraph ends, too.
  for number, line in enumerate([*text.split('\n'), ''], 1):
    if line.strip() and documents == 'line':
      yield Row(number, line, (line,))
    elif line.strip():
      lines.append(line)
    else:
      if lines:
        whole = '\n'.join(lines)
        yield Row(first, whole, (whole,))
      lines, first = [], number + 1


def jsonl_rows(
  path: epath.Path, fields: Sequence[str], lists: Sequence[str] = ()
) -> Iterator[Row]:
  """The objects of a file, one a line; blank lines hold none.

  Args:
    path: of a .jsonl file in UTF-8.
    fields: keys that every object has, in the order of a row's values.
    lists: those of them whose value is a list of texts.

  Raises:
    ValueError: the file is no UTF-8, or a line is no object with such fields;
      the message says which.
  """
  # Numbers stay as they are written; json would take NaN, which is no JSON.
  decoder = json.JSONDecoder(
    parse_int=str,
    parse_float=str,
    parse_constant=_refuse_constant,
    object_pairs_hook=_distinct,
  )
  # Not splitlines, which also ends lines at characters that JSON may hold.
  for number, line in enumerate(_decoded(path).split('\n'), 1):
    line = line.strip()
    if not line:
      continue
    where = f'{path}:{number}'
    try:
      value = decoder.decode(line)
    except RecursionError as error:
      raise ValueError(f'{where} is nested too deeply.') from error
    except ValueError as error:
      raise ValueError(
        f'{where} is no JSON ({error}); each line is one object.'
      ) from error
    if not isinstance(value, dict):
      raise ValueError(
        f'{where} is {_kind(value)}, but each line is one object, such as '
        '{"text": "..."}.'
      )
    values = (_value(value, field, where, field in lists) for field in fields)
    # Whichever way an object is written, equal ones are in one split.
    yield Row(number, json.dumps(value, sort_keys=True), tuple(values))


def csv_rows(path: epath.Path, fields: Sequence[str]) -> Iterator[Row]:
  """The rows of a table after its first, which names the columns."""
  lines = io.StringIO(_decoded(path), newline='')
  reader = csv.reader(lines, strict=True)
  header, places, line = None, (), 1
  for row in _unlimited(reader, path):
    if not row:  # A blank line.
      pass
    elif header is None:
      header = row
      _check_header(header, f'{path}:{line}')
      for field in fields:
        _check_known(field, header, f'{path}:{line}', 'column')
      places = [header.index(field) for field in fields]
    elif len(row) != len(header):
      raise ValueError(
        f'{path}:{line} has {len(row)} fields, but the table has '
        f'{len(header)} ({", ".join(header)}); a field with a comma or a '
        'newline in it stands in double quotes.'
      )
    else:
      yield Row(line, '\n'.join(row), tuple(row[i] for i in places))
    line = reader.line_num + 1


def _decoded(path: epath.Path) -> str:
  """The text of a file without its byte-order mark.

  Raises:
    ValueError: it is empty or no UTF-8.
  """
  data = path.read_bytes()
  for mark, name in _OTHER_MARKS.items():
    if data.startswith(mark):
      raise ValueError(
        f'{path}:1 is {name}; save it as UTF-8, for example by iconv -f {name} '
        '-t UTF-8.'
      )
  text = storage.decoded(path, data)
  if '\0' in text:
    line = text.count('\n', 0, text.index('\0')) + 1
    raise ValueError(
      f'{path}:{line} has a zero byte, which no text has; if it is UTF-16, '
      'save it as UTF-8, for example by iconv -f UTF-16 -t UTF-8.'
    )
  if not text.strip():
    raise ValueError(f'{path} is empty; give a file that has examples.')
  return text


def _unlimited(reader, path: epath.Path) -> Iterator[list[str]]:
  """Rows with fields of any length; what csv refuses, with its line."""
  while True:
    line = reader.line_num + 1
    # The limit is one of the process, so it is lifted for a row at a time.
    limit = csv.field_size_limit(sys.maxsize)
    try:
      row = next(reader, None)
    except csv.Error as error:
      raise ValueError(
        f'{path}:{line} is no row of CSV ({error}); a quote inside a quoted '
        'field is written twice.'
      ) from error
    finally:
      csv.field_size_limit(limit)
    if row is None:
      return
    yield row


def _check_header(header: Sequence[str], where: str) -> None:
  twice = sorted({name for name in header if header.count(name) > 1})
  if twice:
    raise ValueError(
      f'{where} names {", ".join(map(repr, twice))} more than once; rename one '
      'of the columns.'
    )


def _check_known(
  field: str, known: Iterable[str], where: str, kind: str
) -> None:
  known = list(known)
  if field not in known:
    close = difflib.get_close_matches(field, known, n=1)
    meant = f' (did you mean {close[0]!r}?)' if close else ''
    raise ValueError(
      f'{where} has no {kind} {field!r}{meant}; it has: '
      f'{", ".join(map(repr, known)) or "none"}.{_hint(known)}'
    )


def _hint(header: Sequence[str]) -> str:
  """What a table of one column may really be."""
  other = [c for c in ';\t|' if len(header) == 1 and c in header[0]]
  return f' Columns are parted by commas, not by {other[0]!r}.' if other else ''


def _value(row: dict, field: str, where: str, is_list: bool) -> Any:
  """What is at `outer/inner`, as text or as a list of texts."""
  value: Any = row
  names = [field] if field in row else field.split('/')
  for name in names:
    if not isinstance(value, dict):
      raise ValueError(f'{where}: {field!r} goes into {_kind(value)}.')
    _check_known(name, value, where, 'key')
    value = value[name]
  if is_list:
    if not isinstance(value, list) or not value:
      raise ValueError(
        f'{where}: {field!r} is {_kind(value)}, where a list of options is '
        'asked for.'
      )
    return [_text(item, field, where) for item in value]
  return _text(value, field, where)


def _text(value: Any, field: str, where: str) -> str:
  if isinstance(value, bool):
    return str(value).lower()  # As JSON writes it.
  if not isinstance(value, str):
    raise ValueError(
      f'{where}: {field!r} is {_kind(value)}, where a text, a number, true or '
      'false is asked for.'
    )
  try:
    value.encode()
  except UnicodeEncodeError as error:
    raise ValueError(
      f'{where}: {field!r} has half of a surrogate pair, which is no character.'
    ) from error
  return value


def _kind(value: Any) -> str:
  kinds = {dict: 'an object', list: 'a list', bool: 'true or false'}
  if isinstance(value, list) and not value:
    return 'an empty list'
  return 'null' if value is None else kinds.get(type(value), 'one value')


def _distinct(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
  found = dict(pairs)
  if len(found) < len(pairs):
    names = [name for name, _ in pairs]
    twice = next(name for name in names if names.count(name) > 1)
    raise ValueError(f'the key {twice!r} is there twice')
  return found


def _refuse_constant(name: str):
  raise ValueError(f'{name} is no number of JSON')

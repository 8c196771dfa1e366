"""Rows of files: what is right, and the line of what is wrong."""

import csv
import io
import json
import re

import pytest
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_experts.data import file_rows

BOM = b'\xef\xbb\xbf'
LONG = 'x' * 10_000_000

READERS = {
  'csv': lambda path: file_rows.csv_rows(path, ('text', 'label')),
  'jsonl': lambda path: file_rows.jsonl_rows(path, ('text', 'label')),
  'nested': lambda path: file_rows.jsonl_rows(path, ('a/b',), ()),
  'listed': lambda path: file_rows.jsonl_rows(path, ('a',), ('a',)),
  **{
    kind: lambda path, kind=kind: file_rows.text_rows(path, kind)
    for kind in file_rows.DOCUMENTS
  },
}


def rows(folder, kind, data):
  path = epath.Path(folder / 'a.txt')
  path.write_bytes(data)
  return [(row.line, *row.values) for row in READERS[kind](path)]


@pytest.mark.parametrize(
  'kind,data,expected',
  [
    ('csv', b'text,label\na,b\n', [(2, 'a', 'b')]),
    ('csv', b'label,id,text\nb,1,a', [(2, 'a', 'b')]),
    ('csv', BOM + b'text,label\r\na,b\r\n\r\nc,\r\n', [(2, 'a', 'b'),
                                                      (4, 'c', '')]),
    ('csv', b'text,label\n"a, ""b""\nc","d\r\ne"\nf,g\n',
     [(2, 'a, "b"\nc', 'd\r\ne'), (5, 'f', 'g')]),
    ('csv', 'text,label\n\u00e4\u2028,\U0001f600\n'.encode(),
     [(2, '\u00e4\u2028', '\U0001f600')]),
    ('csv', f'text,label\n{LONG},b\n'.encode(), [(2, LONG, 'b')]),
    ('jsonl', b'{"text": "a", "label": "b", "more": [1]}\n', [(1, 'a', 'b')]),
    ('jsonl', BOM + b'\r\n{"text": 1.50, "label": true}\r\n',
     [(2, '1.50', 'true')]),
    ('jsonl', b'{"text": ' + b'9' * 5000 + b', "label": -0.0}',
     [(1, '9' * 5000, '-0.0')]),
    ('jsonl', '{"text": "a\u2028b", "label": "\\u00e4\\n"}'.encode(),
     [(1, 'a\u2028b', '\u00e4\n')]),
    ('jsonl', json.dumps({'text': LONG, 'label': ''}).encode(),
     [(1, LONG, '')]),
    ('nested', b'{"a": {"b": "c"}}\n{"a/b": "d"}', [(1, 'c'), (2, 'd')]),
    ('listed', b'{"a": ["b", 2]}', [(1, ['b', '2'])]),
    ('paragraph', BOM + b'\r\na\r\n  b\r\n \t\r\nc\n\n\nd',
     [(2, 'a\n  b'), (5, 'c'), (8, 'd')]),
    ('line', b'a\r\n\n  b \n', [(1, 'a'), (3, '  b ')]),
    ('file', b'\na\r\n\r\nb\n\n', [(1, 'a\n\nb')]),
    ('line', LONG.encode(), [(1, LONG)]),
  ],
  ids=lambda value: repr(value)[:30],
)  # fmt: skip
def test_right(kind, data, expected, tmp_path):
  assert rows(tmp_path, kind, data) == expected


@pytest.mark.parametrize(
  'kind,data,line,message',
  [
    ('csv', b'', None, 'a.txt is empty'),
    ('csv', BOM + b' \n', None, 'a.txt is empty'),
    ('csv', b'text,labels\n', 1, "'label' (did you mean 'labels'?); it has"),
    ('csv', b'text;label\na;b\n', 1, "it has: 'text;label'. Columns are par"),
    ('csv', b'text,label,text\n', 1, "names 'text' more than once"),
    ('csv', b'text,label\na\n', 2, 'has 1 fields, but the table has 2 (text, '),
    ('csv', b'text,label\n"a\nb",c\nd,e,f\n', 4, 'has 3 fields'),
    ('csv', b'text,label\n\n"a"b,c\n', 3, 'is no row of CSV'),
    ('csv', b'text,label\na,"b\nc,d\n', 2, 'is no row of CSV (unexpected end'),
    ('csv', BOM + b'text,label\na,b\n\xff,c\n', 3, 'has the byte 0xff'),
    ('csv', 'text,label\n'.encode('utf-16'), 1, 'is UTF-16; save it as UTF-8'),
    ('csv', 'text,label\n'.encode('utf-32'), 1, 'is UTF-32; save it as UTF-8'),
    ('csv', 'text,label\n'.encode('utf-16-le'), 1, 'has a zero byte'),
    ('line', b'a\nb\0', 2, 'has a zero byte, which no text has'),
    ('line', b'a\nb\xc3\nc', 2, 'has the byte 0xc3, which is no UTF-8'),
    ('jsonl', b'{"text": "a", "label": "b"}\n{"text": \n', 2, 'is no JSON'),
    ('jsonl', b'{"text": NaN, "label": 1}', 1, 'NaN is no number of JSON'),
    ('jsonl', b'{"text": 1, "text": 2}', 1, "the key 'text' is there twice"),
    ('jsonl', b'\n[1]', 2, 'is a list, but each line is one object'),
    ('jsonl', b'{"text": "a", "lable": 1}', 1, "(did you mean 'lable'?)"),
    ('jsonl', b'{"text": "a", "label": null}', 1, "'label' is null, where"),
    ('jsonl', b'{"text": ["a"], "label": 1}', 1, "'text' is a list, where a"),
    ('jsonl', b'{"text": "\\ud800", "label": 1}', 1, 'half of a surrogate'),
    ('jsonl', b'[' * 100_000, 1, 'nested too deeply'),
    ('nested', b'{"a": {"c": 1}}', 1, "has no key 'b'"),
    ('nested', b'{"a": "c"}', 1, "'a/b' goes into one value"),
    ('listed', b'{"a": "b"}', 1, "'a' is one value, where a list"),
    ('listed', b'{"a": []}', 1, "'a' is an empty list"),
    ('listed', b'{"a": [["b"]]}', 1, "'a' is a list, where a text"),
  ],
)
def test_wrong(kind, data, line, message, tmp_path):
  with pytest.raises(ValueError) as caught:
    rows(tmp_path, kind, data)
  text = str(caught.value)
  assert message in text and '\n' not in text, text
  if line is not None:
    assert f'a.txt:{line}' in text, text


def test_reading_changes_no_limit_of_others(tmp_path):
  before = csv.field_size_limit()
  rows(tmp_path, 'csv', b'text,label\na,b\n')
  assert csv.field_size_limit() == before


text = st.text(
  st.characters(exclude_categories=['Cs'], exclude_characters='\0'), max_size=8
)
names = st.lists(text, min_size=1, max_size=4, unique=True)
table = names.flatmap(
  lambda names: st.tuples(
    st.just(names),
    st.lists(st.tuples(*[text] * len(names)), min_size=1, max_size=4),
  )
)


@settings(deadline=None)
@given(table, st.booleans())
def test_any_table_reads_back(tmp_path_factory, table, marked):
  header, values = table
  written = io.StringIO(newline='')
  csv.writer(written).writerows([header, *values])
  path = epath.Path(tmp_path_factory.getbasetemp() / 'table.csv')
  if not written.getvalue().strip() or written.getvalue()[0] == '\ufeff':
    return  # Nothing but blanks is refused; a mark of its own is dropped.
  path.write_bytes(BOM * marked + written.getvalue().encode())
  read = [row.values for row in file_rows.csv_rows(path, header)]
  assert read == values


@settings(deadline=None)
@given(st.lists(st.fixed_dictionaries({'a': text, 'b/c': text}), min_size=1))
def test_any_objects_read_back(tmp_path_factory, objects):
  path = epath.Path(tmp_path_factory.getbasetemp() / 'objects.jsonl')
  path.write_text(''.join(json.dumps(o) + '\n' for o in objects))
  read = [row.values for row in file_rows.jsonl_rows(path, ('a', 'b/c'))]
  assert read == [(o['a'], o['b/c']) for o in objects]


def test_find(tmp_path, monkeypatch):
  (tmp_path / 'deep').mkdir()
  for name in ('b.txt', 'a.txt', 'deep/c.txt', '[d].txt'):
    (tmp_path / name).write_text('a')
  monkeypatch.chdir(tmp_path)

  def found(patterns):
    return [str(path) for path in file_rows.find(patterns)]

  assert found('a.txt') == ['a.txt']
  assert found(['?.txt', 'deep/*']) == ['a.txt', 'b.txt', 'deep/c.txt']
  assert found('**/c.txt') == ['deep/c.txt']
  assert found('[d].txt') == ['[d].txt']
  assert found(f'{tmp_path}/a.*') == [f'{tmp_path}/a.txt']
  for pattern, message in (
    (
      'c.txt',
      f"'c.txt' is no file and matches none.*{re.escape(str(tmp_path))}",
    ),
    ('c*', 'matches none'),
    ('deep', r"is a folder; name its files, such as 'deep/\*'"),
  ):
    with pytest.raises(FileNotFoundError, match=message):
      file_rows.find(pattern)

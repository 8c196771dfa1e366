"""Files that were cut off are mended; failed writes have a cause."""

import pytest
from etils import epath

from sparse_experts import storage


@pytest.mark.parametrize(
  'content,kept',
  [
    ('', ''),
    ('{"a": 1}\n', '{"a": 1}\n'),
    ('{"a": 1}\n{"a"', '{"a": 1}\n'),
    ('{"a": 1}\n{"a": 2}', '{"a": 1}\n'),
    ('{"a"', ''),
    ('a\n' + 'b' * 200_000, 'a\n'),
  ],
)
def test_half_a_line_is_cut_off(content, kept, tmp_path, capsys):
  path = epath.Path(tmp_path / 'lines.jsonl')
  path.write_text(content)
  storage.mend_lines(path)
  assert path.read_text() == kept
  told = capsys.readouterr().err
  if kept == content:
    assert told == ''
  else:
    lost = len(content) - len(kept)
    assert told == (
      f'{path}: half a line at its end, {lost} bytes, was cut off\n'
    )
  assert [file.name for file in tmp_path.iterdir()] == ['lines.jsonl']


def test_a_line_in_the_middle_that_is_damaged_is_named(tmp_path):
  path = epath.Path(tmp_path / 'lines.jsonl')
  path.write_text('{"a": 1}\n{"a": 2}\n{"a"')
  assert storage.read_lines(path) == [{'a': 1}, {'a': 2}]
  for damage in ('{"a": 1}\n{"a": 2\n{}\n', '{"a": 1}\n3\n{}\n'):
    path.write_text(damage)
    with pytest.raises(ValueError, match='lines.jsonl is damaged in line 2'):
      storage.read_lines(path)


def test_what_is_not_there_needs_no_mending(tmp_path):
  storage.mend_lines(epath.Path(tmp_path / 'none'))
  assert list(tmp_path.iterdir()) == []


def test_a_failed_write_names_file_cause_and_remedy(tmp_path):
  with (
    pytest.raises(OSError, match='FILE cannot be written .No space left on d'),
    storage.writing('FILE', 'free some'),
  ):
    raise RuntimeError('RESOURCE_EXHAUSTED: x; No space left on device [y]\nz')
  with (
    pytest.raises(OSError, match='FILE cannot be written \\(a\\): free some'),
    storage.writing('FILE', 'free some'),
  ):
    raise RuntimeError('a\nb')

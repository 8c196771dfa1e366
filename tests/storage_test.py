"""Files that were cut off are mended; failed writes have a cause."""

import pytest
from etils import epath

from sparse_experts import storage
from sparse_experts.insight import curves
from sparse_experts.training import writers


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
  read = []
  assert storage.read_lines(path, read.append) == [{'a': 1}, {'a': 2}] == read
  for damage in ('{"a": 2', '3', '[]', '[["a", 1]]', '[' * 100_000):
    path.write_text('{"a": 1}\n' + damage + '\n{}\n')
    with pytest.raises(ValueError, match='lines.jsonl is damaged in line 2'):
      storage.read_lines(path, read.append)


@pytest.mark.parametrize(
  'line,why',
  [
    ('{"note": "mine"}', "'step' must be a whole number, not None"),
    ('{"step": null, "name": "a"}', "'step' must be a whole number, not None"),
    ('{"step": "a", "name": "a"}', "'step' must be a whole number, not 'a'"),
    ('{"step": true, "name": "a"}', "'step' must be a whole number, not True"),
    ('{"step": NaN, "name": "a"}', "'step' must be a whole number, not nan"),
    ('{"step": Infinity, "name": "a"}', 'must be a whole number, not inf'),
    ('{"step": 1}', "'name' must be a text, not None"),
    ('{"step": 1, "name": "a", "b": "c"}', "'b' must be a number, not 'c'"),
  ],
)
def test_a_line_that_is_no_metrics_is_named_and_stays(line, why, tmp_path):
  path = tmp_path / 'metrics.jsonl'
  good = '{"step": 1, "name": "train", "loss": NaN}\n'
  path.write_text(f'{good}{line}\n{good}')
  for read in (curves.read, lambda folder: writers.Writers(folder, 0)):
    with pytest.raises(ValueError, match='jsonl is damaged in line 2') as error:
      read(tmp_path)
    assert why in str(error.value)
  assert path.read_text() == f'{good}{line}\n{good}'


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

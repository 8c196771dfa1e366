"""Known bugs that tests find: their records hold, and survivors are told."""

import ast
import difflib
import shutil

import mutants
import pytest
from paths import ROOT

ALL = mutants.mutants()


def test_every_mutant_applies():
  complaints = {m.name: m.apply(ROOT, '--check') for m in ALL}
  assert not {name: text for name, text in complaints.items() if text}


def test_every_mutant_has_a_default_test():
  for mutant in ALL:
    file, _, name = mutant.test.partition('::')
    (test,) = (
      node
      for node in ast.parse((ROOT / file).read_text()).body
      if isinstance(node, ast.FunctionDef)
      and node.name == name.partition('[')[0]
    )
    marks = [ast.unparse(mark) for mark in test.decorator_list]
    assert 'pytest.mark.slow' not in marks, mutant.test
    # What changes tests or scripts shows nothing of the code.
    assert '\n+++ b/sparse_experts/' in mutant.patch, mutant.name
    assert mutant.patch.count('\n+++ ') == 1, mutant.name


def test_a_record_without_its_fields_is_refused(tmp_path):
  whole = (mutants.FOLDER / f'{ALL[0].name}.patch').read_text()
  path = tmp_path / 'a.patch'
  path.write_text(whole)
  assert mutants.read(path).patch == ALL[0].patch
  for text in (
    whole[whole.index('Killed by') :],
    whole.replace('Killed by: ', ''),
    whole[: whole.index('--- ')],
  ):
    path.write_text(text)
    with pytest.raises(ValueError, match='a.patch must be a sentence'):
      mutants.read(path)


FILE = 'sparse_experts/moe/assignment.py'


def record(first_line, test='test_positions_by_hand'):
  """A mutant whose file begins with another line."""
  before = (ROOT / FILE).read_text().splitlines(keepends=True)
  after = [f'{first_line}\n', *before[1:]]
  lines = difflib.unified_diff(before, after, f'a/{FILE}', f'b/{FILE}')
  killed_by = f'Killed by: tests/moe/assignment_test.py::{test}\n'
  return ''.join(['It begins otherwise.\n', killed_by, *lines])


@pytest.mark.slow
def test_survivors_are_told(tmp_path, monkeypatch, capsys):
  names = ('cumsum_along_the_wrong_axis', 'capacity_ignored')
  for name in names:
    shutil.copy(mutants.FOLDER / f'{name}.patch', tmp_path)
  comment = record('"""What a router decides."""')
  for name, text in {
    'a_survivor': comment,
    'an_old_patch': comment.replace('-"""What', '-"""That'),
    'an_error': record('import nothing'),
  }.items():
    (tmp_path / f'{name}.patch').write_text(text)
  monkeypatch.setattr(mutants, 'FOLDER', tmp_path)
  assert mutants.main(names[:1]) == 0
  assert capsys.readouterr().out.endswith('\n1 mutants, 1 killed\n')
  assert mutants.main([]) == 1
  out = capsys.readouterr().out
  assert out.endswith('\n5 mutants, 2 killed\n')
  assert 'test_positions_by_hand passes' in out
  assert 'its patch does not apply: error: patch failed' in out
  assert 'its test could not run: ' in out
  # Of a test that is not there, nothing is told as killed.
  (tmp_path / 'no_test.patch').write_text(record('', 'test_nothing'))
  assert mutants.main(['no_test']) == 1
  assert 'killed' not in capsys.readouterr().out

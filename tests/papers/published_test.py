"""Printed numbers as data: a paper is a file, and digits round."""

import pytest

from sparse_experts import papers
from sparse_experts.papers import published

PAPER = """
from sparse_experts.papers.published import Row, Table

TABLES = {%r: Table('A paper', (Row('tiny', 'paper/tiny', '1.5M'),))}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """Another folder that papers are looked for in."""
  monkeypatch.setattr(papers, '__path__', [*papers.__path__, str(tmp_path)])
  published.tables.cache_clear()
  yield tmp_path
  published.tables.cache_clear()


def test_a_file_is_a_paper_and_nothing_else_names_it(folder):
  before = {*published.tables()}
  published.tables.cache_clear()
  (folder / 'paper_of_tests.py').write_text(PAPER % 'tests_table1')
  assert {*published.tables()} - before == {'tests_table1'}
  ((table, row),) = published.rows_of(['gin/models/paper/tiny.gin'], [])
  assert (table.title, row.printed) == ('A paper', {'parameters': '1.5M'})
  assert not [*published.rows_of(['gin/models/paper/tiny.gin'], ['A=1'])]


def test_two_papers_cannot_name_a_table_alike(folder):
  (folder / 'switch_again.py').write_text(PAPER % 'switch_table7')
  with pytest.raises(ValueError, match="switch_again has .* 'switch_table7'"):
    published.tables()


def test_the_names_that_commands_take_stay():
  assert {*published.tables()} >= {
    'clark_models',
    'deepseek_moe',
    'ec_models',
    'glam_table4',
    'gshard_models',
    'mixtral',
    'olmoe',
    'prmoe_models',
    'stmoe_table11',
    'switch_table7',
    'switch_table9',
    't5_checkpoints',
  }


def test_agreement():
  # 7.42 rounds to 7; 13.9 is neither 20 nor near; 2% of 1.00 is near.
  assert published.agrees('7B', 7.42e9)
  assert not published.agrees('20B', 13.9e9)
  assert published.agrees('1.00T', 1.019e12)
  assert published.agrees('1.00T', 0.981e12)
  assert not published.agrees('1.00T', 1.021e12)
  assert published.agrees('0.1B', 0.149e9)
  assert not published.agrees('0.1B', 0.151e9)

"""bench layer: its rows, and how a program's text is read."""

import importlib.util
import json

import command
import pytest

from sparse_experts.bench import layer as layer_bench

TINY = [
  f'--gin.{setting}'
  for setting in (
    'EXPERTS=(2,4)',
    'CHOICES=(1,)',
    'TOKENS=32',
    'EMBED_DIM=8',
    'MLP_DIM=16',
    'ROUNDS=3',
  )
]


def test_rows_have_what_the_page_shows():
  outcome = command.run('bench', 'layer', '--json', *TINY)
  assert outcome.code == 0, outcome.stderr
  rows = json.loads(outcome.stdout)
  dispatchers = ('gather', 'einsum', 'grouped')
  assert [(row['experts'], row['dispatcher']) for row in rows] == [
    (experts, name) for experts in (2, 4) for name in dispatchers
  ]
  for row in rows:
    assert row['k'] == 1
    low, high = row['train_ratio_iqr']
    assert 0 < low <= row['train_ratio'] <= high
    assert row['forward_ms'] > 0 and row['train_ms'] > row['forward_ms'] / 10
    assert 0 <= row['dropped'] < 1
    if row['dispatcher'] == 'grouped':
      assert row['dropped'] == 0


def test_a_table_for_people():
  outcome = command.run(
    'bench', 'layer', *TINY, "--gin.DISPATCHERS=('gather',)"
  )
  heading, *rows = outcome.stdout.splitlines()
  assert heading.split()[:3] == ['dispatcher', 'experts', 'k']
  assert [row.split()[:3] for row in rows] == [
    ['gather', '2', '1'],
    ['gather', '4', '1'],
  ]


def test_bench_says_what_it_can_time():
  process = command.start('-m', 'sparse_experts', 'bench', 'everything')
  _, stderr = process.communicate()
  assert process.returncode == 2
  line = "error: argument what: invalid choice: 'everything' (choose from "
  assert stderr.startswith(line) and stderr.count('\n') == 1


@pytest.mark.skipif(
  importlib.util.find_spec('libtpu') is not None, reason='libtpu is here'
)
def test_without_libtpu_a_topology_is_an_error_with_the_remedy():
  outcome = command.run('bench', 'layer', '--topology=v5p:4x4x4')
  assert outcome.code == 2
  assert outcome.stderr.startswith('error: compiling for a TPU topology needs')
  assert "pip install 'sparse_experts[precompile]'" in outcome.stderr


def test_useful_flops_are_two_products_of_each_choice():
  # 2 products x 2 x (3 tokens x 2 choices) x 5 x 7.
  assert layer_bench.Layer(3, 5, 7).useful_flops(k=2) == 2 * 2 * 6 * 5 * 7

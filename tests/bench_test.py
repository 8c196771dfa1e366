"""bench layer: its rows, and how a program's text is read."""

import importlib.util
import json

import command
import pytest

from sparse_experts.analysis import bench, topology

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
  outcome = command.run('bench', 'everything')
  assert outcome.code == 2
  assert outcome.stderr == (
    "error: bench times a 'layer', not 'everything': bench layer.\n"
  )


@pytest.mark.skipif(
  importlib.util.find_spec('libtpu') is not None, reason='libtpu is here'
)
def test_without_libtpu_a_topology_is_an_error_with_the_remedy():
  outcome = command.run('bench', 'layer', '--topology=v5p:4x4x4')
  assert outcome.code == 2
  assert outcome.stderr.startswith('error: compiling for a TPU topology needs')
  assert "pip install -e '.[precompile]'" in outcome.stderr


def test_useful_flops_are_two_products_of_each_choice():
  # 2 products x 2 x (3 tokens x 2 choices) x 5 x 7.
  assert bench.Layer(3, 5, 7).useful_flops(k=2) == 2 * 2 * 6 * 5 * 7


def test_collectives_are_counted_with_their_bytes():
  text = """
  %a = bf16[1,64,80]{2,1,0:T(8,128)(2,1)} all-to-all(%x), channel_id=1
  %b = f32[8]{0} all-reduce(%y), to_apply=%add
  %c = (f32[4]{0}, f32[8]{0}) all-gather-start(%z), dimensions={0}
  %d = f32[8]{0} all-gather-done(%c)
  %e = f32[8]{0} fusion(%a, %d), calls=%all-to-all_fusion
  """
  assert topology.collectives(text) == {
    'all-to-all': {'count': 1, 'bytes': 2 * 64 * 80},
    'all-reduce': {'count': 1, 'bytes': 32},
    'all-gather': {'count': 1, 'bytes': 24},
  }

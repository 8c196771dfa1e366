"""bench decode: its rows, and that work does not grow with experts."""

import json

import command
import pytest

TINY = [
  f'--gin.{setting}'
  for setting in (
    'EXPERTS=(4,32)',
    'BATCH_SIZES=(2,)',
    'NUM_EMBEDDINGS=64',
    'EMBED_DIM=64',
    'NUM_HEADS=2',
    'HEAD_DIM=8',
    'MLP_DIM=512',
    'MAX_TOKENS=3',
    'ROUNDS=3',
  )
]


@pytest.fixture(scope='module')
def rows():
  outcome = command.run('bench', 'decode', '--json', *TINY)
  assert outcome.code == 0, outcome.stderr
  return json.loads(outcome.stdout)


def test_rows_have_what_the_page_shows(rows):
  assert [(row['model'], row['batch']) for row in rows] == [
    (model, 2) for model in ('dense', '4 experts', '32 experts')
  ]
  for row in rows:
    low, high = row['ratio_iqr']
    assert 0 < low <= row['ratio'] <= high
    speed = row['batch'] * 3 / row['seconds']
    assert row['tokens_per_second'] == pytest.approx(speed)
  assert rows[0]['ratio'] == 1


def test_work_does_not_grow_with_experts(rows):
  dense, few, many = (row['flops_per_token'] for row in rows)
  # An FFN: 2 products x 2 x 64 x 512. Routers: 2 x 64 x E, and some for each
  # expert; were every expert to compute, 28 FFNs would lie between them.
  assert dense > 2 * 2 * 64 * 512
  assert 0 < many - few < 0.2 * 2 * 2 * 64 * 512
  assert few < 1.1 * dense


def test_it_is_timed_here():
  outcome = command.run('bench', 'decode', '--topology=v5p:4x4x4', *TINY)
  assert outcome.code == 2
  assert outcome.stderr == (
    'error: --topology is for bench layer and step; decoding is timed here.\n'
  )

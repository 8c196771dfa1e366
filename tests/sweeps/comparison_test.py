"""Groups of runs and their differences; numbers by hand."""

import json
import shutil

import made_run
import numpy as np
import pytest

from sparse_experts.insight import curves
from sparse_experts.insight.curves import Curve
from sparse_experts.sweeps import comparison, comparison_page, written_runs

# Held-out losses at steps 0, 10 and 20, by NUM_EXPERTS and seed.
LOSSES = {
  4: {0: (9.0, 4.0, 1.5), 1: (9.0, 4.0, 2.0), 2: (9.0, 4.0, 3.5)},
  8: {0: (9.0, 3.0, 2.0), 1: (9.0, 3.0, 3.0), 2: (9.0, 3.0, 4.0)},
}


@pytest.fixture
def groups(tmp_path):
  folders = [
    made_run.write(
      tmp_path / f'{n}-{seed}', losses, seed, NUM_EXPERTS=n, WIDTH=64
    )
    for n, of_seeds in LOSSES.items()
    for seed, losses in reversed(of_seeds.items())
  ]
  groups = comparison.groups([written_runs.read(x) for x in folders])
  return [group.with_flops(flops) for group, flops in zip(groups, (10, 20))]


def test_runs_that_differ_in_the_seed_are_one_group(groups):
  assert [group.name for group in groups] == ['NUM_EXPERTS=4', 'NUM_EXPERTS=8']
  for group in groups:
    assert [run.seed for run in group.runs] == [0, 1, 2]
  assert comparison.settings(groups) == {'NUM_EXPERTS': ['4', '8']}
  assert comparison.metrics(groups) == ['loss']


def test_paired_differences_are_those_of_a_hand_computation(groups):
  # Steps: 20 for both. Pairs differ by .5, 1, .5: their mean is 2/3, their
  # standard deviation sqrt((2/36 + 4/36) / 2) = .2886751; over sqrt(3) that is
  # 1/6, and the 97.5th percentile of t with 2 degrees is 4.302653.
  half = 4.302653 / 6
  steps, at_flops, seconds = comparison.differences('loss', groups)
  assert steps.equal == 'steps' and steps.at == 20
  assert (steps.of, steps.minus) == ('NUM_EXPERTS=8', 'NUM_EXPERTS=4')
  assert steps.seeds == [0, 1, 2]
  assert steps.difference == pytest.approx(2 / 3)
  assert steps.interval == pytest.approx((2 / 3 - half, 2 / 3 + half))
  # FLOPs: 4 experts end at 200, where 8 experts are at step 10, loss 3:
  # differences 3 - 1.5, 3 - 2, 3 - 3.5.
  assert at_flops.equal == 'FLOPs' and at_flops.at == 200
  assert at_flops.difference == pytest.approx((1.5 + 1.0 - 0.5) / 3)
  # Seconds: 8 experts end at 2.5, where 4 experts are at step 10, loss 4.
  assert seconds.equal == 'seconds' and seconds.at == 2.5
  assert seconds.difference == pytest.approx((-2.0 - 1.0 + 0.0) / 3)


def test_a_single_seed_has_no_interval(tmp_path):
  runs = [
    written_runs.read(
      made_run.write(tmp_path / f'{n}', losses[1], 1, NUM_EXPERTS=n)
    )
    for n, losses in LOSSES.items()
  ]
  found = comparison.differences('loss', comparison.groups(runs))
  # No FLOPs are given, so there is no row of them.
  assert [(row.equal, row.difference) for row in found] == [
    ('steps', 1.0),
    ('seconds', -1.0),
  ]
  assert all(row.interval is None for row in found)


def test_only_seeds_of_both_are_paired_and_only_where_both_have_been(tmp_path):
  of = [
    made_run.write(tmp_path / 'a0', (5.0, 4.0), 0, (0, 10), RATE=1),
    made_run.write(tmp_path / 'a1', (6.0, 5.0), 1, (0, 10), RATE=1),
    made_run.write(tmp_path / 'b1', (6.0, 2.0), 1, (0, 20), RATE=2),
    made_run.write(tmp_path / 'b2', (7.0, 1.0), 2, (0, 20), RATE=2),
    made_run.write(tmp_path / 'c1', (7.0, 1.0), 1, (15, 20), RATE=3),
    made_run.write(tmp_path / 'd3', (7.0, 1.0), 3, (0, 20), RATE=4),
  ]
  groups = comparison.groups([written_runs.read(folder) for folder in of])
  by_steps = [
    row
    for row in comparison.differences('loss', groups)
    if row.equal == 'steps'
  ]
  # Not RATE=3, whose first evaluation is later, nor RATE=4, of another seed.
  (row,) = by_steps
  assert (row.of, row.at, row.seeds) == ('RATE=2', 10, [1])
  assert row.difference == 4.0 - 5.0
  assert comparison.unpaired(groups) == ['RATE=4']


def test_long_names_are_those_of_folders(tmp_path):
  of = [
    made_run.write(tmp_path / name, (1.0, 1.0), 0, (0, 1), A=f"'{name * 60}'")
    for name in ('x', 'y')
  ]
  groups = comparison.groups([written_runs.read(folder) for folder in of])
  assert [group.name for group in groups] == ['x', 'y']


def test_other_data_is_another_group(tmp_path):
  for name in ('x', 'y'):
    folder = made_run.write(tmp_path / name, (1.0, 1.0), 0, (0, 1))
    step = folder / 'checkpoints/1'
    (step / 'data').mkdir(parents=True)
    (step / 'commit_success.txt').touch()
    text = json.dumps({'corpus': {'task': name}})
    (step / 'data/batches.json').write_text(text)
  of = [written_runs.read(tmp_path / name) for name in ('x', 'y')]
  groups = comparison.groups(of)
  assert comparison.settings(groups) == {'data': ['task x', 'task y']}
  assert 'different data' in comparison_page.apart(groups)
  assert comparison_page.apart(groups[:1]) == ''


def test_what_cannot_be_compared(tmp_path):
  given = ((1.0, 1.0), 0, (0, 1))
  one = written_runs.read(made_run.write(tmp_path / 'one', *given))
  other = written_runs.read(made_run.write(tmp_path / 'other', *given))
  with pytest.raises(ValueError, match='one configuration and of one seed, 0'):
    comparison.groups([one, other])
  training = other._replace(held_out=False)
  with pytest.raises(ValueError, match='other has no held-out metrics'):
    comparison.groups([one, training])
  (tmp_path / 'one/config.gin').unlink()
  with pytest.raises(FileNotFoundError, match=r'has no config\.gin'):
    written_runs.read(tmp_path / 'one')


def test_a_diverged_seed_is_no_number_of_json(groups):
  groups[1].runs[0].metrics['loss'].values[-1] = np.nan
  found = comparison.facts(groups)
  json.dumps(found, allow_nan=False)
  assert found['groups'][1]['metrics']['loss'] == [None, 3.0, 4.0]
  assert found['differences'][0]['difference'] is None


def test_seconds_are_of_the_steps_that_count():
  # Ten at 1 second each, of which the first was not measured, ten at .5; a
  # call that took one step more.
  each = Curve(np.array([10, 20]), np.array([1.0, 0.5]))
  loss = Curve(np.array([10, 20, 21]), np.zeros(3))
  found = curves.seconds({'seconds_per_step': each, 'loss': loss})
  np.testing.assert_array_equal(found.steps, [0, 10, 20, 21])
  np.testing.assert_array_equal(found.values, [0, 10, 15, 15.5])


def test_a_band_is_where_all_curves_are():
  a = Curve(np.array([0, 10, 20]), np.array([4.0, 2.0, 0.0]))
  b = Curve(np.array([5, 15]), np.array([1.0, 3.0]))
  found = curves.band([a, b])
  np.testing.assert_array_equal(found.steps, [5, 10, 15])
  np.testing.assert_allclose(found.low, [1, 2, 1])
  np.testing.assert_allclose(found.mean, [2, 2, 2])
  np.testing.assert_allclose(found.high, [3, 2, 3])


def test_seconds_of_several_machines_are_not_compared(groups):
  first, second = groups
  second.runs[0] = second.runs[0]._replace(machine='8 x TPU, another')
  found = comparison.differences('loss', [first, second])
  assert [row.equal for row in found] == ['steps', 'FLOPs']


def test_tasks_are_compared_that_were_evaluated_alike(tmp_path):
  for seed, beams in enumerate((1, 1, 4)):
    folder = made_run.write(tmp_path / str(seed), (1.0, 1.0), seed, (0, 1))
    (folder / 'evaluation').mkdir()
    (folder / 'evaluation/sums-test-1.json').write_text(
      json.dumps({'settings': {'beams': beams}})
    )
    with (folder / 'metrics.jsonl').open('a') as file:
      line = {'step': 1, 'name': 'evaluation/sums-test', 'rouge1': 0.5}
      file.write(json.dumps(line) + '\n')
  runs = [written_runs.read(tmp_path / str(seed)) for seed in range(3)]
  # It makes no group of its own: they differ in the seed only.
  (group,) = comparison.groups(runs)
  assert comparison.metrics([group]) == ['loss']
  assert comparison.evaluated_otherwise([group]) == ['sums-test']
  alike = comparison.groups(runs[:2])
  assert comparison.metrics(alike) == ['loss', 'sums-test/rouge1']
  # Nor does one that was not evaluated at all.
  shutil.rmtree(tmp_path / '1/evaluation')
  comparison.groups([written_runs.read(tmp_path / str(i)) for i in range(2)])


def test_a_seed_by_another_name(tmp_path):
  folder = made_run.write(tmp_path / 'x', (1.0, 1.0), '%FIRST', (0, 1), FIRST=7)
  assert written_runs.read(folder).seed == 7
  folder = made_run.write(tmp_path / 'y', (1.0, 1.0), "'a'", (0, 1))
  with pytest.raises(ValueError, match="SEED = 'a', which is no whole number"):
    written_runs.read(folder)


def test_runs_that_have_nothing_in_common(tmp_path):
  of = [made_run.write(tmp_path / str(i), (1.0,), i, (0,)) for i in range(2)]
  (of[1] / 'metrics.jsonl').write_text(
    '{"step": 0, "name": "eval", "accuracy": 0.5}\n'
  )
  groups = comparison.groups([written_runs.read(folder) for folder in of])
  with pytest.raises(ValueError, match='no metric in common'):
    comparison.metrics(groups)

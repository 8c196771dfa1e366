"""Calibration: hand-made cases, an independent oracle, ranges; BIG-bench."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_experts.data import bigbench, tasks, vocabularies
from sparse_experts.evaluation import calibration, task_evaluators

# Confidences .6, .6, .9, .8, of which the 1st, 3rd and 4th are right.
P = np.array([[0.6, 0.4], [0.6, 0.4], [0.1, 0.9], [0.2, 0.8]])
LABEL = np.array([0, 1, 1, 1])


def test_by_hand():
  """Bins (.5, .6], (.7, .8], (.8, .9] of 2, 1, 1 examples."""
  diagram = calibration.reliability(P, LABEL)
  filled = {
    round(b.high, 1): (b.count, b.accuracy, round(b.confidence, 6))
    for b in diagram
    if b.count
  }
  assert filled == {0.6: (2, 0.5, 0.6), 0.8: (1, 1, 0.8), 0.9: (1, 1, 0.9)}
  # (2 x .1 + .2 + .1) / 4, and the root of (2 x .01 + .04 + .01) / 4.
  assert calibration.expected_calibration_error(diagram) == pytest.approx(0.125)
  assert calibration.rms_calibration_error(diagram) == pytest.approx(
    (0.07 / 4) ** 0.5
  )
  # 2 x (.16 + .36 + .01 + .04) / 4.
  assert calibration.brier_score(P, LABEL) == pytest.approx(0.285)


def test_equal_mass_by_hand():
  """Sorted confidences .6 .6 | .8 .9: halves of means .6 and .85."""
  low, high = calibration.reliability(P, LABEL, bins=2, binning='equal_mass')
  assert (low.count, low.accuracy, low.confidence) == (2, 0.5, 0.6)
  assert (high.low, high.high) == (0.8, 0.9)
  assert (high.accuracy, high.confidence) == (1, pytest.approx(0.85))


def test_ties_are_the_first_option():
  p = np.full((2, 4), 0.25)
  assert calibration.measures(p, np.array([0, 3]))['accuracy'] == 0.5


def test_perfect_and_opposite():
  right, wrong = np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])
  label = np.array([0])
  good, bad = (calibration.measures(p, label) for p in (right, wrong))
  for name in ('expected_calibration_error', 'rms_calibration_error'):
    assert (good[name], bad[name]) == (0, 1)
  assert (good['brier_score'], bad['brier_score']) == (0, 2)


@pytest.mark.parametrize(
  'examples, bins, step', [(200, 10, 0.05), (1000, 10, 0.05), (2000, 20, 0.02)]
)
def test_rms_is_of_bins_of_100_examples_and_of_ten_at_least(
  examples, bins, step
):
  """Five options; bins' accuracies are .1 above and below confidence in turns.

  So RMS is .1. Of two bins in one it would be 0, and of parts of a bin more, as
  its right answers come first.
  """
  each = examples // bins
  p, label = [], []
  for b in range(bins):
    confidence = 0.25 + step * b
    right = round(each * (confidence + 0.1 * (-1) ** b))
    p += [[confidence, *[(1 - confidence) / 4] * 4]] * each
    label += [0] * right + [1] * (each - right)
  found = calibration.measures(np.array(p), np.array(label))
  assert found['rms_calibration_error'] == pytest.approx(0.1)


def test_probabilities_of_unequal_numbers_of_options():
  p = calibration.probabilities([np.log([0.5, 0.25]), [-1e4, -1e4, -1e4]])
  np.testing.assert_allclose(p, [[2 / 3, 1 / 3, 0], [1 / 3] * 3])


def naive(p, label, bins):
  """ECE, RMS and Brier, example by example."""
  sums = {}
  brier = 0.0
  for row, target in zip(p, label):
    choice = max(range(len(row)), key=lambda o: row[o])
    where = max(int(np.ceil(row[choice] * bins - 1e-9)) - 1, 0)
    count, right, confidence = sums.get(where, (0, 0, 0.0))
    sums[where] = (
      count + 1,
      right + (choice == target),
      confidence + row[choice],
    )
    brier += sum((value - (o == target)) ** 2 for o, value in enumerate(row))
  ece = sum(abs(r - c) for _, r, c in sums.values()) / len(p)
  square = sum(n * ((r - c) / n) ** 2 for n, r, c in sums.values()) / len(p)
  return ece, square**0.5, brier / len(p)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 5))
def test_against_the_oracle_and_in_range(seed, examples, options):
  random = np.random.default_rng(seed)
  logits = random.normal(scale=3, size=(examples, options))
  p = calibration.probabilities(logits)
  label = random.integers(options, size=examples)
  diagram = calibration.reliability(p, label, bins=7)
  ours = (
    calibration.expected_calibration_error(diagram),
    calibration.rms_calibration_error(diagram),
    calibration.brier_score(p, label),
  )
  np.testing.assert_allclose(ours, naive(p, label, 7), atol=1e-9)
  ece, rms, brier = ours
  assert 0 <= ece <= rms + 1e-12 <= 1 + 1e-9 and 0 <= brier <= 2
  mass = calibration.reliability(p, label, bins=7, binning='equal_mass')
  assert sum(b.count for b in mass) == sum(b.count for b in diagram) == examples
  counts = [b.count for b in mass]
  assert max(counts) - min(counts) <= 1


def test_calibrated_answers_have_no_error():
  """Ten answers at .7, of which seven are right."""
  p = np.tile([0.7, 0.3], (10, 1))
  label = np.array([0] * 7 + [1] * 3)
  found = calibration.measures(p, label)
  assert found['expected_calibration_error'] == pytest.approx(0)


@pytest.mark.parametrize(
  'p,label,message',
  [
    (np.zeros((0, 2)), np.zeros(0, int), 'at least one'),
    (P, LABEL[:3], 'shapes'),
    (P + 0.1, LABEL, 'sum to 1'),
    (np.array([[1.5, -0.5]]), np.array([0]), 'at least 0'),
    (P, np.array([0, 1, 2, 1]), 'one is 2'),
  ],
)
def test_bad_arguments(p, label, message):
  with pytest.raises(ValueError, match=message):
    calibration.brier_score(p, label)


def test_bad_bins():
  with pytest.raises(ValueError, match='at least 1'):
    calibration.reliability(P, LABEL, bins=0)
  with pytest.raises(ValueError, match='equal_mass'):
    calibration.reliability(P, LABEL, binning='quantiles')


def test_plot(tmp_path):
  file = tmp_path / 'diagram.png'
  calibration.plot(calibration.measures(P, LABEL)['bins'], file)
  assert file.read_bytes().startswith(b'\x89PNG')


# BIG-bench.


@pytest.fixture
def task_file(tmp_path):
  def write(content):
    folder = tmp_path / 'sums'
    folder.mkdir(exist_ok=True)
    file = folder / 'task.json'
    text = (
      content if isinstance(content, bytes) else json.dumps(content).encode()
    )
    file.write_bytes(text)
    return file

  return write


EXAMPLES = [
  {'input': '1 + 1 =', 'target_scores': {'3': 0, '2': 1}},
  {'input': 'Ü?', 'target_scores': {'ä': 0.5, 'ö': 0.5, 'ü': 0}},
]


def test_questions_of_a_file(task_file):
  one, two = bigbench.read(task_file({'examples': EXAMPLES}))
  assert one == bigbench.Question('\nQ: 1 + 1 =\nA: ', ('3', '2'), 1)
  assert (two.options, two.label) == (('ä', 'ö', 'ü'), 0)


def test_prefixes(task_file):
  file = task_file(
    {
      'examples': EXAMPLES[:1],
      'task_prefix': 'Sums.',
      'example_input_prefix': ' ',
      'example_output_prefix': '',
    }
  )
  assert bigbench.read(file)[0].context == 'Sums. 1 + 1 ='


@pytest.mark.parametrize(
  'content,message',
  [
    (b'\xff', 'no BIG-bench task'),
    (b'[]', 'no BIG-bench task'),
    ({'examples': []}, 'no example'),
    ({'examples': [EXAMPLES[0], {'input': 'x'}]}, 'example 1 of'),
  ],
)
def test_bad_files(content, message, task_file):
  with pytest.raises(ValueError, match=message):
    bigbench.read(task_file(content))


def test_no_file(tmp_path):
  with pytest.raises(FileNotFoundError, match='no BIG-bench file'):
    bigbench.read(tmp_path / 'task.json')


def test_a_file_is_a_task_whose_options_are_ranked(task_file, tmp_path):
  name = bigbench.task(task_file({'examples': EXAMPLES}), vocabularies.byte())
  assert name == 'bigbench_sums'
  assert bigbench.task(tmp_path / 'sums' / 'task.json') == name
  other = tmp_path / 'sums.json'
  other.write_text(json.dumps({'examples': EXAMPLES}))
  with pytest.raises(ValueError, match='rename'):
    bigbench.task(other)
  task = tasks.find(name)
  examples = list(
    task.get_dataset(
      {'inputs': 32, 'targets': 8}, split='test', shuffle=False
    ).as_numpy_iterator()
  )
  # The model prefers 2 to 3, rightly, and ü to ä and ö.
  scores = [np.log([0.2, 0.8]), np.log([0.2, 0.2, 0.6])]
  found, ranking, calibrated = task_evaluators.judged_options(
    task, examples, scores
  )
  assert found == {'accuracy': 50}
  assert ranking == {'examples': 2, 'ties': 0}
  assert calibrated['accuracy'] == 0.5
  # .8 right and .6 wrong: (.2 + .6) / 2; Brier .08 and .64 + .04 + .36, halved.
  assert calibrated['expected_calibration_error'] == pytest.approx(0.4)
  assert calibrated['brier_score'] == pytest.approx((0.08 + 1.04) / 2)

  # A model that knows nothing is as good as its luck with first options.
  nothing = [np.zeros(2), np.full(3, -7.0)]
  found, ranking, _ = task_evaluators.judged_options(task, examples, nothing)
  assert (found, ranking) == ({'accuracy': 50}, {'examples': 2, 'ties': 2})
  broken = [scores[0], np.full(3, np.nan)]
  with pytest.raises(ValueError, match='option 0 of example 1 of bigbench_sum'):
    task_evaluators.judged_options(task, examples, broken)

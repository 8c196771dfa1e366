"""Rows of speech, of which nothing is cut off, and the made spectrograms."""

import dataclasses

import numpy as np
import pytest
import seqio
import tensorflow as tf

from sparse_experts.data.dataset import Dataset
from sparse_experts.data.features.speech import Speech
from sparse_experts.data.tasks import made_spectrograms as made

FEATURES = Speech(made.BANDS)
DATASET = Dataset(
  'made_spectrograms', {'frames': 184, 'labels': 8}, 16, pack=False
)


def examples(split='train', count=16):
  """As numpy arrays, in the order of the source."""
  task = seqio.get_mixture_or_task('made_spectrograms')
  dataset = task.get_dataset({}, split=split, shuffle=False)
  return list(dataset.take(count).as_numpy_iterator())


def test_rows_are_the_examples_and_padding():
  said = DATASET.shapes(FEATURES)
  dataset = dataclasses.replace(DATASET, shuffle=False)
  batch = next(dataset.training(FEATURES, slice(None)))
  assert {k: (x.shape, x.dtype) for k, x in said.items()} == {
    k: (x.shape, x.dtype) for k, x in batch.items()
  }
  for i, example in enumerate(examples()):
    for name in ('frames', 'labels'):
      length = len(example[name])
      assert batch[f'{name[:-1]}_lengths'][i] == length
      np.testing.assert_array_equal(batch[name][i, :length], example[name])
      assert not batch[name][i, length:].any()
  assert batch['weight'].tolist() == [1.0] * 16
  assert len(set(batch['label_lengths'])) > 1


def test_rows_that_fill_up_have_no_frame():
  dataset = dataclasses.replace(DATASET, split='test', batch_size=300)
  *_, last = dataset.evaluation(FEATURES)  # 512 = 300 + 212.
  assert last['weight'].sum() == 212
  for name in ('frame_lengths', 'label_lengths'):
    assert (last[name] > 0).sum() == 212


@pytest.mark.parametrize('name,least', [('frames', 183), ('labels', 7)])
def test_an_example_that_is_too_long_is_an_error(name, least):
  lengths = {'frames': 184, 'labels': 8, name: least // 2}
  dataset = dataclasses.replace(DATASET, feature_lengths=lengths)
  said = f'has .* {name}, and TASK_FEATURE_LENGTHS has room for {least // 2}'
  with pytest.raises(ValueError, match=said):
    next(dataset.training(FEATURES, slice(None)))
  with pytest.raises(ValueError, match=said):
    next(iter(dataset.evaluation(FEATURES)))


def test_what_does_not_fit_is_one_line():
  def rows(features=FEATURES, **settings):
    dataset = dataclasses.replace(DATASET, **settings)
    return dataset.training(features, slice(None))

  with pytest.raises(ValueError, match=r"'frames' as float32 \(None, 80\)"):
    rows(Speech(80))
  with pytest.raises(ValueError, match='lengths of frames and labels'):
    rows(feature_lengths={'frames': 184})
  with pytest.raises(ValueError, match='packs none: set PACK = False'):
    rows(pack=True)
  with pytest.raises(ValueError, match='set TASK_IDS = False'):
    rows(task_ids=True)
  with pytest.raises(ValueError, match=r"has the features \['image', 'label'"):
    rows(mixture_or_task_name='digits')


def test_it_resumes_where_it_was_saved(tmp_path):
  batches = DATASET.training(FEATURES, slice(None))
  next(batches)
  batches.save(tmp_path)
  expected = next(batches)
  again = DATASET.training(FEATURES, slice(None))
  again.restore(tmp_path)
  for name, x in next(again).items():
    np.testing.assert_array_equal(x, expected[name])


def ways(digit, at):
  """How far up its lower and its upper line are, of 0 to 1."""
  lower = at if digit < 5 else 1 - at
  upper = {
    0: at,
    1: 1 - at,
    2: 2 * at if at < 0.5 else 2 - 2 * at,
    3: 1 - 2 * at if at < 0.5 else 2 * at - 1,
    4: 0.5,
  }[digit % 5]
  return lower, upper


def test_spectrograms_are_those_of_a_loop():
  columns = made.read()['validation']
  assert set(columns['digits'].ravel()) == set(range(10))
  for index in range(6):
    drawn = {name: x[index] for name, x in columns.items()}
    found = made.render({k: tf.constant(x) for k, x in drawn.items()}, 0.0)
    n = drawn['length']
    expected = []
    for i in range(n + 1):
      expected += [np.zeros(16)] * drawn['pauses'][i]
      if i == n:
        break
      for frame in range(drawn['durations'][i]):
        at = (frame + 0.5) / drawn['durations'][i]
        lower, upper = ways(drawn['digits'][i], at)
        x = np.zeros(16)
        for line in (2 + 4 * lower, 9 + 4 * upper):
          away = np.arange(16) - line - drawn['shift']
          x += 4 * np.exp(-(away**2) / (2 * 0.8**2))
        expected.append(x)
    np.testing.assert_array_equal(found['labels'], drawn['digits'][:n])
    np.testing.assert_allclose(found['frames'], expected, rtol=1e-3, atol=1e-4)


def test_draws_are_in_their_ranges_and_noise_is_the_example_s():
  columns = made.read()
  for split, drawn in columns.items():
    assert len(drawn['length']) == made.SPLITS[split]
    for name, ends in (
      ('length', (3, 8)),
      ('durations', (8, 16)),
      ('pauses', (2, 6)),
    ):
      assert (drawn[name].min(), drawn[name].max()) == ends
    assert 1.4 < np.abs(drawn['shift']).max() <= 1.5
  keys = [tuple(k) for drawn in columns.values() for k in drawn['key']]
  assert len(set(keys)) == len(keys)  # No two spectrograms are the same.
  once, again = examples(count=2), examples(count=2)
  for a, b in zip(once, again):
    np.testing.assert_array_equal(a['frames'], b['frames'])
  # The longest: 8 digits of 16 frames, 9 pauses of 6. What every string needs
  # of four frames a token: n equal digits, n - 1 blanks.
  assert 8 * 16 + 9 * 6 < 184
  assert all((8 * n + 2 * (n + 1)) // 4 >= 2 * n - 1 for n in range(3, 9))

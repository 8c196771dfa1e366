"""Labelled arrays: shapes without data, rows of a task, a source in memory."""

import dataclasses
import itertools

import numpy as np
import pytest
import seqio
import tensorflow as tf

from sparse_experts.data.dataset import Dataset
from sparse_experts.data.features.arrays import Labelled
from sparse_experts.data.tasks import arrays, digits

FEATURES = Labelled('image', (8, 8, 1))
DATASET = Dataset('digits', {}, 16, pack=False)


def add_task(name, image, label):
  """A task on two arrays, which are all of its splits."""
  columns = {'image': image, 'label': label}
  source = arrays.ArraySource(lambda: {'train': columns}, ('train',))
  return seqio.TaskRegistry.add(
    name,
    source=source,
    preprocessors=[],
    output_features={
      'image': seqio.ContinuousFeature(
        dtype=tf.as_dtype(image.dtype), rank=image.ndim - 1
      ),
      'label': seqio.ContinuousFeature(
        dtype=tf.as_dtype(label.dtype), rank=label.ndim - 1
      ),
    },
    shuffle_buffer_size=None,
  )


def test_rows_have_the_shapes_that_are_said():
  said = DATASET.shapes(FEATURES)
  batch = next(DATASET.training(FEATURES, slice(None)))
  assert {k: (x.shape, x.dtype) for k, x in said.items()} == {
    k: (x.shape, x.dtype) for k, x in batch.items()
  }
  assert batch['weight'].tolist() == [1.0] * 16


def test_labels_of_any_kind(forget_new_tasks):
  several = np.arange(15).reshape(5, 3).astype(np.int32) % 2
  add_task('of_several', np.ones((5, 2), np.float32), several)
  features = Labelled('image', (2,), label_shape=(3,))
  dataset = Dataset('of_several', {}, 4, pack=False)
  first, last = dataset.evaluation(features)
  np.testing.assert_array_equal(first['label'], several[:4])
  np.testing.assert_array_equal(last['label'][0], several[4])
  # Three rows fill the last batch up.
  assert last['weight'].tolist() == [1, 0, 0, 0]
  assert not last['input'][1:].any()


def test_what_does_not_fit_is_one_line():
  def rows(features, lengths=None, **settings):
    dataset = dataclasses.replace(
      DATASET, feature_lengths=lengths or {}, **settings
    )
    return dataset.training(features, slice(None))

  with pytest.raises(
    ValueError, match=r"'image' as float32 \(28, 28, 1\).*float32 \(8, 8, 1\)"
  ):
    rows(Labelled('image', (28, 28, 1)))
  with pytest.raises(ValueError, match=r"'label' as float32 \(\).*int32 \(\)"):
    rows(dataclasses.replace(FEATURES, label_dtype='float32'))
  with pytest.raises(ValueError, match=r"has the features \['image', 'label'"):
    rows(dataclasses.replace(FEATURES, input='picture'))
  with pytest.raises(ValueError, match=r"TASK_FEATURE_LENGTHS is {'image': 8"):
    rows(FEATURES, {'image': 8})
  with pytest.raises(ValueError, match='packs none: set PACK = False'):
    rows(FEATURES, pack=True)
  with pytest.raises(ValueError, match='set TASK_IDS = False'):
    rows(FEATURES, task_ids=True)


def test_an_epoch_is_every_example_once_in_another_order(forget_new_tasks):
  label = np.arange(12, dtype=np.int32)
  add_task('numbered', np.ones((12, 1), np.float32), label)
  dataset = Dataset('numbered', {}, 6, pack=False, num_shards=2)
  batches = dataset.training(Labelled('image', (1,)), slice(None))
  epochs = [
    np.concatenate([next(batches)['label'] for _ in range(2)]) for _ in range(3)
  ]
  for epoch in epochs:
    assert sorted(epoch) == list(range(12))
    # Streams are side by side, of every second example.
    assert set(epoch.reshape(2, 2, 3)[:, 0].ravel()) == set(range(0, 12, 2))
  assert len({tuple(epoch) for epoch in epochs}) == 3


def test_it_resumes_where_it_was_saved(tmp_path):
  batches = DATASET.training(FEATURES, slice(None))
  for _ in range(3):
    next(batches)
  batches.save(tmp_path)
  expected = next(batches)
  # Indices are saved, and no example: 64 floats each would be 4 KB a batch.
  assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 16_000
  again = DATASET.training(FEATURES, slice(None))
  again.restore(tmp_path)
  for name, x in next(again).items():
    np.testing.assert_array_equal(x, expected[name])


def test_digits_are_all_there_once():
  columns = digits.read()
  assert sum(len(split['label']) for split in columns.values()) == 1797
  seen = [
    {image.tobytes() for image in split['image']} for split in columns.values()
  ]
  for some, others in itertools.combinations(seen, 2):
    assert not some & others
  for name, split in columns.items():
    assert set(split['label']) == set(range(10))
    assert (split['image'].min(), split['image'].max()) == (0, 1)
    for image in split['image']:
      bucket = digits.split_of(image.ravel() * digits.BRIGHTEST)
      assert bucket in digits.SPLITS[name]


def test_a_digest_is_of_every_value():
  def source(value):
    columns = {'image': np.array([[0.0, value]], np.float32)}
    return arrays.ArraySource(lambda: {'train': columns}, ('train',))

  assert source(1.0).digest == source(1.0).digest != source(2.0).digest
  assert set(DATASET.corpus()) == {'digits'}

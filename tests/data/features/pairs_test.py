"""Pairs: rows of texts and arrays from the examples of a task."""

import dataclasses

import numpy as np
import pytest
import seqio
import tensorflow as tf

from sparse_experts.data.dataset import Dataset
from sparse_experts.data.features.pairs import Pairs, Side
from sparse_experts.data.tasks import arrays

TEXTS = Pairs(Side('inputs'), Side('targets', pad=-1))
DATASET = Dataset(
  'docs_summary', {'inputs': 24, 'targets': 8}, 4, pack=False, task_ids=True
)
EXAMPLES = [
  {'inputs': [5, 6, 7], 'targets': [8], 'inputs_task_ids': [3, 3, 3]},
  {'inputs': [9], 'targets': [2, 3, 4], 'inputs_task_ids': [1]},
]


def dataset_of(examples):
  """Examples of which each feature varies in length."""
  names = examples[0]
  return tf.data.Dataset.from_generator(
    lambda: iter(examples),
    output_signature={n: tf.TensorSpec([None], tf.int32) for n in names},
  )


def test_texts_are_cut_and_filled_up():
  rows = TEXTS.rows(dataset_of(EXAMPLES), {'inputs': 2, 'targets': 2})
  one, two = rows.as_numpy_iterator()
  assert one['left'].tolist() == [5, 6] and one['right'].tolist() == [8, -1]
  assert two['left'].tolist() == [9, 0] and two['right'].tolist() == [2, 3]
  assert one['weight'] == two['weight'] == 1.0
  assert (TEXTS.fill('left'), TEXTS.fill('right')) == (0, -1)
  assert TEXTS.fill('right_task_ids') == TEXTS.fill('weight') == 0


def test_rows_have_the_shapes_that_are_said():
  said = DATASET.shapes(TEXTS)
  batch = next(DATASET.training(TEXTS, slice(None)))
  assert {k: (x.shape, x.dtype) for k, x in said.items()} == {
    k: (x.shape, x.dtype) for k, x in batch.items()
  }
  # All tokens of an example are of its domain; padding is of none.
  for side, pad in (('left', 0), ('right', -1)):
    tokens, ids = batch[side], batch[f'{side}_task_ids']
    for b in range(4):
      of_tokens = set(ids[b][tokens[b] != pad].tolist())
      assert len(of_tokens) == 1
      assert not ids[b][tokens[b] == pad].any()


def test_an_array_and_a_text(forget_new_tasks):
  image = np.arange(10, dtype=np.float32).reshape(5, 2)
  caption = np.arange(15, dtype=np.int32).reshape(5, 3)
  columns = {'image': image, 'caption': caption}
  seqio.TaskRegistry.add(
    'captions',
    source=arrays.ArraySource(lambda: {'train': columns}, ('train',)),
    preprocessors=[],
    output_features={
      'image': seqio.ContinuousFeature(dtype=tf.float32, rank=1),
      'caption': seqio.Feature(seqio.PassThroughVocabulary(20), add_eos=False),
    },
    shuffle_buffer_size=None,
  )
  features = Pairs(Side('image', (2,)), Side('caption'))
  dataset = Dataset('captions', {'caption': 2}, 4, pack=False)
  first, last = dataset.evaluation(features)
  np.testing.assert_array_equal(first['left'], image[:4])
  np.testing.assert_array_equal(first['right'], caption[:4, :2])
  # Three rows fill the last batch up.
  assert last['weight'].tolist() == [1, 0, 0, 0]
  assert not last['left'][1:].any() and not last['right'][1:].any()
  other = dataclasses.replace(features, left=Side('image', (3,)))
  with pytest.raises(ValueError, match=r"'image' as float32 \(3,\), but .*\(2"):
    dataset.training(other, slice(None))
  swapped = Pairs(Side('caption', (3,), 'int32'), Side('image'))
  with pytest.raises(ValueError, match=r"'image' as token ids, .*float32 \(2,"):
    Dataset('captions', {'image': 2}, 4, pack=False).training(
      swapped, slice(None)
    )


def test_what_does_not_fit_is_one_line():
  with pytest.raises(ValueError, match="both inputs of a pair are 'inputs'"):
    Pairs(Side('inputs'), Side('inputs'))
  with pytest.raises(ValueError, match=r"lengths of \['inputs', 'targets'\]"):
    TEXTS.shapes({'inputs': 8}, 2)
  with pytest.raises(ValueError, match='packs none: set PACK = False'):
    TEXTS.shapes({'inputs': 8, 'targets': 8}, 2, pack=True)
  with pytest.raises(ValueError, match='have no targets_task_ids: '):
    TEXTS.rows(dataset_of(EXAMPLES), {'inputs': 2, 'targets': 2}, task_ids=True)

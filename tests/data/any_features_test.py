"""Batches of features of any type and rank, from a task to devices."""

import dataclasses

import jax
import numpy as np
import pytest
import seqio
import tensorflow as tf

from sparse_experts import sharding
from sparse_experts.data import streams
from sparse_experts.data.features.base import Features
from sparse_experts.inference import batch_decoding
from sparse_experts.training import global_batch, step


@dataclasses.dataclass(frozen=True)
class Frames(Features):
  """Three frames of two numbers, and what they are worth."""

  name = 'frames'

  def rows(self, dataset, feature_lengths, *, pack=False, task_ids=False):
    return dataset.map(lambda x: {**x, 'weight': tf.constant(1.0)})

  def fill(self, feature):
    return {'frames': 7, 'weight': 0}[feature]


@pytest.fixture
def frames(forget_new_tasks):
  """Six examples; the numbers of example n are n + 1/8, n + 2/8, ..."""
  data = np.arange(6)[:, None, None] + np.arange(1, 7).reshape(1, 3, 2) / 8
  data = data.astype(np.float32)

  def source(split, shuffle_files, seed=None):
    return tf.data.Dataset.from_tensor_slices({'frames': data})

  seqio.TaskRegistry.add(
    'frames',
    source=seqio.FunctionDataSource(source, splits=('train',)),
    preprocessors=[],
    output_features={
      'frames': seqio.Feature(
        seqio.PassThroughVocabulary(1),
        add_eos=False,
        dtype=tf.float32,
        rank=2,
      )
    },
    metric_fns=[],
  )
  return data


def test_the_last_batch_is_filled_up_and_placed(frames):
  first, last = streams.eval_batches(
    'frames', 'train', {'frames': 3}, 4, Frames()
  )
  np.testing.assert_array_equal(first['frames'], frames[:4])
  filled = np.full((2, 3, 2), 7, np.float32)
  np.testing.assert_array_equal(
    last['frames'], np.concatenate([frames[4:], filled])
  )
  assert last['frames'].dtype == np.float32
  assert last['weight'].tolist() == [1, 1, 0, 0]
  mesh = sharding.make_mesh(data=4, devices=jax.devices()[:4])
  placed = global_batch.place(last, mesh, 4, 0)
  for name, x in last.items():
    assert placed[name].dtype == x.dtype
    np.testing.assert_array_equal(placed[name], x)
    rows = {shard.index[0].start for shard in placed[name].addressable_shards}
    assert rows == set(range(4))


def test_training_s_batches_are_of_the_same_kind(frames, tmp_path):
  batches = streams.Batches(
    'frames', 'train', {'frames': 3}, 2, Frames(), seed=0, shuffle=False
  )
  np.testing.assert_array_equal(next(batches)['frames'], frames[:2])
  batches.save(tmp_path)
  batches = streams.Batches(
    'frames', 'train', {'frames': 3}, 2, Frames(), seed=0, shuffle=False
  )
  batches.restore(tmp_path)
  np.testing.assert_array_equal(next(batches)['frames'], frames[2:4])


def test_microbatches_keep_rows_whole():
  x = np.arange(8 * 3 * 2, dtype=np.float32).reshape(8, 3, 2) / 4
  parts = step.split_microbatches({'frames': x}, 2, 2)['frames']
  # Of every shard's four rows, two runs of two.
  rows = [[0, 1, 4, 5], [2, 3, 6, 7]]
  np.testing.assert_array_equal(parts, x[np.array(rows)])
  np.testing.assert_array_equal(step.join_microbatches(parts, 2), x)


def test_what_fills_a_batch_of_questions_up_is_zero():
  mesh = sharding.make_mesh(data=1, devices=jax.devices()[:1])
  one = {'frames': np.full((3, 2), np.inf, np.float32)}
  placed = batch_decoding.place([one], mesh, 3)['frames']
  assert placed.shape == (3, 3, 2) and np.isinf(placed[0]).all()
  assert (np.asarray(placed[1:]) == 0).all()

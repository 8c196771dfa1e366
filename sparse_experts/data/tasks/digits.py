"""Handwritten digits of scikit-learn: 1,797 images of 8 x 8, ten classes.

  digits   'image', float32 [8, 8, 1] from 0 to 1, and 'label', int32 []

They lie inside scikit-learn, so nothing is downloaded. The last digit of a hash
of an image's 64 values says its split: 0 to 7 train, 8 validation, 9 test. So
equal images are in one split. Writers of training images are also those of the
others: no test of new hands.

References:
  Alpaydin and Kaynak 1998, Optical Recognition of Handwritten Digits, UCI
  Machine Learning Repository, of which these are the test set.
"""

import hashlib

import numpy as np
import seqio
import tensorflow as tf

from sparse_experts.data.tasks.arrays import ArraySource, Columns

NUM_CLASSES = 10
BRIGHTEST = 16  # Of the values there.
SPLITS = {'train': range(8), 'validation': [8], 'test': [9]}


def split_of(values: np.ndarray) -> int:
  """0 to 9: SHA-256 of values from 0 to 16, as bytes, modulo 10.

  >>> split_of(np.zeros(64))
  7
  """
  hashed = hashlib.sha256(values.astype(np.uint8).tobytes()).digest()
  return int.from_bytes(hashed, 'big') % 10


def read() -> dict[str, Columns]:
  """The columns of each split."""
  from sklearn import datasets

  images, labels = datasets.load_digits(return_X_y=True)
  columns = {
    'image': (images / BRIGHTEST).astype(np.float32).reshape(-1, 8, 8, 1),
    'label': labels.astype(np.int32),
  }
  remainders = np.array([split_of(values) for values in images])

  def of_split(wanted):
    return {k: v[np.isin(remainders, list(wanted))] for k, v in columns.items()}

  return {split: of_split(wanted) for split, wanted in SPLITS.items()}


seqio.TaskRegistry.add(
  'digits',
  source=ArraySource(read, tuple(SPLITS)),
  preprocessors=[],
  output_features={
    'image': seqio.ContinuousFeature(dtype=tf.float32, rank=3),
    'label': seqio.Feature(
      seqio.PassThroughVocabulary(NUM_CLASSES),
      add_eos=False,
      dtype=tf.int32,
      rank=0,
    ),
  },
  shuffle_buffer_size=None,  # The source shuffles completely.
)

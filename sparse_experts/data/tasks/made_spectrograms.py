"""Made spectrograms of strings of digits: no recording, and no download.

  made_spectrograms   'frames', float32 [frames, 16], and 'labels', int32 [3..8]

A digit is two bright lines over 8 to 16 frames, between pauses of 2 to 6. The
lower one rises or falls by four bands, digits 0 to 4 and 5 to 9; the upper one
rises, falls, rises and falls, falls and rises, or stays, by the digit modulo 5.
So a single frame does not say which digit it is of. All lines of an example are
shifted by up to 1.5 bands, and every value has noise.

Everything is a function of the split and the index of an example: draws are
NumPy's, noise is TensorFlow's of a key. Splits have seeds of their own; strings
are drawn evenly, so short ones are in several splits, never with the same times
and noise.
"""

from collections.abc import Mapping

import numpy as np
import seqio
import tensorflow as tf

from sparse_experts.data.tasks.arrays import ArraySource, Columns

BANDS = 16
NUM_LABELS = 10
DIGITS = (3, 8)  # Of a string; these and further ranges are inclusive.
DURATIONS = (8, 16)  # Frames of a digit.
PAUSES = (2, 6)
SHIFT = 1.5  # Bands, up or down.
LOWER, UPPER = (2.0, 6.0), (9.0, 13.0)  # Bands that lines run between.
WIDTH = 0.8  # Standard deviation of a line, in bands.
BRIGHTNESS = 4.0  # Of the middle of a line.
NOISE = 1.0  # Standard deviation.
SPLITS = {'train': 16384, 'validation': 512, 'test': 512}


def read() -> dict[str, Columns]:
  """What is drawn of each example, by split."""
  return {
    split: _draw(np.random.default_rng(seed), count)
    for seed, (split, count) in enumerate(SPLITS.items())
  }


def _draw(random: np.random.Generator, count: int) -> Columns:
  most = DIGITS[1]

  def draw(limits: tuple[int, int], *shape: int) -> np.ndarray:
    x = random.integers(*limits, (count, *shape), endpoint=True)
    return x.astype(np.int32)

  return {
    'length': draw(DIGITS),
    'digits': draw((0, NUM_LABELS - 1), most),
    'durations': draw(DURATIONS, most),
    'pauses': draw(PAUSES, most + 1),
    'shift': random.uniform(-SHIFT, SHIFT, count).astype(np.float32),
    'key': draw((0, 2**31 - 1), 2),
  }


def render(
  drawn: Mapping[str, tf.Tensor], noise: float = NOISE
) -> dict[str, tf.Tensor]:
  """The spectrogram and the labels of what is drawn of one example."""
  length = drawn['length']
  digits = drawn['digits'][:length]
  durations = drawn['durations'][:length]
  pauses = drawn['pauses'][: length + 1]
  starts = tf.cumsum(pauses[:-1]) + tf.cumsum(durations, exclusive=True)
  num_frames = tf.reduce_sum(pauses) + tf.reduce_sum(durations)
  # Frames x digits: how far through the digit a frame is, from 0 to 1.
  at = tf.cast(tf.range(num_frames)[:, None] - starts[None], tf.float32) + 0.5
  at /= tf.cast(durations, tf.float32)[None]
  is_inside = tf.cast((at > 0) & (at < 1), tf.float32)[..., None]
  peak = 1 - tf.abs(2 * at - 1)
  ways = tf.stack([at, 1 - at, peak, 1 - peak, tf.fill(tf.shape(at), 0.5)], -1)
  bands = tf.range(BANDS, dtype=tf.float32)
  frames = noise * tf.random.stateless_normal(
    (num_frames, BANDS), drawn['key'], alg='philox'
  )
  for (bottom, top), way in ((LOWER, digits // 5), (UPPER, digits % 5)):
    way = tf.broadcast_to(way[None], tf.shape(at))
    place = tf.gather(ways, way, batch_dims=2)
    line = bottom + (top - bottom) * place + drawn['shift']
    bright = BRIGHTNESS * tf.exp(
      -0.5 * ((bands - line[..., None]) / WIDTH) ** 2
    )
    frames += tf.reduce_sum(bright * is_inside, axis=1)
  return {'frames': tf.ensure_shape(frames, [None, BANDS]), 'labels': digits}


seqio.TaskRegistry.add(
  'made_spectrograms',
  source=ArraySource(read, tuple(SPLITS)),
  preprocessors=[seqio.map_over_dataset(render)],
  output_features={
    'frames': seqio.ContinuousFeature(dtype=tf.float32, rank=2),
    'labels': seqio.Feature(
      seqio.PassThroughVocabulary(NUM_LABELS), add_eos=False, dtype=tf.int32
    ),
  },
  shuffle_buffer_size=None,  # The source shuffles completely.
)

"""Sequences side by side: trimmed, packed or padded by their lengths."""

from __future__ import annotations

from collections.abc import Mapping

import tensorflow as tf

Columns = dict[str, tf.Tensor]


def rows(
  examples: tf.data.Dataset, lengths: Mapping[str, int], pack: bool
) -> tf.data.Dataset:
  """Rows of sequences that are filled up with 0, and which example is where.

  seqio's packing takes the first 0 for the end of what it packs, and numbers
  the inputs and the targets of a row apart: after an example without inputs
  the inputs of one are taken for another's. Here an example ends where it ends
  and has one number. What seqio does right it does alike.

  Args:
    examples: {sequence: {column: int32 [n]}}; columns of a sequence are as long
      as one another.
    lengths: to which each sequence is cut or filled up.
    pack: several examples may share a row, as many as fit in order.

  Returns:
    Rows {sequence: {column: int32 [length]}}, with two columns more:
    'segment_ids', from 1 on the number of an example in its row, 0 where there
    is none; 'positions' in the example, of rows that are not packed in the row.

  >>> two = tf.data.Dataset.from_tensors({'a': {'x': [7, 0]}}).repeat(2)
  >>> row, = rows(two, {'a': 5}, pack=True).as_numpy_iterator()
  >>> row['a']['x'].tolist(), row['a']['segment_ids'].tolist()
  ([7, 0, 7, 0, 0], [1, 1, 2, 2, 0])
  """

  def cut(example: Mapping[str, Columns]) -> dict[str, Columns]:
    return {
      name: {column: x[: lengths[name]] for column, x in columns.items()}
      for name, columns in example.items()
    }

  def pad(example: Mapping[str, Columns]) -> dict[str, Columns]:
    return {
      name: _padded(columns, lengths[name]) for name, columns in example.items()
    }

  examples = examples.map(cut, num_parallel_calls=tf.data.AUTOTUNE)
  if not pack:
    return examples.map(pad, num_parallel_calls=tf.data.AUTOTUNE)

  def with_sizes(example: dict[str, Columns]) -> dict[str, Columns]:
    return {
      name: {**columns, 'size': tf.size(next(iter(columns.values())))}
      for name, columns in example.items()
    }

  sized = examples.map(with_sizes, num_parallel_calls=tf.data.AUTOTUNE)
  # seqio's, so that the same examples meet.
  batches = sized.padded_batch(max(lengths.values()))
  packed = batches.map(
    lambda batch: _packed(batch, lengths), num_parallel_calls=tf.data.AUTOTUNE
  )
  return packed.unbatch()


def _padded(columns: Columns, length: int) -> Columns:
  size = tf.size(next(iter(columns.values())))
  row = {'segment_ids': tf.ones([size], tf.int32), **columns}
  row = {
    column: tf.ensure_shape(tf.pad(x, [[0, length - size]]), [length])
    for column, x in row.items()
  }
  return {**row, 'positions': tf.range(length)}


def _packed(
  batch: Mapping[str, Columns], lengths: Mapping[str, int]
) -> dict[str, Columns]:
  """Rows of N examples: columns [N, n] to [rows, length]."""
  names = list(lengths)
  sizes_NxK = tf.stack([batch[name]['size'] for name in names], 1)
  row_N, segment_N, starts_NxK = _placed(
    sizes_NxK, tf.constant([lengths[name] for name in names])
  )
  packed = {}
  for k, name in enumerate(names):
    columns = {c: x for c, x in batch[name].items() if c != 'size'}
    width = tf.shape(next(iter(columns.values())))[1]
    at = tf.where(tf.sequence_mask(sizes_NxK[:, k], width))
    n, position = tf.unstack(tf.cast(at, tf.int32), axis=1)
    values = {column: tf.gather_nd(x, at) for column, x in columns.items()}
    values['segment_ids'] = tf.gather(segment_N, n)
    values['positions'] = position
    to = tf.stack(
      [tf.gather(row_N, n), tf.gather(starts_NxK[:, k], n) + position], 1
    )
    shape = [row_N[-1] + 1, lengths[name]]
    packed[name] = {
      column: tf.ensure_shape(
        tf.scatter_nd(to, x, shape), [None, lengths[name]]
      )
      for column, x in values.items()
    }
  return packed


def _placed(
  sizes_NxK: tf.Tensor, lengths_K: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
  """Where examples of K sequences go, in order.

  Returns:
    Row, segment in the row, int32 [N], and the first place of each sequence,
    int32 [N, K].
  """

  def place(before, sizes_K):
    row, segment, _, used_K = before
    is_full = tf.reduce_any(used_K + sizes_K > lengths_K)
    row = tf.where(is_full, row + 1, row)
    segment = tf.where(is_full, 0, segment)
    start_K = tf.where(is_full, tf.zeros_like(used_K), used_K)
    # What is empty is nowhere.
    segment += tf.cast(tf.reduce_any(sizes_K > 0), tf.int32)
    return row, segment, start_K, start_K + sizes_K

  none_K = tf.zeros_like(lengths_K)
  first = (tf.constant(0), tf.constant(0), none_K, none_K)
  row_N, segment_N, start_NxK, _ = tf.scan(place, sizes_NxK, first)
  return row_N, segment_N, start_NxK

"""Examples in memory: a source that tasks of other files are made on."""

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import seqio
import tensorflow as tf

Columns = Mapping[str, np.ndarray]


class ArraySource(seqio.DataSource):
  """Arrays whose first axis is examples; read when a task first is.

  Positions in it are saved and restored exactly: the state of an iterator holds
  indices and no example.
  """

  def __init__(
    self,
    read: Callable[[], Mapping[str, Columns]],
    splits: Sequence[str],
  ):
    """A source of the columns, by split and by name, that `read` returns.

    Args:
      read: is called once.
      splits: their names.
    """
    super().__init__(
      tuple(splits), caching_permitted=False, performs_internal_shuffling=True
    )
    self._read = read

  @functools.cached_property
  def _columns(self) -> Mapping[str, Columns]:
    return self._read()

  @functools.cached_property
  def digest(self) -> str:
    """Of all values: equal digests mean equal data."""
    digest = hashlib.sha256()
    for split in self.splits:
      for name, column in sorted(self._columns[split].items()):
        about = f'{split} {name} {column.dtype.str} {column.shape}'
        digest.update(about.encode())
        digest.update(np.ascontiguousarray(column).tobytes())
    return digest.hexdigest()[:16]

  @property
  def supports_arbitrary_sharding(self) -> bool:
    return True

  def list_shards(self, split: str) -> Sequence[str]:
    return [split]

  def get_dataset(
    self,
    split: str = 'train',
    shuffle: bool = True,
    seed: int | None = None,
    shard_info: seqio.ShardInfo | None = None,
    **_,  # seqio's other arguments are for sources that cache.
  ) -> tf.data.Dataset:
    columns = {k: tf.constant(v) for k, v in self._columns[split].items()}
    return examples(columns, shuffle, seed, shard_info)


def examples(
  columns: Mapping[str, tf.Tensor],
  shuffle: bool,
  seed: int | None,
  shard_info: seqio.ShardInfo | None,
) -> tf.data.Dataset:
  """The rows of columns, or of a shard of them, shuffled completely."""
  index, num_shards = 0, 1
  if shard_info:
    index, num_shards = shard_info.index, shard_info.num_shards
  rows = int(tf.shape(next(iter(columns.values())))[0])
  # Sharded before they are shuffled: shards may have seeds of their own.
  count = len(range(index, rows, num_shards))
  order = (
    _permutations(count, seed) if shuffle else tf.data.Dataset.range(count)
  )
  return order.map(
    lambda i: {k: v[i * num_shards + index] for k, v in columns.items()}
  )


def _permutations(count: int, seed: int | None) -> tf.data.Dataset:
  """[0, count) in a random order, another one at each iteration.

  As `range(count).shuffle(count)`, but the latter keeps all indices in a
  buffer, 10 MB of every saved iterator; this has a key and a position.
  """

  def permutation(key):
    return tf.data.Dataset.range(count).map(
      lambda i: tf.random.experimental.index_shuffle(i, [key, key], count - 1)
    )

  keys = tf.data.Dataset.random(seed, rerandomize_each_iteration=True)
  return keys.take(1).flat_map(permutation)

"""Examples in memory: a source that tasks of other files are made on."""

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import seqio
import tensorflow as tf

# Arrays whose first axis is examples, or lists of arrays of any length. Texts
# are bytes in arrays of objects.
Columns = Mapping[str, np.ndarray | list[np.ndarray]]
Tensor = tf.Tensor | tf.RaggedTensor


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
  def tensors(self) -> Mapping[str, Mapping[str, Tensor]]:
    """The columns by split and name, of which all iterators share one copy."""
    return {
      split: {name: _tensor(column) for name, column in columns.items()}
      for split, columns in self._read().items()
    }

  @functools.cached_property
  def digest(self) -> str:
    """Of all values: equal digests mean equal data."""
    digest = hashlib.sha256()
    for split in self.splits:
      for name, column in sorted(self.tensors[split].items()):
        digest.update(f'{split} {name} '.encode())
        for part in _parts(column):
          digest.update(part)
    return digest.hexdigest()[:16]

  @property
  def supports_arbitrary_sharding(self) -> bool:
    return True

  def list_shards(self, split: str) -> Sequence[str]:
    return [split]

  def num_input_examples(self, split: str) -> int:
    return _size(self.tensors[split])

  def get_dataset(
    self,
    split: str = 'train',
    shuffle: bool = True,
    seed: int | None = None,
    shard_info: seqio.ShardInfo | None = None,
    **_,  # seqio's other arguments are for sources that cache.
  ) -> tf.data.Dataset:
    """The rows of a split.

    Args:
      split: one of the source's.
      shuffle, seed, shard_info: see `examples`.
    """
    return examples(self.tensors[split], shuffle, seed, shard_info)


class TokenSource(ArraySource):
  """Examples of another source, whose texts are tokens when they are read.

  For vocabularies that are Python: in a stream of TensorFlow's they would have
  a state that no checkpoint can hold.
  """

  def __init__(
    self,
    source: seqio.DataSource,
    prepare: Callable[[tf.data.Dataset], tf.data.Dataset],
    features: Mapping[str, seqio.Feature],
  ):
    """Args are a source, what makes its examples, and which of them are tokens.

    What was the text of a feature is in '<feature>_pretokenized'.
    """
    self._source, self._prepare, self._features = source, prepare, features
    super().__init__(self._tokens, tuple(source.splits))

  def _tokens(self) -> dict[str, Columns]:
    return {split: self._of_split(split) for split in self.splits}

  def _of_split(self, split: str) -> Columns:
    dataset = self._prepare(self._source.get_dataset(split, shuffle=False))
    examples = list(dataset.as_numpy_iterator())
    columns = {
      name: [example[name] for example in examples]
      for name in dataset.element_spec
    }
    for name, feature in self._features.items():
      texts = columns[f'{name}_pretokenized'] = columns[name]
      encode = feature.vocabulary.encode
      columns[name] = [
        np.array(encode(text.decode()), np.int32) for text in texts
      ]
    return {name: _column(values) for name, values in columns.items()}


def examples(
  columns: Mapping[str, Tensor],
  shuffle: bool,
  seed: int | None,
  shard_info: seqio.ShardInfo | None,
) -> tf.data.Dataset:
  """The rows of columns, or of a shard of them, shuffled completely.

  Args:
    columns: by name, each [I, ...] with one entry for each of I rows.
    shuffle: whether to; without, they come in order.
    seed: of the order; None: another one each time.
    shard_info: the shard, every num_shards-th row; None: all of them.
  """
  index, num_shards = 0, 1
  if shard_info:
    index, num_shards = shard_info.index, shard_info.num_shards
  rows = _size(columns)
  # Sharded before they are shuffled: shards may have seeds of their own.
  count = len(range(index, rows, num_shards))
  order = (
    _permutations(count, seed) if shuffle else tf.data.Dataset.range(count)
  )
  return order.map(
    lambda i: {k: v[i * num_shards + index] for k, v in columns.items()}
  )


def is_python(vocabulary: seqio.Vocabulary) -> bool:
  """Whether a vocabulary has no program of TensorFlow's, see `TokenSource`."""
  return getattr(vocabulary, 'is_python', False)


def _size(columns: Mapping[str, Tensor]) -> int:
  return next(iter(columns.values())).shape[0]


def _column(values: list) -> np.ndarray | list[np.ndarray]:
  if np.ndim(values[0]):
    return values
  # As numpy's own texts they would lose zeros at their end.
  return np.array(values, object if isinstance(values[0], bytes) else None)


def _tensor(column: np.ndarray | list[np.ndarray]):
  if not isinstance(column, list):
    return tf.constant(column)
  lengths = [len(values) for values in column]
  return tf.RaggedTensor.from_row_lengths(np.concatenate(column), lengths)


def _parts(column: Tensor) -> Iterator[bytes]:
  """What a digest is of; of texts and lists their lengths, too."""
  if isinstance(column, tf.RaggedTensor):
    yield from _parts(column.row_splits)
    yield from _parts(column.values)
    return
  values = column.numpy()
  dtype = 'text' if values.dtype == object else values.dtype.str
  yield f'{dtype} {values.shape}'.encode()
  if values.dtype != object:
    yield np.ascontiguousarray(values).tobytes()
    return
  for text in values:
    yield f'{len(text)} '.encode()
    yield text


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

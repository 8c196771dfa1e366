"""From a task to global batches of numpy arrays.

The global batch is `num_shards` streams side by side. Stream i is a function of
seed, i and num_shards, never of the number of processes: a process opens those
streams whose rows it needs. So the same run may be continued by any number of
processes, and its data stays the same.

    rows of the global batch   0 ......... 7 8 ......... 15   batch_size 16
    streams                    [stream 0   ] [stream 1    ]   num_shards 2
    processes                  [p0 ] [p1   ] [p2 ] [p3    ]   rows of each
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from sparse_experts import earlier
from sparse_experts.data import examples, host_tensorflow
from sparse_experts.data.features.base import Features
from sparse_experts.data.rows import Rows

if typing.TYPE_CHECKING:
  import tensorflow as tf

Batch = dict[str, np.ndarray]


def streams(rows: slice, batch_size: int, num_shards: int) -> range:
  """The streams of which some rows are among `rows` of the global batch.

  Args:
    rows: a range of [0, batch_size).
    batch_size: rows of the global batch.
    num_shards: streams, each of batch_size / num_shards rows.

  Raises:
    ValueError: streams would not be equal, or rows are no such range.

  >>> streams(slice(4, 8), batch_size=16, num_shards=2)
  range(0, 1)
  """
  if batch_size % num_shards:
    raise ValueError(
      f'the batch is cut into equal streams: batch size {batch_size} is no '
      f'multiple of num_shards {num_shards}'
    )
  start, stop, step = rows.indices(batch_size)
  if step != 1 or start >= stop:
    raise ValueError(f'rows must be a range of [0, {batch_size}), not {rows}')
  size = batch_size // num_shards
  return range(start // size, (stop - 1) // size + 1)


class Batches(Iterator[Batch]):
  """An infinite stream of training batches that can be saved and continued.

  Epochs follow one another without end, each in another order and with fresh
  noise. What it yields depends on the arguments only, not on the machine.

  Attributes:
    identity: what the global stream is a function of, with the digests of
      its data; must be the same in all processes of a run.
    streams: those that this process has open.

  >>> from sparse_experts.data.features.text import Text
  >>> batches = Batches('docs_lm', 'train', {'targets': 32}, batch_size=4,
  ...                   features=Text(), seed=0)
  >>> next(batches)['decoder_target_tokens'].shape
  (4, 32)
  """

  def __init__(
    self,
    task_name: str,
    split: str,
    feature_lengths: Mapping[str, int],
    batch_size: int,
    features: Features,
    *,
    seed: int,
    pack: bool = True,
    task_ids: bool | str = False,
    shuffle: bool = True,
    num_shards: int = 1,
    rows: slice = slice(None),
    modules: Sequence[str] = (),
  ):
    """Opens the streams that `rows` needs.

    Args:
      task_name: of a task or mixture.
      split: of the task.
      feature_lengths: length of each feature of the task.
      batch_size: rows of the global batch.
      features: what rows are, see `features`.
      seed: of the shuffle, the noise and the mixing.
      pack: whether several examples may share a row.
      task_ids: what rows say of the task of every token: nothing; True, what
        the task says; 'mixture', its number in the mixture.
      shuffle: whether to shuffle; without, epochs repeat their order.
      num_shards: number of streams; 1 unless reading everything in every
        process is too slow.
      rows: the contiguous rows of the global batch that this process needs.
      modules: further modules that register tasks.

    Raises:
      ValueError: unknown task or split; features that the task does not have;
        batch size no multiple of num_shards; rows out of range; a source whose
        position cannot be saved.
    """
    source = Rows(
      task_name, split, feature_lengths, features, pack, task_ids, modules
    )
    self.streams = streams(rows, batch_size, num_shards)
    self.identity = {
      **source.identity(),
      'batch_size': batch_size,
      'seed': seed,
      'shuffle': shuffle,
      'num_shards': num_shards,
    }
    start, stop, _ = rows.indices(batch_size)
    first = self.streams.start * (batch_size // num_shards)
    self._rows = slice(start - first, stop - first)
    self._features = features
    self._drawn = 0
    self._iterators = {i: self._open(source, i) for i in self.streams}

  def _open(self, source: Rows, stream: int) -> Iterator[Any]:
    """The batches of one stream."""
    seeds = np.random.SeedSequence([self.identity['seed'], stream])
    num_shards = self.identity['num_shards']
    rows = source.read(
      shuffle=self.identity['shuffle'],
      # Streams that shared a seed would share their noise.
      seed=int(seeds.generate_state(1)[0]),
      shard=(stream, num_shards),
      num_epochs=None,
    )
    if stream == self.streams.start:  # Others are like the first.
      source.check_savable(rows)
    size = self.identity['batch_size'] // num_shards
    return iter(rows.batch(size, drop_remainder=True).prefetch(2))

  def __next__(self) -> Batch:
    """The rows of the next batch, arrays [rows, ...]."""
    parts = [next(iterator) for iterator in self._iterators.values()]
    self._drawn += 1
    rows = {
      name: np.concatenate([part[name].numpy() for part in parts])[self._rows]
      for name in parts[0]
    }
    self._features.check_rows(rows)
    return rows

  def save(
    self, directory: epath.PathLike, streams: Sequence[int] | None = None
  ) -> None:
    """Writes the state of the open streams, so that `restore` continues here.

    Processes may share a directory. Where several of them open the same stream,
    exactly one should write it. The directory is complete once all have
    returned.

    Args:
      directory: is made if need be.
      streams: which of the open ones to write; all of them unless given. The
        writer of stream 0 also writes batches.json, what the streams are.
    """
    directory = epath.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for i in self.streams if streams is None else streams:
      self._checkpoint(i).write(self._prefix(directory, i))
      if i == 0:
        description = self.identity | {'batches_drawn': self._drawn}
        text = json.dumps(description, indent=2)
        (directory / 'batches.json').write_text(text)

  def restore(self, directory: epath.PathLike) -> None:
    """Continues where `save` was called: the next batch is the one after.

    The number of processes, and so `rows`, may have changed.

    Raises:
      FileNotFoundError: nothing was saved there.
      ValueError: what was saved is another stream of data than this one or was
        made otherwise, or batches have been drawn from this one already.
    """
    if self._drawn:
      # tf.data does not rewind its seeds.
      raise ValueError(
        f'batches are restored before the first is drawn, not after '
        f'{self._drawn}: make new ones and restore these'
      )
    directory = epath.Path(directory)
    file = directory / 'batches.json'
    if not file.exists():
      raise FileNotFoundError(f'no saved batches: {file} does not exist')
    saved = json.loads(file.read_text())
    drawn = saved.pop('batches_drawn')
    saved = earlier.batches(saved, self.identity)
    for key, ours in self.identity.items():
      if saved[key] != ours:
        before = examples.installed(saved[key]) if key == 'corpus' else {}
        raise ValueError(
          f'the batches saved in {directory} have {key} {saved[key]!r}, these '
          f'have {ours!r}: restore with the saved value, or start the data '
          'anew in another directory'
          + ''.join(
            f'; what {name} was is {task} now (--gin.MIXTURE_OR_TASK_NAME)'
            for name, task in before.items()
          )
        )
    tf = host_tensorflow.load()
    prefixes = {i: self._prefix(directory, i) for i in self.streams}
    for prefix in prefixes.values():  # TensorFlow's error is of both kinds.
      for end in ('.index', '.data-00000-of-00001'):
        if not epath.Path(prefix + end).exists():
          raise FileNotFoundError(f'{prefix}{end} does not exist')
    try:
      for i, prefix in prefixes.items():
        self._checkpoint(i).read(prefix).assert_consumed()
    except tf.errors.NotFoundError as error:
      raise ValueError(
        f'the batches saved in {directory} were made by other steps, those of '
        'another version of this package or of seqio, and cannot go on: begin '
        'a new run, with INITIAL_CHECKPOINT for what was learned'
      ) from error
    self._drawn = drawn

  def _checkpoint(self, stream: int) -> tf.train.Checkpoint:
    tf = host_tensorflow.load()
    return tf.train.Checkpoint(iterator=self._iterators[stream])

  def _prefix(self, directory: epath.Path, stream: int) -> str:
    num_shards = self.identity['num_shards']
    return os.fspath(directory / f'stream-{stream:05}-of-{num_shards:05}')


def eval_batches(
  task_name: str,
  split: str,
  feature_lengths: Mapping[str, int],
  batch_size: int,
  features: Features,
  *,
  pack: bool = False,
  task_ids: bool | str = False,
  num_batches: int | None = None,
  modules: Sequence[str] = (),
) -> WholeBatches:
  """A split once, in order, the same in every process.

  Args:
    num_batches: stop after so many batches; None for the whole split.
    (The others are those of `Batches`.)

  >>> from sparse_experts.data.features.text import Text
  >>> (batch,) = eval_batches('docs_lm', 'test', {'targets': 16}, 2, Text(),
  ...                       num_batches=1)
  >>> batch['decoder_target_tokens'].shape
  (2, 16)
  """
  source = Rows(
    task_name, split, feature_lengths, features, pack, task_ids, modules
  )
  rows = source.read(shuffle=False, seed=0)
  return WholeBatches(rows, batch_size, features, num_batches)


@dataclasses.dataclass(frozen=True)
class WholeBatches:
  """Batches of rows, in order; each iteration has them all.

  The last batch is filled up with rows of `Features.fill`, which weigh nothing.

  Attributes:
    rows: one by one.
    batch_size: rows of a batch.
    features: what rows are, and what fills a batch up.
    num_batches: stop after so many; None: after the last row.
  """

  rows: tf.data.Dataset
  batch_size: int
  features: Features
  num_batches: int | None = None

  def __iter__(self) -> Iterator[Batch]:
    # Without drop_remainder; the loop below fills up the last batch.
    batches = self.rows.batch(self.batch_size).prefetch(2).as_numpy_iterator()
    for batch in itertools.islice(batches, self.num_batches):
      self.features.check_rows(batch)
      yield {name: self._fill_up(name, x) for name, x in batch.items()}

  def _fill_up(self, name: str, x: np.ndarray) -> np.ndarray:
    missing = [(0, self.batch_size - len(x)), *[(0, 0)] * (x.ndim - 1)]
    return np.pad(x, missing, constant_values=self.features.fill(name))

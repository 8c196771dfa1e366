"""The examples of a task or mixture, and which task each is of."""

from __future__ import annotations

import copy
import re
import typing
from collections.abc import Collection, Mapping, Sequence

from sparse_experts import earlier
from sparse_experts.data import host_tensorflow, tasks

if typing.TYPE_CHECKING:
  import seqio
  import tensorflow as tf

# What examples may say of their tokens: nothing, the task id that the task
# gives, or the number of the task in its mixture.
TASK_IDS = (False, True, 'mixture')


def read(
  task: seqio.Task | seqio.Mixture,
  split: str,
  feature_lengths: Mapping[str, int],
  *,
  features: Collection[str] | None = None,
  task_ids: bool | str = False,
  shuffle: bool,
  seed: int,
  shard: tuple[int, int] = (0, 1),
  num_epochs: int | None = 1,
) -> tf.data.Dataset:
  """Examples as the task has them, preprocessed and trimmed.

  Args:
    task, split: what to read.
    feature_lengths: length of each feature of the task that is a sequence.
    features: all that are read; None: those that have lengths.
    task_ids: one of `TASK_IDS`; unless False, examples have
      '<feature>_task_ids' beside each feature, as long as it.
    shuffle, seed: order, noise and mixing.
    shard: index and number of equal parts.
    num_epochs: None is without end.

  Raises:
    ValueError: the task has no such split or other features, or fewer files
      than parts.
  """
  host_tensorflow.load()
  import seqio

  asked = set(feature_lengths if features is None else features)
  _check(task, split, feature_lengths, asked)
  index, num_shards = shard
  if num_shards > 1:
    _check_shards(task, split, num_shards)
  more = {}
  if isinstance(task, seqio.Mixture):
    if task_ids == 'mixture':
      task = _numbered(task, tuple(feature_lengths))
    if task_ids:  # A mixture drops what it is not asked for.
      more['passthrough_features'] = [f'{f}_task_ids' for f in feature_lengths]
  dataset = task.get_dataset(
    feature_lengths,
    split=split,
    shuffle=shuffle,
    seed=seed,
    shard_info=seqio.ShardInfo(index, num_shards) if num_shards > 1 else None,
    num_epochs=num_epochs,
    # A cache in memory would become part of every saved iterator.
    try_in_mem_cache=False,
    **more,
  )
  if task_ids == 'mixture' and isinstance(task, seqio.Task):
    return _with_task_id(dataset, tuple(feature_lengths), 0)
  return dataset


def task_names(
  task_name: str, task_ids: bool | str = True, modules: Sequence[str] = ()
) -> tuple[str, ...]:
  """What the task ids of a task's tokens mean; empty where it has none.

  Args:
    task_name: of a task or mixture.
    task_ids: one of `TASK_IDS`. With 'mixture' the names are those of the
      mixture's tasks, sorted: a task's number does not depend on how the
      mixture was put together.
    modules: further modules that register tasks.

  Raises:
    ValueError: there is no such task.

  >>> task_names('docs_lm')[:3]
  ('ase', 'darts', 'deepchem')
  >>> task_names('docs_lm', 'mixture')
  ('docs_lm',)
  """
  task = tasks.find(task_name, modules)
  import seqio

  subtasks = seqio.get_subtasks(task)
  if task_ids == 'mixture':
    return tuple(sorted(subtask.name for subtask in subtasks))
  of_sources = {
    tuple(getattr(subtask.source, 'task_names', ())) for subtask in subtasks
  }
  return of_sources.pop() if len(of_sources) == 1 else ()


def digests(task_name: str, modules: Sequence[str] = ()) -> dict[str, str]:
  """Digests of the data of those tasks whose source declares one."""
  task = tasks.find(task_name, modules)
  import seqio

  return {
    subtask.name: subtask.source.digest
    for subtask in seqio.get_subtasks(task)
    # `seqio.DataSource` has none: a source that can tell declares one.
    if hasattr(type(subtask.source), 'digest')
  }


def installed(saved: Mapping[str, str]) -> dict[str, str]:
  """Tasks that once read the installed packages, and what they are called now.

  Args:
    saved: digests of tasks' data, see `digests`.

  Returns:
    Today's name of each whose data, as it was, is here.
  """
  found = {}
  for name, digest in saved.items():
    today = earlier.installed(name)
    try:
      if today != name and digests(today)[today] == digest:
        found[name] = today
    except (ValueError, OSError):  # No such task, or its data is not here.
      continue
  return found


def check_savable(
  rows: tf.data.Dataset,
  task: seqio.Task | seqio.Mixture,
  split: str,
  feature_lengths: Mapping[str, int],
) -> None:
  """Checks that a position in rows of a task can be saved.

  TensorFlow says so when a position is saved, and then not of what has not been
  begun; of the whole program it can be asked before anything is read.

  Args:
    rows: all that is made of the examples of `task`.
    task: whose parts the error names, where it is they that cannot.
    split: that is read.
    feature_lengths: length of each feature of the task, in tokens.

  Raises:
    ValueError: it cannot.
  """
  import seqio

  reason = _unsavable(rows)
  if reason is None:
    return
  names = [
    subtask.name
    for subtask in seqio.get_subtasks(task)
    if split in subtask.splits
    and _unsavable(
      subtask.get_dataset(feature_lengths, split, try_in_mem_cache=False)
    )
  ]
  raise ValueError(
    f'where training stands in {", ".join(names) or task.name} cannot be saved '
    f'({reason}): its source or a preprocessor runs Python, such as '
    'from_generator or py_function; read tensors or files in its place, such '
    'as tf.data.Dataset.from_tensor_slices or seqio.TFExampleDataSource.'
  )


def _unsavable(dataset: tf.data.Dataset) -> str | None:
  """What in a dataset has a state of its own, such as 'PyFunc is stateful'."""
  tf = host_tensorflow.load()
  try:
    tf.raw_ops.DatasetToGraphV2(
      input_dataset=dataset._variant_tensor,
      external_state_policy=2,  # Fail, as saving does.
    )
  except tf.errors.FailedPreconditionError as error:
    found = re.search(r'\w+ is stateful', error.message)
    return found.group() if found else error.message.splitlines()[0]
  return None


def check_task_ids(task_ids: bool | str) -> None:
  """Raises ValueError unless it is one of `TASK_IDS`."""
  if not isinstance(task_ids, bool) and task_ids != 'mixture':
    raise ValueError(
      f'task_ids must be one of {", ".join(map(repr, TASK_IDS))}, got '
      f'{task_ids!r}.'
    )


def _numbered(
  mixture: seqio.Mixture, features: tuple[str, ...]
) -> seqio.Mixture:
  """The same mixture, whose tasks' examples have their number."""
  numbers = {
    name: i
    for i, name in enumerate(sorted(task.name for task in mixture.tasks))
  }

  def get_task_dataset(task, *args, **kwargs):
    dataset = mixture.get_task_dataset(task, *args, **kwargs)
    return _with_task_id(dataset, features, numbers[task.name])

  numbered = copy.copy(mixture)
  numbered.get_task_dataset = get_task_dataset
  return numbered


def _with_task_id(
  dataset: tf.data.Dataset, features: tuple[str, ...], number: int
) -> tf.data.Dataset:
  tf = host_tensorflow.load()

  def add(example):
    ids = {
      f'{f}_task_ids': tf.fill(tf.shape(example[f])[:1], number)
      for f in features
    }
    return {**example, **ids}

  return dataset.map(add, num_parallel_calls=tf.data.AUTOTUNE)


def _check(
  task, split: str, feature_lengths: Mapping[str, int], asked: set[str]
) -> None:
  check_lengths(task, feature_lengths, asked)
  if split not in (known := splits(task)):
    raise ValueError(
      f'task {task.name!r} has no split {split!r}; it has '
      f'{", ".join(known) or "none, for texts that a command is given"}'
    )


def splits(task) -> Sequence[str]:
  """Of a task or mixture; empty for one without data."""
  try:
    return tuple(task.splits)
  except ValueError:  # Of a task that has none.
    return ()


def check_lengths(
  task, feature_lengths: Mapping[str, int], asked: set[str]
) -> None:
  """Raises ValueError where a task has other features than are asked for.

  Args:
    task: or a mixture.
    feature_lengths: tokens by feature, which the message names.
    asked: the features that are read.
  """
  if asked != set(task.output_features):
    raise ValueError(
      f'task {task.name!r} has the features {sorted(task.output_features)}, '
      f'but lengths are given for {sorted(feature_lengths)}, and '
      f'the model reads {sorted(asked)}: set TASK_FEATURE_LENGTHS for those of '
      'the task, or take another task'
    )


def _check_shards(task, split: str, num_shards: int) -> None:
  import seqio

  for subtask in seqio.get_subtasks(task):
    source = subtask.source
    # seqio would read all files and then drop most examples, after a shuffle
    # that differs between streams.
    if source.supports_arbitrary_sharding:
      continue
    if num_shards > (files := len(source.list_shards(split))):
      raise ValueError(
        f'each stream needs a file of its own: task {subtask.name!r} has '
        f'{files} for {split!r}, but num_shards is {num_shards}: lower it'
      )

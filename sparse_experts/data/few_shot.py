"""Questions after examples of questions with their answers.

The examples are drawn from the split 'shots' of a benchmark's source, where its
table has one, else from 'train', else from the split that is asked.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import functools
import re
import typing
from collections.abc import Callable, Sequence

import numpy as np

from sparse_experts.data import host_tensorflow, mixing, tasks

if typing.TYPE_CHECKING:
  import seqio
  import tensorflow as tf

POOL = 1000  # Examples are drawn from the first of a split, at most.


def mixture(name: str, *, shots: int | str = 'zero', seed: int = 0) -> str:
  """Registers a benchmark, or a mixture of some, with examples in its prompts.

  Those that a prompt shows follow from seed and index of the question alone,
  and ask something else: where the question itself is there to be drawn,
  however often and with whatever answer, it is not. In a prompt that would be
  longer than 'inputs' may be, the last of them are left out.

  Args:
    name: of a task from a table, see `tasks.benchmark`, or of a mixture.
    shots: how many examples a prompt shows: 'zero', 'one', a number, or 'few',
      as many as the table says for each benchmark.
    seed: of the draws.

  Returns:
    The name of what is registered, `glam_copa_1_shot_seed_0`; `name` itself
    without shots.

  Raises:
    ValueError: shots is no such number, or a task is not from a table.
  """
  if isinstance(shots, str):
    shots = {'zero': 0, 'one': 1}.get(shots, shots)
  if shots != 'few' and not (isinstance(shots, int) and shots >= 0):
    raise ValueError(
      f"shots must be 'zero', 'one', 'few' or a number, not {shots!r}."
    )
  found = tasks.find(name)
  if shots == 0:
    return name
  import seqio

  if isinstance(found, seqio.Task):
    return _add(found, shots, seed).name
  parts = [_add(task, shots, seed) for task in seqio.get_subtasks(found)]
  return mixing.add(f'{name}_{shots}_shot_seed_{seed}', parts, 'equal')


def asked(name: str) -> str:
  """The task that a name of `mixture` asks.

  >>> asked('glam_copa_32_shot_seed_0'), asked('glam_copa')
  ('glam_copa', 'glam_copa')
  """
  return re.sub(r'_\d+_shot_seed_\d+$', '', name)


def draw(
  pool: int, k: int, *, seed: int, index: int, exclude: Sequence[int] = ()
) -> np.ndarray:
  """Which k of a pool of examples are shown before example `index`, int [k].

  A function of its arguments alone: not of batches, order or processes.

  Args:
    pool: how many examples there are to draw from, without replacement.
    k: how many to show.
    seed: of the whole evaluation.
    index: of the example that is asked.
    exclude: indices of the pool not to draw, such as the example itself.

  Raises:
    ValueError: there are not so many.

  >>> sorted(draw(4, 2, seed=0, index=5, exclude=[1, 3]).tolist())
  [0, 2]
  """
  others = np.setdiff1d(np.arange(pool), exclude)
  if not 0 <= k <= len(others):
    raise ValueError(
      f'cannot show {k} examples: there are {len(others)} to draw from.'
    )
  random = np.random.default_rng([seed, index])
  return random.choice(others, k, replace=False)


def prompt(
  inputs: str, shots: Sequence[tuple[str, str]], separator: str = '\n\n'
) -> str:
  """A question after examples of questions with their answers.

  Args:
    inputs: the question.
    shots: questions and their answers, in the order they are shown.
    separator: between one question with its answer and the next question.

  >>> prompt('3+4=', [('1+1=', '2')], separator=' ')
  '1+1= 2 3+4='
  """
  shown = [f'{question} {answer}' for question, answer in shots]
  return separator.join([*shown, inputs])


def _add(
  task: seqio.Task, shots: int | typing.Literal['few'], seed: int
) -> seqio.Task:
  """A task's benchmark with prompts."""
  host_tensorflow.load()
  import seqio

  from sparse_experts.data.tasks import benchmark

  row = benchmark.ROWS.get(task.name)
  if row is None or (shots == 'few' and not row.shots):
    raise ValueError(
      f'{task.name} has no prompts of {shots} shots: name a benchmark of a '
      "table, and for 'few' one whose row says how many."
    )
  k = row.shots if shots == 'few' else shots
  name = f'{task.name}_{k}_shot_seed_{seed}'
  if name in seqio.TaskRegistry.names():
    return seqio.TaskRegistry.get(name)
  split = next((s for s in ('shots', 'train') if s in row.splits), 'validation')

  def pool():
    examples = benchmark.texts(row, split).take(POOL).as_numpy_iterator()
    found = [(e['inputs'].decode(), e['targets'].decode()) for e in examples]
    times = collections.Counter(question for question, _ in found)
    most = max(times.values(), default=1)
    if len(found) < k + most:
      raise ValueError(
        f'cannot show {k} examples of {task.name}: its split {split!r} has '
        f'{len(found)}, of which {most} may be the question; ask for fewer '
        'shots.'
      )
    return found

  return benchmark.add(
    dataclasses.replace(row, name=name),
    task.output_features['inputs'].vocabulary,
    functools.partial(_prompts, pool=pool, k=k, seed=seed),
  )


def _prompts(
  dataset: tf.data.Dataset,
  sequence_length,
  output_features,
  *,
  pool: Callable[[], list[tuple[str, str]]],
  k: int,
  seed: int,
) -> tf.data.Dataset:
  """A seqio preprocessor: 'inputs' with k of a pool before them."""
  import tensorflow as tf

  examples = pool()
  places = {}
  for i, (question, _) in enumerate(examples):
    places.setdefault(question, []).append(i)
  feature = output_features['inputs']
  tokens = feature.vocabulary.encode
  room = (sequence_length or {}).get('inputs', float('inf')) - feature.add_eos

  def text(index, inputs):
    inputs = inputs.decode()
    itself = places.get(inputs, ())
    drawn = draw(len(examples), k, seed=seed, index=int(index), exclude=itself)
    shots = [examples[i] for i in drawn]
    fit = bisect.bisect_right(
      range(k + 1), room, key=lambda n: len(tokens(prompt(inputs, shots[:n])))
    )
    return prompt(inputs, shots[: max(0, fit - 1)]).encode()

  def with_prompt(index, example):
    inputs = tf.numpy_function(text, [index, example['inputs']], tf.string)
    return {**example, 'inputs': tf.ensure_shape(inputs, [])}

  return dataset.enumerate().map(with_prompt)

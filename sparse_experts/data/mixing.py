"""Mixtures of tasks, and how much of each."""

from __future__ import annotations

import functools
import itertools
import typing
from collections.abc import Sequence

from sparse_experts.data import host_tensorflow, tasks

if typing.TYPE_CHECKING:
  import seqio

SAMPLE = 1000  # Examples of a task whose tokens are counted.


def mixture(
  name: str,
  task_names: Sequence[str],
  *,
  by: str = 'examples',
  temperature: float = 1.0,
  maximum: float | None = None,
  modules: Sequence[str] = (),
) -> str:
  """Registers a mixture of tasks and returns its name.

  A task's rate is min(size, maximum)^(1 / temperature), with `size` counted in
  its train split when data is first read; 0 for tasks without one, which are
  there to be evaluated.

  Args:
    name: of the mixture. The same name with the same arguments is the same
      mixture, so gin may call this wherever a task is named.
    task_names: of tasks and mixtures, which count as their tasks.
    by: 'examples', 'tokens' (examples times the mean tokens of the first
      1,000), or 'equal', where every rate is 1.
    temperature: 1 is in proportion; mT5's alpha of 0.3 is 1 / 0.3.
    maximum: cap of a task's size, as T5's "K" and ST-MoE's 65,536.
    modules: as in `tasks.find`.

  Raises:
    ValueError: an argument is out of range, a task is unknown, or the name is
      another's.
  """
  if by not in ('examples', 'tokens', 'equal'):
    raise ValueError(f"by must be 'examples', 'tokens' or 'equal', not {by!r}.")
  for argument, value in (('temperature', temperature), ('maximum', maximum)):
    if value is not None and not value > 0:
      raise ValueError(f'{argument} must be above 0, got {value}.')
  found = [tasks.find(task, modules) for task in task_names]
  if not found:
    raise ValueError(f'mixture {name!r} needs at least one task.')
  return add(name, found, by, temperature, maximum)


def add(
  name: str,
  found: Sequence[seqio.Task | seqio.Mixture],
  by: str = 'examples',
  temperature: float = 1.0,
  maximum: float | None = None,
) -> str:
  """As `mixture`, of tasks at hand and arguments that are known to be good.

  Args:
    name: new, or that of the same mixture.
    found: tasks, and mixtures for the tasks that they are of.
    by, temperature, maximum: as of `mixture`.

  Raises:
    ValueError: another mixture has the name.
  """
  host_tensorflow.load()
  import seqio

  names = sorted(
    {task.name for each in found for task in seqio.get_subtasks(each)}
  )
  made_of = (names, by, temperature, maximum)
  if name in seqio.MixtureRegistry.names():
    if _MADE_OF.get(name) != made_of:
      raise ValueError(
        f'there is another mixture {name!r} already; choose another name.'
      )
    return name
  of = functools.partial(rate, by=by, temperature=temperature, maximum=maximum)
  seqio.MixtureRegistry.add(name, [(task, of) for task in names])
  _MADE_OF[name] = made_of
  return name


_MADE_OF: dict[str, tuple] = {}


def rate(
  task: seqio.Task,
  *,
  by: str = 'examples',
  temperature: float = 1.0,
  maximum: float | None = None,
) -> float:
  """The rate of a task in a mixture, see `mixture`.

  Args:
    task: of a mixture.
    by, temperature, maximum: as of `mixture`.
  """
  if by == 'equal':
    return 1.0
  if 'train' not in task.splits:
    return 0.0
  size = float(task.num_input_examples('train'))
  if by == 'tokens':
    size *= _mean_tokens(task)
  if maximum is not None:
    size = min(size, maximum)
  return size ** (1 / temperature)


def _mean_tokens(task: seqio.Task) -> float:
  """Mean number of tokens of an example, over its first ones."""
  examples = task.get_dataset(
    split='train', shuffle=False, try_in_mem_cache=False
  )
  counts = [
    sum(len(example[feature]) for feature in task.output_features)
    for example in itertools.islice(examples.as_numpy_iterator(), SAMPLE)
  ]
  return sum(counts) / len(counts)

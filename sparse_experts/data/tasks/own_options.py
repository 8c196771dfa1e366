"""The options of rows whose target is one of them: given, or found in train."""

import sys
from collections.abc import Sequence

import numpy as np

from sparse_experts.data.tasks.benchmark import Benchmark, fill
from sparse_experts.data.tasks.file_source import FileSource

# They are found where targets have at most so many values, and each value is
# there so often on the mean.
MAX_OPTIONS = 100
MIN_EXAMPLES_PER_OPTION = 2


def of(
  row: Benchmark, options: Sequence[str] | str | None
) -> Sequence[str] | str:
  """A row's options, given or found; its files are read.

  Raises:
    ValueError: they are given, and a target is none of them.
  """
  if options is not None and not options:
    return ()
  source = _source(row)
  if options is not None:
    for split in source.splits:
      for i in _unlisted(row, options, split)[:1]:
        target = _targets(row, split)[i].decode()
        raise ValueError(
          f'{source.place(split, i)}: TARGETS is {target!r}, which is none '
          f'of OPTIONS = {options!r}; correct the one or the other.'
        )
    return options
  if 'train' not in source.splits:
    return ()
  targets = _targets(row, 'train')
  found = sorted(set(targets))
  enough = len(targets) >= MIN_EXAMPLES_PER_OPTION * len(found)
  if not (enough and 2 <= len(found) <= MAX_OPTIONS):
    return ()
  escaped = tuple(
    target.decode().replace('{', '{{').replace('}', '}}') for target in found
  )
  for split in source.splits:
    if others := _unlisted(row, escaped, split):
      print(
        f'{row.name}: {len(others)} of {len(_targets(row, split))} targets in '
        f'{split} are none of the {len(found)} options found in train, such as '
        f'that of {source.place(split, others[0])}; as answers chosen from '
        'them they count as wrong.',
        file=sys.stderr,
      )
  return escaped


def _source(row: Benchmark) -> FileSource:
  """The files of a row, which has no other source."""
  assert isinstance(row.source, FileSource)
  return row.source


def _targets(row: Benchmark, split: str) -> np.ndarray:
  return fill(row.targets, _source(row).tensors[split]).numpy()


def _unlisted(
  row: Benchmark, options: Sequence[str] | str, split: str
) -> list[int]:
  """The examples of a split whose target is none of the options."""
  columns, targets = _source(row).tensors[split], _targets(row, split)
  if isinstance(options, str):
    listed = columns[options].to_list()
    return [i for i, t in enumerate(targets) if t not in listed[i]]
  is_listed = np.zeros(targets.shape, bool)
  for option in options:
    is_listed |= targets == np.array(fill(option, columns).numpy(), object)
  return np.flatnonzero(~is_listed).tolist()

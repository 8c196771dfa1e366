"""seqio tasks and mixtures; importing a file of this package registers its own.

A new task is one new file here, or in any module that a caller names; a new
benchmark of TFDS is a row of a table in one of them, see `benchmark`.
"""

import difflib
import importlib
import pkgutil
import typing
from collections.abc import Sequence

from sparse_experts.data import host_tensorflow

if typing.TYPE_CHECKING:
  import seqio


def find(
  name: str, modules: Sequence[str] = ()
) -> 'seqio.Task | seqio.Mixture':
  """Looks up a task or mixture by name.

  Args:
    name: as registered with seqio.
    modules: dotted names of further modules to import, which register theirs.

  Raises:
    ValueError: no such name; the message has the nearest.

  >>> find('docs_lm').splits
  ('train', 'validation', 'test', 'out_of_domain')
  """
  known = names(modules)
  if name not in known:
    close = difflib.get_close_matches(name, known, n=1)
    meant = f'did you mean {close[0]!r}? ' if close else ''
    raise ValueError(
      f'unknown task {name!r}; {meant}`python -m sparse_experts list` names '
      f'all {len(known)}, and TASK_MODULES brings others.'
    )
  import seqio

  return seqio.get_mixture_or_task(name)


def names(modules: Sequence[str] = ()) -> list[str]:
  """The names of all tasks and mixtures, sorted.

  Args:
    modules: as in `find`.
  """
  host_tensorflow.load()
  import seqio

  for module in pkgutil.iter_modules(__path__, f'{__name__}.'):
    importlib.import_module(module.name)
  for module in modules:
    _import(module)
  return sorted({*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()})


def _import(module: str) -> None:
  """Imports a module of the user's."""
  try:
    importlib.import_module(module)
  except (ImportError, SystemExit) as error:
    reason = error if isinstance(error, ImportError) else 'it ends Python'
    raise ImportError(
      f'TASK_MODULES has {module!r}, which cannot be imported ({reason}); '
      "modules are found in the current folder and on Python's path."
    ) from error

"""Dispatchers execute an assignment and do not know who made it.

Each is a function (experts, x_GxSxD, assignment, capacity) -> y_GxSxD in the
file of its name.
"""

import importlib
import pkgutil
from collections.abc import Callable

from sparse_experts.letters import Array

# What becomes of tokens; or that, and the choices lost, by who had no room.
Dispatched = Array | tuple[Array, dict[str, Array]]


def names() -> list[str]:
  """The dispatchers there are, by file name."""
  return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> Callable[..., Dispatched]:
  """The dispatcher of this name.

  Raises:
    ValueError: there is no such dispatcher.
  """
  if name not in names():
    raise ValueError(
      f'dispatcher must be one of {", ".join(names())}, not {name!r}.'
    )
  return getattr(importlib.import_module(f'{__name__}.{name}'), name)

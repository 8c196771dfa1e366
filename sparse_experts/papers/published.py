"""Counts that papers print, and the recipes they are about.

A table is data: a row names a recipe, what it overrides, the digits the paper
prints, and, where the modules do not give them, why. A paper is a file of this
folder with its `TABLES`, by the names that `table --paper` takes.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sparse_experts import papers

# What papers print, and what the ledger calls it.
QUANTITIES = {
  'parameters': 'total_params',
  'active parameters': 'active_params',
  'FLOPs/sequence': 'kaplan_forward_flops_per_sequence',
  'parameters of blocks': 'block_params',
}

_UNITS = {'': 1, 'M': 1e6, 'B': 1e9, 'T': 1e12}
TOLERANCE = 0.02


@dataclasses.dataclass(frozen=True)
class Row:
  """One model of a table.

  Attributes:
    model: its name in the paper.
    recipe: under `gin/models/`, without `.gin`.
    params, active_params, flops, block_params: as printed, '7B' or all digits;
      FLOPs are of a forward pass over one sequence; None: the paper has none.
    bindings: NAME=VALUE, what the recipe is overridden with.
    because: why a number does not reproduce, by its name in QUANTITIES.
  """

  model: str
  recipe: str
  params: str | None = None
  active_params: str | None = None
  flops: str | None = None
  block_params: str | None = None
  bindings: tuple[str, ...] = ()
  because: Mapping[str, str] = dataclasses.field(default_factory=dict)

  @property
  def file(self) -> str:
    return f'gin/models/{self.recipe}.gin'

  @property
  def printed(self) -> dict[str, str]:
    """The printed digits by quantity."""
    values = (
      self.params,
      self.active_params,
      self.flops,
      self.block_params,
    )
    return {name: v for name, v in zip(QUANTITIES, values) if v is not None}


@dataclasses.dataclass(frozen=True)
class Table:
  """A table of a paper."""

  title: str
  rows: tuple[Row, ...]


# What many rows override their recipe with: no sparse layer, or n experts.
DENSE = ('SPARSE_LAYERS=0',)


def experts(n: int) -> tuple[str, ...]:
  """The binding of a recipe's number of experts."""
  return (f'NUM_EXPERTS={n}',)


@functools.cache
def tables() -> Mapping[str, Table]:
  """The tables of all papers by name, in the order of the papers' files.

  Raises:
    ValueError: two papers call a table the same.
  """
  found = {}
  for file in pkgutil.iter_modules(papers.__path__, f'{papers.__name__}.'):
    paper = importlib.import_module(file.name)
    for name, table in getattr(paper, 'TABLES', {}).items():
      if name in found:
        raise ValueError(
          f'{file.name} has a table {name!r}, and a paper before it too: table '
          'names are unique, so give it another.'
        )
      found[name] = table
  return found


def number(printed: str) -> float:
  """A printed count as a number.

  Example:
    >>> number('12.5B')
    12500000000.0
  """
  digits, unit = _split(printed)
  return float(digits) * _UNITS[unit]


def agrees(printed: str, computed: float) -> bool:
  """Whether a count rounds to the printed digits or is within 2% of them.

  If all digits are printed, it must be equal.

  Example:
    >>> agrees('7B', 7.42e9), agrees('20B', 14.0e9), agrees('1000', 1001)
    (True, False, False)
  """
  digits, unit = _split(printed)
  decimals = len(digits.partition('.')[2])
  if round(computed / _UNITS[unit], decimals) == float(digits):
    return True
  return unit != '' and abs(computed / number(printed) - 1) <= TOLERANCE


def _split(printed: str) -> tuple[str, str]:
  """Digits and unit."""
  digits = printed.rstrip(''.join(_UNITS))
  return digits, printed[len(digits) :]


def compare(row: Row, facts: Mapping[str, Any]) -> list[dict[str, Any]]:
  """Printed beside computed for every number of a row.

  Args:
    row: of a table.
    facts: the ledger of its model.

  Returns:
    For each number `quantity`, `published` (as printed), `computed`,
    `difference` (relative), `agrees` and `because` (None, or a reason).
  """
  return [
    {
      'quantity': quantity,
      'published': printed,
      'computed': facts[QUANTITIES[quantity]],
      'difference': facts[QUANTITIES[quantity]] / number(printed) - 1,
      'agrees': agrees(printed, facts[QUANTITIES[quantity]]),
      'because': row.because.get(quantity),
    }
    for quantity, printed in row.printed.items()
  ]


def rows_of(
  files: Sequence[str], bindings: Sequence[str]
) -> Iterator[tuple[Table, Row]]:
  """Rows about exactly these gin files and overrides."""
  for table in tables().values():
    for row in table.rows:
      if list(files) == [row.file] and sorted(bindings) == sorted(row.bindings):
        yield table, row

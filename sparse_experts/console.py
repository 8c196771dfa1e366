"""Tables for people, and text that a terminal shows while something runs."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any


def table(
  header: Sequence[str],
  rows: Sequence[Sequence[str]],
  words: Collection[int] = (0,),
) -> str:
  """Aligned columns.

  Args:
    header, rows: cells.
    words: which columns stand to the left; others, of numbers, to the right.
  """
  widths = [max(map(len, column)) for column in zip(header, *rows)]
  lines = [
    '  '.join(
      cell.ljust(width) if i in words else cell.rjust(width)
      for i, (cell, width) in enumerate(zip(row, widths))
    ).rstrip()
    for row in (header, *rows)
  ]
  return '\n'.join([lines[0], '-' * max(map(len, lines)), *lines[1:]])


def expert_load(layers: Mapping[str, Mapping[str, Any]]) -> str:
  """Load of each expert in percent by layer, and how well it is spread.

  Args:
    layers: from `models.sums.summary`.
  """
  shown = 16  # Experts with a column of their own.
  num_experts = max(len(layer['load_E']) for layer in layers.values())
  columns = min(num_experts, shown)
  header = [
    'load of expert, %',
    *map(str, range(columns)),
    *(['...'] if num_experts > shown else []),
    'max/mean',
    'dropped',
    'dead',
    'confidence',
  ]
  rows = []
  for name, layer in layers.items():
    load_E = layer['load_E']
    rows.append(
      [
        name,
        *(
          f'{100 * load_E[e]:.0f}' if e < len(load_E) else ''
          for e in range(columns)
        ),
        *([''] if num_experts > shown else []),
        f'{layer["imbalance"]:.2f}',
        f'{100 * layer["dropped"]:.1f}%',
        f'{layer["dead"]:.0f}',
        f'{layer["confidence"]:.2f}' if 'confidence' in layer else '',
      ]
    )
  return table(header, rows)


def scalars(metrics: Mapping[str, Any]) -> dict[str, float]:
  """The top-level numbers among metrics."""
  return {
    name: value
    for name, value in metrics.items()
    if isinstance(value, (int, float))
  }


def line(cells: Sequence[Any], widths: Sequence[int]) -> str:
  """One row of a table that is printed as it grows."""
  padded = (str(cell).ljust(width) for cell, width in zip(cells, widths))
  return '  '.join(padded).rstrip()


class Live:
  """Text on a terminal's stderr that is written anew where it has changed.

  Elsewhere there is none of it, and only what is said.
  """

  def __init__(self):
    self._text = ''

  def show(self, text: Callable[[], str]) -> None:
    if not sys.stderr.isatty():
      return
    columns, lines = shutil.get_terminal_size()
    shown = [line[: columns - 1] for line in text().splitlines()]
    if len(shown) > lines - 1:
      shown = [*shown[: lines - 2], f'... {len(shown) - lines + 2} more']
    new = '\n'.join(shown)
    if new != self._text:
      self.clear()
      print(new, file=sys.stderr, flush=True)
      self._text = new

  def clear(self) -> None:
    if self._text:
      lines = self._text.count('\n') + 1
      print(f'\033[{lines}A\033[J', end='', file=sys.stderr, flush=True)
    self._text = ''

  def say(self, line: str) -> None:
    """A line that stays."""
    self.clear()
    print(line, file=sys.stderr, flush=True)

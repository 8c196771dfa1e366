"""Tables for people: what a run reached and what its experts do."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
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

"""What plots are drawn with: axes, series, maps and legends.

Lines differ in their dashes too; maps are cividis. Legends stand over the axes,
where no line crosses them. Of more series than there are colours each has axes
of its own. matplotlib is imported by what draws.
"""

from __future__ import annotations

import textwrap
import typing
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sparse_experts.insight.colours import COLOURS
from sparse_experts.insight.routing import Matrix

if typing.TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure

DASHES = ('-', '--', '-.', ':')
POINTS = 9  # Of letters.
WIDTH = 4.6  # Inches: a column of print, a phone held upright.


def one_axes(height: float = 2.9) -> tuple[Figure, Axes]:
  """A figure with one pair of axes; shown once, where it is returned."""
  figure, axes = _panels(1, 1, height)
  return figure, axes[0]


def _panels(
  rows: int, columns: int, height: float
) -> tuple[Figure, Sequence[Axes]]:
  """A figure of axes, row by row, which share their scales."""
  from matplotlib import pyplot

  with pyplot.rc_context({'font.size': POINTS}):
    figure, grid = pyplot.subplots(
      rows, columns, figsize=(WIDTH, height), layout='constrained',
      sharex=True, sharey=True, squeeze=False,
    )  # fmt: skip
  pyplot.close(figure)
  for axes in grid.flat:
    axes.spines[['top', 'right']].set_visible(False)
  return figure, list(grid.flat)


def series(
  names: Sequence[str],
  draw: Callable[[Axes, str, dict[str, Any]], None],
  *,
  xlabel: str,
  ylabel: str,
  together: int = len(COLOURS),
) -> Figure:
  """All in one pair of axes, or where they are many each in its own.

  Args:
    names: of the series.
    draw: draws one of a name, in a style.
    xlabel, ylabel: of all axes.
    together: so many share axes at most.
  """
  if len(names) <= together:
    figure, axes = one_axes()
    for i, name in enumerate(names):
      dashes = DASHES[i % len(DASHES)]
      draw(axes, name, {'color': COLOURS[i], 'linestyle': dashes})
    axes.set(xlabel=xlabel, ylabel=textwrap.fill(ylabel, 28))
    if len(names) > 1:
      legend(figure, axes)
    return figure
  columns = 3
  rows = -(-len(names) // columns)
  figure, panels = _panels(rows, columns, height=0.6 + 0.85 * rows)
  for axes, name in zip(panels, names):
    draw(axes, name, {'color': COLOURS[0]})
    axes.set_title(name, fontsize=POINTS - 2)
    axes.tick_params(labelsize=POINTS - 2)
  for axes in panels[len(names) :]:
    axes.remove()
  for axes in panels[len(names) - columns : len(names)]:  # The lowest ones.
    axes.tick_params(labelbottom=True)
  figure.supxlabel(xlabel, fontsize=POINTS)
  figure.supylabel(ylabel, fontsize=POINTS)
  return figure


def heat_map(
  matrix: Matrix,
  *,
  label: str,
  xlabel: str,
  ylabel: str = '',
  low: float | None = None,
  high: float | None = None,
) -> Figure:
  """A map of a matrix, whose cells without a value stay blank.

  Args:
    matrix: rows down, columns across.
    label: what the colours say, with its unit.
    xlabel, ylabel: what columns and rows are.
    low, high: of the scale; None: of the values.
  """
  figure, axes = one_axes(height=min(1.0 + 0.22 * len(matrix.rows), 6.5))
  image = axes.imshow(
    matrix.values, aspect='auto', cmap='cividis', interpolation='nearest',
    vmin=low, vmax=high,
  )  # fmt: skip
  is_long = max(map(len, (*matrix.rows, *matrix.columns))) > 3
  _few_ticks(axes.xaxis, matrix.columns, most=8 if is_long else 16)
  _few_ticks(axes.yaxis, matrix.rows, most=40)
  axes.set(xlabel=xlabel, ylabel=ylabel)
  is_whole = not np.isnan(matrix.values).any()
  _scale(axes, image, label if is_whole else f'{label}; blank: there is none')
  return figure


def legend(figure: Figure, axes: Axes) -> None:
  """Over the axes, across the whole figure."""
  handles, labels = axes.get_legend_handles_labels()
  columns = max(1, 80 // (max(map(len, labels)) + 8))  # Of 80 letters a line.
  figure.legend(
    handles, labels, loc='outside upper left', frameon=False, handlelength=2.8,
    fontsize=POINTS - 1, ncols=min(columns, len(labels)),
  )  # fmt: skip
  height = figure.get_figheight() + 0.18 * -(-len(labels) // columns)
  figure.set_figheight(height)


def say(axes: Axes, text: str) -> None:
  """Writes into the middle of axes that would be taken for a failure."""
  axes.text(0.5, 0.5, text, transform=axes.transAxes, ha='center', va='center')


def _scale(axes: Axes, image, title: str) -> None:
  """A bar of colours, and over the axes what they mean."""
  axes.set_title(title, loc='left', fontsize=POINTS)
  bar = axes.figure.colorbar(image, ax=axes)
  bar.ax.tick_params(labelsize=POINTS)


def _few_ticks(axis, names: Sequence[str], most: int) -> None:
  """Ticks at every position, every second, fourth, eighth, ..."""
  every = 1
  while len(names) > most * every:
    every *= 2
  axis.set_ticks(range(0, len(names), every), names[::every])

"""Plots of runs and routing records; each function returns its figure.

Lines differ in their dashes too and bars in their hatching; maps are cividis.
Legends stand over the axes, where no line crosses them. Of more series than
there are colours each has axes of its own. matplotlib is of the extra
`notebooks`.
"""

from __future__ import annotations

import textwrap
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from sparse_experts.insight import routing
from sparse_experts.insight.colours import COLOURS
from sparse_experts.insight.curves import Curve
from sparse_experts.insight.records import Records
from sparse_experts.insight.routing import Matrix, Path
from sparse_experts.moe import FATES, Record

if typing.TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure

_DASHES = ('-', '--', '-.', ':')
_HATCHES = ('', '////', '....', 'xxxx')
_POINTS = 9  # Of letters.
_WIDTH = 4.6  # Inches: a column of print, a phone held upright.


def curves(
  named: Mapping[str, Curve], *, ylabel: str, xlabel: str = 'step'
) -> Figure:
  """One line for each name, at the steps it has.

  Args:
    named: curves by name; without a value other than 0 the axis is 0 to 1.
    ylabel, xlabel: what the axes show, with its unit.
  """

  def draw(axes: Axes, name: str, style: dict[str, Any]) -> None:
    marker = 'o' if len(named[name].steps) < 12 else None
    axes.plot(*named[name], label=name, marker=marker, markersize=3, **style)

  figure = _series(list(named), draw, xlabel=xlabel, ylabel=ylabel)
  zero = [
    axes
    for axes in figure.axes
    if not any(np.any(line.get_ydata()) for line in axes.lines)
  ]
  for axes in zero:
    _say(axes, 'all zero')
  if all(np.all(curve.steps % 1 == 0) for curve in named.values()):
    figure.axes[0].locator_params('x', integer=True)
  if len(zero) == len(figure.axes):
    figure.axes[0].set_ylim(0, 1)
  return figure


def load(records: Records) -> Figure:
  """The load of every expert (across) of every layer (down)."""
  loads = [routing.summary(x)['load_E'] for x in records.layers.values()]
  E = max(map(len, loads))
  load_NxE = np.full((len(loads), E), np.nan)
  for n, load_E in enumerate(loads):
    load_NxE[n, : len(load_E)] = load_E
  matrix = Matrix(tuple(records.layers), tuple(map(str, range(E))), load_NxE)
  return _heat_map(
    matrix, label='share of choices', xlabel='expert', ylabel='layer', low=0
  )


def load_over_time(steps: np.ndarray, load_TxE: np.ndarray) -> Figure:
  """The load of every expert (down) of one layer as training goes on.

  The scale reaches to twice a balanced load at least.

  Args:
    steps, load_TxE: of `history.load_over_time`.
  """
  E = load_TxE.shape[1]
  return _heat_map(
    Matrix(
      tuple(map(str, range(E))), tuple(map('{:g}'.format, steps)), load_TxE.T
    ),
    label='share of choices', xlabel='step', ylabel='expert', low=0,
    high=max(2 / E, load_TxE.max()),
  )  # fmt: skip


def fates(records: Records) -> Figure:
  """What became of the choices of each layer, padding left out."""
  shown = [name for name in FATES if name not in ('padding', 'no choice')]
  counts_NxI = np.array(
    [
      np.bincount(layer.fate_BxLxK.ravel(), minlength=len(FATES))[: len(shown)]
      for layer in records.layers.values()
    ]
  )
  share_NxI = counts_NxI / np.maximum(counts_NxI.sum(1, keepdims=True), 1)
  figure, axes = _axes(height=0.9 + 0.3 * len(records.layers))
  left_N = np.zeros(len(share_NxI))
  for r, name in enumerate(shown):
    if r == 0 or share_NxI[:, r].any():
      axes.barh(
        list(records.layers), share_NxI[:, r], left=left_N, label=name,
        color=COLOURS[r], hatch=_HATCHES[r], edgecolor='#1a1a1a', linewidth=0,
      )  # fmt: skip
      left_N += share_NxI[:, r]
  axes.invert_yaxis()
  axes.set(xlabel='share of choices', ylabel='layer', xlim=(0, 1))
  _legend(figure, axes)
  return figure


def line_lengths(record: Record) -> Figure:
  """How long the experts' lines are in a group, and where capacity cuts."""
  lengths_GxE = routing.line_lengths(record)
  figure, axes = _axes()
  bins = np.arange(lengths_GxE.max() + 2) - 0.5
  axes.hist(lengths_GxE.ravel(), bins, color=COLOURS[0])
  if record.capacity is not None:
    axes.axvline(
      record.capacity + 0.5, color=COLOURS[5], linestyle='--',
      label=f'capacity {record.capacity}',
    )  # fmt: skip
    _legend(figure, axes)
  axes.set(
    xlabel='length of a line, choices of an expert in a group',
    ylabel='lines of that length',
  )
  return figure


def confidence(records: Records) -> Figure:
  """How sure routers are: the largest probability, over tokens."""
  values = {
    name: layer.confidence_BxL[~routing.is_padding(layer)]
    for name, layer in records.layers.items()
    if layer.confidence_BxL is not None
  }
  bins = np.linspace(0, 1, 41).tolist()

  def draw(axes: Axes, name: str, style: dict[str, Any]) -> None:
    share = np.full(len(values[name]), 1 / max(len(values[name]), 1))
    axes.hist(
      values[name], bins, weights=share, histtype='step', label=name, **style
    )

  figure = _series(
    list(values),
    draw,
    xlabel='largest probability of a token',
    ylabel='share of tokens, by 0.025',
    together=3,
  )
  if not values:
    _say(figure.axes[0], 'no router has logits')
  return figure


def specialisation(matrix: Matrix, ylabel: str = '') -> Figure:
  """Of the tokens of each row, the share that goes to each expert."""
  return _heat_map(
    matrix, label='share of tokens', xlabel='expert', ylabel=ylabel, low=0
  )


def coactivation(matrix: Matrix) -> Figure:
  """Of the tokens that chose expert i (down), the share that chose j."""
  return _heat_map(
    matrix, label='share of its tokens', xlabel='expert also chosen',
    ylabel='expert',
  )  # fmt: skip


def transitions(matrix: Matrix) -> Figure:
  """Of the tokens at expert i of a layer (down), the share at j of the next."""
  return _heat_map(
    matrix, label='share of its tokens', xlabel='expert of the next layer',
    ylabel='expert of a layer', low=0,
  )  # fmt: skip


def paths(found: Sequence[Path]) -> Figure:
  """How frequent paths are, beside what independent layers would give."""
  figure, axes = _axes(height=0.9 + 0.22 * len(found))
  names = [' → '.join(map(str, path.experts)) for path in found]
  axes.barh(
    names, [path.share for path in found], color=COLOURS[0], label='found'
  )
  axes.plot(
    [path.by_chance for path in found], names, linestyle='', marker='D',
    markersize=4, color=COLOURS[1], label='by chance',
  )  # fmt: skip
  axes.invert_yaxis()
  longest = max(map(len, names), default=1)
  axes.tick_params('y', labelsize=min(_POINTS, max(5, 250 / longest)))
  axes.set(xlabel='share of tokens', ylabel='experts, layer by layer')
  _legend(figure, axes)
  return figure


def saturation(
  steps: Sequence[int], by_step: Sequence[Mapping[str, float]]
) -> Figure:
  """Of the final choices, the share that each earlier step made too.

  Args:
    steps: of the earlier checkpoints.
    by_step: `comparison.saturation` of each, by layer.
  """
  figure = curves(
    {
      name: Curve(np.array(steps), np.array([at[name] for at in by_step]))
      for name in by_step[0]
    },
    ylabel='share of final choices',
  )
  for axes in figure.axes:
    axes.set_ylim(0, 1.02)
  return figure


def _axes(height: float = 2.9) -> tuple[Figure, Axes]:
  """A figure with one pair of axes; shown once, where it is returned."""
  figure, axes = _panels(1, 1, height)
  return figure, axes[0]


def _panels(
  rows: int, columns: int, height: float
) -> tuple[Figure, Sequence[Axes]]:
  """A figure of axes, row by row, which share their scales."""
  try:
    from matplotlib import pyplot
  except ImportError as error:
    raise ImportError(
      "plots need matplotlib: pip install 'sparse_experts[notebooks]'."
    ) from error
  with pyplot.rc_context({'font.size': _POINTS}):
    figure, grid = pyplot.subplots(
      rows, columns, figsize=(_WIDTH, height), layout='constrained',
      sharex=True, sharey=True, squeeze=False,
    )  # fmt: skip
  pyplot.close(figure)
  for axes in grid.flat:
    axes.spines[['top', 'right']].set_visible(False)
  return figure, list(grid.flat)


def _series(
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
    figure, axes = _axes()
    for i, name in enumerate(names):
      dashes = _DASHES[i % len(_DASHES)]
      draw(axes, name, {'color': COLOURS[i], 'linestyle': dashes})
    axes.set(xlabel=xlabel, ylabel=textwrap.fill(ylabel, 28))
    if len(names) > 1:
      _legend(figure, axes)
    return figure
  columns = 3
  rows = -(-len(names) // columns)
  figure, panels = _panels(rows, columns, height=0.6 + 0.85 * rows)
  for axes, name in zip(panels, names):
    draw(axes, name, {'color': COLOURS[0]})
    axes.set_title(name, fontsize=_POINTS - 2)
    axes.tick_params(labelsize=_POINTS - 2)
  for axes in panels[len(names) :]:
    axes.remove()
  for axes in panels[len(names) - columns : len(names)]:  # The lowest ones.
    axes.tick_params(labelbottom=True)
  figure.supxlabel(xlabel, fontsize=_POINTS)
  figure.supylabel(ylabel, fontsize=_POINTS)
  return figure


def _heat_map(
  matrix: Matrix,
  *,
  label: str,
  xlabel: str,
  ylabel: str = '',
  low: float | None = None,
  high: float | None = None,
) -> Figure:
  figure, axes = _axes(height=min(1.0 + 0.22 * len(matrix.rows), 6.5))
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


def _legend(figure: Figure, axes: Axes) -> None:
  """Over the axes, across the whole figure."""
  handles, labels = axes.get_legend_handles_labels()
  columns = max(1, 80 // (max(map(len, labels)) + 8))  # Of 80 letters a line.
  figure.legend(
    handles, labels, loc='outside upper left', frameon=False, handlelength=2.8,
    fontsize=_POINTS - 1, ncols=min(columns, len(labels)),
  )  # fmt: skip
  height = figure.get_figheight() + 0.18 * -(-len(labels) // columns)
  figure.set_figheight(height)


def _say(axes: Axes, text: str) -> None:
  """Writes into the middle of axes that would be taken for a failure."""
  axes.text(0.5, 0.5, text, transform=axes.transAxes, ha='center', va='center')


def _scale(axes: Axes, image, title: str) -> None:
  """A bar of colours, and over the axes what they mean."""
  axes.set_title(title, loc='left', fontsize=_POINTS)
  bar = axes.figure.colorbar(image, ax=axes)
  bar.ax.tick_params(labelsize=_POINTS)


def _few_ticks(axis, names: Sequence[str], most: int) -> None:
  """Ticks at every position, every second, fourth, eighth, ..."""
  every = 1
  while len(names) > most * every:
    every *= 2
  axis.set_ticks(range(0, len(names), every), names[::every])

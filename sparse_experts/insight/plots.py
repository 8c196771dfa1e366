"""Plots of runs and routing records; each function returns its figure.

Colours are those of Okabe and Ito and the map cividis, which the colour-blind
can tell apart; lines differ in their dashes too and bars in their hatching, so
they do in print. matplotlib is imported by what draws.
"""

from __future__ import annotations

import itertools
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from sparse_experts.insight import routing
from sparse_experts.insight.curves import Curve
from sparse_experts.insight.records import Records
from sparse_experts.insight.routing import Matrix, Path
from sparse_experts.moe import FATES, Record

if typing.TYPE_CHECKING:
  from matplotlib.figure import Figure

COLOURS = (
  '#0072B2', '#E69F00', '#009E73', '#CC79A7', '#56B4E9', '#D55E00', '#F0E442',
)  # fmt: skip
_DASHES = ('-', '--', '-.', ':')
_HATCHES = ('', '///', '...', 'xxx', '', '')
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
  figure, axes = _axes()
  for (name, curve), style in zip(named.items(), _styles()):
    marker = 'o' if len(curve.steps) < 12 else None
    axes.plot(*curve, label=name, marker=marker, markersize=3, **style)
  axes.set(xlabel=xlabel, ylabel=ylabel)
  if not any(curve.values.any() for curve in named.values()):
    axes.set_ylim(0, 1)
  if len(named) > 1:
    _legend(axes)
  return figure


def load(records: Records) -> Figure:
  """The load of every expert (across) of every layer (down)."""
  loads = [routing.summary(x)['load_E'] for x in records.layers.values()]
  E = max(map(len, loads))
  load_NxE = np.full((len(loads), E), np.nan)
  for n, load_E in enumerate(loads):
    load_NxE[n, : len(load_E)] = load_E
  matrix = Matrix(tuple(records.layers), tuple(map(str, range(E))), load_NxE)
  return _heat_map(matrix, label='share of choices', xlabel='expert', low=0)


def load_over_time(steps: np.ndarray, load_TxE: np.ndarray) -> Figure:
  """The load of every expert (down) of one layer as training goes on.

  The scale reaches to twice a balanced load at least.

  Args:
    steps, load_TxE: of `history.load_over_time`.
  """
  T, E = load_TxE.shape
  figure, axes = _axes(height=min(0.9 + 0.14 * E, 4.6))
  image = axes.imshow(
    load_TxE.T,
    aspect='auto',
    cmap='cividis',
    interpolation='nearest',
    vmin=0,
    vmax=max(2 / E, load_TxE.max()),
  )
  ticks = np.unique(np.linspace(0, T - 1, min(T, 5)).round().astype(int))
  axes.set_xticks(ticks, [f'{steps[i]:g}' for i in ticks])
  _few_ticks(axes.yaxis, tuple(map(str, range(E))), most=16)
  axes.set(xlabel='step', ylabel='expert')
  _scale(axes, image, 'share of choices')
  return figure


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
        color=COLOURS[r], hatch=_HATCHES[r], edgecolor='white', linewidth=0,
      )  # fmt: skip
      left_N += share_NxI[:, r]
  axes.invert_yaxis()
  axes.set(xlabel='share of choices', xlim=(0, 1))
  _legend(axes, ncols=4, loc='lower left', bbox_to_anchor=(0, 1))
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
    _legend(axes)
  axes.set(xlabel='choices of an expert in a group', ylabel='lines')
  return figure


def confidence(records: Records) -> Figure:
  """How sure routers are: the largest probability, over tokens."""
  figure, axes = _axes()
  bins = np.linspace(0, 1, 41)
  for (name, layer), style in zip(records.layers.items(), _styles()):
    if layer.confidence_BxL is not None:
      values = layer.confidence_BxL[~routing.is_padding(layer)]
      axes.hist(
        values, bins, density=True, histtype='step', label=name, **style
      )
  axes.set(xlabel='largest probability', ylabel='density of tokens')
  if axes.patches:
    _legend(axes)
  return figure


def specialisation(matrix: Matrix) -> Figure:
  """Of the tokens of each row, the share that goes to each expert."""
  return _heat_map(matrix, label='share of tokens', xlabel='expert', low=0)


def coactivation(matrix: Matrix) -> Figure:
  """Of the tokens that chose expert i (down), the share that chose j."""
  return _heat_map(
    matrix, label='share of its tokens', xlabel='also chose', ylabel='expert'
  )


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
  axes.barh(names, [path.share for path in found], color=COLOURS[0])
  axes.plot(
    [path.by_chance for path in found], names, linestyle='', marker='D',
    markersize=4, color=COLOURS[1], label='by chance',
  )  # fmt: skip
  axes.invert_yaxis()
  axes.set(xlabel='share of tokens', ylabel='experts, layer by layer')
  _legend(axes)
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
  figure.axes[0].set_ylim(0, 1.02)
  return figure


def _axes(height: float = 2.9):
  """A figure with one pair of axes; shown once, where it is returned."""
  from matplotlib import pyplot

  with pyplot.rc_context({'font.size': _POINTS}):
    figure, axes = pyplot.subplots(
      figsize=(_WIDTH, height), layout='constrained'
    )
  pyplot.close(figure)
  axes.spines[['top', 'right']].set_visible(False)
  return figure, axes


def _styles() -> Iterator[dict[str, Any]]:
  """Colour and dashes of one line after another; 24 differ."""
  for i in itertools.count():
    colour, dashes = COLOURS[i % 6], _DASHES[(i + i // 6) % 4]
    yield {'color': colour, 'linestyle': dashes}


def _heat_map(
  matrix: Matrix, *, label: str, xlabel: str, ylabel: str = '', low=None
) -> Figure:
  figure, axes = _axes(height=min(1.0 + 0.22 * len(matrix.rows), 6.5))
  image = axes.imshow(
    matrix.values, aspect='auto', cmap='cividis', interpolation='nearest',
    vmin=low,
  )  # fmt: skip
  _few_ticks(axes.xaxis, matrix.columns, most=16)
  _few_ticks(axes.yaxis, matrix.rows, most=40)
  axes.set(xlabel=xlabel, ylabel=ylabel)
  _scale(axes, image, label)
  return figure


def _legend(axes, **place) -> None:
  points = _POINTS
  if len(axes.get_legend_handles_labels()[0]) > 6:  # Beside, in small print.
    points, place = 6, {'loc': 'center left', 'bbox_to_anchor': (1, 0.5)}
  axes.legend(frameon=False, fontsize=points, **place)


def _scale(axes, image, title: str) -> None:
  """A bar of colours, and over the axes what they mean."""
  axes.set_title(title, loc='left', fontsize=_POINTS)
  bar = axes.figure.colorbar(image, ax=axes)
  bar.ax.tick_params(labelsize=_POINTS)


def _few_ticks(axis, names: Sequence[str], most: int) -> None:
  every = -(-len(names) // most)
  axis.set_ticks(range(0, len(names), every), names[::every])

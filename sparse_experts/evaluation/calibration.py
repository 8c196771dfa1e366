"""Whether a model's probabilities of options are how often they are right.

Everything takes probabilities p_BxW of W options (rows sum to 1; where examples
have fewer options, zeros fill them up) and label_B, the index of the right one.
A confidence is the probability of the most probable option, the first of equal
ones.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def probabilities(log_likelihoods: Sequence[Sequence[float]]) -> np.ndarray:
  """Softmax over each example's options, [B, W], zeros where it has fewer.

  >>> probabilities([[-1.0, -1.0], [-5.0]]).tolist()
  [[0.5, 0.5], [1.0, 0.0]]
  """
  options = max(map(len, log_likelihoods), default=0)
  x_BxW = np.full((len(log_likelihoods), options), -np.inf)
  for row_W, values in zip(x_BxW, log_likelihoods):
    row_W[: len(values)] = values
  p_BxW = np.exp(x_BxW - x_BxW.max(1, keepdims=True))
  return p_BxW / p_BxW.sum(1, keepdims=True)


@dataclasses.dataclass(frozen=True)
class Bin:
  """Examples of similar confidence.

  Attributes:
    low, high: edges of the bin; for 'equal_mass', the least and the greatest
      confidence in it.
    count: examples; empty bins have accuracy and confidence 0.
    accuracy, confidence: means.
  """

  low: float
  high: float
  count: int
  accuracy: float
  confidence: float


def reliability(
  p_BxW: np.ndarray,
  label_B: np.ndarray,
  *,
  bins: int = 10,
  binning: str = 'equal_width',
) -> list[Bin]:
  """The data of a reliability diagram.

  Args:
    bins: how many.
    binning: 'equal_width', (0, 1 / bins], (1 / bins, 2 / bins] and so on (Guo
      et al. 2017, https://arxiv.org/abs/1706.04599, section 2); 'equal_mass',
      equal numbers of examples, sorted by confidence (Hendrycks et al. 2019,
      https://arxiv.org/abs/1812.04606).

  Raises:
    ValueError: probabilities or labels are none, or an argument is wrong.
  """
  confidence_B, right_B = _confidence(p_BxW, label_B)
  if bins < 1:
    raise ValueError(f'bins must be at least 1, got {bins}.')
  if binning == 'equal_width':
    edges = np.linspace(0, 1, bins + 1)
    place_B = np.digitize(confidence_B, edges[1:-1], right=True)
    members = [place_B == b for b in range(bins)]
    ranges = list(itertools.pairwise(edges))
  elif binning == 'equal_mass':
    order_B = np.argsort(confidence_B, kind='stable')
    members = [part for part in np.array_split(order_B, bins) if part.size]
    ranges = [
      (confidence_B[part].min(), confidence_B[part].max()) for part in members
    ]
  else:
    raise ValueError(
      f"binning must be 'equal_width' or 'equal_mass', not {binning!r}."
    )
  return [
    Bin(
      float(low),
      float(high),
      count := right_B[part].size,
      float(right_B[part].mean()) if count else 0.0,
      float(confidence_B[part].mean()) if count else 0.0,
    )
    for part, (low, high) in zip(members, ranges)
  ]


def expected_calibration_error(diagram: Sequence[Bin]) -> float:
  """sum over bins of share |accuracy - confidence|, in [0, 1]."""
  total = sum(b.count for b in diagram)
  gaps = (b.count * abs(b.accuracy - b.confidence) for b in diagram)
  return sum(gaps) / total


def rms_calibration_error(diagram: Sequence[Bin]) -> float:
  """Root of sum over bins of share (accuracy - confidence)^2, in [0, 1]."""
  total = sum(b.count for b in diagram)
  squares = (b.count * (b.accuracy - b.confidence) ** 2 for b in diagram)
  return (sum(squares) / total) ** 0.5


def brier_score(p_BxW: np.ndarray, label_B: np.ndarray) -> float:
  """Mean over examples of sum over options of (p - is it right)^2, in [0, 2].

  Brier 1950's definition; half of it is in use, too.
  """
  _confidence(p_BxW, label_B)
  right_BxW = np.arange(p_BxW.shape[1])[None] == np.asarray(label_B)[:, None]
  return float(((p_BxW - right_BxW) ** 2).sum(1).mean())


def measures(p_BxW: np.ndarray, label_B: np.ndarray) -> dict[str, Any]:
  """Every number of this file, and the bins of a diagram.

  ECE is of 10 bins of equal width, RMS of bins of 100 examples (the last in
  Hendrycks et al. 2019; ten bins where that would be fewer).
  """
  equal_width = reliability(p_BxW, label_B)
  bins = max(10, len(label_B) // 100)
  equal_mass = reliability(p_BxW, label_B, bins=bins, binning='equal_mass')
  confidence_B, right_B = _confidence(p_BxW, label_B)
  return {
    'accuracy': float(right_B.mean()),
    'confidence': float(confidence_B.mean()),
    'expected_calibration_error': expected_calibration_error(equal_width),
    'rms_calibration_error': rms_calibration_error(equal_mass),
    'brier_score': brier_score(p_BxW, label_B),
    'bins': [dataclasses.asdict(b) for b in equal_width],
  }


def plot(bins: Sequence[Mapping[str, Any]], path: os.PathLike | str) -> None:
  """Draws a reliability diagram of `measures`' bins into an image file."""
  from matplotlib.figure import Figure

  figure = Figure(figsize=(4, 4), layout='constrained')
  axes = figure.subplots()
  axes.plot([0, 1], [0, 1], color='grey', linestyle='--', label='calibrated')
  axes.bar(
    [b['low'] for b in bins],
    [b['accuracy'] for b in bins],
    width=[b['high'] - b['low'] for b in bins],
    align='edge',
    edgecolor='black',
    color='#0072B2',
    label='accuracy',
  )
  largest = max(b['count'] for b in bins)
  axes.step(
    [b['low'] for b in bins] + [1],
    [b['count'] / largest for b in bins] + [bins[-1]['count'] / largest],
    where='post',
    color='#D55E00',
    label=f'examples ({largest} at most)',
  )
  axes.set(xlabel='confidence', ylabel='accuracy', xlim=(0, 1), ylim=(0, 1))
  axes.legend(frameon=False, loc='upper left')
  figure.savefig(path, dpi=150)


def _confidence(p_BxW, label_B) -> tuple[np.ndarray, np.ndarray]:
  """Probability of the most probable option, and whether it is right."""
  p_BxW, label_B = np.asarray(p_BxW), np.asarray(label_B)
  if p_BxW.ndim != 2 or not len(p_BxW) or label_B.shape != p_BxW.shape[:1]:
    raise ValueError(
      'calibration takes probabilities [B, W] and labels [B] of at least one '
      f'example, not shapes {p_BxW.shape} and {label_B.shape}.'
    )
  if not (p_BxW >= 0).all() or not np.allclose(p_BxW.sum(1), 1, atol=1e-4):
    raise ValueError(
      "an example's probabilities must be at least 0 and sum to 1; "
      '`probabilities` makes such from log-likelihoods.'
    )
  if (label_B < 0).any() or (label_B >= p_BxW.shape[1]).any():
    raise ValueError(
      f'labels must be from 0 to {p_BxW.shape[1] - 1}, the options; one is '
      f'{label_B[(label_B < 0) | (label_B >= p_BxW.shape[1])][0]}.'
    )
  choice_B = p_BxW.argmax(1)
  return p_BxW[np.arange(len(p_BxW)), choice_B], choice_B == label_B

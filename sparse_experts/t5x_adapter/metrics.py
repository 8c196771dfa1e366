"""What sparse layers report, as metrics that T5X adds up and writes."""

from __future__ import annotations

import math
from collections.abc import Mapping

import clu.metrics
import flax
import jax.numpy as jnp
import numpy as np

from sparse_experts import moe
from sparse_experts.letters import Array


@flax.struct.dataclass
class LayerStatistic(clu.metrics.Metric):
  """One number of `moe.summary` of one layer.

  It adds the layer's sums, so that it is divided once, at the end.

  Attributes:
    sums: one after the other, float32. T5X makes metrics of zeros from the
      shapes of their fields, so a field is one array.
    shapes: of each, by name.
    name: of the statistic.
  """

  sums: Array
  shapes: tuple[tuple[str, tuple[int, ...]], ...] = flax.struct.field(
    pytree_node=False
  )
  name: str = flax.struct.field(pytree_node=False)

  def merge(self, other: LayerStatistic) -> LayerStatistic:
    return self.replace(sums=self.sums + other.sums)

  def compute(self) -> float:
    sizes = [math.prod(shape) for _, shape in self.shapes]
    parts = np.split(np.asarray(self.sums), np.cumsum(sizes)[:-1])
    return moe.summary(
      {
        name: part.reshape(shape)
        for (name, shape), part in zip(self.shapes, parts, strict=True)
      }
    )[self.name]


def of_layers(
  layers: Mapping[str, Mapping[str, Array]],
) -> dict[str, LayerStatistic]:
  """'LAYER/STATISTIC' -> metric, of all that `moe.summary` has as a number.

  Args:
    layers: metrics of each layer, by its name.

  Example:
    >>> sums = {'chosen_E': [3.0, 1.0], 'kept_E': [3.0, 1.0], 'tokens': 4.0,
    ...         'gate_mass_E': [1.0, 1.0], 'padding': 0.0, 'left_out': 0.0,
    ...         'slots': 8.0}
    >>> metrics = of_layers({'decoder/layers_1': sums})
    >>> metrics['decoder/layers_1/imbalance'].compute()
    1.5
  """
  metrics = {}
  for layer, sums in layers.items():
    sums = {name: jnp.asarray(value) for name, value in sums.items()}
    packed = jnp.concatenate(
      [value.astype(jnp.float32).ravel() for value in sums.values()]
    )
    shapes = tuple((name, value.shape) for name, value in sums.items())
    zeros = {name: np.zeros(shape) for name, shape in shapes}
    for name, value in moe.summary(zeros).items():
      if np.ndim(value) == 0:
        metrics[f'{layer}/{name}'] = LayerStatistic(packed, shapes, name)
  return metrics

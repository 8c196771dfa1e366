"""Tensors of a checkpoint that are read only when asked for."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]

# What a parameter may be stored in, widest first.
DTYPES = (
  np.dtype(np.float32),
  np.dtype(ml_dtypes.bfloat16),
  np.dtype(np.float16),
)


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor of a checkpoint.

  Attributes:
    shape: its shape.
    dtype: its dtype, by numpy's name where it is none of DTYPES.
    read: the part of it at an index, of integers and slices, () for all.
  """

  shape: Shape
  dtype: np.dtype | str
  read: Callable[[tuple[Any, ...]], np.ndarray]


Tensors = Mapping[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Found:
  """What a checkpoint holds, before it is compared with a model.

  Attributes:
    tensors: of its parameters.
    gin: makes a gin file of its model.
    step: of training; 0 where the format does not say.
    unused: what else it holds.
  """

  tensors: Tensors
  gin: Callable[[], str]
  step: int = 0
  unused: list[str] = dataclasses.field(default_factory=list)


def check(tensors: Tensors, expected: Shapes, where: object) -> None:
  """Raises ValueError, with names, where `tensors` are not those `expected`.

  All have one dtype, float32, bfloat16 or float16, but float32 tensors may be
  among narrower ones: some programs keep some layers so.

  Args:
    tensors: of a checkpoint, by name.
    expected: shapes that the model has.
    where: the checkpoint, for errors.
  """
  missing = sorted(expected.keys() - tensors.keys())
  unknown = sorted(tensors.keys() - expected.keys())
  if missing or unknown:
    raise ValueError(
      f'{where} is not a checkpoint of this model: '
      + ' and '.join(
        f'it {verb} {len(names)} tensors, {", ".join(names[:3])}'
        + (', ...' if len(names) > 3 else '')
        for verb, names in (('lacks', missing), ('has unknown', unknown))
        if names
      )
      + '; give the configuration it was made with.'
    )
  for name, tensor in tensors.items():
    if tuple(tensor.shape) != tuple(expected[name]):
      raise ValueError(
        f'{where}: {name} has shape {tuple(tensor.shape)}, and this model '
        f'{tuple(expected[name])}; give the configuration it was made with '
        '(--experts changes the number of experts).'
      )
  dtypes = collections.Counter(str(tensor.dtype) for tensor in tensors.values())
  usual = dtypes.most_common(1)[0][0]
  allowed = {str(dtype) for dtype in DTYPES} & {usual, 'float32'}
  for name, tensor in tensors.items():
    if str(tensor.dtype) not in allowed:
      raise ValueError(
        f'{where}: {name} is {tensor.dtype}, where most tensors are {usual}; '
        'parameters are float32, bfloat16 or float16, and no tensor may be '
        'narrower than the others.'
      )

"""Blocks of zeros before those of a stack: the same model in another layout.

A block adds to what it is given what its parts write, and parts of zeros write
zeros. They are dense, and have no gradient but zero: training leaves them so.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from sparse_experts.convert import tensor_map
from sparse_experts.convert.formats import Checkpoint
from sparse_experts.convert.tensor_map import Place
from sparse_experts.convert.tensors import Shape, Tensor
from sparse_experts.models import layout
from sparse_experts.models.language import Language
from sparse_experts.models.transformer import Stack


def lead(source: Checkpoint, numbers: Mapping[str, int]) -> Checkpoint:
  """The checkpoint with dense blocks of zeros before those of its stacks.

  Its gin file stays that of `source`.

  Args:
    source: a checkpoint.
    numbers: of blocks, by stack: 'encoder', 'decoder'.
  """
  model = _model(source.model, numbers)
  shapes = tensor_map.plain_shapes(model)
  places, zeros = {}, {}
  for name, shape in shapes.items():
    at = layout.split_path(name.split('/'))
    number = numbers.get(at.stack_name, 0) if at else 0
    if at is None or number == 0:
      places[name] = source.places[name]
    elif at.index >= number:
      before = at._replace(index=at.index - number)
      places[name] = source.places['/'.join(before.path)]
    else:
      places[name] = Place(f'zeros/{name}')
      zeros[places[name].name] = _zeros(shape)
  return dataclasses.replace(
    source,
    model=model,
    shapes=shapes,
    places=places,
    tensors={**source.tensors, **zeros},
  )


def _model(model: Language, numbers: Mapping[str, int]) -> Language:
  stacks: dict[str, Any] = {
    name: _stack(getattr(model.module, name), number)
    for name, number in numbers.items()
  }
  return dataclasses.replace(model, module=model.module.clone(**stacks))


def _stack(stack: Stack, number: int) -> Stack:
  kinds = layout.kinds(stack.num_layers, stack.sparse_layers)
  sparse = {number + i: kind for i, kind in enumerate(kinds) if kind}
  pyramid = isinstance(stack.sparse_layers, Mapping)
  return stack.clone(
    num_layers=number + stack.num_layers,
    sparse_layers=sparse if pyramid else tuple(sparse),
  )


def _zeros(shape: Shape) -> Tensor:
  read = functools.partial(np.broadcast_to(np.float32(0), shape).__getitem__)
  return Tensor(shape, np.dtype(np.float32), read)

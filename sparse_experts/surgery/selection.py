"""Other experts: fewer, copies of them, or the same in another order."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from flax import linen as nn

from sparse_experts import config
from sparse_experts.convert import tensor_map
from sparse_experts.convert.formats import Checkpoint, check_same
from sparse_experts.convert.tensor_map import Piece, Place
from sparse_experts.convert.tensors import Tensor
from sparse_experts.models.language import Language
from sparse_experts.moe.router import Router
from sparse_experts.sharding import EXPERT_AXES


def select(
  source: Checkpoint,
  experts: Sequence[int],
  *,
  gin_files: Sequence[str] = (),
  bindings: Sequence[str] = (),
  search_paths: Sequence[str] = (),
) -> Checkpoint:
  """The checkpoint whose expert j is expert `experts[j]` of `source`.

  Every axis of experts is taken at these indices, in experts and routers; all
  else stays. As in any checkpoint, a tensor is read when it is asked for.

  Args:
    source: a checkpoint with experts, which its routers tell apart by their
      parameters alone.
    experts: indices, in any order, repeated or not.
    gin_files, bindings, search_paths: the model with so many experts; without
      `gin_files`, it is that of `source` with these `bindings`.

  Raises:
    ValueError: one line: there is no such expert, or no such model.
  """
  path, indices = source.path, np.asarray(experts, int)
  axes = _axes(source.model, path)
  if not indices.size:
    raise ValueError('--experts lists no expert; give indices such as 0,2,5.')
  sizes = sorted({source.shapes[name][axis] for name, axis in axes.items()})
  if len(sizes) > 1:
    raise ValueError(
      f'--experts takes the same experts in all layers, and those of {path} '
      f'have {" or ".join(map(str, sizes))} experts; leave it out.'
    )
  wrong = indices[(indices < 0) | (indices >= sizes[0])]
  if wrong.size:
    raise ValueError(
      f'--experts names expert {wrong[0]}, and {path} has experts 0 to '
      f'{sizes[0] - 1}; name those.'
    )
  if gin_files:
    config.parse(gin_files, bindings, search_paths)
    model = config.model()
  else:
    model = config.model_of(source.gin, bindings)
  check_same(path, source.model, model, but='num_experts')
  chosen = {
    name: _chosen(source, name, axis, indices) for name, axis in axes.items()
  }
  shapes = tensor_map.plain_shapes(model)
  for name, tensor in chosen.items():
    if shapes[name] != tensor.shape:
      raise ValueError(
        f'--experts lists {indices.size} experts, and {name} of the model to '
        f'write has shape {shapes[name]}, not {tensor.shape}; give '
        f'--gin.NUM_EXPERTS={indices.size}.'
      )
  return dataclasses.replace(
    source,
    gin=config.text(),
    model=model,
    shapes=shapes,
    places={**source.places, **{name: Place(name) for name in chosen}},
    tensors={**source.tensors, **chosen},
    experts=indices.tolist(),
  )


def _axes(model: Language, path) -> dict[str, int]:
  """The axis of experts of each plain parameter that has one."""
  fixed = set()

  def note(call, args, kwargs, context):
    router = context.module
    if isinstance(router, Router) and not router.exchangeable:
      fixed.add(type(router).__name__)
    return call(*args, **kwargs)

  with nn.intercept_methods(note):
    parameters = tensor_map.plain(model)
  if fixed:
    raise ValueError(
      f"--experts chooses experts by their routers' parameters, and {path} "
      f'has {", ".join(sorted(fixed))}, to which their indices mean something; '
      'leave --experts out.'
    )
  axes = {
    name: axis
    for name, (_, names) in parameters.items()
    for axis, axis_name in enumerate(names)
    if axis_name in EXPERT_AXES
  }
  if not axes:
    raise ValueError(
      f'--experts chooses among experts, and {path} has none; leave it out.'
    )
  return axes


def _chosen(
  source: Checkpoint, name: str, axis: int, experts: np.ndarray
) -> Tensor:
  """The plain parameter `name`, of these experts."""
  there, place = source.shapes[name], source.places[name]

  def read(index):
    if not index:
      whole = tensor_map.read(Piece(name, there), place, source.tensors)
      return whole.take(experts, axis)
    wanted = experts[index[0]]
    array = np.empty((wanted.size, *there[1:]), np.float32)
    for piece in tensor_map.pieces({name: there}):
      assert piece.experts is not None
      here = (piece.experts.start <= wanted) & (wanted < piece.experts.stop)
      if here.any():
        part = tensor_map.read(piece, place, source.tensors)
        array[here] = part[wanted[here] - piece.experts.start]
    return array

  shape = (*there[:axis], experts.size, *there[axis + 1 :])
  return Tensor(shape, np.dtype(np.float32), read)

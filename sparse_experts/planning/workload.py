"""What a training step of a model does, block by block, told by its layers.

The modules are traced with abstract shapes, so no size costs any memory.
Counts are of one forward pass of the global batch on all devices together.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from sparse_experts import sharding
from sparse_experts.layers import cost
from sparse_experts.layers.cost import Cost
from sparse_experts.models import layout
from sparse_experts.models.objective import Objective


@dataclasses.dataclass(frozen=True)
class Block(Cost):
  """Equal blocks of a stack: one traced, `layers` of them in a scan.

  Attributes:
    layers: how many; all else is of one.
    stream: elements of its input, B L D.
  """

  layers: int = 1
  stream: int = 0


@dataclasses.dataclass(frozen=True)
class Workload:
  """A model's blocks by path, and what is around them.

  Attributes:
    blocks: by path, as ('decoder', 'period', 'layers_1').
    logits: elements B L V. logits_flops: of their product, and of others
      outside blocks, such as of patches.
    itemsize: bytes of an activation.
    is_relu: the FFNs' activation is that.
    num_experts: most of any layer; 1 for a dense model.
  """

  blocks: Mapping[tuple[str, ...], Block]
  logits: float
  logits_flops: float
  itemsize: int
  is_relu: bool
  num_experts: int

  def in_stacks(self) -> Iterator[tuple[str, Block]]:
    """Each block, after the name of its stack."""
    for path, block in self.blocks.items():
      at = layout.split_path(path)
      assert at is not None, path
      yield at.stack_name, block

  def total(self, field: str) -> float:
    """Sum over all layers of a field of `Block`."""
    return sum(
      block.layers * getattr(block, field) for block in self.blocks.values()
    )

  @property
  def forward_flops(self) -> float:
    kinds = ('flops', 'expert_flops', 'attention_flops')
    return self.logits_flops + sum(map(self.total, kinds))


def trace(model: Objective, init: Callable[[], Any]) -> tuple[Any, Workload]:
  """The boxed abstract parameters that `init` returns, and the workload.

  Args:
    model: the model.
    init: traces the model on the shapes of a batch.

  Raises:
    ValueError: a layer has parameters and does not tell what it costs.
  """
  boxed, calls = cost.calls(init, capacity_factor=model.capacity_factor_train)
  blocks: dict[tuple[str, ...], Block] = {}
  head = Cost()
  for path, call in sorted(calls.items()):
    at = layout.block_of(path)
    if not at:
      head += call.cost
      continue
    block = blocks.get(at, Block()) + call.cost
    if path == at:
      block = dataclasses.replace(
        block, stream=sum(map(math.prod, call.shapes))
      )
    blocks[at] = block
  num_experts = 1
  for path, axes, shape in _leaves(boxed):
    if 'expert' in axes:
      num_experts = max(num_experts, shape[axes.index('expert')])
    if layout.is_scanned(path):
      at, repeats = layout.block_of(path), shape[axes.index('layers')]
      blocks[at] = dataclasses.replace(blocks[at], layers=repeats)
  dtype = jax.dtypes.canonicalize_dtype(model.module.dtype)
  whole = sum(blocks.values(), Cost())
  return boxed, Workload(
    blocks,
    head.logits,
    head.flops,
    dtype.itemsize,
    0 < whole.relu == whole.activated,
    num_experts,
  )


def _leaves(boxed: Any):
  """Path, axis names and shape of every parameter."""
  names = jax.tree_util.tree_leaves_with_path(
    sharding.names_of(boxed), is_leaf=lambda x: isinstance(x, tuple)
  )
  for (keys, axes), leaf in zip(names, jax.tree.leaves(boxed)):
    yield tuple(key.key for key in keys), axes, leaf.shape

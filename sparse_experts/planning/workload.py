"""What a training step of a model does, block by block, read off its modules.

The modules are traced with abstract shapes, so no size costs any memory.
Counts are of one forward pass of the global batch on all devices together.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import linen as nn

from sparse_experts import sharding
from sparse_experts.layers.attention import Attention
from sparse_experts.layers.linear import Linear
from sparse_experts.layers.mlp import Mlp
from sparse_experts.models.objective import Objective


@dataclasses.dataclass
class Block:
  """Equal blocks of a stack: one traced, `layers` of them in a scan.

  Attributes:
    layers: how many.
    stream: elements of its input, B L D.
    float32_inputs: how many norms and routers read as many in float32.
    routed: elements of its routers' logits, G S E.
    width, heads, mlp: elements of its products with parameters, by the axis
      that they have at the end (D; H A; F).
    attention: B H L M, summed over its attentions.
    biased: of these, logits that get a bias of positions.
    slots, hidden: outputs of its experts' products, D and F wide, of every slot
      of every expert, full or empty, at training's capacity.
    flops, expert_flops, attention_flops: two for each multiply-add of products
      with parameters, of experts, of queries and keys and of weights and
      values.
    group: (S, L): tokens of a group, and of a sequence; None in a dense block.
  """

  layers: int = 1
  stream: int = 0
  float32_inputs: int = 0
  routed: int = 0
  width: int = 0
  heads: int = 0
  mlp: int = 0
  attention: int = 0
  biased: int = 0
  slots: float = 0
  hidden: float = 0
  flops: float = 0
  expert_flops: float = 0
  attention_flops: float = 0
  group: tuple[int, int] | None = None


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
  logits: int
  logits_flops: float
  itemsize: int
  is_relu: bool
  num_experts: int

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
  """
  rows, attentions, routers = {}, {}, {}
  activations = set()

  def record(call, args, kwargs, context):
    result = call(*args, **kwargs)
    module = context.module
    if context.method_name == 'attend':
      rows[module.path] = math.prod(args[0].shape[:-1])
    elif context.method_name != '__call__':
      return result
    elif isinstance(module, Linear):
      rows[module.path] = math.prod(args[0].shape[: -module.num_inputs])
    elif isinstance(module, Mlp):
      activations.add(module.activation)
    elif isinstance(module, Attention):
      bias = kwargs.get('bias_1xHxLxM') is not None or module.relative
      attentions[module.path] = (module, bias, *(x.shape for x in args[:2]))
    elif module.name == 'router':
      tokens = math.prod(args[0].shape[:2])
      S = module.parent.group_size or args[0].shape[1]  # Here: a sequence.
      rows[module.path] = tokens
      routers[module.parent.path] = (
        S,
        _rows_per_expert(model, module, tokens, S),
        tokens * module.num_experts,
      )
    return result

  with nn.intercept_methods(record):
    boxed = init()

  blocks: dict[tuple[str, ...], Block] = {}
  logits = logits_flops = 0
  num_experts = 1
  for path, axes, shape in _leaves(boxed):
    size, at = math.prod(shape), block_of(path)
    if path[:-1] in rows and not at:  # Logits, or the table of them; patches.
      logits_flops += 2 * rows[path[:-1]] * size
      if 'vocab' in axes:
        logits += rows[path[:-1]] * shape[axes.index('vocab')]
    if not at or path[-1] not in ('kernel', 'scale'):
      continue
    block = blocks.setdefault(at, Block())
    if path[-1] == 'scale':
      block.float32_inputs += 1
      continue
    if 'layers' in axes:
      block.layers = shape[axes.index('layers')]
    size //= block.layers
    if 'expert' in axes:
      E = shape[axes.index('expert')]
      num_experts = max(num_experts, E)
      _, per_expert, _ = routers[path[: path.index('expert')]]
      block.expert_flops += 2 * per_expert * size
      outputs = per_expert * E * shape[-1]
      if axes[-1] == 'embed':
        block.slots += outputs
      else:
        block.hidden += outputs
      continue
    if path[:-1] not in rows:
      continue  # Of a router that has further ones: next to nothing.
    block.flops += 2 * rows[path[:-1]] * size
    if axes[-1] == 'embed':
      block.width += rows[path[:-1]] * shape[-1]
    elif axes[-1] == 'kv':
      block.heads += rows[path[:-1]] * shape[-1] * shape[-2]
    elif axes[-1] == 'mlp':
      block.mlp += rows[path[:-1]] * shape[-1]
  lengths = {}
  for path, (module, bias, (B, L, D), (_, M, _)) in attentions.items():
    block = blocks[block_of(path)]
    elements = B * module.num_heads * L * M
    block.attention += elements
    block.biased += elements * bias
    products = 3 if module.relative else 2
    block.attention_flops += 2 * products * elements * module.head_width
    block.stream = B * L * D
    lengths[block_of(path)] = L
  for path, (S, _, logits_of_router) in routers.items():
    block = blocks[block_of(path)]
    block.group = (S, lengths[block_of(path)])
    block.float32_inputs += 1
    block.routed += logits_of_router
  dtype = jax.dtypes.canonicalize_dtype(model.module.dtype)
  return boxed, Workload(
    blocks,
    logits,
    logits_flops,
    dtype.itemsize,
    activations == {'relu'},
    num_experts,
  )


def _rows_per_expert(
  model: Objective, router: Any, tokens: int, group_size: int
) -> float:
  """Slots of an expert; without capacity its share of the choices."""
  factor, E, k = model.capacity_factor_train, router.num_experts, router.k
  if factor is None:
    return tokens * k / E
  rule = router.parent.capacity_rule
  slots = rule(factor, tokens=group_size, num_experts=E, k=k)
  return tokens / group_size * slots


def _leaves(boxed: Any):
  """Path, axis names and shape of every parameter."""
  names = jax.tree_util.tree_leaves_with_path(
    sharding.names_of(boxed), is_leaf=lambda x: isinstance(x, tuple)
  )
  for (keys, axes), leaf in zip(names, jax.tree.leaves(boxed)):
    yield tuple(key.key for key in keys), axes, leaf.shape


def block_of(path: tuple[str, ...]) -> tuple[str, ...]:
  """The part of a path up to its block; () outside all blocks."""
  ends = [i for i, part in enumerate(path) if part.startswith('layers_')]
  return path[: ends[-1] + 1] if ends else ()

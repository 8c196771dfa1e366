"""Memory of a device at the peak of a training step, predicted.

    peak = parameters + optimizer
           + max(head, max over stacks of backward(stack))

    backward(stack) = gradients of this stack and of those after it
                      + casts and saved of this stack and of those before it
                      + working and gathered of this stack
    head            = casts and saved of all stacks
                      + LOGITS for each element of the logits
                      + TABLES gathered tables of embeddings

where backward passes run from the last stack to the first. Parameters and
optimizer are what shapes, axis names and rules say, and so are gradients
(float32; all of them, twice, where microbatches are added up) and casts (each
block's parameters in bfloat16: XLA casts all layers before the loop over them).
`gathered` is what FSDP brings together of a block in bfloat16, twice: in use,
and on its way. Activations are counted from the shapes that modules see, `a`
bytes each:

    saved, per block   full   a BLD
                       dots   a BLD and a for each output of a product with one
                              parameter
                       none   a BLD + 12 (BLD of each norm and router + GSE)
                              + a HA + 6 BHLM + 2 a (slots)
                              + (ACTIVATION or RELU) a (hidden elements)
    working            6 BHLM + 2 a (HA, hidden elements, slots), and under
                       'full' and 'dots' 6 more for each BHLM with a bias of
                       positions, in float32 then; of the largest block

Hidden elements are those of FFNs and of experts' slots. Norms and routers
compute in float32 and keep three arrays each of what they read; a router three
more of its logits, G S E. The constants are those of XLA's programs for TPU;
docs/results/pods_memory.md has predictions beside what the compiler says.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import AbstractMesh, Mesh

from sparse_experts import sharding
from sparse_experts.models import layout
from sparse_experts.models.layout import LayerId
from sparse_experts.models.objective import Objective
from sparse_experts.models.transformer import REMAT_POLICIES
from sparse_experts.planning.workload import Block, Workload, trace
from sparse_experts.training import state

FLOAT32 = 3 * 4  # Kept of an element that is read in float32.
ACTIVATION = 4  # Of hidden elements, before, in and after the activation.
RELU = 1.5  # If that is ReLU: its result, and a byte that says where it is 0.
LOGITS = 10  # Bytes: float32 logits, their gradient, its cast.
TABLES = 4  # Gathered: for look-up, logits and both gradients.


@dataclasses.dataclass
class Placed:
  """Bytes of a stack, or of what is around them, on a device.

  Attributes:
    parameters, optimizer: that it keeps.
    gathered: of parameters in use, with those that FSDP brings together.
    block: of these, what FSDP brings together for the largest block, or table.
    reduced: parameters whose gradients are sums over the axes of `batch`.
  """

  parameters: float = 0
  optimizer: float = 0
  gathered: float = 0
  block: float = 0
  reduced: float = 0


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes of a device at the peak of a step, see the module."""

  parameters: float
  optimizer: float
  gradients: float
  casts: float
  activations: float
  gathered: float

  @property
  def peak(self) -> float:
    return sum(dataclasses.astuple(self))


def place(boxed: Any, mesh: Mesh | AbstractMesh) -> dict[str, Placed]:
  """Where the current placement puts a state: by stack, 'head' is around them.

  Args:
    boxed: abstract TrainState, see `state.abstract`.
    mesh: the mesh.

  Raises:
    ValueError: a dimension does not divide over its mesh axes.
  """
  batch_axes = set(sharding.current().axes('batch'))
  expert_axes = set(sharding.current().axes('expert'))
  stacks = collections.defaultdict(Placed)
  blocks = collections.defaultdict(float)
  shardings = state.shardings(boxed, mesh)
  of_stacks = layout.stacks_of(
    [key.key for key in keys]
    for keys, _ in jax.tree_util.tree_leaves_with_path(nn.unbox(boxed.params))
  )
  for field in ('params', 'opt_state'):
    tree = getattr(boxed, field)
    leaves = jax.tree_util.tree_leaves_with_path(
      tree, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)
    )
    placed_leaves = jax.tree.leaves(getattr(shardings, field))
    for (keys, leaf), placed in zip(leaves, placed_leaves):
      path = tuple(key.key for key in keys if hasattr(key, 'key'))
      stack = layout.stack_of(path, of_stacks) or 'head'
      value = nn.unbox(leaf)
      size = math.prod(placed.shard_shape(value.shape)) * value.dtype.itemsize
      at = stacks[stack]
      if field == 'opt_state':
        at.optimizer += size
        continue
      axes = {axis for entry in placed.spec for axis in jax.tree.leaves(entry)}
      at.parameters += size
      if math.prod(mesh.shape[a] for a in batch_axes - axes) > 1:
        at.reduced += size
      if not (fsdp_axes := axes & batch_axes - expert_axes):
        at.gathered += size
        continue
      whole = size * math.prod(mesh.shape[a] for a in fsdp_axes)
      at.gathered += whole
      names = leaf.names
      layers = value.shape[names.index('layers')] if 'layers' in names else 1
      block = layout.block_of(path) or path
      blocks[stack, block] += whole / layers
      at.block = max(at.block, blocks[stack, block])
  return dict(stacks)


def memory(
  workload: Workload,
  stacks: Mapping[str, Placed],
  mesh: Mapping[str, int],
  *,
  remat: str,
  microbatches: int,
) -> Memory:
  """Bytes of a device.

  Args:
    workload: of the global batch.
    stacks: from `place`.
    mesh: devices along each axis; rules are the current ones.
    remat, microbatches: of the step.
  """
  shards = sharding.shards('batch', mesh) * microbatches
  model = sharding.shards('mlp', mesh)
  order = sorted(set(stacks) - {'head'}, key=lambda name: LayerId(name, 0))
  saved = dict.fromkeys(order, 0.0)
  working = dict.fromkeys(order, 0.0)
  for stack, block in workload.in_stacks():
    kept, at_work = _block(workload, block, remat, model)
    saved[stack] += block.layers * kept / shards
    working[stack] = max(working[stack], at_work / shards)
  copies = 2 if microbatches > 1 else 1
  gradients = {name: copies * at.parameters for name, at in stacks.items()}
  casts = {name: stacks[name].parameters / 2 for name in order}

  head = stacks['head']
  phases = [
    {
      'gradients': gradients['head'],
      'casts': sum(casts.values()),
      'activations': sum(saved.values())
      + LOGITS * workload.logits / shards / model,
      'gathered': TABLES * head.block / 2,
    }
  ]
  for i, name in enumerate(order):
    phases.append(
      {
        'gradients': sum(gradients[n] for n in ('head', *order[i:])),
        'casts': sum(casts[n] for n in order[: i + 1]),
        'activations': sum(saved[n] for n in order[: i + 1]) + working[name],
        'gathered': stacks[name].block,
      }
    )
  if microbatches > 1:  # Sums of all gradients are there from the start.
    for phase in phases:
      phase['gradients'] = sum(gradients.values())
  return Memory(
    parameters=sum(at.parameters for at in stacks.values()),
    optimizer=sum(at.optimizer for at in stacks.values()),
    **max(phases, key=lambda phase: sum(phase.values())),
  )


def activations_per_token(
  model: Objective, feature_lengths: Mapping[str, int]
) -> dict[str, int]:
  """Bytes of a step on one device, by remat, per token of all features."""
  shapes = model.features.shapes(feature_lengths, 1, task_ids=True)
  _, workload = trace(
    model,
    lambda: jax.eval_shape(
      lambda key: model.init(key, shapes), jax.random.key(0)
    ),
  )
  stacks = (*layout.stacks_of(workload.blocks), 'head')
  nothing = {stack: Placed() for stack in stacks}
  one = dict.fromkeys(sharding.MESH_AXES, 1)
  tokens = model.positions(shapes)
  return {
    remat: round(
      memory(workload, nothing, one, remat=remat, microbatches=1).activations
      / tokens
    )
    for remat in REMAT_POLICIES
  }


def _block(
  workload: Workload, block: Block, remat: str, model: int
) -> tuple[float, float]:
  """What a block keeps, and what its backward pass works on; all shards'."""
  a, attention = workload.itemsize, block.attention / model
  heads, mlp = block.heads / model, block.mlp / model
  hidden = mlp + block.hidden / model
  kept = a * block.stream
  if remat == 'dots':
    kept += a * (block.width + heads + mlp)
  elif remat == 'none':
    kept += FLOAT32 * (block.float32_inputs * block.stream + block.routed)
    kept += a * heads + 6 * attention + 2 * a * block.slots
    kept += (RELU if workload.is_relu else ACTIVATION) * a * hidden
  working = 6 * attention + (0 if remat == 'none' else 6 * block.biased / model)
  return kept, working + 2 * a * (heads + hidden + block.slots)

"""The least time of a training step on a mesh of chips.

    seconds = max(compute, hbm, reduction) + exchange

`compute` is FLOPs over the chip's; `hbm` the bytes that parameters, optimizer
and activations move between memory and chip over its bandwidth; `reduction`
what summing gradients and gathering parameters sends, which hides behind
arithmetic; `exchange` what arithmetic waits for: the all-to-alls of experts and
the sums over the `model` axis. Every term is at the chip's published peak: a
program may come near it, and none is faster.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping

from sparse_experts import sharding
from sparse_experts.planning.chips import Chip
from sparse_experts.planning.memory import Placed
from sparse_experts.planning.workload import Workload


@dataclasses.dataclass(frozen=True)
class Roofline:
  """Seconds of a step, see the module."""

  compute: float
  hbm: float
  reduction: float
  exchange: float

  @property
  def seconds(self) -> float:
    return max(self.compute, self.hbm, self.reduction) + self.exchange

  @property
  def bound(self) -> str:
    """The largest of the four."""
    times = dataclasses.asdict(self)
    return max(times, key=times.__getitem__)


def train_flops(workload: Workload, remat: str) -> float:
  """FLOPs of a step: a backward pass is two forward ones, and what remat adds.

  'dots' keeps products with one parameter; those of experts and of attention
  are computed again.
  """
  forward = workload.forward_flops
  again = {
    'none': 0,
    'dots': workload.total('expert_flops') + workload.total('attention_flops'),
    'full': forward - workload.logits_flops,
  }
  return 3 * forward + again[remat]


def roofline(
  workload: Workload,
  stacks: Mapping[str, Placed],
  chip: Chip,
  mesh: Mapping[str, int],
  *,
  remat: str,
  microbatches: int,
) -> Roofline:
  """Seconds of a training step.

  Args:
    workload: of the global batch.
    stacks: from `memory.place`.
    chip: each of the mesh's devices.
    mesh: devices along each axis; rules are the current ones.
    remat, microbatches: of the step.

  Example: tests/plan_test.py has one by hand.
  """
  n, dims = math.prod(mesh.values()), chip.dims
  parts = functools.partial(sharding.shards, sizes=mesh)
  experts, model, shards = parts('expert'), parts('mlp'), parts('batch')
  passes = 2 if remat == 'none' else 3  # Over the blocks.
  total = lambda field: sum(getattr(at, field) for at in stacks.values())
  itemsize = workload.itemsize

  # Parameters are read by every pass; parameters and optimizer state once more
  # by the update, which writes them, as gradients are written and read. An
  # activation is written, read by the next layer and by the backward pass.
  activations = workload.logits + sum(
    map(workload.total, ('stream', 'width', 'heads', 'mlp', 'slots', 'hidden'))
  )
  activations = itemsize * activations + 6 * workload.total('attention')
  hbm = (
    microbatches * passes * total('gathered')
    + 4 * total('parameters')
    + 2 * total('optimizer')
    + (2 * passes - 1) * activations / n
  )

  # Every slot goes to its expert and back, in each pass of a sparse layer.
  slots = itemsize * workload.total('slots') * model / n
  exchanged = 2 * passes * slots * (experts - 1) / experts
  # Outputs of products that `model` splits are sums; an all-reduce sends twice.
  outputs = itemsize * workload.total('width') * model / n + slots
  summed = passes * 2 * outputs * (model - 1) / model

  gathered = total('gathered') - total('parameters')
  reduced = 2 * total('reduced') * (shards - 1) / shards
  return Roofline(
    compute=train_flops(workload, remat) / n / chip.flops_bf16,
    hbm=hbm / chip.hbm_bytes_per_s,
    reduction=microbatches
    * (passes * gathered + reduced)
    / chip.ici_bytes_per_s,
    exchange=(exchanged * hops(experts, dims) + summed) / chip.ici_bytes_per_s,
  )


def hops(devices: int, dims: int) -> float:
  """Links that a byte crosses on average in an all-to-all of a torus.

  A quarter of a side in each dimension, where the devices are a cube; each link
  it crosses is one that another byte does not. GPUs have a switch between them,
  `dims` 0; that nodes of 8 are joined by a slower network is not counted.

  Example:
    >>> hops(64, dims=3), hops(256, dims=2)
    (3.0, 8.0)
    >>> hops(64, dims=0)
    1.0
  """
  if not dims:
    return 1.0
  return max(1.0, dims * round(devices ** (1 / dims), 6) / 4)

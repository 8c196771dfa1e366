"""What all blocks of a stack are given beside their input."""

from __future__ import annotations

from flax import struct

from sparse_experts.letters import Array


@struct.dataclass
class Context:
  """What every block of a stack sees beside the tokens' representations.

  Attributes:
    mask_BxL: True for tokens that routers may route; None for all.
    token_ids_BxL, task_ids_BxL: for routers that need them.
    step: training step, for routers with a schedule; None outside training.
    attend_BxLxM: True where a token may look; M is L, or a cache's length.
    queries_BxL, keys_BxM: positions, for relative biases and rotary
      attention; B may be 1.
    memory_BxMxD: what cross-attention looks at; None without.
    attend_memory_BxLxM: True where it may.
    bias_1xHxLxM: relative bias shared by all blocks; None where blocks have
      their own.
    positions_B: where a step writes into the cache.
    capacity_factor: of sparse layers; None drops nothing.
    deterministic: no dropout, jitter, noise.
    record: sparse layers return `Aux.record`.
    cache: 'none', 'fill' (store keys and values) or 'step' (one more position).
    cache_length: positions a filled cache has.
  """

  attend_BxLxM: Array
  queries_BxL: Array
  keys_BxM: Array
  mask_BxL: Array | None = None
  token_ids_BxL: Array | None = None
  task_ids_BxL: Array | None = None
  step: Array | None = None
  memory_BxMxD: Array | None = None
  attend_memory_BxLxM: Array | None = None
  bias_1xHxLxM: Array | None = None
  positions_B: Array | None = None
  capacity_factor: float | None = struct.field(pytree_node=False, default=None)
  deterministic: bool = struct.field(pytree_node=False, default=True)
  record: bool = struct.field(pytree_node=False, default=False)
  cache: str = struct.field(pytree_node=False, default='none')
  cache_length: int = struct.field(pytree_node=False, default=0)

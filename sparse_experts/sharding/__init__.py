"""Where arrays live: logical axis names, the mesh, and the rules between them.

Every parameter and every constrained activation names its axes (`embed`,
`mlp`, `expert`, ...); rules say which mesh axis each name is split over. A
parallelism strategy is a table: FSDP is `embed -> data`, tensor parallelism
`mlp, heads, vocab -> model`, expert parallelism `expert -> expert`. `RULES` is
the table; a `Placement` is a mesh and what it overrides in the table.

The mesh has the axes `data`, `expert`, `model`, and others that rules name.
What an axis is for is what rules say: outside the experts the batch is split
over the axes of `batch` ("data shards" are their product); between the two
constraints of an expert layer E lies on the axis of `expert` and G on those of
`expert_group`, and the change from one to the other is the all-to-all.

`jax.jit` with shardings does all partitioning (it is what pjit became).

Example:
  >>> import jax.numpy as jnp
  >>> with Placement().use() as mesh:  # all devices on `data`
  ...   y = constrain(jnp.ones((8, 16)), 'batch', 'act_embed')
"""

from sparse_experts.sharding.arrays import (
  batch_sharding,
  constrain,
  named,
  names_of,
  replicated,
  shardings,
  spec,
)
from sparse_experts.sharding.placement import (
  DATA_PARALLEL,
  EXPERT_AXES,
  MESH_AXES,
  RULES,
  MeshAxes,
  Placement,
  current,
  data_shards,
  make_mesh,
  shards,
  use_mesh,
  use_rules,
)

__all__ = [
  'DATA_PARALLEL',
  'EXPERT_AXES',
  'MESH_AXES',
  'RULES',
  'MeshAxes',
  'Placement',
  'batch_sharding',
  'constrain',
  'current',
  'data_shards',
  'make_mesh',
  'named',
  'names_of',
  'replicated',
  'shardings',
  'shards',
  'spec',
  'use_mesh',
  'use_rules',
]

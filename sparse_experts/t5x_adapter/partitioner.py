"""T5X's partitioner with our mesh and our rules."""

from __future__ import annotations

import math

import jax
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from t5x import partitioning

from sparse_experts import sharding


class Partitioner(partitioning.PjitPartitioner):
  """A `sharding.Placement` as T5X takes it.

  Unlike T5X's own it enters the mesh by `Placement.use`, raises for names of
  axes in no rule and for sizes that do not divide, and lays the mesh out the
  same on every platform.
  """

  def __init__(self, placement: sharding.Placement = sharding.DATA_PARALLEL):
    self._placement = placement
    model_axes = placement.axes('mlp')
    super().__init__(
      num_partitions=math.prod(placement.mesh.shape[a] for a in model_axes),
      logical_axis_rules=tuple(placement.all_rules.items()),
    )

  @property
  def mesh(self) -> Mesh:
    return self._placement.mesh

  def get_mesh_axes(self, train_state):
    """PartitionSpecs in the place of the state's arrays."""
    names = self.get_logical_axes(train_state)
    shapes = _flat(train_state.state_dict())

    def place(path, axes):
      if axes is None or axes is traverse_util.empty_node:
        return axes
      of_optimizer = path.startswith('state/')
      rules = self._placement.optimizer_rules if of_optimizer else {}
      with self._placement.use(), sharding.use_rules(rules):
        return sharding.spec(axes, shapes[path].shape, self.mesh, path)

    flat = {
      path: place(path, axes)
      for path, axes in _flat(names.state_dict()).items()
    }
    return names.restore_state(traverse_util.unflatten_dict(flat, sep='/'))

  def partition(
    self,
    fn,
    in_axis_resources,
    out_axis_resources,
    static_argnums=(),
    donate_argnums=(),
  ):
    """A function compiled for the mesh.

    Args:
      fn: of positional arguments.
      in_axis_resources, out_axis_resources: a PartitionSpec for each array of
        its arguments and results; None: whole on every device.
      static_argnums, donate_argnums: as of `jax.jit`.
    """
    return _Partitioned(
      jax.jit(
        fn,
        in_shardings=self._shardings(in_axis_resources),
        out_shardings=self._shardings(out_axis_resources),
        static_argnums=static_argnums,
        donate_argnums=donate_argnums,
      ),
      self._placement.use,
    )

  def _shardings(self, resources):
    return jax.tree.map(
      lambda axes: NamedSharding(self.mesh, axes or PartitionSpec()),
      resources,
      is_leaf=lambda x: x is None or isinstance(x, PartitionSpec),
    )


class _Partitioned:
  """A compiled function that is traced within the mesh."""

  def __init__(self, jitted, within_mesh):
    self._jitted, self._within_mesh = jitted, within_mesh

  def __call__(self, *args):
    with self._within_mesh():
      return self._jitted(*args)

  def lower(self, *args):
    with self._within_mesh():
      return self._jitted.lower(*args)


def _flat(tree):
  return traverse_util.flatten_dict(tree, keep_empty_nodes=True, sep='/')

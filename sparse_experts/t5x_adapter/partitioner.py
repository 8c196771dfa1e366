"""T5X's partitioner with our mesh and our rules."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from t5x import partitioning

from sparse_experts import sharding


class Partitioner(partitioning.PjitPartitioner):
  """(data, expert, model) devices, and `sharding.RULES`.

  Unlike T5X's own it enters the mesh by `sharding.use_mesh`, raises for names
  of axes in no rule and for sizes that do not divide, and lays the mesh out the
  same on every platform.

  Args:
    mesh: devices along each axis, see `sharding.make_mesh`.
    rules: override entries of `sharding.RULES`; FSDP is {'embed': 'data'}.
    optimizer_rules: override them for the optimizer's state only (ZeRO-1).
  """

  def __init__(
    self,
    mesh: Mapping[str, int] | None = None,
    rules: Mapping[str, sharding.MeshAxes] | None = None,
    optimizer_rules: Mapping[str, sharding.MeshAxes] | None = None,
  ):
    self._mesh_sizes = dict(mesh or {})
    self._rules = dict(rules or {})
    self._optimizer_rules = dict(optimizer_rules or {})
    super().__init__(
      num_partitions=self._mesh_sizes.get('model', 1),
      logical_axis_rules=tuple({**sharding.RULES, **self._rules}.items()),
    )

  @functools.cached_property
  def mesh(self) -> Mesh:
    return sharding.make_mesh(**self._mesh_sizes)

  def get_mesh_axes(self, train_state):
    """PartitionSpecs in the place of the state's arrays."""
    names = self.get_logical_axes(train_state)
    shapes = _flat(train_state.state_dict())

    def place(path, axes):
      if axes is None or axes is traverse_util.empty_node:
        return axes
      overrides = self._optimizer_rules if path.startswith('state/') else {}
      with sharding.use_rules({**self._rules, **overrides}):
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
    """`fn` compiled for the mesh; None is whole on every device."""
    return _Partitioned(
      jax.jit(
        fn,
        in_shardings=self._shardings(in_axis_resources),
        out_shardings=self._shardings(out_axis_resources),
        static_argnums=static_argnums,
        donate_argnums=donate_argnums,
      ),
      lambda: sharding.use_mesh(self.mesh, self._rules),
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

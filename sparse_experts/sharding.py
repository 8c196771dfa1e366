"""Logical axis names, the one table that maps them to the mesh, and the mesh.

Every parameter and every constrained activation names its axes (`embed`,
`mlp`, `expert`, ...); `RULES` says which mesh axis each name is split over. A
parallelism strategy is a table: FSDP is `embed -> data`, tensor parallelism
`mlp, heads, vocab -> model`, expert parallelism `expert -> expert`.

The mesh has the axes `data`, `expert`, `model`. Outside the experts the batch
is split over data *and* expert ("data shards" means their product); between
the two constraints of an expert layer E lies on `expert` and G on `data`, and
the change from one to the other is the all-to-all.

`jax.jit` with shardings does all partitioning (it is what pjit became).

Example:
  >>> mesh = make_mesh()  # all devices on `data`
  >>> with use_mesh(mesh):
  ...   y = constrain(jnp.ones((8, 16)), 'batch', 'act_embed')
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp  # noqa: F401  (used by the docstring's example)
import numpy as np
from flax import linen as nn
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sparse_experts.letters import Array

MESH_AXES = ('data', 'expert', 'model')

MeshAxes = str | tuple[str, ...] | None

RULES: Mapping[str, MeshAxes] = {
  # Activations.
  'batch': ('data', 'expert'),
  'length': None,
  'act_embed': None,  # D of an activation; `embed` is D of a parameter.
  'group': ('data', 'expert'),
  'expert_group': 'data',  # G while tokens are with their experts.
  # Parameters.
  'embed': None,
  'mlp': 'model',
  'heads': 'model',
  'kv': None,
  'vocab': 'model',
  'expert': 'expert',
  'layers': None,
  'router': None,  # E of a router's kernel: whole on every device.
  'router_width': None,  # What else a router has: tasks, groups, bits.
  'slots': None,  # Slots of an expert, where a router has parameters of them.
  'relpos_buckets': None,
  'patch': None,  # Values of a patch.
  'position': None,  # Of a learned table.
}

EXPERT_AXES = ('expert', 'router')  # Names of an axis that is over experts.

_rules: contextvars.ContextVar[Mapping[str, MeshAxes]] = contextvars.ContextVar(
  'rules', default=RULES
)


def make_mesh(
  data: int = -1,
  expert: int = 1,
  model: int = 1,
  devices: Sequence[jax.Device] | None = None,
) -> Mesh:
  """A mesh of `data` x `expert` x `model` devices; one may be -1, the rest.

  Args:
    data, expert, model: number of devices along each axis.
    devices: the devices, all of the job's by default.

  Raises:
    ValueError: the sizes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = axis_sizes(len(devices), data, expert, model)
  # Auto: on JAX's default, Explicit, sharding constraints raise.
  return Mesh(
    _lay_out(sizes, devices), MESH_AXES, axis_types=(AxisType.Auto,) * 3
  )


def axis_sizes(
  num_devices: int, data: int = -1, expert: int = 1, model: int = 1
) -> list[int]:
  """Sizes of `MESH_AXES` on so many devices; see `make_mesh`."""
  sizes = [data, expert, model]
  if sizes.count(-1) == 1:
    rest = -int(np.prod(sizes))
    sizes[sizes.index(-1)] = num_devices // rest if rest > 0 else 0
  if min(sizes) < 1 or int(np.prod(sizes)) != num_devices:
    raise ValueError(
      f'mesh axes must multiply to the number of devices: {data=} x {expert=} '
      f'x {model=} on {num_devices} devices; change an axis, or set one to -1.'
    )
  return sizes


def _lay_out(sizes: list[int], devices: Sequence[jax.Device]) -> np.ndarray:
  """Neighbours on an axis are neighbours in the network where they can be.

  Slices of a pod, which only a slow network joins, are parts of `data`.
  """
  slices = len({getattr(device, 'slice_index', None) for device in devices})
  if sizes[0] % slices:
    raise ValueError(
      f'data={sizes[0]} does not divide over {slices} slices; make it a '
      f'multiple of {slices}.'
    )
  if slices == 1:
    return mesh_utils.create_device_mesh(
      sizes, devices, allow_split_physical_axes=True
    )
  return mesh_utils.create_hybrid_device_mesh(
    (sizes[0] // slices, *sizes[1:]),
    (slices, 1, 1),
    devices,
    allow_split_physical_axes=True,
  )


@contextlib.contextmanager
def use_rules(rules: Mapping[str, MeshAxes]) -> Iterator[None]:
  """Overrides entries of the current rules for a block.

  A rule names a mesh axis, several, or None (replicated).
  """
  unknown = {axis for value in rules.values() for axis in _axes(value)}
  unknown -= set(MESH_AXES)
  if unknown:
    raise ValueError(
      f'rules name mesh axes {sorted(unknown)}; the mesh has {MESH_AXES}.'
    )
  token = _rules.set({**_rules.get(), **rules})
  try:
    yield
  finally:
    _rules.reset(token)


@contextlib.contextmanager
def use_mesh(
  mesh: Mesh, rules: Mapping[str, MeshAxes] | None = None
) -> Iterator[Mesh]:
  """Enters `mesh`, with `rules` that override entries of `RULES`.

  This, not `with mesh:`, is how a mesh is entered: there JAX drops sharding
  constraints silently.
  """
  with use_rules(rules or {}), jax.set_mesh(mesh):
    yield mesh


def data_shards(mesh: Mesh) -> int:
  """Number of parts the batch is split into: data x expert."""
  return mesh.shape['data'] * mesh.shape['expert']


def spec(
  names: Sequence[str | None], shape: Sequence[int], mesh, what: str = 'array'
) -> PartitionSpec:
  """The mesh axes of an array with these logical names.

  Raises:
    ValueError: a name is in no rule, or a dimension does not divide over its
      mesh axes.
  """
  rules = _rules.get()
  if len(names) != len(shape):
    raise ValueError(f'{what} has shape {tuple(shape)} but axis names {names}.')
  entries: list[MeshAxes] = []
  for name, size in zip(names, shape):
    if name is not None and name not in rules:
      raise ValueError(
        f'{what}: axis name {name!r} is in no rule; add it to the rules of '
        f'sparse_experts/sharding.py. Known: {", ".join(sorted(rules))}.'
      )
    axes = _axes(rules[name]) if name is not None else ()
    parts = int(np.prod([mesh.shape[axis] for axis in axes], initial=1))
    if size % parts:
      raise ValueError(
        f'{what}: axis {name!r} of size {size} does not divide over '
        f'{" x ".join(f"{axis}={mesh.shape[axis]}" for axis in axes)} devices; '
        f'make it a multiple of {parts}, or change the mesh.'
      )
    entries.append(axes if len(axes) > 1 else (axes[0] if axes else None))
  return PartitionSpec(*entries)


def constrain(x: Array, *names: str | None) -> Array:
  """`x` with its axes laid out over the current mesh by their logical names.

  Outside any mesh it returns `x`, so a layer can be tried on one device with
  no ceremony. In a mesh entered by JAX's old `with mesh:` it raises.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    if not _legacy_mesh().empty:
      raise ValueError(
        'a mesh entered by `with mesh:` would drop sharding constraints '
        'silently; enter it by `with sharding.use_mesh(mesh):`.'
      )
    return x
  return jax.lax.with_sharding_constraint(x, spec(names, x.shape, mesh))


def named(init, *names: str):
  """An initialiser whose parameter carries logical axis names."""
  return nn.with_logical_partitioning(init, names)


def names_of(boxed):
  """Tree of logical axis name tuples of a tree of boxed parameters.

  Raises:
    ValueError: a parameter carries no names.
  """

  def names(path, leaf):
    if not isinstance(leaf, nn.LogicallyPartitioned):
      raise ValueError(
        f'parameter {jax.tree_util.keystr(path, simple=True, separator="/")} '
        'has no axis names; wrap its initialiser in sharding.named.'
      )
    return leaf.names

  return jax.tree_util.tree_map_with_path(names, boxed, is_leaf=_is_boxed)


def shardings(boxed, mesh: Mesh):
  """Shardings of a tree whose leaves are boxed, or unnamed and replicated."""

  def sharding(path, leaf):
    if not isinstance(leaf, nn.LogicallyPartitioned):
      return NamedSharding(mesh, PartitionSpec())
    what = jax.tree_util.keystr(path, simple=True, separator='/')
    return NamedSharding(mesh, spec(leaf.names, leaf.value.shape, mesh, what))

  return jax.tree_util.tree_map_with_path(sharding, boxed, is_leaf=_is_boxed)


def batch_sharding(mesh: Mesh, shape: Sequence[int]) -> NamedSharding:
  """Sharding of a batch: its first axis over the data shards."""
  names = ('batch', *[None] * (len(shape) - 1))
  return NamedSharding(mesh, spec(names, shape, mesh, 'batch'))


def replicated(mesh: Mesh) -> NamedSharding:
  """Whole on every device, so that every process can read it."""
  return NamedSharding(mesh, PartitionSpec())


def _axes(value: MeshAxes) -> tuple[str, ...]:
  return (value,) if isinstance(value, str) else tuple(value or ())


def _is_boxed(leaf) -> bool:
  return isinstance(leaf, nn.LogicallyPartitioned)


def _legacy_mesh():
  from jax._src import mesh as internal  # JAX has no public way to ask this.

  return internal.thread_resources.env.physical_mesh

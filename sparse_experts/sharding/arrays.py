"""The places of arrays on a mesh, by the logical names of their axes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from sparse_experts.jax_internals import entered_mesh
from sparse_experts.letters import Array
from sparse_experts.sharding.placement import MeshAxes, axes_of, current


def spec(
  names: Sequence[str | None], shape: Sequence[int], mesh, what: str = 'array'
) -> PartitionSpec:
  """The mesh axes of an array with these logical names.

  Args:
    names: one for each axis; None: it is whole on every device.
    shape: of the array.
    mesh: sizes of its axes, concrete or abstract.
    what: the array's name in errors.

  Raises:
    ValueError: a name is in no rule, a dimension does not divide over its mesh
      axes, or two are split over the same one.
  """
  rules = current().all_rules
  if len(names) != len(shape):
    raise ValueError(f'{what} has shape {tuple(shape)} but axis names {names}.')
  entries: list[MeshAxes] = []
  for name, size in zip(names, shape):
    if name is not None and name not in rules:
      raise ValueError(
        f'{what}: axis name {name!r} is in no rule; add it to `RULES` of '
        f'sparse_experts/sharding/. Known: {", ".join(sorted(rules))}.'
      )
    axes = axes_of(rules[name]) if name is not None else ()
    parts = math.prod(mesh.shape[axis] for axis in axes)
    if size % parts:
      raise ValueError(
        f'{what}: axis {name!r} of size {size} does not divide over '
        f'{" x ".join(f"{axis}={mesh.shape[axis]}" for axis in axes)} devices; '
        f'make it a multiple of {parts}, or change the mesh.'
      )
    entries.append(axes if len(axes) > 1 else (axes[0] if axes else None))
  used = [axis for entry in entries for axis in axes_of(entry)]
  for axis in set(used):
    if used.count(axis) > 1:
      raise ValueError(
        f'{what}: axes {names} would be split over mesh axis {axis!r} '
        f'{used.count(axis)} times, by {entries}; change a rule.'
      )
  return PartitionSpec(*entries)


def constrain(x: Array, *names: str | None) -> Array:
  """`x` with its axes laid out over the current mesh by their logical names.

  Outside any mesh it returns `x`, so a layer can be tried on one device with
  no ceremony. In a mesh entered by JAX's old `with mesh:` it raises.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    if not entered_mesh().empty:
      raise ValueError(
        'a mesh entered by `with mesh:` would drop sharding constraints '
        'silently; enter it by `with sharding.use_mesh(mesh):`.'
      )
    return x
  return jax.lax.with_sharding_constraint(x, spec(names, x.shape, mesh))


def named(init, *names: str) -> Callable[..., Any]:
  """An initialiser whose parameter carries logical axis names.

  What it returns is boxed; flax's `param` takes it out of its box.
  """
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


def shardings(boxed, mesh: Mesh | AbstractMesh):
  """Shardings of a tree whose leaves are boxed, or unnamed and replicated."""

  def sharding(path, leaf):
    if not isinstance(leaf, nn.LogicallyPartitioned):
      return NamedSharding(mesh, PartitionSpec())
    what = jax.tree_util.keystr(path, simple=True, separator='/')
    return NamedSharding(mesh, spec(leaf.names, leaf.value.shape, mesh, what))

  return jax.tree_util.tree_map_with_path(sharding, boxed, is_leaf=_is_boxed)


def batch_sharding(
  mesh: Mesh | AbstractMesh, shape: Sequence[int]
) -> NamedSharding:
  """Sharding of a batch: its first axis over the data shards."""
  names = ('batch', *[None] * (len(shape) - 1))
  return NamedSharding(mesh, spec(names, shape, mesh, 'batch'))


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
  """Whole on every device, so that every process can read it."""
  return NamedSharding(mesh, PartitionSpec())


def _is_boxed(leaf) -> bool:
  return isinstance(leaf, nn.LogicallyPartitioned)

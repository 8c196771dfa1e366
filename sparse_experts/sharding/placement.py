"""A mesh, and the rules that say over which of its axes arrays are split."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import difflib
import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

MESH_AXES: tuple[str, ...] = ('data', 'expert', 'model')

MeshAxes = str | tuple[str, ...] | list[str] | None

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
  'patch': None,  # Values of a patch, or of frames side by side.
  'position': None,  # Of a learned table.
}

EXPERT_AXES = ('expert', 'router')  # Names of an axis that is over experts.


def axes_of(value: MeshAxes) -> tuple[str, ...]:
  """A rule as a tuple, of no axes for None."""
  return (value,) if isinstance(value, str) else tuple(value or ())


def _check_rules(
  what: str, rules: Mapping[str, MeshAxes], mesh_axes: Sequence[str]
) -> None:
  """Raises where a rule is for nothing, or names an axis that is not there."""
  for name, value in rules.items():
    if name not in RULES:
      raise ValueError(
        f'{what}: no array has an axis {name!r}; {_nearest(name, RULES)}'
        f'Known: {", ".join(sorted(RULES))}.'
      )
    if not isinstance(value, (str, tuple, list, type(None))):
      raise ValueError(
        f'{what}: {name!r} must be split over a mesh axis, a tuple of them or '
        f'None, not {value!r}.'
      )
    for axis in axes_of(value):
      if axis not in mesh_axes:
        raise ValueError(
          f'{what}: {name!r} cannot be split over {axis!r}, which is no mesh '
          f'axis; {_nearest(axis, mesh_axes)}The mesh has '
          f'{", ".join(mesh_axes)}.'
        )


def _nearest(name: str, known: Iterable[str]) -> str:
  near = difflib.get_close_matches(str(name), sorted(known), n=1)
  return f'did you mean {near[0]}? ' if near else ''


@dataclasses.dataclass(frozen=True)
class Placement:
  """A mesh, and which of its axes each logical axis is split over.

  Attributes:
    sizes: devices along each mesh axis; one may be -1, the rest. `data` is -1,
      `expert` and `model` are 1 where they are not said; others are there if
      they are said, after these three.
    rules: overrides of `RULES`, each a mesh axis, several, or None (whole on
      every device). FSDP is {'embed': 'data'}.
    optimizer_rules: overrides of these for the optimizer state alone. ZeRO-1 is
      {'embed': 'data'}.
    devices: of the mesh; None: all of the job's.

  Raises:
    ValueError: a size is not a number of devices, a rule is for a logical axis
      that is not in `RULES` or names an axis that the mesh does not have, or
      the mesh has one that no rule names.

  Example:
    >>> fsdp = Placement({'expert': 4}, {'embed': 'data'})
    >>> fsdp.axes('batch'), fsdp.axes('embed'), fsdp.axes('kv')
    (('data', 'expert'), ('data',), ())
    >>> fsdp.sizes_on(8)
    {'data': 2, 'expert': 4, 'model': 1}
  """

  sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
  rules: Mapping[str, MeshAxes] = dataclasses.field(default_factory=dict)
  optimizer_rules: Mapping[str, MeshAxes] = dataclasses.field(
    default_factory=dict
  )
  devices: Sequence[jax.Device] | None = None

  def __post_init__(self):
    for field in ('sizes', 'rules', 'optimizer_rules'):
      if not isinstance(getattr(self, field), Mapping):
        raise ValueError(
          f'{field} of a placement must be a dictionary whose keys are axes, '
          f'not {getattr(self, field)!r}.'
        )
    for axis, size in self.sizes.items():
      if type(size) is not int or (size < 1 and size != -1):
        raise ValueError(
          f'mesh axis {axis!r} must have a whole number of devices, at least '
          f'1, or -1 for the rest; got {size!r}.'
        )
    _check_rules('rules', self.rules, self._mesh_axes)
    _check_rules('optimizer_rules', self.optimizer_rules, self._mesh_axes)
    for axis in self._mesh_axes:
      if axis not in (*MESH_AXES, *self._used):
        raise ValueError(
          f'no rule splits anything over mesh axis {axis!r}; '
          f'{_nearest(axis, self._used)}Name it in a rule, or leave it out.'
        )

  @functools.cached_property
  def all_rules(self) -> Mapping[str, MeshAxes]:
    """`RULES` with what these rules override."""
    return {**RULES, **self.rules}

  @functools.cached_property
  def mesh(self) -> Mesh:
    """The mesh, of `devices`.

    Raises:
      ValueError: the sizes do not multiply to the number of devices, or several
        devices would have nothing to share, because no rule names their axis.
    """
    devices = jax.devices() if self.devices is None else self.devices
    sizes = self.sizes_on(len(devices))
    # Auto: on JAX's default, Explicit, sharding constraints raise.
    return Mesh(
      _lay_out(list(sizes.values()), devices),
      tuple(sizes),
      axis_types=(AxisType.Auto,) * len(sizes),
    )

  def axes(self, name: str) -> tuple[str, ...]:
    """The mesh axes that a logical axis is split over."""
    return axes_of(self.all_rules[name])

  def sizes_on(self, num_devices: int) -> dict[str, int]:
    """Devices along every mesh axis, of so many; raises as `mesh` does."""
    given = dict.fromkeys(self._mesh_axes, 1) | {'data': -1} | dict(self.sizes)
    sizes = dict(given)
    if list(given.values()).count(-1) == 1:
      rest = -math.prod(given.values())
      axis = next(axis for axis, size in given.items() if size == -1)
      sizes[axis] = num_devices // rest
    if min(sizes.values()) < 1 or math.prod(sizes.values()) != num_devices:
      raise ValueError(
        'mesh axes must multiply to the number of devices: '
        f'{" x ".join(f"{axis}={size}" for axis, size in given.items())} on '
        f'{num_devices} devices; change an axis, or set one to -1.'
      )
    for axis, size in sizes.items():
      if size > 1 and axis not in self._used:
        raise ValueError(
          f'no rule splits anything over mesh axis {axis!r}, so its {size} '
          'devices would all do the same; name it in a rule, or make it 1.'
        )
    return sizes

  @contextlib.contextmanager
  def use(self) -> Iterator[Mesh]:
    """Enters the mesh, under these rules."""
    with _entered(self), jax.set_mesh(self.mesh):
      yield self.mesh

  @contextlib.contextmanager
  def use_abstract(self, num_devices: int) -> Iterator[AbstractMesh]:
    """As `use`, on devices that are only counted."""
    sizes = self.sizes_on(num_devices)
    mesh = AbstractMesh(
      tuple(sizes.values()),
      tuple(sizes),
      axis_types=(AxisType.Auto,) * len(sizes),
    )
    with _entered(self), jax.sharding.use_abstract_mesh(mesh):
      yield mesh

  @property
  def _mesh_axes(self) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*MESH_AXES, *self.sizes)))

  @property
  def _used(self) -> set[str]:
    values = (*self.all_rules.values(), *self.optimizer_rules.values())
    return {axis for value in values for axis in axes_of(value)}


DATA_PARALLEL = Placement()  # All devices on `data`, by `RULES` alone.

_current: contextvars.ContextVar[Placement] = contextvars.ContextVar(
  'placement', default=DATA_PARALLEL
)


def current() -> Placement:
  """The placement that was entered; outside any, `DATA_PARALLEL`."""
  return _current.get()


@contextlib.contextmanager
def use_rules(rules: Mapping[str, MeshAxes]) -> Iterator[None]:
  """Overrides entries of the current rules for a block."""
  rules = {**current().rules, **rules}
  with _entered(dataclasses.replace(current(), rules=rules)):
    yield


def make_mesh(
  data: int = -1,
  expert: int = 1,
  model: int = 1,
  devices: Sequence[jax.Device] | None = None,
) -> Mesh:
  """A mesh of `data` x `expert` x `model` devices; see `Placement.mesh`.

  Args:
    data, expert, model: sizes; -1, for one of them: all devices that are left.
    devices: in this order; None: all of JAX.

  Raises:
    ValueError: sizes do not multiply to the devices.
  """
  sizes = {'data': data, 'expert': expert, 'model': model}
  return Placement(sizes, devices=devices).mesh


@contextlib.contextmanager
def use_mesh(
  mesh: Mesh, rules: Mapping[str, MeshAxes] | None = None
) -> Iterator[Mesh]:
  """Enters a mesh there is, under `RULES` with `rules` that override them.

  This or `Placement.use`, not `with mesh:`, is how a mesh is entered: there JAX
  drops sharding constraints silently.
  """
  placement = Placement(dict(mesh.shape), rules or {})
  with _entered(placement), jax.set_mesh(mesh):
    yield mesh


def shards(name: str, sizes: Mapping[str, int]) -> int:
  """Number of parts that a logical axis is split into by the current rules.

  Args:
    name: of the axis.
    sizes: devices along each mesh axis, such as `Mesh.shape`.
  """
  return math.prod(sizes[axis] for axis in current().axes(name))


def data_shards(mesh: Mesh | AbstractMesh) -> int:
  """Number of parts the batch is split into: data x expert by `RULES`."""
  return shards('batch', mesh.shape)


@contextlib.contextmanager
def _entered(placement: Placement) -> Iterator[None]:
  token = _current.set(placement)
  try:
    yield
  finally:
    _current.reset(token)


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
    (slices, *[1] * (len(sizes) - 1)),
    devices,
    allow_split_physical_axes=True,
  )

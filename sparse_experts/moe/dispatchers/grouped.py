"""Dropless dispatch: rows sorted by expert, one grouped product for all.

No slots, so no padding and nothing dropped for lack of them; a capacity is
honoured if given. Every move of a row is a gather, forward and backward.

On a mesh each device sorts the choices of its own tokens, and `exchange` says
how they meet their experts along the mesh axis of the rule for `expert`.

References:
  Gale et al. 2022 (MegaBlocks), https://arxiv.org/abs/2211.15841.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec

from sparse_experts import sharding
from sparse_experts.letters import Array
from sparse_experts.moe import row_exchange
from sparse_experts.moe.assignment import Assignment, require_hard
from sparse_experts.moe.dispatchers.gather import from_slots, to_slots
from sparse_experts.moe.experts import Experts
from sparse_experts.moe.grouped_matmul import grouped_matmul

EXCHANGES = ('ragged', 'all_to_all', 'gather')


def grouped(
  experts: Experts,
  x_GxSxD: Array,
  assignment: Assignment,
  capacity: int | None,
  *,
  exchange: str | None = None,
  buffer_factor: float | None = None,
  chunks: int = 1,
  implementation: str = 'auto',
) -> Array | tuple[Array, dict[str, Array]]:
  """Sends tokens to experts and mixes their outputs, [G, S, D].

  Args:
    experts: whose parameters meet rows by `layers.parameters`.
    x_GxSxD: tokens.
    assignment: who meets whom.
    capacity: choices whose position is beyond it are dropped; None: none are.
    exchange: between the devices of the axis of experts; None: 'gather' for
      groups of single tokens, as in decoding, otherwise 'ragged'.
      'ragged': rows go to their experts by `jax.lax.ragged_all_to_all`, which
        sends what there is. XLA:CPU has none; there, an all-to-all with room
        for all gives the same numbers.
      'all_to_all': by an all-to-all of equal buffers for each pair of devices.
      'gather': tokens are gathered, every device runs its own experts on all
        of them, sums are scattered: for few tokens.
    buffer_factor: room for rows relative to a balanced load: of all that a
      device receives ('ragged', 'gather'), where senders are served in order
      of their index; or of what it sends to one other ('all_to_all'), in order
      of the experts there. Rows that find none are dropped, output, gradient
      and all. None: room for the worst case.
    chunks: the tokens of a device go in so many parts, one after the other, so
      that the exchange of one may overlap with the experts of another.
    implementation: see `grouped_matmul`.

  Returns:
    y_GxSxD; and with a buffer_factor also which choices were dropped for lack
    of room, boolean [G, S, K], by the 'sender' and by the 'receiver'.

  Raises:
    ValueError: a soft assignment, experts that cannot be grouped, an unknown
      exchange, chunks that do not divide the tokens of a device, or rules by
      which there is no one axis to exchange along.
  """
  require_hard(assignment, 'grouped')
  if exchange is None:
    exchange = 'gather' if x_GxSxD.shape[1] == 1 else 'ragged'
  if exchange not in EXCHANGES:
    raise ValueError(
      f'exchange must be one of {", ".join(EXCHANGES)}, not {exchange!r}.'
    )
  if buffer_factor is not None and buffer_factor <= 0:
    raise ValueError(
      f'buffer_factor must be positive or None, not {buffer_factor}.'
    )
  run = functools.partial(
    _run,
    exchange=exchange,
    buffer_factor=buffer_factor,
    chunks=chunks,
    implementation=implementation,
  )
  E = assignment.num_experts
  arguments = (
    experts,
    x_GxSxD,
    jnp.where(assignment.kept(capacity), assignment.expert_GxSxK, E),
    assignment.gate_GxSxK.astype(x_GxSxD.dtype),
  )
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    y_GxSxD, lost = run(*arguments, axis=None)
  else:
    sharding.spec(('expert',), (E,), mesh, 'experts')  # They divide.
    axis, group_axes = _axes()
    by_group = PartitionSpec(group_axes)
    # Others, as `model`, stay with the compiler, which cannot split Pallas
    # kernels.
    manual = {a for a, size in mesh.shape.items() if size == 1} | {*group_axes}
    specs = dataclasses.replace(
      experts,
      params=PartitionSpec(axis),
      key=None if experts.key is None else PartitionSpec(),
    )
    y_GxSxD, lost = jax.shard_map(
      functools.partial(run, axis=axis),
      in_specs=(specs, by_group, by_group, by_group),
      out_specs=by_group,
      axis_names=manual,
      check_vma=False,
    )(*arguments)
  return y_GxSxD if buffer_factor is None else (y_GxSxD, lost)


def _axes() -> tuple[str | None, tuple[str, ...]]:
  """The mesh axis of the experts, if they are split, and those of groups."""
  placement = sharding.current()
  experts, groups = placement.axes('expert'), placement.axes('group')
  if len(experts) > 1 or not {*experts} <= {*groups}:
    raise ValueError(
      'grouped exchanges rows along one mesh axis, over which groups are split '
      f"too, but the rules have 'expert' over {experts} and 'group' over "
      f'{groups}; change them, or take dispatch=gather.'
    )
  return (experts[0] if experts else None), groups


def _run(experts, x_GxSxD, expert_GxSxK, gate_GxSxK, *, chunks, **options):
  """What one device does with its groups."""
  G, S, D = x_GxSxD.shape
  K = expert_GxSxK.shape[-1]
  if chunks < 1 or G * S % chunks:
    raise ValueError(
      f'chunks={chunks} does not divide the {G * S} tokens of a device.'
    )
  if experts.key is not None and not jax.sharding.get_abstract_mesh().empty:
    experts = experts.fold_in(jax.lax.axis_index(('data', 'expert')))
  parts = [
    _run_chunk(experts.fold_in(i), *chunk, **options)
    for i, chunk in enumerate(
      zip(
        jnp.split(x_GxSxD.reshape(G * S, D), chunks),
        jnp.split(expert_GxSxK.reshape(G * S, K), chunks),
        jnp.split(gate_GxSxK.reshape(G * S, K), chunks),
      )
    )
  ]
  y_IxD, lost = jax.tree.map(lambda *parts: jnp.concatenate(parts), *parts)
  return jax.tree.map(lambda x: x.reshape(G, S, -1), (y_IxD, lost))


def _run_chunk(
  experts,
  x_IxD,
  expert_IxK,
  gate_IxK,
  *,
  axis,
  exchange,
  buffer_factor,
  implementation,
):
  product = functools.partial(grouped_matmul, implementation=implementation)
  run = functools.partial(experts.grouped, product=product)
  # X experts live here, on each of P devices; choices want to meet them.
  X, P, choices = experts.stacked, 1, expert_IxK.size
  if axis is not None:
    P = jax.lax.axis_size(axis)

  def room(balanced, worst):
    if buffer_factor is None:
      return worst
    return min(worst, math.ceil(buffer_factor * balanced))

  if axis is None or P == 1:
    rows = Rows.sort(expert_IxK, X)
    y_IxD = rows.collect(run(rows.lay_out(x_IxD), rows.sizes_E), gate_IxK)
    none_IxK = jnp.zeros(expert_IxK.shape, bool)
    return y_IxD, {'sender': none_IxK, 'receiver': none_IxK}
  if exchange == 'gather':
    return _gather_tokens(
      run,
      axis,
      x_IxD,
      expert_IxK,
      gate_IxK,
      X=X,
      room=room(choices, P * choices),
    )
  rows = Rows.sort(expert_IxK, P * X)
  if exchange == 'ragged':
    buffers = {'peer_rows': choices, 'receive_rows': room(choices, P * choices)}
  else:
    peer_rows = room(choices / P, choices)
    buffers = {'peer_rows': peer_rows, 'receive_rows': P * peer_rows}
  traffic = row_exchange.traffic(
    rows.sizes_E, axis, **buffers, ragged=exchange == 'ragged'
  )
  y_IxD = _send_rows(run, x_IxD, gate_IxK, rows, traffic, X=X)
  return y_IxD, _lost(expert_IxK // X, rows, traffic)


@struct.dataclass
class Rows:
  """Choices of I items sorted by expert, a row for each; R of them have room.

  Attributes:
    row_IxK: the row of each choice; R where it has none.
    choice_R: the choice (i * K + k) of each row; I * K where it has none.
    sizes_E: rows of each expert.
  """

  row_IxK: Array
  choice_R: Array
  sizes_E: Array

  @classmethod
  @jax.named_scope('dispatch')
  def sort(
    cls, expert_IxK: Array, num_experts: int, room: int | None = None
  ) -> Rows:
    """Rows of the choices in order; E means none.

    Args:
      expert_IxK: int32, the expert of each choice of I tokens.
      num_experts: E.
      room: rows at most; what is sorted behind is dropped. None: all choices.
    """
    choices = expert_IxK.size
    R = min(choices, room or choices)
    expert_IK = expert_IxK.reshape(-1)
    choice_IK = jnp.argsort(expert_IK, stable=True)
    row_IK = (
      jnp.zeros(choices, jnp.int32)
      .at[choice_IK]
      .set(jnp.arange(choices), unique_indices=True)
    )
    count_E = (expert_IK[:, None] == jnp.arange(num_experts)[None]).sum(0)
    ends_E = jnp.minimum(jnp.cumsum(count_E), R)
    used = ends_E[-1]
    return cls(
      row_IxK=jnp.where(row_IK < used, row_IK, R).reshape(expert_IxK.shape),
      choice_R=jnp.where(jnp.arange(R) < used, choice_IK[:R], choices),
      sizes_E=jnp.diff(ends_E, prepend=0),
    )

  @jax.named_scope('dispatch')
  def lay_out(self, x_IxD: Array) -> Array:
    """The token of each row, [R, D]."""
    return to_slots(x_IxD[None], self.row_IxK[None], self.choice_R[None])[0]

  @jax.named_scope('combine')
  def collect(self, y_RxD: Array, gate_IxK: Array) -> Array:
    """The sum of each token's rows weighted by their gates, [I, D]."""
    return from_slots(
      y_RxD[None], gate_IxK[None], self.row_IxK[None], self.choice_R[None]
    )[0]

  @jax.named_scope('combine')
  def put_back(self, y_RxD: Array) -> Array:
    """The row of each token, [I, D], where K is 1."""
    return to_slots(
      y_RxD[None], self.choice_R[None, :, None], self.row_IxK[None, :, 0]
    )[0]


def _send_rows(run, x_IxD, gate_IxK, rows, traffic, *, X):
  """Rows to their experts and back."""
  with jax.named_scope('dispatch'):
    x_RxD = row_exchange.send(rows.lay_out(x_IxD), traffic)
  there = Rows.sort(traffic.expert_R[:, None], X)
  y_RxD = there.put_back(run(there.lay_out(x_RxD), there.sizes_E))
  with jax.named_scope('combine'):
    y_RxD = row_exchange.send_back(y_RxD, traffic, rows.choice_R.size)
  return rows.collect(y_RxD, gate_IxK)


def _lost(device_IxK, rows, traffic):
  """Which choices found no room, by who had none."""
  exists_IxK = rows.row_IxK < rows.choice_R.size
  device_IxK = jnp.where(exists_IxK, device_IxK, 0)
  place_IxK = rows.row_IxK - traffic.out.start_P[device_IxK]
  offered_IxK = place_IxK < traffic.offered_P[device_IxK]
  sent_IxK = place_IxK < traffic.out.size_P[device_IxK]
  return {
    'sender': exists_IxK & ~offered_IxK,
    'receiver': exists_IxK & offered_IxK & ~sent_IxK,
  }


def _gather_tokens(run, axis, x_IxD, expert_IxK, gate_IxK, *, X, room):
  """All tokens to all devices; sums back."""
  all_gather = functools.partial(jax.lax.all_gather, axis_name=axis, tiled=True)
  scatter = functools.partial(jax.lax.psum_scatter, axis_name=axis, tiled=True)
  # From here I are the tokens of all devices, and experts are those here.
  expert_IxK = all_gather(expert_IxK) - X * jax.lax.axis_index(axis)
  mine_IxK = (expert_IxK >= 0) & (expert_IxK < X)
  rows = Rows.sort(jnp.where(mine_IxK, expert_IxK, X), X, room)
  y_RxD = run(rows.lay_out(all_gather(x_IxD)), rows.sizes_E)
  y_IxD = scatter(rows.collect(y_RxD, all_gather(gate_IxK)))
  no_room_IxK = mine_IxK & (rows.row_IxK == rows.choice_R.size)
  lost_IxK = scatter(no_room_IxK.astype(jnp.int32)) > 0
  return y_IxD, {'sender': jnp.zeros_like(lost_IxK), 'receiver': lost_IxK}

"""Dropless dispatch: rows sorted by expert, one grouped product for all.

No slots, so no padding and nothing dropped for lack of them; a capacity is
honoured if given. Every move of a row is a gather, forward and backward.

On a mesh each device sorts the choices of its own tokens, and `exchange` says
how they meet their experts over the axis `expert`.

References:
  Gale et al. 2022 (MegaBlocks), https://arxiv.org/abs/2211.15841.
"""

from __future__ import annotations

import functools
import math

import flax
import jax
import jax.numpy as jnp
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
    exchange: between the devices of the mesh axis `expert`; None: 'gather' for
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
      exchange, or chunks that do not divide the tokens of a device.
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
    y_GxSxD, lost = run(*arguments)
  else:
    sharding.spec(('expert',), (E,), mesh, 'experts')  # They divide.
    by_group = PartitionSpec(('data', 'expert'))
    # `model` stays with the compiler, which cannot split Pallas kernels.
    manual = {axis for axis in mesh.shape if axis != 'model'}
    if mesh.shape['model'] == 1:
      manual.add('model')
    specs = experts.replace(
      params=PartitionSpec('expert'),
      key=None if experts.key is None else PartitionSpec(),
    )
    y_GxSxD, lost = jax.shard_map(
      run,
      in_specs=(specs, by_group, by_group, by_group),
      out_specs=by_group,
      axis_names=manual,
      check_vma=False,
    )(*arguments)
  return y_GxSxD if buffer_factor is None else (y_GxSxD, lost)


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
  y_TxD, lost = jax.tree.map(lambda *parts: jnp.concatenate(parts), *parts)
  return jax.tree.map(lambda x: x.reshape(G, S, -1), (y_TxD, lost))


def _run_chunk(
  experts,
  x_TxD,
  expert_TxK,
  gate_TxK,
  *,
  exchange,
  buffer_factor,
  implementation,
):
  product = functools.partial(grouped_matmul, implementation=implementation)
  run = functools.partial(experts.grouped, product=product)
  # L experts live here, on each of P devices; N choices want to meet them.
  L, P, N = experts.stacked, 1, expert_TxK.size
  if not jax.sharding.get_abstract_mesh().empty:
    P = jax.lax.axis_size(row_exchange.AXIS)

  def room(balanced, worst):
    if buffer_factor is None:
      return worst
    return min(worst, math.ceil(buffer_factor * balanced))

  if P == 1:
    rows = Rows.sort(expert_TxK, L)
    y_TxD = rows.collect(run(rows.lay_out(x_TxD), rows.sizes_E), gate_TxK)
    none_TxK = jnp.zeros(expert_TxK.shape, bool)
    return y_TxD, {'sender': none_TxK, 'receiver': none_TxK}
  if exchange == 'gather':
    return _gather_tokens(
      run, x_TxD, expert_TxK, gate_TxK, L=L, room=room(N, P * N)
    )
  rows = Rows.sort(expert_TxK, P * L)
  if exchange == 'ragged':
    buffers = {'peer_rows': N, 'receive_rows': room(N, P * N)}
  else:
    peer_rows = room(N / P, N)
    buffers = {'peer_rows': peer_rows, 'receive_rows': P * peer_rows}
  plan = row_exchange.plan(rows.sizes_E, **buffers, ragged=exchange == 'ragged')
  y_TxD = _send_rows(run, x_TxD, gate_TxK, rows, plan, L=L)
  return y_TxD, _lost(expert_TxK // L, rows, plan)


@flax.struct.dataclass
class Rows:
  """Choices sorted by expert, a row for each; R of them have room.

  Attributes:
    row_TxK: the row of each choice; R where it has none.
    choice_R: the choice (t * K + k) of each row; T * K where it has none.
    sizes_E: rows of each expert.
  """

  row_TxK: Array
  choice_R: Array
  sizes_E: Array

  @classmethod
  def sort(
    cls, expert_TxK: Array, num_experts: int, room: int | None = None
  ) -> Rows:
    """Rows of the choices in order; E means none."""
    N = expert_TxK.size
    R = min(N, room or N)
    expert_N = expert_TxK.reshape(-1)
    choice_N = jnp.argsort(expert_N, stable=True)
    row_N = (
      jnp.zeros(N, jnp.int32)
      .at[choice_N]
      .set(jnp.arange(N), unique_indices=True)
    )
    count_E = (expert_N[:, None] == jnp.arange(num_experts)[None]).sum(0)
    ends_E = jnp.minimum(jnp.cumsum(count_E), R)
    used = ends_E[-1]
    return cls(
      row_TxK=jnp.where(row_N < used, row_N, R).reshape(expert_TxK.shape),
      choice_R=jnp.where(jnp.arange(R) < used, choice_N[:R], N),
      sizes_E=jnp.diff(ends_E, prepend=0),
    )

  def lay_out(self, x_TxD: Array) -> Array:
    """The token of each row, [R, D]."""
    return to_slots(x_TxD[None], self.row_TxK[None], self.choice_R[None])[0]

  def collect(self, y_RxD: Array, gate_TxK: Array) -> Array:
    """The sum of each token's rows weighted by their gates, [T, D]."""
    return from_slots(
      y_RxD[None], gate_TxK[None], self.row_TxK[None], self.choice_R[None]
    )[0]

  def put_back(self, y_RxD: Array) -> Array:
    """The row of each token, [T, D], where K is 1."""
    return to_slots(
      y_RxD[None], self.choice_R[None, :, None], self.row_TxK[None, :, 0]
    )[0]


def _send_rows(run, x_TxD, gate_TxK, rows, plan, *, L):
  """Rows to their experts and back."""
  x_RxD = row_exchange.send(rows.lay_out(x_TxD), plan)
  there = Rows.sort(plan.expert_R[:, None], L)
  y_RxD = there.put_back(run(there.lay_out(x_RxD), there.sizes_E))
  y_NxD = row_exchange.send_back(y_RxD, plan, rows.choice_R.size)
  return rows.collect(y_NxD, gate_TxK)


def _lost(device_TxK, rows, plan):
  """Which choices found no room, by who had none."""
  exists_TxK = rows.row_TxK < rows.choice_R.size
  device_TxK = jnp.where(exists_TxK, device_TxK, 0)
  place_TxK = rows.row_TxK - plan.out.start_P[device_TxK]
  offered_TxK = place_TxK < plan.offered_P[device_TxK]
  sent_TxK = place_TxK < plan.out.size_P[device_TxK]
  return {
    'sender': exists_TxK & ~offered_TxK,
    'receiver': exists_TxK & offered_TxK & ~sent_TxK,
  }


def _gather_tokens(run, x_TxD, expert_TxK, gate_TxK, *, L, room):
  """All tokens to all devices; sums back."""
  all_gather = functools.partial(
    jax.lax.all_gather, axis_name=row_exchange.AXIS, tiled=True
  )
  scatter = functools.partial(
    jax.lax.psum_scatter, axis_name=row_exchange.AXIS, tiled=True
  )
  # From here T are the tokens of all devices, and experts are those here.
  expert_TxK = all_gather(expert_TxK) - L * jax.lax.axis_index(
    row_exchange.AXIS
  )
  mine_TxK = (expert_TxK >= 0) & (expert_TxK < L)
  rows = Rows.sort(jnp.where(mine_TxK, expert_TxK, L), L, room)
  y_RxD = run(rows.lay_out(all_gather(x_TxD)), rows.sizes_E)
  y_TxD = scatter(rows.collect(y_RxD, all_gather(gate_TxK)))
  no_room_TxK = mine_TxK & (rows.row_TxK == rows.choice_R.size)
  lost_TxK = scatter(no_room_TxK.astype(jnp.int32)) > 0
  return y_TxD, {'sender': jnp.zeros_like(lost_TxK), 'receiver': lost_TxK}

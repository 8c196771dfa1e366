"""Rows to the devices of their experts and back, as many as there are.

For use inside `jax.shard_map` over the mesh axis of the experts. A device's
rows are sorted by expert, so those for one device are one run; a device
receives a run from each. Buffers are static: what does not fit is dropped, and
known.

P counts the devices of the axis, I and O rows of an input and an output.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import struct

from sparse_experts.letters import Array


@struct.dataclass
class Runs:
  """Where the runs of one device's rows are, one for each device, int32 [P].

  Attributes:
    start_P: first row of each run.
    size_P: rows of it.
    landing_P: its first row on the other device.
  """

  start_P: Array
  size_P: Array
  landing_P: Array


@struct.dataclass
class Traffic:
  """What one device sends and receives.

  Attributes:
    out: runs of its own rows, by receiver.
    into: runs of its receive buffer, by sender.
    offered_P: rows of each run of its own that fit the buffers it sends from.
    expert_R: which of its E / P experts each received row is for; E / P where
      there is no row.
    peer_rows: rows of the largest run there can be.
    ragged: by `jax.lax.ragged_all_to_all`, where the platform has it.
    axis: the mesh axis.
  """

  out: Runs
  into: Runs
  offered_P: Array
  expert_R: Array
  peer_rows: int = struct.field(pytree_node=False)
  ragged: bool = struct.field(pytree_node=False)
  axis: str = struct.field(pytree_node=False)


def traffic(
  sizes_E: Array, axis: str, *, peer_rows: int, receive_rows: int, ragged: bool
) -> Traffic:
  """Traffic under which no buffer overflows, the same seen from all devices.

  Args:
    sizes_E: int32, this device's rows for each expert of all devices.
    axis: the mesh axis that the devices are along.
    peer_rows: how many rows fit between two devices. Of a longer run the last
      are dropped, by the sender.
    receive_rows: R, how many rows a device can receive. Senders are served in
      order of their index; the rest is dropped, by the receiver.
    ragged: see `Traffic`.
  """
  P, me = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
  # X experts of each device; axes are sender, receiver.
  sizes_PxPxX = jax.lax.all_gather(sizes_E.reshape(P, -1), axis)
  X = sizes_PxPxX.shape[-1]
  count_PxP = sizes_PxPxX.sum(-1)
  offered_PxP = jnp.minimum(count_PxP, peer_rows)
  room_PxP = receive_rows - _before(offered_PxP, 0)
  sent_PxP = jnp.clip(room_PxP, 0, offered_PxP)
  start_PxP, landing_PxP = _before(count_PxP, 1), _before(sent_PxP, 0)

  sent_PxPxX = jnp.clip(
    sent_PxP[..., None] - _before(sizes_PxPxX, 2), 0, sizes_PxPxX
  )
  ends_PX = jnp.cumsum(sent_PxPxX[:, me].reshape(-1))
  run_R = (jnp.arange(receive_rows)[:, None] >= ends_PX[None]).sum(-1)
  return Traffic(
    out=Runs(start_PxP[me], sent_PxP[me], landing_PxP[me]),
    into=Runs(landing_PxP[:, me], sent_PxP[:, me], start_PxP[:, me]),
    offered_P=offered_PxP[me],
    expert_R=jnp.where(run_R < P * X, run_R % X, X),
    peer_rows=peer_rows,
    ragged=ragged,
    axis=axis,
  )


def send(x_IxD: Array, traffic: Traffic) -> Array:
  """This device's rows to the devices of their experts; those received."""
  return _move(
    (x_IxD.shape[0], traffic.expert_R.size),
    (traffic.peer_rows, traffic.ragged, traffic.axis),
    x_IxD,
    (traffic.out, traffic.into),
  )


def send_back(x_IxD: Array, traffic: Traffic, num_rows: int) -> Array:
  """Received rows to where they came from; zeros for those never sent.

  Args:
    x_IxD: rows as they were received, outputs by now.
    traffic: that brought them here.
    num_rows: that this device had before.
  """
  return _move(
    (x_IxD.shape[0], num_rows),
    (traffic.peer_rows, traffic.ragged, traffic.axis),
    x_IxD,
    (traffic.into, traffic.out),
  )


def _before(count: Array, axis: int) -> Array:
  """Sum of the entries before each."""
  return jnp.cumsum(count, axis) - count


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _move(sizes, how, x_IxD, runs):
  """Runs of I rows to runs of O rows on the other devices."""
  (_, O), (peer_rows, ragged, axis) = sizes, how
  fixed = functools.partial(_fixed, num_rows=O, peer_rows=peer_rows, axis=axis)
  if not ragged:
    return fixed(x_IxD, runs)
  return jax.lax.platform_dependent(
    x_IxD,
    runs,
    cpu=fixed,  # XLA:CPU has no ragged_all_to_all.
    default=functools.partial(_ragged, num_rows=O, axis=axis),
  )


def _move_forward(sizes, how, x_IxD, runs):
  return _move(sizes, how, x_IxD, runs), runs


def _move_backward(sizes, how, runs, dx_OxD):
  return _move(sizes[::-1], how, dx_OxD, runs[::-1]), None


_move.defvjp(_move_forward, _move_backward)


def _ragged(x_IxD, runs, num_rows, axis):
  out, into = runs
  return jax.lax.ragged_all_to_all(
    x_IxD,
    jnp.zeros((num_rows, x_IxD.shape[1]), x_IxD.dtype),
    out.start_P,
    out.size_P,
    out.landing_P,
    into.size_P,
    axis_name=axis,
  )


def _fixed(x_IxD, runs, num_rows, peer_rows, axis):
  """By an all-to-all of buffers of the size of the largest run."""
  out, into = runs
  I, place_1xR = x_IxD.shape[0], jnp.arange(peer_rows)[None]
  row_PxR = jnp.where(
    place_1xR < out.size_P[:, None], out.start_P[:, None] + place_1xR, I
  )
  x_PxRxD = _take(x_IxD, row_PxR)
  x_PxRxD = jax.lax.all_to_all(x_PxRxD, axis, 0, 0)

  row_O = jnp.arange(num_rows)
  run_O = (row_O[:, None] >= (into.start_P + into.size_P)[None]).sum(-1)
  place_O = row_O - _take(into.start_P, run_O)
  received_O = (run_O < len(into.size_P)) & (place_O >= 0)
  index_O = run_O * peer_rows + place_O
  return _take(
    x_PxRxD.reshape(-1, x_PxRxD.shape[-1]),
    jnp.where(received_O, index_O, len(into.size_P) * peer_rows),
  )


def _take(x, index):
  return jnp.take(x, index, axis=0, mode='fill', fill_value=0)

"""From the rows a process reads to arrays that span all devices."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from sparse_experts.data import streams
from sparse_experts.letters import Array
from sparse_experts.sharding import batch_sharding


def rows_of_process(mesh: Mesh, batch_size: int, process: int) -> slice:
  """The rows of a global batch that a process's devices hold.

  Args:
    mesh: of all processes.
    batch_size: global, in rows.
    process: its index.
  """
  sharding = batch_sharding(mesh, (batch_size,))
  ranges = [
    index[0].indices(batch_size)
    for device, index in sharding.devices_indices_map((batch_size,)).items()
    if device.process_index == process
  ]
  return slice(
    min(start for start, _, _ in ranges), max(stop for _, stop, _ in ranges)
  )


def streams_written(
  mesh: Mesh, batch_size: int, num_shards: int, process: int
) -> tuple[int, ...]:
  """The data streams that this process saves: each has one writer.

  Args:
    mesh: of all processes.
    batch_size: global, in rows.
    num_shards: streams that there are in all.
    process: its index.
  """
  readers = {
    p: streams.streams(
      rows_of_process(mesh, batch_size, p), batch_size, num_shards
    )
    for p in sorted({device.process_index for device in mesh.devices.flat})
  }
  return tuple(
    stream
    for stream in range(num_shards)
    if process == min(p for p, held in readers.items() if stream in held)
  )


def check_same_on_all_processes(identity: Mapping[str, Any]) -> None:
  """Raises ValueError where processes would read different data.

  Hosts with other versions of packages have another corpus of these.
  """
  text = json.dumps(identity, sort_keys=True)
  digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
  digests = multihost_utils.process_allgather(digest)
  if (digests.reshape(-1, digest.size) != digest).any():
    raise ValueError(
      f'processes would read different data; process {jax.process_index()} '
      f'reads {text}; give all hosts the same files and package versions.'
    )


def place(
  batch: Mapping[str, np.ndarray], mesh: Mesh, batch_size: int, first_row: int
) -> dict[str, Array]:
  """The global batch, of which `batch` holds rows from `first_row` on.

  Args:
    batch: this process's rows, [rows, ...].
    mesh: of all processes.
    batch_size: global, in rows.
    first_row: of the global batch, that `batch` begins with.
  """

  def array(x):
    shape = (batch_size, *x.shape[1:])

    def rows(index):
      start, stop, _ = index[0].indices(batch_size)
      return x[start - first_row : stop - first_row]

    return jax.make_array_from_callback(
      shape, batch_sharding(mesh, shape), rows
    )

  return {name: array(x) for name, x in batch.items()}

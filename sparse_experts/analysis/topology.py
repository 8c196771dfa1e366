"""Compiling for TPU topologies that are not here, and reading the programs.

The TPU compiler comes with libtpu, which runs on any x86 machine:
`pip install -e '.[precompile]'`.
"""

from __future__ import annotations

import math
import os
import pathlib
import re
import tempfile
from collections.abc import Sequence
from typing import Any

import jax

_BYTES = {'f64': 8, 's64': 8, 'u64': 8, 'f32': 4, 's32': 4, 'u32': 4}
_BYTES |= {'bf16': 2, 'f16': 2, 's16': 2, 'u16': 2, 'pred': 1}
_COLLECTIVES = (
  'all-to-all',
  'ragged-all-to-all',
  'all-gather',
  'all-reduce',
  'reduce-scatter',
  'collective-permute',
)


def devices(topology: str) -> Sequence[jax.Device]:
  """The chips of a TPU topology such as 'v5p:4x4x4', to compile for.

  Raises:
    ValueError: libtpu is not installed, or knows no such topology.
  """
  # Without these libtpu asks a metadata server, and two processes at once
  # abort on a lock file.
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
  from jax.experimental import topologies

  try:
    import libtpu  # noqa: F401  (only whether it is there)
  except ImportError as error:
    raise ValueError(
      'compiling for a TPU topology needs libtpu: '
      "pip install -e '.[precompile]', in an environment of its own."
    ) from error
  try:
    return topologies.get_topology_desc(
      platform='tpu', topology_name=topology
    ).devices
  except Exception as error:
    raise ValueError(
      f'libtpu knows no topology {topology!r}: {error}; they are named as '
      "'v5p:4x4x4' or 'v5e:2x4'."
    ) from error


def compile(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, str]:
  """A compiled program and its optimised HLO text.

  The text is what XLA dumps: `compiled.as_text()` fails on programs with
  asynchronous gathers (RET_CHECK, "async-update instruction should have 1
  operands").
  """
  with tempfile.TemporaryDirectory() as folder:
    compiled = lowered.compile(
      compiler_options={'xla_dump_to': folder, 'xla_dump_hlo_as_text': True}
    )
    (dump,) = pathlib.Path(folder).glob('*after_optimizations.txt')
    return compiled, dump.read_text()


def facts(compiled: jax.stages.Compiled) -> dict[str, Any]:
  """What the compiler says of a program, for one device.

  Returns:
    flops and bytes_accessed (a loop's body counts once), optimal_seconds (None
    where XLA gives none); argument_bytes, output_bytes and temp_bytes of
    memory.
  """
  cost = compiled.cost_analysis() or {}
  memory = compiled.memory_analysis()
  seconds = cost.get('optimal_seconds', -1)
  return {
    'flops': cost.get('flops', math.nan),
    'bytes_accessed': cost.get('bytes accessed', math.nan),
    'optimal_seconds': seconds if seconds > 0 else None,
    'argument_bytes': memory.argument_size_in_bytes,
    'output_bytes': memory.output_size_in_bytes,
    'temp_bytes': memory.temp_size_in_bytes,
  }


def collectives(text: str) -> dict[str, dict[str, int]]:
  """Collectives of an HLO text: how many, and bytes of their results."""
  found: dict[str, dict[str, int]] = {}
  names = '|'.join(_COLLECTIVES)
  pattern = rf'= (\(.*?\)|\S+) ({names})(-start)?\('
  for shapes, name, start in re.findall(pattern, text):
    arrays = [
      _BYTES.get(dtype, 4) * math.prod(map(int, filter(None, dims.split(','))))
      for dtype, dims in re.findall(r'(\w+)\[([\d,]*)\]', shapes)
    ]
    entry = found.setdefault(name, {'count': 0, 'bytes': 0})
    entry['count'] += 1
    # An asynchronous start holds its operands beside its results.
    entry['bytes'] += sum(arrays) // 2 if start else sum(arrays)
  return found

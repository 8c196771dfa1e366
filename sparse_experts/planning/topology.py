"""Compiling for TPU topologies that are not here.

The TPU compiler comes with libtpu, which runs on any x86 machine:
`pip install -e '.[precompile]'`.
"""

from __future__ import annotations

import math
import os
import pathlib
import re
import subprocess
import tempfile
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from sparse_experts.planning import chips

# The two cores of other chips are that by default, or never.
_AS_ONE_DEVICE = {'v4': {'chip_config_name': 'megacore'}}

# Without these libtpu asks a metadata server, two processes at once abort on a
# lock file, and it complains that this host is no TPU's.
_ENVIRONMENT = {
  'TPU_SKIP_MDS_QUERY': '1',
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  'TPU_WORKER_HOSTNAMES': 'localhost',
  'TPU_ACCELERATOR_TYPE': 'v5p-8',
}

# "Used 20.5G of 15.75G hbm", "(46.96G) exceeds available HBM (15.75G)".
_NEEDED = re.compile(r'([\d.]+)([KMGT])\)? (?:of|exceeds available)')

# "allocation 7: size 512, page 0, ..."; another memory than HBM has a color,
# and what lives within one operation is thread-local.
_ALLOCATION = re.compile(
  r'^allocation \d+: size (\d+), (?!color)(?!.*thread-local)', re.MULTILINE
)


class Planned(NamedTuple):
  """A program before its machine code is written.

  Attributes:
    text: its optimised HLO.
    hbm_bytes: all that it holds of a device's memory at a time, without code.
  """

  text: str
  hbm_bytes: int


class DoesNotFit(ValueError):
  """A program needs more memory than a device has.

  Attributes:
    needed_bytes: of one device, all that the program holds at a time.
    text: the program's optimised HLO.
  """

  def __init__(self, needed_bytes: int, text: str):
    super().__init__(
      f'the program needs {needed_bytes / 2**30:.2f} GiB on each device, which '
      'is more than there is; take more chips or a smaller batch, or '
      'rematerialise.'
    )
    self.needed_bytes, self.text = needed_bytes, text


def devices(topology: str, slices: int = 1) -> Sequence[jax.Device]:
  """The devices of a TPU topology such as 'v5p:4x4x4', to compile for.

  Args:
    topology: of a slice, see `chips.parse_topology`.
    slices: how many of these there are.

  Raises:
    ValueError: libtpu is not installed, or knows no such topology.
  """
  chip, _ = chips.parse_topology(topology)
  for name, value in _ENVIRONMENT.items():
    os.environ.setdefault(name, value)
  from jax.experimental import topologies

  try:
    import libtpu  # noqa: F401  (only whether it is there)
  except ImportError as error:
    raise ValueError(
      'compiling for a TPU topology needs libtpu: '
      "pip install 'sparse_experts[precompile]', in an environment of its own."
    ) from error
  options = _AS_ONE_DEVICE.get(chip.name, {})
  try:
    return topologies.get_topology_desc(
      platform='tpu', topology_name=topology, num_slices=slices, **options
    ).devices
  except Exception as error:
    raise ValueError(
      f'libtpu knows no topology {topology!r}: {error}.'
    ) from error


def compile(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, str]:
  """A compiled program and its optimised HLO text.

  The text is what XLA dumps: `compiled.as_text()` fails on programs with
  asynchronous gathers (RET_CHECK, "async-update instruction should have 1
  operands").

  Raises:
    DoesNotFit: it needs more memory than a device has.
  """
  with tempfile.TemporaryDirectory() as folder:

    def text():
      (dump,) = pathlib.Path(folder).glob('*after_optimizations.txt')
      return dump.read_text()

    try:
      compiled = lowered.compile(
        compiler_options={'xla_dump_to': folder, 'xla_dump_hlo_as_text': True}
      )
    except jax.errors.JaxRuntimeError as error:
      needed = _NEEDED.search(str(error))
      if not needed:
        raise
      raise DoesNotFit(
        int(float(needed[1]) * 1024 ** ' KMGT'.index(needed[2])), text()
      ) from error
    return compiled, text()


def planned(command: Sequence[str]) -> Planned:
  """The program that a process compiles, which is ended before it has code.

  Machine code takes nine tenths of the time that compiling takes, and XLA can
  only write it or be stopped.

  Args:
    command: of a process that calls `compile`, once.

  Raises:
    ValueError: the process ended by itself, with what it said last.
  """
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    with (folder / 'stderr').open('w') as stderr:
      process = subprocess.Popen(
        command,
        env={**os.environ, 'TMPDIR': name},  # Where `compile` has its folder.
        stdout=subprocess.DEVNULL,
        stderr=stderr,
      )
      try:  # XLA writes this one last.
        while not any(folder.glob('*/*_after_buffer_assignment.txt')):
          if process.poll() is not None:
            said = (folder / 'stderr').read_text().splitlines() or ['']
            raise ValueError(
              said[-1].removeprefix('error: ')
              or 'the program does not fit: XLA assigned it no buffers.'
            )
          time.sleep(0.1)
      finally:
        process.kill()
        process.wait()
    (text,) = folder.glob('*/*after_optimizations.txt')
    (buffers,) = folder.glob('*/*after_optimizations-buffer-assignment.txt')
    return Planned(text.read_text(), hbm_bytes(buffers.read_text()))


def hbm_bytes(buffers: str) -> int:
  """All that a program holds of HBM, from the text of its buffer assignment."""
  return sum(map(int, _ALLOCATION.findall(buffers)))


def facts(compiled: jax.stages.Compiled) -> dict[str, Any]:
  """What the compiler says of a program, for one device.

  Returns:
    flops and bytes_accessed (a loop's body counts once), optimal_seconds (None
    where XLA gives none); argument_bytes, output_bytes and temp_bytes of
    memory; needed_bytes, all that it holds at a time, itself included.
  """
  cost = compiled.cost_analysis() or {}
  memory = compiled.memory_analysis()
  if memory is None:
    raise RuntimeError('XLA tells no memory of what it compiled.')
  seconds = cost.get('optimal_seconds', -1)
  return {
    'flops': cost.get('flops', math.nan),
    'bytes_accessed': cost.get('bytes accessed', math.nan),
    'optimal_seconds': seconds if seconds > 0 else None,
    'argument_bytes': memory.argument_size_in_bytes,
    'output_bytes': memory.output_size_in_bytes,
    'temp_bytes': memory.temp_size_in_bytes,
    'needed_bytes': memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
    + memory.temp_size_in_bytes
    + memory.generated_code_size_in_bytes,
  }

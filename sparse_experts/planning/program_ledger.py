"""What a step's program does on one device, kept and compared later.

A ledger is a JSON file: what makes the program (gin files, bindings, topology),
which JAX and libtpu compiled it, and its quantities, of one device: executed
and useful FLOPs, bytes of HBM at the peak (without the program's code), and of
each kind of collective how many there are and the bytes of their results. Loops
count as often as they turn.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import pathlib
from collections.abc import Mapping

from sparse_experts import sharding
from sparse_experts.planning import precompile, topology

TOLERANCE = 0.02  # Of what is kept.


@dataclasses.dataclass(frozen=True)
class Ledger:
  """A program's quantities, and what it is the program of.

  Attributes:
    gin_file, bindings, topology, slices, step: as `precompile` is given them.
    versions: of the packages that compiled it, by name.
    quantities: by name, of one device.
  """

  gin_file: list[str]
  bindings: list[str]
  topology: str
  slices: int
  step: str
  versions: dict[str, str]
  quantities: dict[str, float]

  @property
  def arguments(self) -> list[str]:
    """Of `precompile`, which compiles it."""
    return [
      *(f'--gin_file={file}' for file in self.gin_file),
      *(f'--gin.{binding}' for binding in self.bindings),
      f'--topology={self.topology}',
      *([f'--slices={self.slices}'] if self.slices > 1 else []),
      *([f'--step={self.step}'] if self.step != 'train' else []),
    ]

  def write(self, path: pathlib.Path) -> None:
    path.write_text(json.dumps(dataclasses.asdict(self), indent=1) + '\n')


def read(path: pathlib.Path) -> Ledger:
  """A kept ledger.

  Raises:
    ValueError: the file is no ledger.
  """
  try:
    return Ledger(**json.loads(path.read_text()))
  except (TypeError, ValueError) as error:
    raise ValueError(
      f'{path} is no ledger of a program: {error}; --write_ledger writes one.'
    ) from error


def versions() -> dict[str, str]:
  """Of the packages that compile here; of these, those that are here."""
  found = {}
  for name in ('jax', 'jaxlib', 'libtpu'):
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      found[name] = importlib.metadata.version(name)
  return found


def quantities(
  run: precompile.Run, num_devices: int, what: str, planned: topology.Planned
) -> dict[str, float]:
  """Of a run's program, see the module.

  Args:
    run: whose step it is.
    num_devices: of its mesh.
    what: of `precompile.STEPS`.
    planned: the program.
  """
  with run.placement.use_abstract(num_devices) as mesh:
    expert_shards = sharding.shards('expert', mesh.shape)
  program = precompile.read(run, planned.text, what, expert_shards)
  found = {
    'executed FLOPs': program.total.flops,
    'useful FLOPs': run.useful_flops(what) / num_devices,
    'peak HBM bytes': planned.hbm_bytes,
  }
  for kind, entry in sorted(program.collectives().items()):
    found |= {f'{kind} {of}': number for of, number in entry.items()}
  return found


def differences(
  kept: Mapping[str, float], found: Mapping[str, float]
) -> list[tuple[str, float]]:
  """Quantities and by what part of what is kept they differ, largest first.

  One that is on one side alone is 0 on the other: all of it is the difference.
  """
  of: dict[str, float] = {}
  for name in {**kept, **found}:
    before, now = kept.get(name, 0), found.get(name, 0)
    change = now - before
    of[name] = change and change / (before or now)
  return sorted(of.items(), key=lambda item: -abs(item[1]))


def fault(ledger: Ledger, found: Mapping[str, float]) -> str:
  """What differs most from what is kept, '' within TOLERANCE."""
  name, change = differences(ledger.quantities, found)[0]
  if abs(change) <= TOLERANCE:
    return ''
  said = lambda of: ', '.join(f'{key} {value}' for key, value in of.items())
  return (
    f'{name} {found.get(name, 0):.6g}, kept is '
    f'{ledger.quantities.get(name, 0):.6g} ({change:+.1%}; kept by '
    f'{said(ledger.versions)}, found by {said(versions())})'
  )

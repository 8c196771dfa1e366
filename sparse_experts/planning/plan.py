"""Which meshes can train a model on a pod, how fast, and why others cannot.

Every (data, expert, model) mesh, with and without FSDP, is placed by the rules
of `sharding`, as the runner places it; memory and time are predictions, see
`memory.py` and `roofline.py`. Of the remat policies and numbers of microbatches
a mesh gets those of the fastest step that fits.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence

from sparse_experts import sharding
from sparse_experts.models.transformer import REMAT_POLICIES
from sparse_experts.planning import workload as workload_module
from sparse_experts.planning.chips import Chip
from sparse_experts.planning.memory import Memory, Placed, memory, place
from sparse_experts.planning.precompile import Run
from sparse_experts.planning.roofline import Roofline, roofline
from sparse_experts.planning.workload import Workload
from sparse_experts.training import state

FSDP = {'embed': 'data'}
# Predictions may be 15% off, and a program that does not fit costs more.
HEADROOM = 0.9


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A mesh, what goes with it, and what to expect of a step.

  Attributes:
    mesh: devices along each axis.
    fsdp: parameters are split over `data` too.
    remat: see `transformer.Stack`. microbatches: see `step.train_step`.
    group_sizes: tokens of a group by stack: the model's own, or the largest
      below that the batch of a device allows.
    legal_group_sizes: all whole sequences, by stack.
    memory, time: predicted.
  """

  mesh: Mapping[str, int]
  fsdp: bool
  remat: str
  microbatches: int
  group_sizes: Mapping[str, int]
  legal_group_sizes: Mapping[str, Sequence[int]]
  memory: Memory
  time: Roofline


@dataclasses.dataclass(frozen=True)
class Rejected:
  """A mesh that cannot train the model, and why."""

  mesh: Mapping[str, int]
  fsdp: bool
  because: str


def plan(
  run: Run, chip: Chip, num_devices: int
) -> tuple[list[Candidate], list[Rejected]]:
  """Candidates, the fastest first, and what was rejected.

  Nothing is compiled and no array is made: a plan of any model takes seconds.

  Args:
    run: model, batch and optimizer; its placement and microbatches are what is
      looked for.
    chip: each of the `num_devices` devices.
  """
  boxed, workload = _trace(run)
  candidates, rejected = [], []
  for mesh in meshes(num_devices, workload.num_experts):
    for rules in ({}, FSDP) if mesh['data'] > 1 else ({},):
      placement = sharding.Placement(mesh, rules)
      try:
        with placement.use_abstract(num_devices) as abstract:
          stacks = place(boxed, abstract)
          candidates.append(_best(workload, stacks, chip, mesh, run.batch_size))
      except ValueError as error:
        rejected.append(Rejected(mesh, bool(rules), str(error)))
  return sorted(candidates, key=lambda c: c.time.seconds), rejected


def predict(run: Run, chip: Chip, num_devices: int) -> Candidate:
  """What to expect of a run as it is, whether it fits or not.

  Args:
    run: what would run, on its own mesh.
    chip: the kind of the devices.
    num_devices: of the mesh.

  Raises:
    ValueError: its mesh or its groups are not legal.
  """
  boxed, workload = _trace(run)
  with run.placement.use_abstract(num_devices) as abstract:
    stacks, mesh = place(boxed, abstract), dict(abstract.shape)
    rows = _rows(run.batch_size, mesh)
    if rows % run.microbatches:
      raise ValueError(
        f'the {rows} sequences of a device do not divide into '
        f'{run.microbatches} microbatches; take a divisor.'
      )
    found = _candidate(
      workload,
      stacks,
      chip,
      mesh,
      remat=run.remat,
      microbatches=run.microbatches,
      rows=rows,
    )
  for stack, size in _group_sizes(workload).items():
    if found.group_sizes[stack] != size:
      legal = ', '.join(map(str, found.legal_group_sizes[stack]))
      raise ValueError(
        f'{stack}: groups of {size} tokens do not fit the sequences that a '
        f'device has at once; {legal} do.'
      )
  return found


def _trace(run: Run) -> tuple[state.TrainState, Workload]:
  make_optimizer = functools.partial(
    run.optimizer, learning_rate=run.learning_rate
  )
  boxed = None

  def init():
    nonlocal boxed
    boxed, _ = state.abstract(run.model, run.shapes(), make_optimizer)
    return boxed.params

  _, workload = workload_module.trace(run.model, init)
  return boxed, workload


def _rows(batch_size: int, mesh: Mapping[str, int]) -> int:
  """Sequences of a device."""
  shards = sharding.shards('batch', mesh)
  if batch_size % shards:
    raise ValueError(
      f'a batch of {batch_size} does not divide over {shards} data shards '
      '(data x expert); make it a multiple, or give `model` more devices.'
    )
  return batch_size // shards


def meshes(num_devices: int, num_experts: int) -> Iterator[dict[str, int]]:
  """Every mesh of so many devices; `expert` is 1 where there are no experts.

  Example:
    >>> list(meshes(2, num_experts=1))
    [{'data': 2, 'expert': 1, 'model': 1}, {'data': 1, 'expert': 1, 'model': 2}]
  """
  divisors = [i for i in range(1, num_devices + 1) if num_devices % i == 0]
  for model, expert in itertools.product(divisors, divisors):
    whole = num_devices % (model * expert) == 0
    if whole and (expert == 1 or num_experts > 1):
      data = num_devices // (model * expert)
      yield {'data': data, 'expert': expert, 'model': model}


def _best(
  workload: Workload,
  stacks: Mapping[str, Placed],
  chip: Chip,
  mesh: Mapping[str, int],
  batch_size: int,
) -> Candidate:
  """The fastest step on a mesh that fits.

  Raises:
    ValueError: the batch does not divide, or none fits.
  """
  rows = _rows(batch_size, mesh)
  candidates = [
    _candidate(
      workload,
      stacks,
      chip,
      mesh,
      remat=remat,
      microbatches=microbatches,
      rows=rows,
    )
    for remat in REMAT_POLICIES
    for microbatches in range(1, rows + 1)
    if rows % microbatches == 0
  ]
  limit = HEADROOM * chip.hbm_bytes
  fitting = [c for c in candidates if c.memory.peak <= limit]
  if fitting:
    return min(fitting, key=lambda c: c.time.seconds)
  leanest = min(candidates, key=lambda c: c.memory.peak)
  parts = ', '.join(
    f'{name} {size / 2**30:.1f}'
    for name, size in dataclasses.asdict(leanest.memory).items()
    if size
  )
  raise ValueError(
    f'needs {leanest.memory.peak / 2**30:.1f} GiB even with remat '
    f'{leanest.remat} and {leanest.microbatches} microbatches ({parts}), more '
    f'than {HEADROOM:.0%} of {chip.hbm_bytes / 2**30:.1f} GiB.'
  )


def _candidate(
  workload: Workload,
  stacks: Mapping[str, Placed],
  chip: Chip,
  mesh: Mapping[str, int],
  *,
  remat: str,
  microbatches: int,
  rows: int,
) -> Candidate:
  step = {'remat': remat, 'microbatches': microbatches}
  legal = legal_group_sizes(workload, rows // microbatches)
  wanted = _group_sizes(workload)
  return Candidate(
    mesh,
    bool(sharding.current().axes('embed')),
    **step,
    group_sizes={
      stack: _group_size(wanted[stack], sizes) for stack, sizes in legal.items()
    },
    legal_group_sizes=legal,
    memory=memory(workload, stacks, mesh, **step),
    time=roofline(workload, stacks, chip, mesh, **step),
  )


def _group_size(wanted: int, legal: Sequence[int]) -> int:
  """The one wanted, or the largest legal one below it."""
  if legal[0] % wanted == 0:  # Part of a sequence.
    return wanted
  return max(size for size in legal if size <= max(wanted, legal[0]))


def _group_sizes(workload: Workload) -> dict[str, int]:
  """The model's own, by stack."""
  return {
    stack: block.group[0]
    for stack, block in workload.in_stacks()
    if block.group is not None
  }


def legal_group_sizes(
  workload: Workload, rows: int
) -> dict[str, tuple[int, ...]]:
  """Groups of whole sequences, `rows` of which a device has at once."""
  return {
    stack: tuple(
      block.group[1] * i for i in range(1, rows + 1) if rows % i == 0
    )
    for stack, block in workload.in_stacks()
    if block.group is not None
  }

"""A step compiled for a pod that is not here, and what it costs.

Parameters, optimizer state and batch are shapes with shardings, never arrays,
so a model of any size compiles in the memory of one host.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import AbstractMesh, Mesh

from sparse_experts import sharding
from sparse_experts.models.decoding import check_decodable
from sparse_experts.models.objective import Objective
from sparse_experts.numbers import Count
from sparse_experts.planning import chips, hlo, ledger, topology
from sparse_experts.training import frozen, state, step


@dataclasses.dataclass(frozen=True)
class Run:
  """What a runner is given of a run, as far as its step depends on it.

  Attributes:
    model: the model.
    feature_lengths, batch_size, pack, task_ids: as of `data.dataset.Dataset`.
    optimizer, learning_rate, placement, microbatches: as of
      `training.train.train`.
    max_tokens: as of `training.infer.infer`.
  """

  model: Objective
  feature_lengths: Mapping[str, Count] | None
  batch_size: Count | None
  optimizer: Callable[..., optax.GradientTransformation]
  learning_rate: optax.Schedule
  placement: sharding.Placement = sharding.DATA_PARALLEL
  microbatches: Count = 1
  pack: bool = True
  task_ids: bool | str = False
  max_tokens: int | None = None

  def __post_init__(self):
    for name in ('batch_size', 'feature_lengths'):
      if getattr(self, name) is None:
        raise ValueError(
          f'the gin files say no {name.upper()}; give it by --gin.NAME=VALUE, '
          'or add a file of gin/meshes/.'
        )
    if self.max_tokens is not None and self.max_tokens < 1:
      raise ValueError(f'max_tokens must be at least 1, not {self.max_tokens}.')

  @property
  def remat(self) -> str:
    """Of the last stack, whose backward pass is the first."""
    *_, last = self.model.module.stacks.values()
    return last.remat

  def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Of a batch."""
    return self.model.features.shapes(
      self.feature_lengths,
      self.batch_size,
      pack=self.pack,
      task_ids=bool(self.task_ids),
    )

  def lengths(self, what: str) -> dict[str, int]:
    """Of a sequence; in decoding of a question and of its answer.

    Where there are only targets, a question is as long.
    """
    if what != 'decode':
      return dict(self.feature_lengths)
    check_decodable(self.model)
    targets = self.feature_lengths['targets']
    return {
      'inputs': self.feature_lengths.get('inputs', targets),
      'targets': self.max_tokens or targets,
    }

  def size(self, what: str) -> str:
    """Of a sequence, for people."""
    return self.model.features.size(self.lengths(what))

  def questions(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Of a batch that `infer` answers."""
    inputs = self.lengths('decode')['inputs']
    row = self.model.features.prompt(np.zeros(1, np.int32), inputs)
    return {
      name: jax.ShapeDtypeStruct((self.batch_size, *x.shape), x.dtype)
      for name, x in row.items()
    }

  def useful_flops(self, what: str) -> int:
    """Of a step on all chips: no padding, nothing computed twice."""
    lengths = self.lengths(what)
    if what == 'decode':
      flops = ledger.decode_flops(self.model, **lengths)
    else:
      flops = ledger.ledger(self.model, lengths)['train_flops_per_sequence']
    return flops * self.batch_size


STEPS = ('train', 'gradients', 'decode')


def check(run: Run, num_devices: int, what: str = 'train') -> None:
  """Raises ValueError where a run's mesh is not legal on so many devices.

  Args:
    run: what would run.
    num_devices: of the mesh.
    what: of STEPS.
  """
  if what not in STEPS:
    raise ValueError(f'step must be one of {", ".join(STEPS)}, not {what!r}.')
  with run.placement.use_abstract(num_devices) as mesh:
    _step(run, mesh, what)


def precompile(
  run: Run, topology_name: str, *, slices: int = 1, what: str = 'train'
) -> dict[str, Any]:
  """Compiles a run's step for TPU chips, and reads the program.

  Args:
    run: the run.
    topology_name: such as 'v5p:8x16x16', see `chips.parse_topology`.
    slices: so many of it, joined by the data centre's network.
    what: 'train', the step that `train` runs; 'gradients', the same without
      the optimizer; 'decode', the program by which `infer` answers a batch:
      a pass over the questions, which fills the cache, and a loop over the
      tokens of the answers, greedy, of which none ends before its last one.

  Returns:
    `topology`, `chips` and what `measure` does.

  Raises:
    ValueError: the mesh is not legal, or the chips are not known.
  """
  chip, num_devices = chips.parse_topology(topology_name, slices)
  check(run, num_devices, what)
  devices = topology.devices(topology_name, slices)
  return {
    'topology': topology_name,
    'chips': num_devices // chip.devices_per_chip,
    **measure(run, devices, chip, what),
  }


def measure(
  run: Run, devices: Sequence[jax.Device], chip: chips.Chip, what: str
) -> dict[str, Any]:
  """What a run's step takes on devices, as if each were `chip`.

  Args:
    run: what is compiled.
    devices: of a topology, which need not be here.
    chip: whose speeds and memory the estimates are of.
    what: of STEPS.

  Returns:
    fits (in memory), mesh, batch_size, lengths (see `Run.lengths`), optimizer
    and remat (None without); of one device: hbm_bytes (parameters, optimizer,
    peak, limit); flops (executed, useful); bytes_accessed; collectives (list of
    kind, count, bytes of results); optimal_seconds, XLA's estimate, None where
    it gives none; roofline, seconds that compute, hbm and ici each need at
    least. Loops count as often as they turn. And compile_seconds,
    host_peak_bytes of this process.
  """
  placement = dataclasses.replace(run.placement, devices=devices)
  start = time.perf_counter()
  with placement.use() as mesh:
    jitted, arguments = _step(run, mesh, what)
    try:
      compiled, text = topology.compile(jitted.lower(*arguments))
      facts = topology.facts(compiled)
      fits, needed = True, facts['needed_bytes']
      optimal = facts['optimal_seconds']
    except topology.DoesNotFit as error:
      fits, needed, text = False, error.needed_bytes, error.text
      optimal = None
    expert_shards = sharding.shards('expert', mesh.shape)
  compile_seconds = time.perf_counter() - start
  lengths = run.lengths(what)
  program = read(run, text, what, expert_shards)
  flops, bytes_accessed = program.total
  collectives = [
    {'kind': kind, **entry} for kind, entry in program.collectives().items()
  ]
  moved = sum(entry['bytes'] for entry in collectives)
  train_state = arguments[0]
  return {
    'fits': fits,
    'mesh': dict(mesh.shape),
    'batch_size': run.batch_size,
    'lengths': lengths,
    'optimizer': run.optimizer.__name__ if what == 'train' else None,
    'remat': None if what == 'decode' else run.remat,
    'hbm_bytes': {
      'parameters': _bytes(train_state.params),
      'optimizer': _bytes(train_state.opt_state),
      'peak': needed,
      'limit': chip.hbm_bytes,
    },
    'flops': {
      'executed': flops,
      'useful': run.useful_flops(what) / mesh.size,
    },
    'bytes_accessed': bytes_accessed,
    'collectives': collectives,
    'optimal_seconds': optimal and optimal * _turned(program, chip),
    'roofline': {
      'compute': flops / chip.flops_bf16,
      'hbm': bytes_accessed / chip.hbm_bytes_per_s,
      'ici': moved / chip.ici_bytes_per_s,
    },
    'compile_seconds': compile_seconds,
    'host_peak_bytes': _host_peak_bytes(),
  }


def read(run: Run, text: str, what: str, expert_shards: int) -> hlo.Program:
  """A run's program, its loops turning as often as the run says.

  Args:
    run: whose step it is.
    text: its optimised HLO.
    what: of STEPS.
    expert_shards: devices that the experts are split over.
  """
  if what != 'decode':
    return hlo.Program(text)
  # The first token of an answer is of the pass over the question; without a
  # capacity every device of an expert's has room for all rows.
  turns = {'jit(decode)/while': run.lengths(what)['targets'] - 1}
  return hlo.Program(text, turns=turns, filled=1 / expert_shards)


def _host_peak_bytes() -> int:
  """The most memory this process has held.

  Not `getrusage`: Linux counts there what a parent had before it started us.
  """
  status = pathlib.Path('/proc/self/status').read_text()
  return 1024 * int(re.findall(r'VmHWM:\s+(\d+) kB', status)[0])


def _step(run: Run, mesh: Mesh | AbstractMesh, what: str):
  """A jitted step on a mesh, and its arguments as shapes in their places."""
  shapes = run.shapes()
  boxed, optimizer = state.abstract(
    run.model,
    shapes,
    functools.partial(run.optimizer, learning_rate=run.learning_rate),
  )
  if what != 'train':
    boxed = dataclasses.replace(boxed, opt_state=())
  placed = state.shardings(boxed, mesh)
  if what == 'decode':
    shapes = run.questions()
    max_tokens = run.lengths('decode')['targets']

    def decode(given, batch):  # As `inference.batch_decoding.Answers` has it.
      return run.model.decode(given.params, batch, max_tokens=max_tokens)

    jitted = jax.jit(decode, out_shardings=sharding.replicated(mesh))
  else:
    jitted = step.jit_train_step(
      run.model,
      optimizer,
      mesh,
      placed,
      batch_size=run.batch_size,
      microbatches=run.microbatches,
    )
  if what == 'gradients':
    jitted = jax.jit(
      functools.partial(
        step.gradients,
        model=run.model,
        microbatches=run.microbatches,
        data_shards=sharding.data_shards(mesh),
      ),
      out_shardings=(placed.params, sharding.replicated(mesh)),
    )
  batch = {
    name: _at(leaf, sharding.batch_sharding(mesh, leaf.shape))
    for name, leaf in shapes.items()
  }
  arguments = (jax.tree.map(_at, nn.unbox(boxed), placed), batch)
  if what != 'decode':
    key = jax.eval_shape(jax.random.key, 0)
    beside = frozen.abstract(run.model, shapes)
    arguments += (
      _at(key, sharding.replicated(mesh)),
      jax.tree.map(_at, nn.unbox(beside), sharding.shardings(beside, mesh)),
    )
  return jitted, arguments


def _at(leaf, placed) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed)


def _bytes(tree) -> int:
  """Of one device."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )


def _turned(program: hlo.Program, chip: chips.Chip) -> float:
  """By a roofline, all turns of the loops over one turn of each.

  XLA's estimate of the time has a loop's body once.
  """
  turned = once = 0.0
  for part in program.parts:
    seconds = max(
      part.costs.flops / chip.flops_bf16,
      part.costs.bytes_accessed / chip.hbm_bytes_per_s,
    )
    turned, once = turned + part.turns * seconds, once + seconds
  return turned / once

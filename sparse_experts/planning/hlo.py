"""Reading optimised HLO: what a program does, with loops run to their end.

XLA's own cost analysis counts the body of a loop once. Here a body is counted
as often as the loop turns, so a scanned model costs what its layers cost.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from sparse_experts.jax_internals import cost_analysis

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
_START = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{$', re.MULTILINE)
_CALL = re.compile(r'\b(?:calls|to_apply|\w+_computation)=%?([\w.\-]+)')
_CALLS = re.compile(r'\b(?:branch|called)_computations=\{(.*?)\}')
_LOOP = re.compile(
  r' while\(.*?\bcondition=%?([\w.\-]+), body=%?([\w.\-]+)(.*)'
)
_KNOWN_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_OP_NAME = re.compile(r'\bop_name="(.*?)"')
# A ragged product becomes a fusion that multiplies all rows with each of the
# matrices and skips what it masks, or, if it is large, a kernel.
_MASKED = re.compile(
  r'\bcalls=%?([\w.\-]+).*"num_groups_in_ragged_dot":"(\d+)"'
)
_KERNEL = re.compile(
  r' = (\w+\[[\d,]*\]).* custom-call\(.*"tpu_custom_call", '
  r'operand_layout_constraints=\{(.*?)\}, \w+=.*\bragged_dot_tiling='
)
_UPDATE = re.compile(
  r'^ *(%[\w.\-]+) = .* async-update\((%[\w.\-]+).*\n', re.MULTILINE
)
_COLLECTIVE = re.compile(
  rf'= (\(.*?\)|\S+) ({"|".join(_COLLECTIVES)})(-start)?\('
)


def _path(op_name: str) -> str:
  """Without what transformed it: 'transpose(jvp(f))/while' is 'f/while'."""
  return re.sub(r'\w+\(|\)', '', op_name)


def _parseable(text: str) -> str:
  """Without what XLA prints and does not read."""
  text = re.sub(r' stack_frame_id=\d+', '', text)
  # Gathers that run aside: what goes on between their start and their end.
  updates = dict(_UPDATE.findall(text))
  text = _UPDATE.sub('', text)
  return re.sub(r'%[\w.\-]+', lambda name: updates.get(name[0], name[0]), text)


def _shapes(text: str) -> list[tuple[int, list[int]]]:
  """Bytes of an element and dimensions of every array type in a text."""
  return [
    (_BYTES.get(dtype, 4), [int(n) for n in dims.split(',') if n])
    for dtype, dims in re.findall(r'(\w+)\[([\d,]*)\]', text)
  ]


class Costs(NamedTuple):
  """Arithmetic and bytes read and written of a part of a program."""

  flops: float
  bytes_accessed: float


class Part(NamedTuple):
  """Costs that occur so many times: the program's own, or a loop body's."""

  turns: int
  costs: Costs


def _sum(parts: Sequence[Costs]) -> Costs:
  return Costs(
    sum(part.flops for part in parts),
    sum(part.bytes_accessed for part in parts),
  )


class Program:
  """The text of an optimised HLO module.

  Computations stand after those that they call. Loops are those that count
  from 0 to a constant, as `jax.lax.scan` makes them, and those that are given;
  one of the scope 'overflow' has no turn, as under a balanced load (see
  `dispatchers.gather_dropless`); the body of any other counts once. XLA counts
  a ragged product, in which each row meets one of several matrices, as if each
  met all, or as nothing; here a row counts once.

  Args:
    text: what XLA prints of it.
    turns: of loops that stop when data say so, by the end of the name that JAX
      gives them, such as 'jit(f)/while' for a `jax.lax.while_loop` in f itself.
    filled: share of the rows of a ragged product that meet a matrix at all.
  """

  def __init__(
    self,
    text: str,
    turns: Mapping[str, int] | None = None,
    filled: float = 1.0,
  ):
    self._given_turns = {**(turns or {}), 'overflow/while': 0}
    self._filled = filled
    text = _parseable(text)
    starts = list(_START.finditer(text))
    ends = [start.start() for start in starts[1:]] + [len(text)]
    self._texts = {
      start[2]: text[start.start() : end] for start, end in zip(starts, ends)
    }
    (self._entry,) = (start[2] for start in starts if start[1])
    self._groups = {name: int(groups) for name, groups in _MASKED.findall(text)}
    self._refs = {
      name: self._references(text) for name, text in self._texts.items()
    }

  @functools.cached_property
  def parts(self) -> list[Part]:
    """The program without its loops, and every loop's body without its own."""
    parts: list[Part] = []
    self._add_part(self._entry, 1, parts)
    return parts

  @property
  def total(self) -> Costs:
    """Of all the program does."""
    return Costs(
      flops=sum(part.turns * part.costs.flops for part in self.parts),
      bytes_accessed=sum(
        part.turns * part.costs.bytes_accessed for part in self.parts
      ),
    )

  def collectives(self) -> dict[str, dict[str, int]]:
    """Collectives by kind: how many, and bytes of their results.

    Of a reduce-scatter on TPU, bytes of the whole array that it reduces.
    """
    found: dict[str, dict[str, int]] = {}
    for name, times in self._times().items():
      for shapes, kind, start in _COLLECTIVE.findall(self._texts[name]):
        arrays = _shapes(shapes)
        # What a start returns is its operands, as many results and, of a
        # permute, two counters; of an all-reduce it is the results.
        if start and kind != 'all-reduce':
          if arrays[-2:] == [(4, [])] * 2 and len(arrays) > 2:
            arrays = arrays[:-2]
          arrays = arrays[len(arrays) // 2 :]
        if kind == 'all-reduce' and name.startswith('all-reduce-scatter'):
          kind = 'reduce-scatter'  # As XLA writes it for TPU, one fusion.
        entry = found.setdefault(kind, {'count': 0, 'bytes': 0})
        entry['count'] += times
        entry['bytes'] += times * sum(
          size * math.prod(dims) for size, dims in arrays
        )
    return found

  def _references(self, text: str) -> list[tuple[str, int | None]]:
    """Computations that one runs, and the turns of loops; None: it is none."""
    refs = [
      (body, self._turns(condition, rest))
      for condition, body, rest in _LOOP.findall(text)
    ]
    names = _CALL.findall(text)
    for several in _CALLS.findall(text):
      names += re.findall(r'[\w.\-]+', several)
    return [*refs, *((name, None) for name in names)]

  def _turns(self, condition: str, rest: str) -> int:
    known = _KNOWN_TURNS.search(rest)
    if known:
      return int(known[1])
    name = _OP_NAME.search(rest)
    for end, turns in self._given_turns.items():
      if name and f'/{_path(name[1])}'.endswith(f'/{_path(end)}'):
        return turns
    limits = re.findall(r' constant\((\d+)\)', self._texts[condition])
    counts_up = 'direction=LT' in self._texts[condition]
    return int(limits[0]) if counts_up and len(limits) == 1 else 1

  def _times(self) -> dict[str, int]:
    """How often each computation runs."""
    times = dict.fromkeys(self._texts, 0) | {self._entry: 1}
    for name in reversed(self._texts):
      for other, turns in self._refs[name]:
        times[other] += times[name] * (1 if turns is None else turns)
    return times

  def _loops(self, name: str) -> list[tuple[str, int]]:
    """The loops of a computation and of what it calls, not loops in loops."""
    loops = []
    for other, turns in self._refs[name]:
      loops += self._loops(other) if turns is None else [(other, turns)]
    return loops

  def _add_part(self, name: str, times: int, parts: list[Part]) -> Costs:
    """Appends parts from `name` on; returns its costs, loops counted once."""
    once = own = self._costs(name)
    for body, turns in self._loops(name):
      inner = self._add_part(body, times * turns, parts)
      own = Costs(*(a - b for a, b in zip(own, inner)))
    parts.append(Part(times, own))
    return once

  def _costs(self, name: str) -> Costs:
    """Of a computation, as if it were the program, with loops counted once."""
    return _sum([self._counted(name), self._corrections[name]])

  @functools.cached_property
  def _corrections(self) -> dict[str, Costs]:
    """By computation, what to add to XLA's count for its ragged products."""
    found: dict[str, Costs] = {}
    for name, refs in self._refs.items():
      parts = [found[other] for other, _ in refs]
      parts += [self._kernel(*k) for k in _KERNEL.findall(self._texts[name])]
      if name in self._groups:
        share = self._filled / self._groups[name]
        parts.append(Costs((share - 1) * self._counted(name).flops, 0))
      found[name] = _sum(parts)
    return found

  def _kernel(self, result: str, operands: str) -> Costs:
    """Of rows with matrices, or of rows with rows to matrices."""
    *_, rows, other = _shapes(operands)
    arrays = [rows, other, *_shapes(result)]
    flops = 2 * math.prod(rows[1]) * arrays[-1][1][-1]
    return Costs(
      self._filled * flops,
      sum(
        size * math.prod(dims) * (self._filled if len(dims) == 2 else 1)
        for size, dims in arrays
      ),
    )

  def _counted(self, name: str) -> Costs:
    """XLA's count of a computation, as if it were the program."""
    names = list(self._texts)
    before = [self._texts[other] for other in names[: names.index(name)]]
    own = 'ENTRY ' + self._texts[name].removeprefix('ENTRY ')
    costs = cost_analysis('HloModule part\n\n' + ''.join(before) + own)
    return Costs(costs['flops'], costs['bytes accessed'])

"""Reading optimised HLO: what a program does, with loops run to their end.

XLA's own cost analysis counts the body of a loop once. Here a body is counted
as often as the loop turns, so a scanned model costs what its layers cost.
"""

from __future__ import annotations

import functools
import math
import re
from typing import NamedTuple

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
_START = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{$', re.MULTILINE)
_CALL = re.compile(r'\b(?:calls|to_apply|\w+_computation)=%?([\w.\-]+)')
_CALLS = re.compile(r'\b(?:branch|called)_computations=\{(.*?)\}')
_LOOP = re.compile(
  r' while\(.*?\bcondition=%?([\w.\-]+), body=%?([\w.\-]+)(.*)'
)
_KNOWN_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_UPDATE = re.compile(
  r'^ *(%[\w.\-]+) = .* async-update\((%[\w.\-]+).*\n', re.MULTILINE
)
_COLLECTIVE = re.compile(
  rf'= (\(.*?\)|\S+) ({"|".join(_COLLECTIVES)})(-start)?\('
)


def _parseable(text: str) -> str:
  """Without what XLA prints and does not read."""
  text = re.sub(r' stack_frame_id=\d+', '', text)
  # Gathers that run aside: what goes on between their start and their end.
  updates = dict(_UPDATE.findall(text))
  text = _UPDATE.sub('', text)
  return re.sub(r'%[\w.\-]+', lambda name: updates.get(name[0], name[0]), text)


class Costs(NamedTuple):
  """Arithmetic and bytes read and written of a part of a program."""

  flops: float
  bytes_accessed: float


class Part(NamedTuple):
  """Costs that occur so many times: the program's own, or a loop body's."""

  turns: int
  costs: Costs


class Program:
  """The text of an optimised HLO module.

  Computations stand after those that they call. Loops are those that count
  from 0 to a constant, as `jax.lax.scan` makes them; the body of any other
  counts once.
  """

  def __init__(self, text: str):
    text = _parseable(text)
    starts = list(_START.finditer(text))
    ends = [start.start() for start in starts[1:]] + [len(text)]
    self._texts = {
      start[2]: text[start.start() : end] for start, end in zip(starts, ends)
    }
    (self._entry,) = (start[2] for start in starts if start[1])
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
    """Collectives by kind: how many, and bytes of their results."""
    found: dict[str, dict[str, int]] = {}
    for name, times in self._times().items():
      for shapes, kind, start in _COLLECTIVE.findall(self._texts[name]):
        arrays = [
          _BYTES.get(dtype, 4)
          * math.prod(map(int, filter(None, dims.split(','))))
          for dtype, dims in re.findall(r'(\w+)\[([\d,]*)\]', shapes)
        ]
        entry = found.setdefault(kind, {'count': 0, 'bytes': 0})
        entry['count'] += times
        # An asynchronous start holds its operands beside its results.
        size = sum(arrays) // 2 if start else sum(arrays)
        entry['bytes'] += times * size
    return found

  def _references(self, text: str) -> list[tuple[str, int]]:
    """Computations that one runs, and the turns of those that are loops."""
    refs = [
      (body, self._turns(condition, rest))
      for condition, body, rest in _LOOP.findall(text)
    ]
    names = _CALL.findall(text)
    for several in _CALLS.findall(text):
      names += re.findall(r'[\w.\-]+', several)
    return [*refs, *((name, 0) for name in names)]

  def _turns(self, condition: str, rest: str) -> int:
    known = _KNOWN_TURNS.search(rest)
    if known:
      return int(known[1])
    limits = re.findall(r' constant\((\d+)\)', self._texts[condition])
    counts_up = 'direction=LT' in self._texts[condition]
    return int(limits[0]) if counts_up and len(limits) == 1 else 1

  def _times(self) -> dict[str, int]:
    """How often each computation runs."""
    times = dict.fromkeys(self._texts, 0) | {self._entry: 1}
    for name in reversed(self._texts):
      for other, turns in self._refs[name]:
        times[other] += times[name] * max(turns, 1)
    return times

  def _loops(self, name: str) -> list[tuple[str, int]]:
    """The loops of a computation and of what it calls, not loops in loops."""
    loops = []
    for other, turns in self._refs[name]:
      loops += [(other, turns)] if turns else self._loops(other)
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
    """XLA's count of a computation, as if it were the program."""
    from jaxlib import _jax, xla_client  # JAX has no public way to ask this.

    names = list(self._texts)
    before = [self._texts[other] for other in names[: names.index(name)]]
    own = 'ENTRY ' + self._texts[name].removeprefix('ENTRY ')
    module = xla_client.hlo.hlo_module_from_text(
      'HloModule part\n\n' + ''.join(before) + own
    )
    costs = _jax.hlo_module_cost_analysis(
      jax.local_devices(backend='cpu')[0].client, module
    )
    return Costs(costs['flops'], costs['bytes accessed'])

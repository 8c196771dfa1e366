"""Where the time of a compiled function goes, by part of a model."""

from __future__ import annotations

import collections
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

# A part, and the scopes in the path of an operation that are of it; the first
# that matches is it. Modules are scopes by their names, others are
# `jax.named_scope`.
PARTS = {
  'optimizer': ('optimizer',),
  'embedding and loss': ('embed', 'logits', 'loss'),
  'routing': ('router', 'dispatch', 'combine'),
  'experts': ('experts', 'shared_expert'),
  'attention': ('attention', 'cross_attention', 'relative_bias'),
  'dense MLP': ('mlp', 'extra_mlp'),
}
OTHER = 'norms and the rest'
COPIES = 'copies'
UNNAMED = 'not named'


def parts(
  function: Callable[[], Any], hlo: str, calls: int = 3
) -> dict[str, float]:
  """Share of the time that each part takes, of operations on all threads.

  Args:
    function: runs a compiled program once.
    hlo: text of that program, whose operations know their scopes.
    calls: of the function, that are looked at.

  Returns:
    A share of 1 for each of PARTS, COPIES (which change the layout of memory,
    fill it or move it, and compute nothing), OTHER and UNNAMED, the largest
    first. What XLA has fused is of the part of its products, where it has one,
    or else of its result.

  Raises:
    ValueError: this backend's profiles have no operations.
  """
  of_program = operation_parts(hlo)
  seconds: dict[str, float] = collections.defaultdict(float)
  for name, taken in _operations(function, calls):
    seconds[of_program.get(name, UNNAMED)] += taken
  total = sum(seconds.values())
  if not total:
    raise ValueError(
      f'profiles of {jax.default_backend()} name no operations: leave out '
      '--profile.'
    )
  largest = sorted(seconds, key=lambda part: -seconds[part])
  return {part: seconds[part] / total for part in largest}


def operation_parts(hlo: str) -> dict[str, str]:
  """The part that each operation of a program is of, by its name."""
  bodies: dict[str, list[_Operation]] = {}
  body: list[_Operation] = []
  for line in hlo.splitlines():
    if head := _COMPUTATION.match(line):
      body = bodies.setdefault(head['name'], [])
    elif found := _OPERATION.match(line):
      scope, calls = _SCOPE.search(line), _CALLS.search(line)
      body.append(
        _Operation(
          found['name'],
          found['kind'],
          scope[1] if scope else '',
          calls[1] if calls else None,
        )
      )
  return {
    operation.name: _part(operation, bodies)
    for body in bodies.values()
    for operation in body
  }


class _Operation(NamedTuple):
  """A line of a program; `calls` is what it has fused."""

  name: str
  kind: str
  scope: str
  calls: str | None


def _part(operation: _Operation, bodies: dict[str, list[_Operation]]) -> str:
  fused = [operation]
  if operation.kind == 'fusion' and operation.calls in bodies:
    fused = bodies[operation.calls]
  if all(each.kind in _MOVES for each in fused):
    return COPIES
  named = [each for each in fused if each.kind in ('dot', 'convolution')]
  for each in [*named, operation, *reversed(fused)]:
    if each.scope:
      return part_of(each.scope)
  return UNNAMED


def part_of(scope: str) -> str:
  """The part that the path of an operation is of.

  Example:
    >>> part_of('jit(train_step)/jvp(Model)/layers_1/moe/router/dot')
    'routing'
  """
  names = set(re.split(r'[/.()]+', scope))
  for part, mine in PARTS.items():
    if not names.isdisjoint(mine):
      return part
  return OTHER


_COMPUTATION = re.compile(r'(ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$')
_OPERATION = re.compile(
  r'\s+(ROOT )?%?(?P<name>[\w.\-]+) = (\(.*?\)|\S+) (?P<kind>[\w\-]+)\('
)
_SCOPE = re.compile(r'\bop_name="([^"]*)"')
_CALLS = re.compile(r'\bcalls=%?([\w.\-]+)')
# They compute nothing.
_MOVES = (
  *('parameter', 'constant', 'copy', 'transpose', 'bitcast', 'broadcast'),
  *('reshape', 'slice', 'concatenate', 'pad', 'convert', 'iota', 'tuple'),
  *('get-tuple-element', 'dynamic-slice', 'dynamic-update-slice', 'reverse'),
)
# Operations that others run within; those are counted.
_CONTAINERS = ('while', 'conditional', 'call')


def _operations(
  function: Callable[[], Any], calls: int
) -> Iterator[tuple[str, float]]:
  """Names of operations as they ran, and what each took."""
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      for _ in range(calls):
        jax.block_until_ready(function())
    (file,) = pathlib.Path(folder).rglob('*.xplane.pb')
    found = jax.profiler.ProfileData.from_file(str(file))
    for plane in found.planes:
      for line in plane.lines:
        for event in line.events:
          name = dict(event.stats).get('hlo_op')
          if name and not name.startswith(_CONTAINERS):
            yield name, event.duration_ns

"""Where the time of a compiled function goes, by part of a model."""

from __future__ import annotations

import collections
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

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
    fill it or move it, and which no scope is left of) and OTHER, the largest
    first.

  Raises:
    ValueError: this backend's profiles have no operations.
  """
  scopes = operation_scopes(hlo)
  seconds: collections.Counter[str] = collections.Counter()
  for name, taken in _operations(function, calls):
    seconds[part_of(name, scopes.get(name, ''))] += taken
  total = seconds.total()
  if not total:
    raise ValueError(
      f'profiles of {jax.default_backend()} name no operations: leave out '
      '--profile.'
    )
  return {part: taken / total for part, taken in seconds.most_common()}


def part_of(name: str, scope: str) -> str:
  """The part that an operation is of.

  Args:
    name: of the operation in its program, such as 'copy.3'.
    scope: its path, '' where it has none.

  Example:
    >>> part_of('dot.1', 'jit(train_step)/jvp(Model)/layers_1/moe/router/dot')
    'routing'
    >>> part_of('transpose_copy_fusion.2', 'jit(f)/layers_0/attention/add')
    'copies'
  """
  if not scope or 'copy' in name or name.startswith('wrapped_broadcast'):
    return COPIES
  names = set(re.split(r'[/.()]+', scope))
  for part, mine in PARTS.items():
    if not names.isdisjoint(mine):
      return part
  return OTHER


def operation_scopes(hlo: str) -> dict[str, str]:
  """The path of each operation of a program, by the operation's name."""
  return {
    found['name']: found['scope']
    for line in hlo.splitlines()
    if (found := _OPERATION.match(line))
  }


_OPERATION = re.compile(
  r'\s*(ROOT )?%?(?P<name>[\w.\-]+) = .*op_name="(?P<scope>[^"]*)"'
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

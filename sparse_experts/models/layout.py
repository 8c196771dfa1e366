"""Which blocks of a stack are sparse, and the period that a scan runs over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

PERIOD = 'period'  # The child of a scanned stack that is scanned over.


def kinds(
  num_layers: int, sparse_layers: int | Sequence[int] | Mapping[int, int]
) -> tuple[bool | int, ...]:
  """For every block whether it is sparse, or how many experts it has.

  Args:
    num_layers: blocks.
    sparse_layers: which are sparse, see `transformer.Stack`.

  Example:
    >>> kinds(4, 2), kinds(3, [0])
    ((False, True, False, True), (True, False, False))
    >>> kinds(4, {1: 32, 3: 64})
    (False, 32, False, 64)
  """
  if isinstance(sparse_layers, int):
    every = sparse_layers
    return tuple(
      every > 0 and i % every == every - 1 for i in range(num_layers)
    )
  wrong = [i for i in sparse_layers if not 0 <= i < num_layers]
  if wrong:
    raise ValueError(
      f'sparse_layers {wrong} are not among the {num_layers} layers, '
      f'0 to {num_layers - 1}.'
    )
  if isinstance(sparse_layers, Mapping):
    return tuple(sparse_layers.get(i, False) for i in range(num_layers))
  return tuple(i in sparse_layers for i in range(num_layers))


def split_period(kinds: Sequence[Any]) -> tuple[int, int, int]:
  """Splits a stack into prefix + period * repeats + suffix.

  The split that leaves the fewest blocks to compile, then the shortest period,
  then the shortest prefix.

  Returns:
    Lengths (prefix, period, repeats); repeats >= 2.

  Raises:
    ValueError: nothing repeats.

  Example:
    >>> split_period('dsdsds'), split_period('xdddy')
    ((0, 2, 3), (1, 1, 3))
  """
  n = len(kinds)
  best = None
  for period in range(1, n // 2 + 1):
    for prefix in range(n - 2 * period + 1):
      repeats = 1
      unit = kinds[prefix : prefix + period]
      while (
        kinds[prefix + repeats * period : prefix + (repeats + 1) * period]
        == unit
      ):
        repeats += 1
      if repeats > 1:
        compiled = n - (repeats - 1) * period
        best = min(best or (n + 1,), (compiled, period, prefix, repeats))
  if best is None:
    raise ValueError(
      f'scan needs a period that repeats, and the {n} layers '
      f'{"".join("s" if kind else "d" for kind in kinds)} (d dense, s sparse) '
      'have none; use scan=False.'
    )
  _, period, prefix, repeats = best
  return prefix, period, repeats


def roll(stack: Mapping[str, Any], kinds: Sequence[Any]) -> dict[str, Any]:
  """A stack's parameters as its scanned form has them.

  Blocks of the scanned part lie under `period/layers_j` with a leading axis of
  repeats; all else is as it was. `unroll` is the inverse.
  """
  prefix, period, repeats = split_period(kinds)
  rolled = dict(stack)
  blocks = [
    [rolled.pop(f'layers_{prefix + r * period + j}') for r in range(repeats)]
    for j in range(period)
  ]
  rolled['period'] = {
    f'layers_{j}': jax.tree.map(lambda *leaves: jnp.stack(leaves), *repeated)
    for j, repeated in enumerate(blocks)
  }
  return rolled


def unroll(stack: Mapping[str, Any], kinds: Sequence[Any]) -> dict[str, Any]:
  """The parameters of a scanned stack as its plain form has them."""
  prefix, period, repeats = split_period(kinds)
  plain = dict(stack)
  scanned = plain.pop('period')
  for r in range(repeats):
    for j in range(period):
      plain[f'layers_{prefix + r * period + j}'] = jax.tree.map(
        lambda leaf, r=r: leaf[r], scanned[f'layers_{j}']
      )
  return plain


def plain_paths(params: Mapping[str, Any], path: Sequence[str]) -> list[str]:
  """Where a parameter lies without scan: if scanned, one path a repeat.

  Args:
    params: of the model, scanned or not, boxed or not.
    path: of one of them.

  Example:
    >>> params = {'layers_0': {}, 'period': {'layers_0': {'w': jnp.ones(2)}}}
    >>> plain_paths(params, ('period', 'layers_0', 'w'))
    ['layers_1/w', 'layers_2/w']
  """
  if PERIOD not in path:
    return ['/'.join(path)]
  at = path.index(PERIOD)
  stack = params
  for key in path[:at]:
    stack = stack[key]
  prefix = next(i for i in range(len(stack) + 1) if f'layers_{i}' not in stack)
  period = stack[PERIOD]
  repeats = jax.tree.leaves(period)[0].shape[0]
  first = prefix + int(path[at + 1].removeprefix('layers_'))
  return [
    '/'.join((*path[:at], f'layers_{first + r * len(period)}', *path[at + 2 :]))
    for r in range(repeats)
  ]

"""How a stack is laid out: which blocks are sparse, and how all are named.

Block i of a stack keeps its parameters under `layers_i`. A scan runs over a
period of the layout: the blocks that it repeats lie under `period/layers_j`,
each array with a leading axis of repeats. This file alone knows these names.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

PERIOD = 'period'  # The child of a scanned stack that is scanned over.
FFN = 'layers'  # The kind of a sparse layer in the place of an FFN.
_BLOCK = 'layers_'


@functools.total_ordering
@dataclasses.dataclass(frozen=True)
class LayerId:
  """Which sparse layer of a model: `str` gives its name, `parse` reads it.

  In order, encoders come before what reads them, blocks by number, and the
  layers of a block by kind.

  Attributes:
    stack: 'encoder', 'decoder', ...; '' for a layer named by its own stack.
    index: of its block in the stack, from 0.
    kind: what it stands for: `FFN`, or in attention 'query', 'key', 'value'.

  Example:
    >>> str(LayerId('decoder', 3))
    'decoder/layers_3'
    >>> LayerId.parse('decoder/query_3')
    LayerId(stack='decoder', index=3, kind='query')
    >>> sorted(['encoder/layers_10', 'decoder/layers_1', 'encoder/layers_9'],
    ...        key=LayerId.parse)
    ['encoder/layers_9', 'encoder/layers_10', 'decoder/layers_1']
  """

  stack: str
  index: int
  kind: str = FFN

  @classmethod
  def parse(cls, name: str) -> LayerId:
    """The layer of a name.

    Raises:
      ValueError: it is no layer's name.
    """
    stack, _, layer = name.rpartition('/')
    kind, _, index = layer.rpartition('_')
    if not kind or not index.isdecimal():
      raise ValueError(
        f'{name!r} names no layer; names are as {str(cls("decoder", 3))!r}: '
        'stack, kind, index of the block.'
      )
    return cls(stack, int(index), kind)

  def __str__(self) -> str:
    name = f'{self.kind}_{self.index}'
    return f'{self.stack}/{name}' if self.stack else name

  def __lt__(self, other: LayerId) -> bool:
    return self._rank() < other._rank()

  def _rank(self) -> tuple[bool, str, int, str]:
    is_read_later = not self.stack.endswith('encoder')
    return (is_read_later, self.stack, self.index, self.kind)


class BlockPath(NamedTuple):
  """The path of a parameter of a block, taken apart by `split_path`.

  Attributes:
    stack: path of the stack, ('decoder',).
    index: of the block: in its stack, or if that is scanned in the period.
    rest: path in the block, ('moe', 'router', 'kernel').
    scanned: the array has a leading axis of repeats.
  """

  stack: tuple[str, ...]
  index: int
  rest: tuple[str, ...] = ()
  scanned: bool = False

  @property
  def path(self) -> tuple[str, ...]:
    """The path, put together."""
    return (*self.block, *self.rest)

  @property
  def stack_name(self) -> str:
    """The name of the stack, see `LayerId`."""
    return '/'.join(map(str, self.stack))

  @property
  def block(self) -> tuple[str, ...]:
    """The path of the block."""
    scan = (PERIOD,) if self.scanned else ()
    return (*self.stack, *scan, block_name(self.index))


def block_name(index: int) -> str:
  """The name of block `index` in its stack, or in the period of a scan."""
  return f'{_BLOCK}{index}'


def split_path(path: Sequence[str]) -> BlockPath | None:
  """Takes the path of a parameter apart; None if it is of no block.

  Example:
    >>> split_path(('decoder', 'period', 'layers_1', 'mlp', 'wi'))
    BlockPath(stack=('decoder',), index=1, rest=('mlp', 'wi'), scanned=True)
    >>> split_path(('decoder', 'norm', 'scale')) is None
    True
  """
  for i, part in enumerate(path):
    name = str(part)
    index = name.removeprefix(_BLOCK)
    if name.startswith(_BLOCK) and index.isdecimal():
      scanned = is_scanned(path[:i])
      stack = path[: i - scanned]
      return BlockPath(tuple(stack), int(index), tuple(path[i + 1 :]), scanned)
  return None


def block_of(path: Sequence[str]) -> tuple[str, ...]:
  """The part of a path up to its block; () outside all blocks."""
  at = split_path(path)
  return at.block if at else ()


def stack_of(path: Sequence[str], stacks: Iterable[str]) -> str | None:
  """Which of these stacks a parameter is in, its norm too; None: in none.

  Example:
    >>> stack_of(('left', 'encoder', 'norm', 'scale'), ['left/encoder'])
    'left/encoder'
  """
  name = '/'.join(map(str, path))
  return next((s for s in stacks if name.startswith(f'{s}/')), None)


def stacks_of(paths: Iterable[Sequence[str]]) -> list[str]:
  """The stacks that parameters of these paths are in, as they run.

  Example:
    >>> stacks_of([('decoder', 'layers_0', 'mlp'), ('encoder', 'layers_0'),
    ...            ('embed', 'embedding')])
    ['encoder', 'decoder']
  """
  found = {at.stack_name for path in paths if (at := split_path(path))}
  return sorted(found, key=lambda stack: LayerId(stack, 0))


def is_scanned(path: Sequence[str]) -> bool:
  """Whether a path leads into the blocks that a scan repeats."""
  return PERIOD in path


class Split(NamedTuple):
  """A stack as a scan has it: prefix + period * repeats + suffix.

  Attributes:
    prefix, period: blocks before the scan, and of one of its turns.
    repeats: turns.
  """

  prefix: int
  period: int
  repeats: int

  def index(self, turn: int, j: int) -> int:
    """The block of the stack that is block j of the period in a turn."""
    return self.prefix + turn * self.period + j

  def turn(self, index: int) -> tuple[int, int] | None:
    """(turn, j) of a block of the stack; None if the scan does not have it."""
    turn, j = divmod(index - self.prefix, self.period)
    return (turn, j) if 0 <= turn < self.repeats else None


def layers_at(params: Mapping[str, Any], path: Sequence[str]) -> list[LayerId]:
  """The sparse layers of the parameter at `path`: in a scan, one of each turn.

  Args:
    params: of the model, which say what lies before a scan.
    path: of a parameter of a sparse layer, as its router's.

  Example:
    >>> params = {'layers_0': {}, 'period': {'layers_0': {'moe': jnp.ones(2)}}}
    >>> [str(layer) for layer in
    ...  layers_at(params, ('period', 'layers_0', 'moe'))]
    ['layers_1', 'layers_2']
  """
  at = split_path(path)
  assert at is not None, path
  kind = at.rest[1] if at.rest[0] == 'attention' else FFN
  indices = [at.index]
  if at.scanned:
    stack = params
    for key in at.stack:
      stack = stack[key]
    prefix = next(i for i in itertools.count() if block_name(i) not in stack)
    repeats = jax.tree.leaves(stack[PERIOD])[0].shape[0]
    split = Split(prefix, len(stack[PERIOD]), repeats)
    indices = [split.index(turn, at.index) for turn in range(repeats)]
  return [LayerId(at.stack_name, index, kind) for index in indices]


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
    if not 0 <= every <= num_layers:
      raise ValueError(
        f'sparse_layers={every} must be 0, none, or n for every n-th of '
        f'{num_layers} layers.'
      )
    return tuple(
      every > 0 and i % every == every - 1 for i in range(num_layers)
    )
  wrong = [i for i in sparse_layers if not 0 <= i < num_layers]
  if wrong:
    raise ValueError(
      f'sparse_layers {wrong} are not among the {num_layers} layers, '
      f'0 to {num_layers - 1}.'
    )
  if len(set(sparse_layers)) < len(sparse_layers):
    raise ValueError(f'sparse_layers {tuple(sparse_layers)} have one twice.')
  if isinstance(sparse_layers, Mapping):
    return tuple(sparse_layers.get(i, False) for i in range(num_layers))
  return tuple(i in sparse_layers for i in range(num_layers))


def split_period(kinds: Sequence[Any]) -> Split:
  """Splits a stack into prefix + period * repeats + suffix.

  The split that leaves the fewest blocks to compile, then the shortest period,
  then the shortest prefix.

  Returns:
    Lengths; repeats >= 2.

  Raises:
    ValueError: nothing repeats.

  Example:
    >>> split_period('dsdsds')
    Split(prefix=0, period=2, repeats=3)
    >>> split_period('xdddy')
    Split(prefix=1, period=1, repeats=3)
  """
  n = len(kinds)
  found = []
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
        found.append((compiled, period, prefix, repeats))
  if not found:
    raise ValueError(
      f'scan needs a period that repeats, and the {n} layers '
      f'{"".join("s" if kind else "d" for kind in kinds)} (d dense, s sparse) '
      'have none; use scan=False.'
    )
  _, period, prefix, repeats = min(found)
  return Split(prefix, period, repeats)


def roll(stack: Mapping[str, Any], kinds: Sequence[Any]) -> dict[str, Any]:
  """A stack's parameters as its scanned form has them.

  Blocks of the scanned part get a leading axis of repeats; all else is as it
  was. `unroll` is the inverse.
  """
  split = split_period(kinds)
  rolled = dict(stack)
  blocks = [
    [rolled.pop(block_name(split.index(r, j))) for r in range(split.repeats)]
    for j in range(split.period)
  ]
  rolled[PERIOD] = {
    block_name(j): jax.tree.map(lambda *leaves: jnp.stack(leaves), *repeated)
    for j, repeated in enumerate(blocks)
  }
  return rolled


def unroll(stack: Mapping[str, Any], kinds: Sequence[Any]) -> dict[str, Any]:
  """The parameters of a scanned stack as its plain form has them."""
  split = split_period(kinds)
  plain = dict(stack)
  scanned = plain.pop(PERIOD)
  for r in range(split.repeats):
    for j in range(split.period):
      plain[block_name(split.index(r, j))] = jax.tree.map(
        lambda leaf, r=r: leaf[r], scanned[block_name(j)]
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
  at = split_path(path)
  if at is None or not at.scanned:
    return ['/'.join(path)]
  return [
    '/'.join(at._replace(index=layer.index, scanned=False).path)
    for layer in layers_at(params, path)
  ]

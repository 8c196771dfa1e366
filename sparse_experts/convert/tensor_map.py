"""Where each parameter of a model lies in a checkpoint, and moving it.

All formats meet in the *plain* form of our parameters: stacks without scan, one
array a layer, by names such as 'decoder/layers_1/moe/expert/wi/kernel'.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from sparse_experts import sharding
from sparse_experts.convert import axes
from sparse_experts.convert.arguments import arguments
from sparse_experts.convert.parameter_names import Row
from sparse_experts.convert.tensors import Shape, Shapes, Tensors
from sparse_experts.models import layout
from sparse_experts.models.language import Language
from sparse_experts.training import checkpoints

PIECE_BYTES = 2**26


@dataclasses.dataclass(frozen=True)
class Place:
  """Where one plain parameter lies.

  Attributes:
    name: of the tensor; one with `{e}` in it holds one expert.
    rule: see `axes`; of one expert's part where `name` has `{e}`.
    stack: it is layer `index` of `length` along axis `axis` of the tensor.
    copies: tensors that repeat this one.
  """

  name: str
  rule: str = ''
  stack: tuple[int, int, int] | None = None  # axis, index, length
  copies: tuple[str, ...] = ()

  def shapes(self, plain: Shape) -> dict[str, Shape]:
    """The shapes of its tensors, for the shape of the plain parameter."""
    if '{e}' in self.name:
      theirs = axes.their_shape(plain[1:], self.rule)
      return {self.name.format(e=e): theirs for e in range(plain[0])}
    shape = list(axes.their_shape(plain, self.rule))
    if self.stack is not None:
      axis, _, length = self.stack
      shape.insert(axis, length)
    return dict.fromkeys((self.name, *self.copies), tuple(shape))

  def index(self, experts: slice | None) -> tuple[Any, ...]:
    """The part of its one tensor that holds these experts."""
    index: list[Any] = [] if experts is None else [experts]
    if self.stack is not None:
      axis, layer, _ = self.stack
      index += [slice(None)] * (axis - len(index))
      index.insert(axis, layer)
    return tuple(index)


Places = Mapping[str, Place]


@dataclasses.dataclass(frozen=True)
class Target:
  """A checkpoint that a format's `Writer` is to write.

  Attributes:
    folder: of all that is written.
    model: whose parameters they are.
    shapes: of its tensors, by name.
    parts: the shapes of what `Writer.write` is given of each.
    step: of the checkpoint.
  """

  folder: pathlib.Path
  model: Language
  shapes: Shapes
  parts: Shapes
  step: int


@dataclasses.dataclass(frozen=True)
class Piece:
  """A plain parameter, or some of its experts: what is moved at once."""

  name: str
  shape: Shape
  experts: slice | None = None

  def __str__(self) -> str:
    if self.experts is None:
      return self.name
    return f'{self.name}[{self.experts.start}:{self.experts.stop}]'


def pieces(shapes: Shapes) -> Iterator[Piece]:
  """All pieces of plain parameters, experts by at most PIECE_BYTES."""
  for name, shape in shapes.items():
    if '/moe/expert/' not in name:
      yield Piece(name, shape)
      continue
    step = max(1, PIECE_BYTES // (4 * math.prod(shape[1:])))
    for start in range(0, shape[0], step):
      experts = slice(start, min(start + step, shape[0]))
      yield Piece(name, (experts.stop - start, *shape[1:]), experts)


def read(piece: Piece, place: Place, tensors: Tensors) -> np.ndarray:
  """The plain float32 array of a piece.

  Args:
    piece: of a plain parameter, see `pieces`.
    place: where that lies in the checkpoint.
    tensors: the checkpoint's, by name.
  """
  if '{e}' not in place.name:
    theirs = tensors[place.name].read(place.index(piece.experts))
    ours = axes.to_ours(theirs, place.rule, piece.shape)
    return np.ascontiguousarray(ours, np.float32)
  assert piece.experts is not None  # Each lies in a tensor of its own.
  ours = np.empty(piece.shape, np.float32)
  for i, e in enumerate(range(piece.experts.start, piece.experts.stop)):
    theirs = tensors[place.name.format(e=e)].read(())
    ours[i] = axes.to_ours(theirs, place.rule, piece.shape[1:])
  return ours


def write(
  piece: Piece,
  array: np.ndarray,
  place: Place,
  write_tensor: Callable[[str, tuple[Any, ...], np.ndarray], None],
) -> None:
  """Writes the plain array of a piece where it lies.

  Args:
    piece: of a plain parameter, see `pieces`.
    array: float32, of the piece's shape.
    place: where the parameter lies in the checkpoint.
    write_tensor: (name, index into it, values) -> None; () is all of it.
  """
  if '{e}' not in place.name:
    theirs = axes.to_theirs(array, place.rule)
    for name in (place.name, *place.copies):
      write_tensor(name, place.index(piece.experts), theirs)
    return
  assert piece.experts is not None
  for i, e in enumerate(range(piece.experts.start, piece.experts.stop)):
    name = place.name.format(e=e)
    write_tensor(name, (), axes.to_theirs(array[i], place.rule))


def expected(shapes: Shapes, places: Places) -> dict[str, Shape]:
  """The shapes of all tensors of a checkpoint."""
  return {
    name: shape
    for plain, place in places.items()
    for name, shape in place.shapes(shapes[plain]).items()
  }


def parts(shapes: Shapes, places: Places) -> dict[str, Shape]:
  """Of each tensor the shape of the part that is written at once."""
  found = {}
  for piece in pieces(shapes):
    for name, shape in places[piece.name].shapes(piece.shape).items():
      stack = places[piece.name].stack
      if stack is not None:
        shape = (*shape[: stack[0]], 1, *shape[stack[0] + 1 :])
      found.setdefault(name, shape)
  return found


def plain_shapes(model: Language) -> dict[str, Shape]:
  """Shapes of a model's parameters in plain form."""
  return {name: shape for name, (shape, _) in plain(model).items()}


def plain(model: Language) -> dict[str, tuple[Shape, tuple[str, ...]]]:
  """Shape and axis names of each of a model's parameters in plain form."""
  sizes = [
    size
    for path, size in arguments(model).items()
    if path.endswith('.group_size') and size
  ]
  length = math.gcd(16, *sizes)  # Whole groups; shapes alone cost nothing.
  features = model.features
  shapes = features.shapes(
    dict.fromkeys(features.example_lengths(), length),
    math.lcm(1, *sizes),
    task_ids=True,
  )
  boxed = jax.eval_shape(lambda: model.init(jax.random.key(0), shapes))
  leaves = checkpoints.flatten(nn.unbox(boxed)).items()
  labels = jax.tree.leaves(
    sharding.names_of(boxed), is_leaf=lambda node: isinstance(node, tuple)
  )
  found = {}
  for (name, leaf), label in zip(leaves, labels, strict=True):
    at = layout.split_path(name.split('/'))
    if at is None or not at.scanned:
      found[name] = leaf.shape, label
      continue
    split = _split(model, at.stack)
    for r in range(split.repeats):
      plain_at = at._replace(index=split.index(r, at.index), scanned=False)
      found['/'.join(plain_at.path)] = leaf.shape[1:], label[1:]
  return {name: found[name] for name in sorted(found, key=_natural)}


def ours(
  model: Language, names: Iterable[str], scanned: Collection[tuple[str, ...]]
) -> dict[str, Place]:
  """Where plain parameters lie in our own tree, with these stacks scanned.

  Args:
    model: whose stacks say what a scan repeats.
    names: of plain parameters, 'decoder/layers_0/...'.
    scanned: paths of the stacks whose blocks lie in one array.
  """
  splits = {stack: _split(model, stack) for stack in scanned}

  def place(name):
    at = layout.split_path(name.split('/'))
    if at is None or at.stack not in splits:
      return Place(name)
    split = splits[at.stack]
    turn = split.turn(at.index)
    if turn is None:
      return Place(name)
    r, j = turn
    scanned_at = at._replace(index=j, scanned=True)
    return Place('/'.join(scanned_at.path), stack=(0, r, split.repeats))

  return {name: place(name) for name in names}


def _split(model: Language, stack: tuple[str, ...]) -> layout.Split:
  module = model.module
  for name in stack:
    module = getattr(module, name)
  return layout.split_period(
    layout.kinds(module.num_layers, module.sparse_layers)
  )


def theirs(table: Iterable[Row], names: Iterable[str]) -> dict[str, Place]:
  """Where a foreign checkpoint has plain parameters, by one of `tables`.

  Raises:
    ValueError: it has no place for one.
  """
  rows = [
    (re.compile(ours.replace('{i}', r'(?P<i>\d+)')), foreign, rule)
    for ours, foreign, rule in table
  ]
  places = {}
  for name in names:
    matches = [
      Place(foreign.replace('{i}', match.groupdict().get('i', '')), rule)
      for pattern, foreign, rule in rows
      if (match := pattern.fullmatch(name))
    ]
    if not matches:
      raise ValueError(
        f'parameter {name} has no place in that format; docs/checkpoints.md '
        'has the architectures it knows.'
      )
    (places[name],) = matches
  return places


def _natural(name: str) -> list[Any]:
  """layers_10 after layers_9."""
  return [
    int(word) if word.isdigit() else word for word in re.split(r'(\d+)', name)
  ]

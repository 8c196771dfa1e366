"""The formats, by name, and a first look into a checkpoint.

A format is a module with

    read(path) -> Found
    source_places(model, names, tensors) -> Places of a checkpoint that is there
    target_places(model, names) -> Places of one to be written
    unsaid(model) -> what of its training such a checkpoint does not say
    blocks_before(model) -> how many dense blocks, by stack, must come before
      its own, so that such a checkpoint can say which are sparse
    Writer(Target), with write(name, index, array) and finish(gin), see the
      modules.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence

from sparse_experts import config
from sparse_experts.convert import (
  hugging_face,
  native,
  t5x,
  tensor_map,
  tensors,
)
from sparse_experts.convert.arguments import differences
from sparse_experts.convert.tensor_map import Places
from sparse_experts.convert.tensors import Shapes, Tensors
from sparse_experts.models.language import Language

FORMATS = {'t5x': t5x, 'hf': hugging_face, 'native': native}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """A checkpoint whose tensors are those of its model.

  Attributes:
    path: where it is.
    gin: the model as a gin file.
    model: the same, built.
    shapes: of the model's parameters in plain form.
    places: where those lie.
    tensors: of the checkpoint.
    step: of training; 0 where the format does not say.
    unused: what else it holds, which is not converted.
    experts: those of the input that it has; None: all, as they were.
  """

  path: pathlib.Path
  gin: str
  model: Language
  shapes: Shapes
  places: Places
  tensors: Tensors
  step: int
  unused: list[str]
  experts: list[int] | None = None


def look(
  path: str | pathlib.Path,
  format: str | None = None,
  *,
  gin_files: Sequence[str] = (),
  bindings: Sequence[str] = (),
  search_paths: Sequence[str] = (),
) -> Checkpoint:
  """A checkpoint, compared with its model; reads no parameter.

  Args:
    path: of a checkpoint, or of a MODEL_DIR: then of its latest.
    format: a name of FORMATS; None: what it looks like.
    gin_files: the model; without, it is what the checkpoint says.
    bindings: `NAME=VALUE` of the model. Without `gin_files` they change how it
      is run, such as SCAN=True, not what it computes.
    search_paths: of `gin_files`.

  Raises:
    ValueError, FileNotFoundError: it is damaged, or not of that model.
  """
  path = pathlib.Path(path).absolute()
  if format is None:
    format = _guess(path)
  if format not in FORMATS:
    raise ValueError(f'--from is one of {", ".join(FORMATS)}, not {format!r}.')
  module = FORMATS[format]
  found = module.read(path)
  if gin_files:
    config.parse(gin_files, bindings, search_paths)
    model = config.model()
  else:
    described = found.gin()
    own = config.model_of(described)
    model = config.model_of(described, bindings) if bindings else own
    check_same(path, own, model)
  gin = config.text()
  shapes = tensor_map.plain_shapes(model)
  where = module.source_places(model, shapes, found.tensors)
  tensors.check(found.tensors, tensor_map.expected(shapes, where), path)
  return Checkpoint(
    path, gin, model, shapes, where, found.tensors, found.step, found.unused
  )


def check_same(
  path: pathlib.Path, own: Language, model: Language, but: str = ''
) -> None:
  """Raises ValueError where `model` says anything else than `own`.

  Args:
    path: of the checkpoint.
    own: its model.
    model: another.
    but: the name of an argument that may differ.
  """
  for argument, (theirs, ours) in differences(own, model).items():
    name = argument.rpartition('.')[2]
    if name == but:
      continue
    remedy = 'leave that binding out'
    if name == 'num_experts':
      remedy += ', or say by --experts which to take'
    raise ValueError(
      f'{path} is of a model whose {argument or "kind"} is {theirs!r}, not '
      f'{ours!r}; converting changes no model: {remedy}.'
    )


def _guess(path: pathlib.Path) -> str:
  if (path / 'config.json').is_file():
    return 'hf'
  if (path / 'checkpoints').is_dir() or path.parent.name == 'checkpoints':
    return 'native'
  return 't5x'  # Which says what it lacks.

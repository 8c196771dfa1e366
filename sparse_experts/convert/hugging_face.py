"""Checkpoints in Hugging Face's layout: config.json beside files of tensors."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from sparse_experts import config
from sparse_experts.convert import safetensors, tensor_map, torch_files
from sparse_experts.convert.architectures import ARCHITECTURES, Architecture
from sparse_experts.convert.arguments import arguments, differences, training
from sparse_experts.convert.tensor_map import Place, Target
from sparse_experts.convert.tensors import Found, Tensor
from sparse_experts.models import layout
from sparse_experts.models.language import Language

_GENERATION = 'generation_config.json'
_SPECIAL = (
  'bos_token_id',
  'decoder_start_token_id',
  'eos_token_id',
  'pad_token_id',
  'suppress_tokens',
)


def read(path: pathlib.Path) -> Found:
  """The checkpoint in a folder.

  Raises:
    ValueError: a tensor that repeats another differs from it.
  """
  file = path / 'config.json'
  if not file.is_file():
    raise FileNotFoundError(
      f'no {file}: a Hugging Face checkpoint is a folder with config.json and '
      'files of tensors.'
    )
  found = json.loads(file.read_text())
  known = _architecture(found)
  if (generation := path / _GENERATION).is_file():
    # It is what `generate` of transformers reads; config.json has the rest.
    said = json.loads(generation.read_text())
    found |= {key: said[key] for key in _SPECIAL if said.get(key) is not None}
  tensors = _tensors(path)
  original, unused = known.table[0][1], []
  for copy in known.copies:
    if copy == 'lm_head.weight' and not found.get('tie_word_embeddings', True):
      continue
    if copy in tensors and original in tensors:
      unused.append(copy)
      repeated, array = tensors.pop(copy).read(()), tensors[original].read(())
      if not np.array_equal(repeated, array):
        raise ValueError(
          f'{path}: {copy} differs from {original}, and this architecture has '
          'one matrix for both.'
        )
  gin = functools.partial(_gin, found)
  return Found(tensors, gin, unused=unused)


def source_places(
  model: Language, names: Iterable[str], tensors: Iterable[str]
) -> dict[str, Place]:
  """Where plain parameters lie.

  Args:
    model: whose parameters they are, and so whose architecture.
    names: of its plain parameters.
    tensors: as of other formats; not read.
  """
  del tensors
  return tensor_map.theirs(ARCHITECTURES[_kind(model)].table, names)


def target_places(model: Language, names: Iterable[str]) -> dict[str, Place]:
  """Where they lie in what `Writer` writes.

  Raises:
    ValueError: config.json cannot say what the model is.
  """
  _describe(model)
  known = ARCHITECTURES[_kind(model)]
  found = tensor_map.theirs(known.table, names)
  if not model.module.tied_logits:
    # transformers makes the copies of the embedding by itself only where logits
    # are tied to it; else those that are not there are drawn at random.
    others = {place.name for place in found.values()}
    copies = tuple(name for name in known.copies if name not in others)
    embedding = found['embed/embedding']
    found['embed/embedding'] = dataclasses.replace(embedding, copies=copies)
  return found


def unsaid(model: Language) -> list[str]:
  """What of a model's training config.json cannot say, and says instead."""
  ours = training(model)
  theirs = training(config.model_of(_gin(_describe(model))))
  return [
    f'{name} {ours.get(name)!r}, there {theirs.get(name)!r}'
    for name in [*ours, *(theirs.keys() - ours.keys())]
    if ours.get(name) != theirs.get(name)
  ]


def blocks_before(model: Language) -> dict[str, int]:
  """How many dense blocks must come before those of each stack.

  For config.json to say which are sparse; stacks that need none are left out.
  """
  before = ARCHITECTURES[_kind(model)].blocks_before
  found = {
    name: before(layout.kinds(stack.num_layers, stack.sparse_layers))
    for name in ('encoder', 'decoder')
    if (stack := getattr(model.module, name)) is not None
  }
  return {name: number for name, number in found.items() if number}


class Writer(safetensors.Writer):
  """Writes safetensors files, config.json and generation_config.json."""

  def __init__(self, target: Target):
    self._config = _describe(target.model)
    super().__init__(target.folder, target.shapes)

  def finish(self, gin: str) -> None:
    """Writes what says what the tensors are."""
    del gin
    said = {
      key: self._config[key]
      for key in _SPECIAL
      if self._config.get(key) is not None
    }
    # Suppressing is of generation alone: transformers refuses it elsewhere.
    kept = {k: v for k, v in self._config.items() if k != 'suppress_tokens'}
    for name, contents in (('config.json', kept), (_GENERATION, said)):
      text = json.dumps(contents, indent=2, sort_keys=True)
      (self.folder / name).write_text(text + '\n')


def _tensors(folder: pathlib.Path) -> dict[str, Tensor]:
  """All tensors of a folder, from safetensors if there are any."""
  for stem, suffix, read_file in (
    ('model', 'safetensors', safetensors.read),
    ('pytorch_model', 'bin', torch_files.read),
  ):
    index = folder / f'{stem}.{suffix}.index.json'
    paths = sorted(folder.glob(f'{stem}*.{suffix}'))
    if index.is_file():
      weight_map = json.loads(index.read_text())['weight_map']
      for name, file in weight_map.items():
        if not (folder / file).is_file():
          raise FileNotFoundError(
            f'{folder} lacks {file}, which has tensor {name}; fetch it too.'
          )
      paths = [folder / file for file in sorted(set(weight_map.values()))]
    if paths:
      return {k: v for path in paths for k, v in read_file(path).items()}
  raise FileNotFoundError(
    f'neither model*.safetensors nor pytorch_model*.bin in {folder}; fetch one '
    'of them.'
  )


def _architecture(found: Mapping[str, Any]) -> Architecture:
  """The architecture a config.json names."""
  kind = found.get('model_type')
  if kind not in ARCHITECTURES:
    raise ValueError(
      f'model_type {kind!r} is none of {", ".join(ARCHITECTURES)}.'
    )
  return ARCHITECTURES[kind]


def _gin(found: Mapping[str, Any]) -> str:
  """A gin file of the model that a config.json describes.

  Raises:
    ValueError: it lacks a key, or describes something we do not have.
  """
  known = _architecture(found)
  found = {**known.absent, **found}
  for key, value in known.fixed.items():
    if found.get(key, value) != value:
      raise ValueError(
        f'config.json has {key}={found[key]!r}, which has no counterpart here; '
        f'it must be {value!r}.'
      )
  rope = found.get('rope_parameters') or {}
  if rope.get('rope_type', 'default') != 'default':
    raise ValueError(
      f'config.json has rope_type={rope["rope_type"]!r}, which has no '
      "counterpart here; it must be 'default'."
    )
  try:
    bindings = {gin: found[key] for key, gin, _ in known.same}
    bindings |= known.to_ours(found)
  except KeyError as error:
    raise ValueError(
      f'config.json lacks {error.args[0]!r}, or has a value of it that is '
      'unknown here; write it out.'
    ) from error
  lines = [f'{name} = {value!r}' for name, value in bindings.items()]
  return '\n'.join([_IMPORTS, known.gin, *lines, ''])


_IMPORTS = """
from __gin__ import dynamic_registration
from sparse_experts.layers import attention
from sparse_experts.models import transformer
from sparse_experts.moe.routers import top_k
"""


def _describe(model: Language) -> dict[str, Any]:
  """The config.json of a model.

  Raises:
    ValueError: no architecture we know says the same; names what differs.
  """
  found, kind = arguments(model) | training(model), _kind(model)
  known = ARCHITECTURES[kind]
  try:
    written = {
      **known.absent,  # What transformers would take, where nothing says it.
      'model_type': kind,
      'architectures': [known.name],
      'dtype': 'float32',
    }
    written |= {key: found[path] for key, _, path in known.same}
    if written.get('num_key_value_heads', 0) is None:
      written['num_key_value_heads'] = written['num_attention_heads']
    written |= known.to_theirs(found)
  except KeyError as error:
    raise ValueError(
      f'this model cannot be {kind}: it has no {error.args[0]}.'
    ) from error
  wrong = differences(model, config.model_of(_gin(written)))
  if wrong:
    path, (mine, other) = next(iter(wrong.items()))
    remedy = known.remedies.get(
      path.rpartition('.')[2], 'that format has no other'
    )
    raise ValueError(
      f'this model cannot be {kind}: {path or "the model"} is {mine!r} and '
      f'would be {other!r}; {remedy}.'
    )
  return written


def _kind(model: Language) -> str:
  """The one `model_type` that a model can be."""
  if model.module.encoder is not None:
    return 'switch_transformers'
  norm = arguments(model)['decoder.make_block.make_attention.norm']
  return 'olmoe' if norm else 'mixtral'

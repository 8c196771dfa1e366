"""T5X's checkpoints of flaxformer's sparse encoder-decoders."""

from __future__ import annotations

import functools
import pathlib
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
from flax import serialization, traverse_util

from sparse_experts.config import provenance
from sparse_experts.convert import flaxformer, parameter_names, tensor_map, zarr
from sparse_experts.convert.arguments import arguments
from sparse_experts.convert.tensor_map import Place, Places, Target
from sparse_experts.convert.tensors import Found, Tensor
from sparse_experts.models.language import Language

MODEL = 'model.gin'  # What we leave beside a checkpoint in T5X's format.
_CONFIGS = ('config.gin', 'operative_config.gin')


def find(path: pathlib.Path) -> pathlib.Path:
  """The checkpoint at `path`: itself one, or a MODEL_DIR's latest.

  Raises:
    FileNotFoundError: there is none.
  """
  if (path / 'checkpoint').is_file() or (path / 'state/_METADATA').is_file():
    return path
  steps = {
    int(match[1]): folder
    for folder in path.glob('checkpoint_*')
    if (match := re.fullmatch(r'checkpoint_(\d+)', folder.name))
  }
  if not steps:
    raise FileNotFoundError(
      f'no T5X checkpoint in {path}; give a folder checkpoint_<step>, or a '
      'MODEL_DIR that holds some.'
    )
  return steps[max(steps)]


def read(path: pathlib.Path) -> Found:
  """The checkpoint at `path`, or a MODEL_DIR's latest."""
  path = find(path)
  legacy = (path / 'checkpoint').is_file()
  found, step, unused = _legacy(path) if legacy else _orbax(path / 'state')
  return Found(found, functools.partial(gin, path), step, unused)


def source_places(
  model: Language, names: Iterable[str], tensors: Iterable[str]
) -> dict[str, Place]:
  """Where plain parameters lie in a checkpoint with these tensors.

  Args:
    model: whose parameters they are.
    names: of its plain parameters.
    tensors: names of the checkpoint's.
  """
  return _scanned(target_places(model, names), tensors)


def target_places(model: Language, names: Iterable[str]) -> dict[str, Place]:
  """Where they lie without scan.

  Raises:
    ValueError: it is of a model that T5X's cannot be.
  """
  tokens, found = model.special_tokens, arguments(model)
  if (tokens.pad, tokens.start) != (0, 0):
    raise ValueError(
      f'this model pads with {tokens.pad} and begins with {tokens.start}, and '
      "T5X's with 0; convert it to native or hf."
    )
  if found['tied_logits'] and not found['embed.scaled_logits']:
    raise ValueError(
      'this model does not scale its tied logits, and flaxformer divides them '
      'by sqrt(EMBED_DIM); convert it to native or hf.'
    )
  return tensor_map.theirs(parameter_names.T5X, names)


def unsaid(model: Language) -> list[str]:
  """Nothing: our gin file of the model lies beside the checkpoint."""
  del model
  return []


def blocks_before(model: Language) -> dict[str, int]:
  """None: any block can be sparse."""
  del model
  return {}


def _orbax(folder):
  names = zarr.names(folder)
  wanted = [
    name for name in names if name.startswith('target/') or name == 'state/step'
  ]
  found = zarr.read(zarr.orbax_specs(folder, wanted))
  step = int(found.pop('state/step').read(()))
  others = {name.split('/')[0] for name in names} - {'target'}
  tensors = {name.removeprefix('target/'): x for name, x in found.items()}
  return tensors, step, sorted(others)


def _legacy(path):
  try:
    tree = serialization.msgpack_restore((path / 'checkpoint').read_bytes())
    tree = tree['optimizer']
    target: dict[str, Any] = traverse_util.flatten_dict(
      tree['target'],
      is_leaf=lambda _, leaf: not isinstance(leaf, dict) or 'driver' in leaf,
      sep='/',
    )
    step = int(tree['state']['step'])
  except Exception as error:
    raise ValueError(
      f'{path}/checkpoint is damaged, or not of T5X ({error}); fetch it again.'
    ) from error
  specs, found = {}, {}
  for name, leaf in target.items():
    if isinstance(leaf, dict):
      folder = path / leaf['kvstore']['path'].strip('/').rpartition('/')[2]
      specs[name] = zarr.spec(folder.parent, folder.name, ocdbt=False)
    else:
      found[name] = Tensor(leaf.shape, leaf.dtype, leaf.__getitem__)
  return found | zarr.read(specs), step, sorted(set(tree) - {'target'})


def _scanned(unscanned: Places, names: Iterable[str]) -> dict[str, Place]:
  """`unscanned` as a checkpoint with these tensors has them, scanned or not.

  A scan is over blocks `subblock_0` to `subblock_<period - 1>`; the number of
  its turns is axis 1 of every array.
  """
  periods: dict[str, int] = {}
  for name in names:
    if match := re.match(r'(\w+)/\1/subblock_(\d+)/', name):
      stack, j = match[1], int(match[2])
      periods[stack] = max(periods.get(stack, 0), j + 1)
  blocks = {
    name: re.fullmatch(r'(\w+)/layers_(\d+)/(.*)', place.name)
    for name, place in unscanned.items()
  }
  layers: dict[str, int] = {}
  for match in filter(None, blocks.values()):
    layers[match[1]] = max(layers.get(match[1], 0), int(match[2]) + 1)

  def moved(place, match):
    if not match or match[1] not in periods:
      return place
    stack, i, rest = match.groups()
    r, j = divmod(int(i), periods[stack])
    name = f'{stack}/{stack}/subblock_{j}/{rest}'
    return Place(name, place.rule, (1, r, layers[stack] // periods[stack]))

  return {name: moved(place, blocks[name]) for name, place in unscanned.items()}


def gin(path: pathlib.Path) -> str:
  """A gin file of the model of the checkpoint at `path`.

  It is ours if we wrote the checkpoint, otherwise read from T5X's operative
  configuration, both beside the checkpoint or in the folder above.

  Raises:
    FileNotFoundError: neither is there. ValueError: it is of no model we know.
  """
  for folder in (path, path.parent):
    if (folder / MODEL).is_file():
      return (folder / MODEL).read_text()
    for name in _CONFIGS:
      if (folder / name).is_file():
        return flaxformer.gin(provenance.statements(str(folder / name)))
  raise FileNotFoundError(
    f'neither {path} nor the folder above has the {_CONFIGS[0]} of T5X, so the '
    'model is unknown; put it there, or give --gin_file=MODEL.'
  )


class Writer:
  """Writes T5X's older format: a folder of zarr for each parameter.

  Attributes:
    folder: of the checkpoint.
  """

  def __init__(self, target: Target):
    self._shapes, self._step = target.shapes, target.step
    self.folder = target.folder / f'checkpoint_{target.step}'
    self.folder.mkdir(parents=True, exist_ok=True)
    self._arrays = zarr.Writer(
      self.folder,
      {f'target/{name}': shape for name, shape in target.shapes.items()},
      {f'target/{name}': part for name, part in target.parts.items()},
    )

  def write(self, name: str, index: tuple, array) -> None:
    """Writes a part of a parameter.

    Args:
      name, index, array: as of `zarr.Writer.write`.
    """
    self._arrays.write(f'target/{name}', index, array)

  def finish(self, gin: str) -> None:
    """Writes what refers to the arrays, and the model's gin file."""
    specs = {}
    for name, shape in self._shapes.items():
      array = f'target/{name}'
      layout = zarr.metadata(shape, self._arrays.chunks[array])
      specs[name] = {
        'driver': 'zarr',
        'dtype': 'float32',
        'kvstore': {'driver': 'file', 'path': f'{array.replace("/", ".")}/'},
        'metadata': {k: v for k, v in layout.items() if k != 'dtype'},
      }
    tree = {
      'version': 3,
      'optimizer': {
        'target': traverse_util.unflatten_dict(specs, sep='/'),
        'state': {'step': np.asarray(self._step, np.int32)},
      },
    }
    (self.folder / 'checkpoint').write_bytes(
      serialization.msgpack_serialize(tree)
    )
    (self.folder.parent / MODEL).write_text(gin)

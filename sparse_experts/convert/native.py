"""Our own checkpoints, MODEL_DIR/checkpoints/<step>/params."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable

import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

from sparse_experts.convert import tensor_map, zarr
from sparse_experts.convert.tensor_map import Place, Target
from sparse_experts.convert.tensors import Found, Shapes
from sparse_experts.models import layout
from sparse_experts.models.language import Language
from sparse_experts.training import checkpoints, checksums

CONFIG = 'config.gin'  # As `train` writes it, too.


def read(path: pathlib.Path) -> Found:
  """The checkpoint at `path`, a step or a MODEL_DIR's latest."""
  found, step = checkpoints.find(path)
  checkpoints.verify(found, 'params')
  folder = pathlib.Path(found)
  params = folder / 'params'
  specs = zarr.orbax_specs(params, zarr.names(params))
  others = {'data', 'optimizer'} & {item.name for item in folder.iterdir()}

  def gin():
    file = pathlib.Path(checkpoints.root_of(path)) / CONFIG
    if not file.is_file():
      raise FileNotFoundError(
        f'no {file}, so the model is unknown; put it there, or give '
        '--gin_file=MODEL.'
      )
    return file.read_text()

  return Found(zarr.read(specs), gin, step, sorted(others))


def source_places(
  model: Language, names: Iterable[str], tensors: Iterable[str]
) -> dict[str, Place]:
  """Where plain parameters lie in a checkpoint with these tensors.

  Args:
    model: whose parameters they are.
    names: of its plain parameters.
    tensors: names of the checkpoint's.
  """
  blocks = (layout.split_path(name.split('/')) for name in tensors)
  scanned = {at.stack for at in blocks if at and at.scanned}
  return tensor_map.ours(model, names, scanned)


def target_places(model: Language, names: Iterable[str]) -> dict[str, Place]:
  """Where they lie in the model's own tree."""
  scanned = {
    (stack,)
    for stack in ('encoder', 'decoder')
    if getattr(getattr(model.module, stack), 'scan', False)
  }
  return tensor_map.ours(model, names, scanned)


def unsaid(model: Language) -> list[str]:
  """Nothing: config.gin says all of a model."""
  del model
  return []


def blocks_before(model: Language) -> dict[str, int]:
  """None: any block can be sparse."""
  del model
  return {}


class Writer:
  """Writes the parameters of one step.

  Attributes:
    folder: a MODEL_DIR.
  """

  def __init__(self, target: Target):
    self.folder = target.folder
    self._step = checkpoints.directory_of(target.folder) / str(target.step)
    params = self._step / 'params'
    if not params.exists():
      _declare(params, target.shapes)
    self._arrays = zarr.Writer(
      pathlib.Path(params), target.shapes, target.parts
    )
    self.write = self._arrays.write

  def finish(self, gin: str) -> None:
    """Writes the model's gin file, and what is in the others."""
    checksums.write(self._step)
    (self.folder / CONFIG).write_text(gin)


class _Declare(ocp.type_handlers.TypeHandler):
  """Lets orbax write down which arrays there are, and no array.

  It is never asked to read: `training.checkpoints` does that.
  """

  def typestr(self) -> str:
    return 'np.ndarray'

  async def serialize(self, values, infos, args=None):
    return []

  async def deserialize(self, infos, args=None):
    raise NotImplementedError

  async def metadata(self, infos):
    raise NotImplementedError


def _declare(params, shapes: Shapes) -> None:
  """Creates the folder of an item 'params' with orbax's own metadata."""
  registry = ocp.type_handlers.create_type_handler_registry(
    (np.ndarray, _Declare())
  )
  handler = ocp.PyTreeCheckpointHandler(
    use_ocdbt=False, type_handler_registry=registry
  )
  tree = traverse_util.unflatten_dict(
    dict.fromkeys(shapes, np.zeros(0, np.float32)), sep='/'
  )
  with ocp.Checkpointer(handler) as checkpointer:
    checkpointer.save(params, args=ocp.args.PyTreeSave(tree))

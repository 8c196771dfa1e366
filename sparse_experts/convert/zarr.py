"""Arrays of T5X's and of our own checkpoints, read and written in parts."""

from __future__ import annotations

import functools
import json
import math
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from sparse_experts.convert.tensors import Shape, Shapes, Tensor
from sparse_experts.training import checkpoints

_CHUNK_BYTES = 2**26


def read(specs: Mapping[str, Mapping[str, Any]]) -> dict[str, Tensor]:
  """Tensors by name, of TensorStore's specifications of each.

  Raises:
    ValueError: one cannot be opened; the message names it.
  """
  opened = {
    name: ts.open(dict(spec), read=True) for name, spec in specs.items()
  }
  tensors = {}
  for name, future in opened.items():
    store = _named(name, future)
    dtype = store.dtype.numpy_dtype
    read = functools.partial(_read, name, store)
    tensors[name] = Tensor(tuple(store.shape), dtype, read)
  return tensors


def spec(folder: pathlib.Path, name: str, *, ocdbt: bool, driver: str = 'zarr'):
  """TensorStore's specification of an array.

  Args:
    folder: of the checkpoint's item.
    name: of the array.
    ocdbt: all arrays lie in one database; otherwise each in a folder.
    driver: 'zarr' or 'zarr3', the array's format.
  """
  kvstore = {'driver': 'file', 'path': f'{folder}/{name}/'}
  if ocdbt:
    kvstore = {'driver': 'ocdbt', 'base': f'file://{folder}/', 'path': name}
  return {
    'driver': driver,
    'kvstore': kvstore,
    'fill_missing_data_reads': False,  # A lost file is not a block of zeros.
  }


def metadata(shape: Shape, chunks: Shape) -> dict[str, Any]:
  """Zarr's metadata of a float32 array."""
  return {
    'shape': list(shape),
    'chunks': list(chunks),
    'compressor': {'id': 'zstd', 'level': 1},
    'dtype': '<f4',
  }


class Writer:
  """Writes float32 arrays, each into a folder of its own.

  Attributes:
    chunks: of each array.
  """

  def __init__(self, folder: pathlib.Path, shapes: Shapes, parts: Shapes):
    """Creates the arrays, or opens them where a conversion goes on.

    Args:
      folder: of the arrays' folders.
      shapes: of arrays.
      parts: the shape that each is written in parts of.
    """
    self._folder = folder
    self._shapes = shapes
    self.chunks = {name: _chunks(part) for name, part in parts.items()}

  def write(self, name: str, index: tuple, array: np.ndarray) -> None:
    """Writes the part of an array at an index of integers and slices.

    Args:
      name: of `shapes`.
      index: integers and slices, for the first axes.
      array: that part, written as float32.
    """
    folder = self._folder / name.replace('/', '.')
    store = ts.open(
      {
        'driver': 'zarr',
        'kvstore': {'driver': 'file', 'path': f'{folder}/'},
        'metadata': metadata(self._shapes[name], self.chunks[name]),
        'store_data_equal_to_fill_value': True,
      },
      open=True,
      create=True,
    ).result()
    store[index].write(np.asarray(array, np.float32)).result()


def _chunks(part: Shape) -> Shape:
  """At most _CHUNK_BYTES, of which whole numbers make up `part`, nearly."""
  chunks = list(part)
  for axis in range(len(chunks)):
    rest = 4 * math.prod(chunks) // chunks[axis]
    chunks[axis] = max(1, min(chunks[axis], _CHUNK_BYTES // rest))
  return tuple(chunks)


def _read(name, store, index):
  return _named(name, store[index].read() if index else store.read())


def _named(name: str, future: ts.Future) -> Any:
  try:
    return future.result()
  except Exception as error:
    reason = ' '.join(str(error).split())[:300]
    raise ValueError(
      f'tensor {name} is damaged or cut off ({reason}); fetch the checkpoint '
      'again.'
    ) from error


def names(folder: pathlib.Path) -> list[str]:
  """Names of the arrays that orbax saved in a folder.

  Raises:
    ValueError: its metadata cannot be read.
  """
  handler = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
  try:
    tree = handler.metadata(folder.absolute()).item_metadata.tree
  except Exception as error:
    raise ValueError(
      f'{folder} is damaged or no checkpoint of orbax ({error}); fetch it '
      'again.'
    ) from error
  return list(checkpoints.flatten(tree))


def orbax_specs(
  folder: pathlib.Path, names: Iterable[str]
) -> dict[str, dict[str, Any]]:
  """TensorStore's specifications of arrays that orbax saved."""
  facts = json.loads((folder / '_METADATA').read_text())
  driver = 'zarr3' if facts.get('use_zarr3') else 'zarr'
  ocdbt = (folder / 'manifest.ocdbt').exists()
  return {
    name: spec(
      folder.absolute(), name.replace('/', '.'), ocdbt=ocdbt, driver=driver
    )
    for name in names
  }

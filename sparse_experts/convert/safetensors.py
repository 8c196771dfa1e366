"""Hugging Face's safetensors files, read and written in parts.

A file is the length of its header, the header in JSON (for each tensor dtype,
shape and place) and the bytes. Reading the places here, rather than in the
library of that name, tells which tensor a truncated file lacks, and reading and
writing at them needs no memory but for the tensor at hand.
"""

from __future__ import annotations

import functools
import json
import math
import pathlib
import struct
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from sparse_experts.convert.tensors import Shapes, Tensor

_DTYPES = {
  'F32': np.dtype(np.float32),
  'BF16': np.dtype(ml_dtypes.bfloat16),
  'F16': np.dtype(np.float16),
}
INDEX = 'model.safetensors.index.json'
SHARD_BYTES = 5 * 10**9


def read(path: pathlib.Path) -> dict[str, Tensor]:
  """The tensors of one file.

  Raises:
    ValueError: it is damaged; the message names the first tensor cut off.
  """
  size = path.stat().st_size
  with path.open('rb') as file:
    start = file.read(8)
    length = struct.unpack('<Q', start)[0] if len(start) == 8 else size
    try:
      header = json.loads(file.read(length) if length < size else b'')
    except ValueError as error:
      raise ValueError(
        f'{path} is no safetensors file, or its header is cut off; fetch it '
        'again.'
      ) from error
  header.pop('__metadata__', None)
  first = 8 + length
  tensors = {}
  for name, entry in header.items():
    dtype, shape = entry['dtype'], tuple(entry['shape'])
    begin, end = (first + offset for offset in entry['data_offsets'])
    known = _DTYPES.get(dtype)
    if end > size or (
      known and end - begin != math.prod(shape) * known.itemsize
    ):
      raise ValueError(
        f'{path}: tensor {name} is truncated: {max(min(end, size) - begin, 0)} '
        f'bytes for {shape} {dtype}; fetch the file again.'
      )
    tensors[name] = Tensor(
      shape, known or dtype, functools.partial(_read, path, known, shape, begin)
    )
  return tensors


def _read(path, dtype, shape, begin, index):
  with path.open('rb') as file:
    file.seek(begin)
    array = np.fromfile(file, dtype, math.prod(shape))
  return array.reshape(shape)[index]


class Writer:
  """Writes float32 tensors into files of at most `shard_bytes`.

  Attributes:
    folder: of the files.
  """

  def __init__(
    self, folder: pathlib.Path, shapes: Shapes, shard_bytes: int = SHARD_BYTES
  ):
    self.folder = folder
    shards: list[dict[str, int]] = [{}]
    for name in shapes:
      size = 4 * math.prod(shapes[name])
      if shards[-1] and sum(shards[-1].values()) + size > shard_bytes:
        shards.append({})
      shards[-1][name] = size
    self._files, self._begin = {}, {}
    for i, shard in enumerate(shards):
      file = 'model.safetensors'
      if len(shards) > 1:
        file = f'model-{i + 1:05d}-of-{len(shards):05d}.safetensors'
      self._create(folder / file, {name: shapes[name] for name in shard})
    if len(shards) > 1:
      total = 4 * sum(math.prod(shape) for shape in shapes.values())
      index = {
        'metadata': {'total_size': total},
        'weight_map': {n: path.name for n, path in self._files.items()},
      }
      (folder / INDEX).write_text(json.dumps(index, indent=2))

  def write(self, name: str, index: tuple, array: np.ndarray) -> None:
    """Writes a whole tensor; `index` is ().

    Args:
      name: of `shapes`.
      index: ().
      array: of its shape, written as float32.
    """
    assert index == (), index
    with self._files[name].open('r+b') as file:
      file.seek(self._begin[name])
      np.ascontiguousarray(array, np.float32).tofile(file)

  def _create(self, path: pathlib.Path, shapes: Mapping) -> None:
    header: dict[str, dict[str, Any]] = {'__metadata__': {'format': 'pt'}}
    end = 0
    for name, shape in shapes.items():
      begin, end = end, end + 4 * math.prod(shape)
      header[name] = {
        'dtype': 'F32',
        'shape': list(shape),
        'data_offsets': [begin, end],
      }
    text = json.dumps(header, separators=(',', ':')).encode()
    text += b' ' * (-len(text) % 8)
    for name in shapes:
      self._files[name] = path
      self._begin[name] = 8 + len(text) + header[name]['data_offsets'][0]
    with path.open('r+b' if path.exists() else 'wb') as file:
      file.write(struct.pack('<Q', len(text)) + text)
      file.truncate(8 + len(text) + end)

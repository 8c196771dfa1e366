"""`pytorch_model.bin` files, read without torch and without running anything.

Such a file is a zip archive of a pickle and of the bytes of each storage. A
pickle can call any function; this reader knows the few names that tensors are
made of, refuses all others, and makes no tensor before it is asked for.
"""

from __future__ import annotations

import functools
import io
import pathlib
import pickle
import zipfile
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from sparse_experts.convert.tensors import Tensor

_STORAGES = {
  'FloatStorage': np.dtype(np.float32),
  'BFloat16Storage': np.dtype(ml_dtypes.bfloat16),
  'HalfStorage': np.dtype(np.float16),
  'DoubleStorage': np.dtype(np.float64),
  'LongStorage': np.dtype(np.int64),
  'IntStorage': np.dtype(np.int32),
}


class _Storage(NamedTuple):
  """Bytes of the archive that tensors look into."""

  key: str
  dtype: np.dtype


class _View(NamedTuple):
  """A tensor: where it begins in its storage, in elements, and its strides."""

  storage: _Storage
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]


def _rebuild_tensor(storage, offset, shape, strides, *_):
  return _View(storage, offset, tuple(shape), tuple(strides))


def _rebuild_parameter(view, *_):
  return view


_KNOWN = {
  ('collections', 'OrderedDict'): dict,
  ('torch._utils', '_rebuild_tensor_v2'): _rebuild_tensor,
  ('torch._utils', '_rebuild_parameter'): _rebuild_parameter,
  **{('torch', name): dtype for name, dtype in _STORAGES.items()},
}


class _Unpickler(pickle.Unpickler):
  """Knows the names in _KNOWN."""

  def find_class(self, module: str, name: str) -> Any:
    if (module, name) not in _KNOWN:
      raise pickle.UnpicklingError(f'it asks for {module}.{name}')
    return _KNOWN[module, name]

  def persistent_load(self, pid: Any) -> _Storage:
    _, dtype, key, _, _ = pid
    return _Storage(key, dtype)


def read(path: pathlib.Path) -> dict[str, Tensor]:
  """The tensors of one file.

  Raises:
    ValueError: it holds anything but a dictionary of tensors, or is damaged.
  """
  try:
    with zipfile.ZipFile(path) as archive:
      (pickled,) = (n for n in archive.namelist() if n.endswith('/data.pkl'))
      views = _Unpickler(io.BytesIO(archive.read(pickled))).load()
      folder = pickled.removesuffix('data.pkl') + 'data/'
      sizes = {
        info.filename.removeprefix(folder): info.file_size
        for info in archive.infolist()
      }
    if not isinstance(views, dict):
      raise pickle.UnpicklingError(f'it is a {type(views).__name__}')
    for name, view in views.items():
      if not isinstance(view, _View):
        raise pickle.UnpicklingError(f'{name} is a {type(view).__name__}')
  except Exception as error:
    raise ValueError(
      f'{path} is no dictionary of tensors as torch.save writes it ({error}); '
      'fetch it again, or use safetensors.'
    ) from error
  for name, view in views.items():
    needed = view.storage.dtype.itemsize * (view.offset + _span(view))
    if sizes.get(view.storage.key, 0) < needed:
      raise ValueError(
        f'{path}: tensor {name} is truncated: its storage has '
        f'{sizes.get(view.storage.key, 0)} bytes of {needed}; fetch the file '
        'again.'
      )
  return {
    name: Tensor(
      view.shape,
      view.storage.dtype,
      functools.partial(_read, path, folder, name, view),
    )
    for name, view in views.items()
  }


def _span(view: _View) -> int:
  """Elements from a tensor's first to behind its last."""
  if 0 in view.shape:
    return 0
  return 1 + sum((n - 1) * s for n, s in zip(view.shape, view.strides))


def _read(path, folder, name, view, index):
  dtype, count = view.storage.dtype, _span(view)
  try:
    with (
      zipfile.ZipFile(path) as archive,
      archive.open(folder + view.storage.key) as file,
    ):
      file.seek(view.offset * dtype.itemsize)
      flat = np.frombuffer(file.read(count * dtype.itemsize), dtype)
  except zipfile.BadZipFile as error:
    raise ValueError(
      f'{path}: tensor {name} is damaged ({error}); fetch the file again.'
    ) from error
  strides = [stride * dtype.itemsize for stride in view.strides]
  return np.lib.stride_tricks.as_strided(flat, view.shape, strides)[index]

"""What a run runs on."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from typing import Any

import jax
from etils import epath

from sparse_experts import storage

PACKAGES = ('sparse_experts', 'jax', 'jaxlib', 'flax', 'optax', 'libtpu')


def hardware(mesh: jax.sharding.Mesh) -> dict[str, Any]:
  """Devices, hosts and versions, for people to read.

  >>> from sparse_experts import sharding
  >>> hardware(sharding.make_mesh(devices=jax.devices()[:1]))['mesh']
  {'data': 1, 'expert': 1, 'model': 1}
  """
  devices = mesh.devices.flatten()
  return {
    'devices': f'{devices.size} x {devices[0].device_kind}',
    'mesh': dict(mesh.shape),
    'processes': jax.process_count(),
    'host': f'{platform.machine()}, {os.cpu_count()} cores',
    'system': f'{platform.system()}, Python {platform.python_version()}',
    'versions': {
      name: version for name in PACKAGES if (version := _version(name))
    },
  }


def write_hardware(model_dir: epath.PathLike, mesh: jax.sharding.Mesh) -> None:
  """Writes MODEL_DIR/hardware.json, in process 0."""
  if jax.process_index() == 0:
    path = epath.Path(model_dir) / 'hardware.json'
    text = json.dumps(hardware(mesh), indent=2) + '\n'
    storage.replace(path, text.encode())


def _version(package: str) -> str | None:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None

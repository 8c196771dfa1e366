"""Checkpoints in our own format, before and after a conversion."""

import functools

import numpy as np
import orbax.checkpoint as ocp
import pytest

from sparse_experts import config
from sparse_experts.convert import convert, tensor_map
from sparse_experts.training import checkpoints


def params_of(path):
  return checkpoints.flatten(checkpoints.load_params(path)[0])


def assert_same(some, others):
  assert some.keys() == others.keys()
  for name, array in some.items():
    assert array.dtype == others[name].dtype == np.float32, name
    np.testing.assert_array_equal(array, others[name], err_msg=name)


def write_native(folder, gin_text, seed):
  """A checkpoint as `train` writes it, of random parameters."""
  model = config.model_of(gin_text)
  where = tensor_map.ours(model, tensor_map.plain_shapes(model), ())
  shapes = tensor_map.expected(tensor_map.plain_shapes(model), where)
  random = np.random.default_rng(seed)
  params = {}
  for name, shape in shapes.items():
    *path, leaf = name.split('/')
    node = functools.reduce(lambda d, key: d.setdefault(key, {}), path, params)
    node[leaf] = random.normal(size=shape).astype(np.float32)
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(folder / 'checkpoints/0/params', params)
  (folder / 'config.gin').write_text(gin_text)
  return model


def refused(source, tmp_path, *words, **options):
  with pytest.raises((ValueError, FileNotFoundError)) as error:
    convert(source, tmp_path / 'output', **options)
  message = str(error.value)
  assert '\n' not in message
  assert all(word in message for word in words), message
  assert not list(tmp_path.glob('output*'))

"""Files of tensors: torch's pickles, safetensors, and the memory it takes."""

import io
import json
import os
import pickle
import subprocess
import sys
import types
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from sparse_experts.convert import axes, torch_files
from sparse_experts.convert import safetensors as ours


@pytest.fixture
def torch(monkeypatch):
  """A module that pickles find where torch's names are."""

  def _rebuild_tensor_v2(*_):
    raise AssertionError

  utils = types.ModuleType('torch._utils')
  utils._rebuild_tensor_v2 = _rebuild_tensor_v2
  _rebuild_tensor_v2.__module__ = 'torch._utils'
  _rebuild_tensor_v2.__qualname__ = '_rebuild_tensor_v2'
  module = types.ModuleType('torch')
  for name in ('FloatStorage', 'BFloat16Storage'):
    storage = type(name, (), {'__module__': 'torch'})
    setattr(module, name, storage)
  module._utils = utils
  monkeypatch.setitem(sys.modules, 'torch', module)
  monkeypatch.setitem(sys.modules, 'torch._utils', utils)
  return module


class Reference:
  """What torch.save writes for a storage."""

  def __init__(self, kind, key, size):
    self.pid = ('storage', kind, key, 'cpu', size)


class Call:
  """Pickled as a call of a function."""

  def __init__(self, function, *args):
    self.call = (function, args)

  def __reduce__(self):
    return self.call


def write_bin(path, contents, storages):
  """An archive as torch.save writes it, protocol 2."""

  class Pickler(pickle.Pickler):
    def persistent_id(self, thing):
      return getattr(thing, 'pid', None)

  stream = io.BytesIO()
  Pickler(stream, protocol=2).dump(contents)
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('model/data.pkl', stream.getvalue())
    for key, array in storages.items():
      archive.writestr(f'model/data/{key}', array.tobytes())


def tensor(torch, kind, key, size, offset, shape, strides):
  storage = Reference(getattr(torch, kind), key, size)
  rebuild = torch._utils._rebuild_tensor_v2
  return Call(rebuild, storage, offset, shape, strides, False, {})


def test_torch_files(tmp_path, torch):
  numbers = np.arange(12, dtype=np.float32)
  halves = (np.arange(3) / 2).astype(ml_dtypes.bfloat16)
  contents = {
    'whole': tensor(torch, 'FloatStorage', '0', 12, 0, (3, 4), (4, 1)),
    # The same bytes: two rows from the second, transposed.
    'view': tensor(torch, 'FloatStorage', '0', 12, 4, (4, 2), (1, 4)),
    'narrow': tensor(torch, 'BFloat16Storage', '1', 3, 0, (3,), (1,)),
  }
  path = tmp_path / 'pytorch_model.bin'
  write_bin(path, contents, {'0': numbers, '1': halves})
  found = torch_files.read(path)
  whole = numbers.reshape(3, 4)
  np.testing.assert_array_equal(found['whole'].read(()), whole)
  np.testing.assert_array_equal(found['view'].read(()), whole[1:].T)
  np.testing.assert_array_equal(found['view'].read((2,)), whole[1:, 2])
  assert found['narrow'].dtype == ml_dtypes.bfloat16
  assert found['narrow'].read(()).tolist() == [0, 0.5, 1]


def test_pickles_that_are_more_than_tensors(tmp_path, torch):
  path, witness = tmp_path / 'pytorch_model.bin', tmp_path / 'witness'
  for evil, name in [
    (Call(os.system, f'touch {witness}'), 'system'),
    (Call(eval, f"open('{witness}', 'w')"), 'eval'),
    (Call(getattr, 'text', 'upper'), 'getattr'),
  ]:
    write_bin(path, {'weight': evil}, {})
    with pytest.raises(ValueError, match=name):
      torch_files.read(path)
    assert not witness.exists()
  write_bin(path, {'weight': 3}, {})
  with pytest.raises(ValueError, match='weight is a int'):
    torch_files.read(path)
  path.write_bytes(b'no archive')
  with pytest.raises(ValueError, match='no dictionary of tensors'):
    torch_files.read(path)


def test_torch_file_with_too_little(tmp_path, torch):
  contents = {'wi': tensor(torch, 'FloatStorage', '0', 12, 0, (3, 4), (4, 1))}
  path = tmp_path / 'pytorch_model.bin'
  write_bin(path, contents, {'0': np.zeros(11, np.float32)})
  with pytest.raises(ValueError, match='wi is truncated: .* 44 bytes of 48'):
    torch_files.read(path)
  write_bin(path, contents, {'0': np.arange(12, dtype=np.float32)})
  data = path.read_bytes()
  nine = np.float32(9).tobytes()
  assert data.count(nine) == 1
  path.write_bytes(data.replace(nine, np.float32(-9).tobytes()))
  with pytest.raises(ValueError, match='wi is damaged'):
    torch_files.read(path)['wi'].read(())


def test_safetensors_in_shards(tmp_path):
  random = np.random.default_rng(0)
  arrays = {
    name: random.normal(size=shape).astype(np.float32)
    for name, shape in [('a', (3, 5)), ('b', (4,)), ('c', (2, 2, 2)), ('d', ())]
  }
  shapes = {name: array.shape for name, array in arrays.items()}
  # 60, 16, 32 and 4 bytes: a and b in 80, c and d in another.
  writer = ours.Writer(tmp_path, shapes, shard_bytes=80)
  for name, array in arrays.items():
    writer.write(name, (), array)
  index = json.loads((tmp_path / ours.INDEX).read_text())
  files = [f'model-0000{i}-of-00002.safetensors' for i in (1, 2)]
  first, second = files
  where = {'a': first, 'b': first, 'c': second, 'd': second}
  assert index['weight_map'] == where
  assert index['metadata']['total_size'] == 112
  for file in files:
    theirs = safetensors.numpy.load_file(tmp_path / file)
    assert set(theirs) == {name for name in where if where[name] == file}
    for name, tensor in ours.read(tmp_path / file).items():
      np.testing.assert_array_equal(theirs[name], arrays[name])
      np.testing.assert_array_equal(tensor.read(()), arrays[name])


def test_rules_of_axes():
  x_DxHxA = np.arange(24).reshape(2, 3, 4)
  y = axes.to_theirs(x_DxHxA, 'DHA = (HA)D')
  assert y[1 * 4 + 2, 1] == x_DxHxA[1, 1, 2]
  np.testing.assert_array_equal(
    axes.to_ours(y, 'DHA = (HA)D', x_DxHxA.shape), x_DxHxA
  )


# A Mixtral of 2.6 GB, whose largest tensor of either side has 67 MB, converted
# by a process that then says how much memory it ever had. Not by getrusage: its
# ru_maxrss counts what the parent had before it started this process.
MEASURE = """
import pathlib, re, sys
from sparse_experts import convert
convert.convert(sys.argv[1], sys.argv[2], target='native')
status = pathlib.Path('/proc/self/status').read_text()
print(1024 * int(re.search(r'VmHWM:\\s+(\\d+) kB', status).group(1)))
"""


@pytest.mark.slow
def test_memory(tmp_path):
  width, hidden, experts, layers, vocab = 1024, 4096, 16, 3, 16384
  config = {
    'model_type': 'mixtral',
    'vocab_size': vocab,
    'hidden_size': width,
    'intermediate_size': hidden,
    'num_hidden_layers': layers,
    'num_attention_heads': 8,
    'num_key_value_heads': 8,
    'num_local_experts': experts,
    'num_experts_per_tok': 2,
    'rms_norm_eps': 1e-5,
    'rope_theta': 1e4,
    'hidden_act': 'silu',
  }
  shapes = {
    'model.embed_tokens.weight': (vocab, width),
    'lm_head.weight': (vocab, width),
    'model.norm.weight': (width,),
  }
  for i in range(layers):
    layer = f'model.layers.{i}'
    for name in ('input', 'post_attention'):
      shapes[f'{layer}.{name}_layernorm.weight'] = (width,)
    for name in 'qkvo':
      shapes[f'{layer}.self_attn.{name}_proj.weight'] = (width, width)
    shapes[f'{layer}.block_sparse_moe.gate.weight'] = (experts, width)
    for e in range(experts):
      expert = f'{layer}.block_sparse_moe.experts.{e}'
      for name in ('w1', 'w3'):
        shapes[f'{expert}.{name}.weight'] = (hidden, width)
      shapes[f'{expert}.w2.weight'] = (width, hidden)
  source = tmp_path / 'hf'
  source.mkdir()
  (source / 'config.json').write_text(json.dumps(config))
  writer = ours.Writer(source, shapes)
  noise = np.random.default_rng(0).normal(size=2**22).astype(np.float32)
  for name, shape in shapes.items():
    writer.write(name, (), np.resize(noise, shape))
  total = sum(path.stat().st_size for path in source.iterdir())
  outcome = subprocess.run(
    [sys.executable, '-c', MEASURE, str(source), str(tmp_path / 'native')],
    capture_output=True,
    text=True,
    check=True,
  )
  largest = 4 * vocab * width
  bound = 3 * largest + 2**30
  assert total > 1.4 * bound
  assert int(outcome.stdout.split()[-1]) < bound

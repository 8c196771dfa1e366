"""convert --experts: fewer experts, copies of them, or another order."""

import json
import re
from functools import partial

import command
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from converted import assert_same, params_of, refused, write_native
from paths import DATA

from sparse_experts.convert import conversion, convert, load, tensor_map
from sparse_experts.moe.routers.top_k import route
from sparse_experts.surgery.selection import select

MIXTRAL = DATA / 'hf_mixtral_tiny'


def only(experts):
  return partial(select, experts=experts)


def model(router, sparse_layers=1, num_experts=5, layers=1):
  return f"""
include 'gin/models/decoder_only.gin'
include 'gin/routers/{router}.gin'
NUM_EMBEDDINGS = 11
NUM_LAYERS = {layers}
EMBED_DIM = 6
NUM_HEADS = 2
HEAD_DIM = 2
MLP_DIM = 3
NUM_EXPERTS = {num_experts}
SPARSE_LAYERS = {sparse_layers}
"""


def chosen(params, experts):
  """What every parameter is to be, in plain stacks."""
  axes = {'expert': 0, 'kernel': 1, 'balance_bias': 0}

  def of(name, array):
    found = re.search(r'/moe/(?:(expert)/|router/(.*))', name)
    return (
      np.take(array, experts, axes[found[1] or found[2]]) if found else array
    )

  return {name: of(name, array) for name, array in params.items()}


def test_renumbered_experts_are_the_same_model(tmp_path):
  order = [2, 0, 4, 3, 1]
  write_native(tmp_path / 'native', model('mixtral'), seed=0)
  convert(
    tmp_path / 'native',
    tmp_path / 'output',
    change=only(order),
  )
  built, before = load(tmp_path / 'native')
  _, after = load(tmp_path / 'output')
  kernels = [
    params['decoder']['layers_0']['moe']['router']['kernel']
    for params in (before, after)
  ]
  assert (kernels[0] != kernels[1]).any()
  logits = jax.jit(built.logits)
  batch = {'tokens': np.arange(2, 10).reshape(2, 4)}
  np.testing.assert_allclose(
    logits(after, batch), logits(before, batch), rtol=1e-4, atol=1e-4
  )


def test_some_experts_several_times(tmp_path, monkeypatch):
  """In pieces of two experts, out of a scanned stack, with routers' biases."""
  monkeypatch.setattr(tensor_map, 'PIECE_BYTES', 2 * 4 * 6 * 3)
  write_native(tmp_path / 'native', model('loss_free', layers=2), seed=0)
  convert(tmp_path / 'native', tmp_path / 'scan', bindings=['SCAN=True'])
  experts = [4, 0, 0, 3, 1, 4, 2]
  report = convert(
    tmp_path / 'scan',
    tmp_path / 'output',
    change=only(experts),
    bindings=['SCAN=False', 'NUM_EXPERTS=7'],
  )
  expected = chosen(params_of(tmp_path / 'native'), experts)
  assert expected['decoder/layers_0/moe/router/balance_bias'].shape == (7,)
  assert_same(params_of(tmp_path / 'output'), expected)
  assert report['parameters'] == sum(map(np.size, expected.values()))
  assert load(tmp_path / 'output')[0].module.decoder.num_layers == 2


def test_some_experts_to_another_format(tmp_path):
  output = tmp_path / 'hf'
  convert(
    MIXTRAL,
    output,
    target='hf',
    change=only([3, 1]),
    bindings=['NUM_EXPERTS=2'],
  )
  assert (
    json.loads((output / 'config.json').read_text())['num_local_experts'] == 2
  )
  before, after = (
    safetensors.numpy.load_file(folder / 'model.safetensors')
    for folder in (MIXTRAL, output)
  )
  block = 'model.layers.2.block_sparse_moe'
  for new, old in ((0, 3), (1, 1)):
    np.testing.assert_array_equal(
      after[f'{block}.experts.{new}.w2.weight'],
      before[f'{block}.experts.{old}.w2.weight'],
    )
  np.testing.assert_array_equal(
    after[f'{block}.gate.weight'], before[f'{block}.gate.weight'][[3, 1]]
  )
  assert sum('layers.0.block_sparse_moe.experts' in name for name in after) == 6


def test_copies_share_their_probability():
  """As docs/checkpoints.md says of one choice among 0.6 and 0.4."""
  assignment, _ = route(jnp.log(jnp.array([[[0.6, 0.4, 0.6]]])))
  assert assignment.expert_GxSxK.tolist() == [[[0]]]
  np.testing.assert_allclose(assignment.gate_GxSxK, 0.6 / 1.6, rtol=1e-6)


def test_it_goes_on_only_with_the_same_experts(tmp_path, monkeypatch):
  write_native(tmp_path / 'native', model('switch'), seed=1)
  read, calls = tensor_map.read, []

  def interrupted(*args):
    calls.append(args)
    if len(calls) > 6:
      raise KeyboardInterrupt
    return read(*args)

  order = [4, 3, 2, 1, 0]
  with monkeypatch.context() as patch:
    patch.setattr(conversion.tensor_map, 'read', interrupted)
    with pytest.raises(KeyboardInterrupt):
      convert(
        tmp_path / 'native',
        tmp_path / 'output',
        change=only(order),
      )
  with pytest.raises(ValueError, match='another conversion'):
    convert(
      tmp_path / 'native',
      tmp_path / 'output',
      change=only(order[::-1]),
    )
  report = convert(
    tmp_path / 'native',
    tmp_path / 'output',
    change=only(order),
  )
  assert report['resumed'] > 0
  assert_same(
    params_of(tmp_path / 'output'),
    chosen(params_of(tmp_path / 'native'), order),
  )


def test_what_is_refused(tmp_path):
  native = tmp_path / 'native'
  write_native(native, model('switch'), seed=0)
  five, two = range(5), ['NUM_EXPERTS=2']
  refused(native, tmp_path, 'no expert', '0,2,5', change=only([]))
  refused(
    native,
    tmp_path,
    'expert 5',
    '0 to 4',
    change=only([0, 5]),
    bindings=two,
  )
  refused(
    native,
    tmp_path,
    'expert -1',
    '0 to 4',
    change=only([-1]),
  )
  refused(
    native,
    tmp_path,
    'NUM_EXPERTS=3',
    '(5, ',
    '(3, ',
    change=only([0, 1, 4]),
  )
  refused(
    native,
    tmp_path,
    'num_layers',
    change=only(five),
    bindings=['NUM_LAYERS=2'],
  )
  refused(
    native, tmp_path, 'num_experts is 5, not 2', '--experts', bindings=two
  )
  file = tmp_path / 'two.gin'
  file.write_text(model('switch', num_experts=2))
  refused(native, tmp_path, '(5, ', '(2, ', '--experts', gin_files=[str(file)])
  report = convert(
    native,
    tmp_path / 'two',
    change=only([1, 2]),
    gin_files=[str(file)],
    dry_run=True,
  )
  assert report['missing'] == []
  write_native(tmp_path / 'hash', model('hash'), seed=0)
  refused(
    tmp_path / 'hash',
    tmp_path,
    'has Hash',
    change=only(five),
  )
  write_native(tmp_path / 'dense', model('switch', 0), seed=0)
  refused(
    tmp_path / 'dense',
    tmp_path,
    'has none',
    change=only([0]),
  )
  pyramid = model('switch', {0: 2, 1: 4}, layers=2)
  write_native(tmp_path / 'pyramid', pyramid, seed=0)
  refused(
    tmp_path / 'pyramid',
    tmp_path,
    '2 or 4 experts',
    change=only([0, 1]),
  )


def test_command(tmp_path):
  flags = ('convert', f'--input={MIXTRAL}', f'--output={tmp_path / "output"}')
  outcome = command.run(
    *flags, '--experts=3,0', '--gin.NUM_EXPERTS=2', '--json'
  )
  assert outcome.code == 0, outcome.stderr
  kernel = 'decoder/layers_0/moe/router/kernel'
  whole = load(MIXTRAL)[1]['decoder']['layers_0']['moe']['router']['kernel']
  np.testing.assert_array_equal(
    params_of(tmp_path / 'output')[kernel], whole[:, [3, 0]]
  )
  refused = command.run(*flags, '--experts=two')
  assert (refused.code, refused.stderr.count('\n')) == (2, 1)

"""precompile: meshes are legal, and programs are read to their end."""

import dataclasses
import functools
import importlib.util
import json
import pathlib

import command
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from paths import ROOT

from sparse_experts import config, sharding
from sparse_experts.commands import precompile as precompile_command
from sparse_experts.planning import chips, hlo, ledger, precompile, topology

MESHES = sorted(
  str(path.relative_to(ROOT)) for path in ROOT.glob('gin/meshes/*/*.gin')
)
LIBTPU = importlib.util.find_spec('libtpu') is not None
BASE = '--gin_file=gin/models/switch/base.gin'
# Large enough for products to be most of the arithmetic.
SMALL = (
  *('NUM_LAYERS=4', 'EMBED_DIM=64', 'NUM_HEADS=4', 'HEAD_DIM=16'),
  *('MLP_DIM=256', 'NUM_EXPERTS=4', 'NUM_EMBEDDINGS=64', 'BATCH_SIZE=32'),
  *('DTYPE=float32', "TASK_FEATURE_LENGTHS={'targets': 64}"),
  "MESH={'data': 2, 'expert': 4, 'model': 1}",
)


def run_of(*files, bindings=()):
  config.parse(['gin/runs/precompile.gin', *files], bindings, [])
  return config.bound(precompile.Run)()


# Looked at for their numbers only; without experts compiling takes little.
DENSE = ('SPARSE_LAYERS=0', 'NUM_LAYERS=2')
SHORT = ("TASK_FEATURE_LENGTHS={'inputs': 8, 'targets': 40}",)


@functools.cache
def measured(*bindings, what='train'):
  """The step of a small GLaM on 8 fake devices."""
  run = run_of('gin/models/glam/0.1b_64e.gin', bindings=(*SMALL, *bindings))
  return precompile.measure(run, jax.devices(), chips.CHIPS['v5e'], what)


def compiled_text(function, *arguments):
  return jax.jit(function).lower(*arguments).compile().as_text()


def test_a_topology_is_a_chip_and_so_many_devices():
  chip, num_devices = chips.parse_topology('v4:8x8x16')
  assert (chip.name, num_devices, chip.hbm_bytes >> 30) == ('v4', 1024, 30)
  # Two devices a chip, with half of its 2307 TFLOP/s and 192 GiB each.
  chip, num_devices = chips.parse_topology('tpu7x:2x2x1')
  assert (num_devices, chip.flops_bf16, chip.hbm_bytes >> 30) == (
    8,
    1153.5e12,
    94,
  )


@pytest.mark.parametrize(
  'name, message',
  [
    ('v9:4x4x4', 'chips are v4, v5e, v5p, v6e, tpu7x'),
    ('v5p', "v5p has 3 dimensions, as in 'v5p:4x4x4'"),
    ('v5e:2x4x4', "v5e has 2 dimensions, as in 'v5e:4x4'"),
    ('v5e:0x4', 'v5e has 2 dimensions'),
  ],
)
def test_another_topology_is_an_error(name, message):
  with pytest.raises(ValueError, match=message):
    chips.parse_topology(name)


def test_a_loop_costs_what_its_turns_cost():
  def body(x_BxD, w_DxD):
    return jnp.tanh(x_BxD @ w_DxD), None

  def looped(x_BxD, w_NxDxD):
    return jax.lax.scan(body, x_BxD, w_NxDxD)[0]

  def twice(x_BxD, w_NxDxD):  # A loop in a loop.
    turn = lambda x_BxD, _: (looped(x_BxD, w_NxDxD), None)
    return jax.lax.scan(turn, x_BxD, length=3)[0]

  arguments = jnp.ones((4, 32)), jnp.ones((6, 32, 32))
  product = 2 * 4 * 32 * 32
  for function, products in ((looped, 6), (twice, 18)):
    flops = hlo.Program(compiled_text(function, *arguments)).total.flops
    assert flops == pytest.approx(products * product, rel=0.1)
    assert flops >= products * product


def test_a_loop_that_data_stop_turns_as_often_as_is_said():
  def function(x_BxD, w_DxD):
    return jax.lax.while_loop(
      lambda x_BxD: x_BxD.sum() < 9, lambda x_BxD: x_BxD @ w_DxD, x_BxD
    )

  text = compiled_text(function, jnp.ones((4, 32)), jnp.ones((32, 32)))
  product = 2 * 4 * 32 * 32
  for turns, products in (({}, 1), ({'jit(function)/while': 7}, 7)):
    flops = hlo.Program(text, turns).total.flops
    assert products <= flops / product < products * 1.1


@pytest.mark.parametrize('filled', [1, 0.25])
def test_a_masked_ragged_product_counts_every_row_once(filled):
  """XLA's form of a small one: all 8 rows with each of 3 matrices, masked."""
  text = """HloModule m

%masked (w: f32[3,4,5], x: f32[8,4]) -> f32[3,8,5] {
  %w = f32[3,4,5]{2,1,0} parameter(0)
  %x = f32[8,4]{1,0} parameter(1)
  %xs = f32[3,8,4]{2,1,0} broadcast(%x), dimensions={1,2}
  ROOT %y = f32[3,8,5]{2,1,0} dot(%xs, %w), lhs_batch_dims={0}, rhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_contracting_dims={1}
}

ENTRY %main (w: f32[3,4,5], x: f32[8,4]) -> f32[3,8,5] {
  %w = f32[3,4,5]{2,1,0} parameter(0)
  %x = f32[8,4]{1,0} parameter(1)
  ROOT %f = f32[3,8,5]{2,1,0} fusion(%w, %x), kind=kOutput, calls=%masked, backend_config={"convolution_algorithm_config":{"is_ragged_dot":true,"num_groups_in_ragged_dot":"3"}}
}
"""  # noqa: E501
  flops = hlo.Program(text, filled=filled).total.flops
  assert flops == pytest.approx(filled * 2 * 8 * 4 * 5)


def test_the_kernel_of_a_ragged_product_counts_every_row_once():
  """XLA's form of a large one, of which it says -1."""
  kernel = (
    'custom-call(%s, %x, %w), custom_call_target="tpu_custom_call", '
    'operand_layout_constraints={s32[3]{0}, bf16[8,4]{1,0}, '
    'bf16[3,4,5]{2,1,0}}, frontend_attributes={ragged_dot_tiling="8,4,5"}'
  )
  text = f"""HloModule m

ENTRY %main (s: s32[3], x: bf16[8,4], w: bf16[3,4,5]) -> bf16[8,5] {{
  %s = s32[3]{{0}} parameter(0)
  %x = bf16[8,4]{{1,0}} parameter(1)
  %w = bf16[3,4,5]{{2,1,0}} parameter(2)
  ROOT %ragged-dot = bf16[8,5]{{1,0}} {kernel}
}}
"""
  # Rows of 4 and 5 numbers, a quarter of them; all of the matrices.
  assert hlo.Program(text, filled=0.25).total == pytest.approx(
    (0.25 * 2 * 8 * 4 * 5, 2 * (0.25 * 8 * (4 + 5) + 3 * 4 * 5)), abs=1
  )


def test_collectives_count_as_often_as_their_loop_turns():
  mesh = sharding.make_mesh()

  @jax.shard_map(
    mesh=mesh, in_specs=PartitionSpec('data'), out_specs=PartitionSpec('data')
  )
  def function(x_BxD):
    def body(x_BxD, _):
      total_D = jax.lax.psum(x_BxD.sum(0), 'data')
      return x_BxD * total_D[None], None

    return jax.lax.scan(body, x_BxD, length=5)[0]

  x_BxD = jax.ShapeDtypeStruct(
    (8, 16), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec('data'))
  )
  text = compiled_text(function, x_BxD)
  assert hlo.Program(text).collectives() == {
    'all-reduce': {'count': 5, 'bytes': 5 * 16 * 4}
  }


def test_collectives_are_counted_with_their_bytes():
  text = """HloModule m

ENTRY %main (x: f32[8]) -> f32[8] {
  %a = bf16[1,64,80]{2,1,0:T(8,128)(2,1)} all-to-all(%x), channel_id=1
  %b = f32[8]{0} all-reduce(%y), channel_id=2
  %c = (f32[4]{0}, f32[8]{0}) all-gather-start(%z), dimensions={0}
  %d = f32[8]{0} all-gather-done(%c)
  %e = ((f32[4]{0}, f32[2]{0}), (f32[8]{0}, f32[4]{0})) all-gather-start(%z, %w)
  %f = f32[6]{0} all-reduce-start(%y), channel_id=3
  %g = (f32[7]{0}, f32[7]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%y)
  ROOT %h = f32[8]{0} add(%a, %d)
}
"""  # noqa: E501
  assert hlo.Program(text).collectives() == {
    'all-to-all': {'count': 1, 'bytes': 2 * 64 * 80},
    'all-reduce': {'count': 2, 'bytes': 32 + 24},
    'all-gather': {'count': 2, 'bytes': 32 + 32 + 16},
    'collective-permute': {'count': 1, 'bytes': 28},
  }


def test_a_reduce_scatter_is_no_all_reduce():
  """XLA's form of it for TPU: a fusion that reduces all and keeps a part."""
  text = """HloModule m

%all-reduce-scatter.1 (p: f32[8,4]) -> f32[2,4] {
  %p = f32[8,4]{1,0} parameter(0)
  %all-reduce.1 = f32[8,4]{1,0} all-reduce(%p), channel_id=1
  %i = s32[] constant(0)
  ROOT %part = f32[2,4]{1,0} dynamic-slice(%all-reduce.1, %i, %i), dynamic_slice_sizes={2,4}
}

ENTRY %main (x: f32[8,4]) -> f32[2,4] {
  %x = f32[8,4]{1,0} parameter(0)
  %y = f32[8,4]{1,0} all-reduce(%x), channel_id=2
  ROOT %f = f32[2,4]{1,0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.1
}
"""  # noqa: E501
  assert hlo.Program(text).collectives() == {
    'all-reduce': {'count': 1, 'bytes': 8 * 4 * 4},
    'reduce-scatter': {'count': 1, 'bytes': 8 * 4 * 4},
  }


def test_a_gather_that_runs_aside_is_read():
  """Its `async-update` is what XLA prints and does not parse."""
  text = """HloModule m

%aside (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %double = f32[8]{0} add(%p, %p)
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %start = ((f32[8]{0}), f32[8]{0}, s32[]) async-start(%x), calls=%aside
  %update = ((f32[8]{0}), f32[8]{0}, s32[1]) async-update(%start, %x)
  ROOT %done = f32[8]{0} async-done(%update)
}
"""
  assert hlo.Program(text).total.flops == 8


def test_a_scanned_model_costs_what_it_costs_unrolled():
  flops = measured(*DENSE, 'SCAN=True', what='gradients')['flops']
  plain = measured(*DENSE, 'SCAN=False', what='gradients')['flops']
  assert flops['executed'] == pytest.approx(plain['executed'], rel=0.01)
  assert flops['useful'] == plain['useful'] < plain['executed']


def test_microbatches_cost_what_the_batch_costs():
  """A loop that holds the layers' loops; adding up gradients costs a little."""
  settings = (*DENSE, 'SCAN=True')
  whole = measured(*settings, what='gradients')['flops']
  parts = measured(*settings, 'MICROBATCHES=2', what='gradients')['flops']
  assert 1 <= parts['executed'] / whole['executed'] < 1.03


def test_all_is_there():
  facts = measured('SCAN=False', 'NUM_LAYERS=2')
  assert set(facts) == {
    *('fits', 'mesh', 'batch_size', 'lengths', 'optimizer', 'remat'),
    *('hbm_bytes', 'flops', 'bytes_accessed', 'collectives'),
    *('optimal_seconds', 'roofline', 'compile_seconds', 'host_peak_bytes'),
  }
  assert facts['mesh'] == {'data': 2, 'expert': 4, 'model': 1}
  assert (facts['optimizer'], facts['remat']) == ('adafactor', 'none')
  hbm = facts['hbm_bytes']
  assert set(hbm) == {'parameters', 'optimizer', 'peak', 'limit'}
  assert hbm['parameters'] + hbm['optimizer'] < hbm['peak'] < hbm['limit']
  kinds = {entry['kind'] for entry in facts['collectives']}
  assert 'all-to-all' in kinds


def test_parameters_are_those_of_one_device():
  # Experts lie on 4 of the 8 devices, FSDP halves all that have `embed`.
  settings = ('SCAN=False', 'NUM_LAYERS=2')
  whole = measured(*settings)['hbm_bytes']['parameters']
  halved = measured(*settings, *SHORT, "RULES={'embed': 'data'}", what='decode')
  assert 0.5 <= halved['hbm_bytes']['parameters'] / whole < 0.52


def test_decoding_costs_its_tokens():
  """Of prompts of 1 + 8 tokens and answers of 40, of which 39 are fed back."""
  facts = measured(*DENSE, *SHORT, 'SCAN=True', what='decode')
  assert facts['lengths'] == {'inputs': 8, 'targets': 40}
  assert (facts['optimizer'], facts['remat']) == (None, None)
  hbm = facts['hbm_bytes']
  assert hbm['optimizer'] == 0 < hbm['parameters'] < hbm['peak']
  # A block: Q, K, V, O and 3 matrices of a gated FFN; in attention each of the
  # 48 tokens looks at all.
  D, F, V, N = 64, 256, 64, 2
  block = 2 * (4 * D * D + 3 * D * F) + 4 * 48 * D
  answer = 48 * N * block + 40 * 2 * D * V
  assert facts['flops']['useful'] == 32 * answer / 8
  assert 1 < facts['flops']['executed'] / facts['flops']['useful'] < 1.3


def test_answers_may_be_longer_than_targets():
  run = run_of(
    'gin/models/switch/base.gin', bindings=('BATCH_SIZE=6', 'MAX_TOKENS=200')
  )
  assert run.lengths('decode') == {'inputs': 512, 'targets': 200}
  assert {name: x.shape for name, x in run.questions().items()} == {
    'encoder_input_tokens': (6, 512)
  }


@pytest.mark.parametrize('file', MESHES)
def test_a_mesh_is_legal_for_its_recipe(file):
  path = pathlib.Path(file)
  size, kind, sizes = path.stem.rsplit('_', 2)
  recipe = f'gin/models/{path.parent.name}/{size}.gin'
  assert (ROOT / recipe).exists()
  assert precompile_command.mesh_file_of(recipe, f'{kind}:{sizes}') == file
  assert f'# Requires: {recipe}\n' in (ROOT / file).read_text()
  _, num_devices = chips.parse_topology(f'{kind}:{sizes}')
  # Enough of a scanned model to meet every rule.
  precompile.check(run_of(recipe, file), num_devices)


@pytest.mark.parametrize(
  'bindings, message',
  [
    (
      ('NUM_EXPERTS=60', "MESH={'data': 1, 'expert': 16, 'model': 1}"),
      "axis 'expert' of size 60 does not divide over expert=16",
    ),
    (
      ("MESH={'data': 1, 'expert': 1, 'model': 16}", 'GROUP_SIZE=None'),
      "axis 'heads' of size 12 does not divide over model=16",
    ),
    (
      ("MESH={'data': 3, 'expert': 1, 'model': 1}",),
      'mesh axes must multiply to the number of devices',
    ),
    (
      ("MESH={'data': 16, 'expert': 1, 'model': 1}", 'MICROBATCHES=3'),
      'batch_size=2048 does not divide over 16 data shards',
    ),
    (('BATCH_SIZE=None',), 'the gin files say no BATCH_SIZE'),
    (('MAX_TOKENS=0',), 'max_tokens must be at least 1, not 0'),
  ],
)
def test_an_impossible_request_is_one_line(bindings, message):
  outcome = command.run(
    'precompile',
    BASE,
    '--topology=v5e:4x4',
    '--json',
    *(f'--gin.{binding}' for binding in bindings),
  )
  assert (outcome.code, outcome.stdout) == (2, '')
  assert message in outcome.stderr
  assert outcome.stderr.count('\n') == 1


def test_an_unknown_topology_or_step_is_one_line():
  for arguments, message in (
    (('--topology=v5q:4x4',), "unknown topology 'v5q:4x4'"),
    (('--topology=v5e:4x4', '--step=eval'), 'step must be one of train,'),
  ):
    outcome = command.run('precompile', BASE, '--json', *arguments)
    assert (outcome.code, outcome.stderr.count('\n')) == (2, 1)
    assert message in outcome.stderr


@pytest.mark.skipif(LIBTPU, reason='libtpu is here')
def test_without_libtpu_there_is_a_remedy():
  outcome = command.run('precompile', BASE, '--topology=v5e:2x4', '--json')
  assert outcome.code == 2
  assert "pip install 'sparse_experts[precompile]'" in outcome.stderr


def test_a_run_says_its_own_mesh():
  """A recipe's mesh comes from gin/meshes/, a run's from the run."""
  parser_arguments = {'topology': 'v5e:2x4', 'gin_search_paths': ''}
  for files, bindings, microbatches in (
    (['gin/models/switch/base.gin'], [], 1),
    (['gin/models/switch/base.gin'], ['MICROBATCHES=4'], 4),
    (['gin/quickstart.gin'], [], 1),
  ):
    arguments = dataclasses.make_dataclass('Arguments', ['gin_file'])(files)
    vars(arguments).update(parser_arguments, bindings=bindings)
    precompile_command.parse(arguments)
    assert config.bound(precompile.Run)().microbatches == microbatches


@pytest.mark.skipif(not LIBTPU, reason='libtpu is not here')
@pytest.mark.slow
@pytest.mark.parametrize('step', precompile.STEPS)
def test_a_pod_that_is_not_there_is_compiled_for(step):
  arguments = [f'--gin.{binding}' for binding in SMALL]
  outcome = command.run(
    'precompile',
    '--gin_file=gin/models/glam/0.1b_64e.gin',
    '--topology=v5e:2x4',
    f'--step={step}',
    '--json',
    *arguments,
  )
  assert outcome.code == 0, outcome.stderr
  facts = json.loads(outcome.stdout)
  assert (facts['chips'], facts['fits']) == (8, True)
  assert facts['host_peak_bytes'] < 8 * 2**30


@pytest.mark.skipif(not LIBTPU, reason='libtpu is not here')
@pytest.mark.slow
def test_what_does_not_fit_says_what_it_needs():
  devices = topology.devices('v5e:2x2')
  placed = NamedSharding(
    sharding.make_mesh(devices=devices), PartitionSpec(None)
  )
  x = jax.ShapeDtypeStruct((2**33,), jnp.bfloat16, sharding=placed)
  with pytest.raises(topology.DoesNotFit) as error:
    topology.compile(jax.jit(lambda x: x + 1).lower(x))
  assert error.value.needed_bytes == pytest.approx(2**35, rel=0.01)


def test_an_objective_without_text_is_measured_and_not_decoded():
  bindings = ('NUM_LAYERS=2', 'EMBED_DIM=16', 'HEAD_DIM=4', 'MLP_DIM=32')
  run = run_of('gin/small/classification.gin', bindings=bindings)
  facts = precompile.measure(run, jax.devices(), chips.CHIPS['v5e'], 'train')
  assert (facts['fits'], facts['lengths'], facts['remat']) == (True, {}, 'none')
  # Forward and backward are three times forward at least, of 64 images.
  per_device = facts['flops']
  useful = ledger.ledger(run.model)['train_flops_per_sequence'] * 64
  assert per_device['useful'] == useful / 8
  assert per_device['executed'] > 0.9 * per_device['useful']
  with pytest.raises(ValueError, match='Classification writes no text'):
    precompile.check(run, 8, 'decode')

"""Programs are what their ledgers keep, and one that is not is named."""

import argparse
import importlib.util
import json
import os
import subprocess
import sys

import checkout
import command
import pytest
from paths import DATA, ROOT

from sparse_experts import config
from sparse_experts.commands import precompile as precompile_command
from sparse_experts.planning import (
  chips,
  precompile,
  program_ledger,
  topology,
)

FOLDER = DATA / 'ledgers'
KEPT = sorted(FOLDER.glob('*.json'))
SMALL = program_ledger.Ledger(
  gin_file=['gin/models/glam/0.1b_64e.gin'],
  bindings=[
    *('SPARSE_LAYERS=0', 'NUM_LAYERS=2', 'SCAN=True', 'NUM_EMBEDDINGS=64'),
    *('EMBED_DIM=64', 'NUM_HEADS=4', 'HEAD_DIM=16', 'MLP_DIM=256'),
    *('BATCH_SIZE=32', "TASK_FEATURE_LENGTHS={'targets': 48}"),
  ],
  topology='v5e:2x4',
  slices=1,
  step='train',
  versions={'jax': '0.0.1'},
  quantities={'executed FLOPs': 100, 'all-gather count': 50},
)
needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec('libtpu') is None,
  reason='libtpu, which compiles for TPU, is not here',
)


def run_of(ledger):
  """The run that a ledger is of, and its number of devices."""
  precompile_command.parse(
    argparse.Namespace(gin_search_paths='', **vars(ledger))
  )
  _, num_devices = chips.parse_topology(ledger.topology, ledger.slices)
  return config.bound(precompile.Run)(), num_devices


def test_what_differs_most_is_first():
  kept = {'a': 100, 'b': 200, 'c': 0}
  assert program_ledger.differences(kept, {'a': 99, 'b': 210, 'c': 0}) == [
    ('b', 0.05),
    ('a', -0.01),
    ('c', 0),
  ]
  # A collective that is new, and one that is gone.
  assert program_ledger.differences({'a': 4}, {'b': 1}) == [
    ('a', -1),
    ('b', 1),
  ]


@pytest.mark.parametrize('flops, faulty', [(98, 0), (102, 0), (97.9, 1)])
def test_two_percent_are_allowed(flops, faulty):
  found = {'executed FLOPs': flops, 'all-gather count': 50}
  fault = program_ledger.fault(SMALL, found)
  assert bool(fault) == faulty
  if faulty:
    assert fault.startswith('executed FLOPs 97.9, kept is 100 (-2.1%; kept by ')
    assert 'kept by jax 0.0.1, found by jax ' in fault


def test_a_ledger_is_what_was_written(tmp_path):
  SMALL.write(tmp_path / 'a.json')
  assert program_ledger.read(tmp_path / 'a.json') == SMALL
  (tmp_path / 'b.json').write_text('{"gin_file": []}')
  with pytest.raises(ValueError, match=r'b\.json is no ledger of a program'):
    program_ledger.read(tmp_path / 'b.json')


def test_memory_is_that_of_hbm():
  """Not vector memory (a color), and not what lives within an operation."""
  buffers = """BufferAssignment:
allocation 0: size 512, page 0, thread-local:
 value: <1611 or.1427 @0> (size=512,offset=0): u32[]{:T(128)}
allocation 1: size 4096, page 0, parameter 46, shape |f32[8,128]| at ShapeIndex {}, maybe-live-out:
 value: <22242 param.56 @0> (size=4096,offset=0): f32[8,128]{1,0:T(8,128)}
allocation 2: size 16, page 0, constant:
allocation 3: size 1000, page 0, preallocated-temp:
allocation 4: size 14336, color 6, page 0, preallocated-temp:
"""  # noqa: E501
  assert topology.hbm_bytes(buffers) == 4096 + 16 + 1000


def test_a_compiler_is_ended_once_it_has_assigned_buffers():
  """Of this one XLA's files are all there is; alone it would take an hour."""
  program = """
import pathlib, tempfile, time
folder = pathlib.Path(tempfile.mkdtemp())
for name, text in (
  ('after_optimizations-buffer-assignment', 'allocation 0: size 7, page 0:'),
  ('after_optimizations', 'HloModule m'),
  ('after_optimizations_after_buffer_assignment', ''),
):
  (folder / f'module_0000.jit_f.{name}.txt').write_text(text)
time.sleep(3600)
"""
  planned = topology.planned([sys.executable, '-c', program])
  assert planned == ('HloModule m', 7)


def test_a_compiler_that_fails_is_heard():
  program = "import sys; sys.exit('a warning\\nerror: no such mesh.')"
  with pytest.raises(ValueError, match=r'^no such mesh\.$'):
    topology.planned([sys.executable, '-c', program])


def test_quantities_are_those_of_one_device():
  """In a loop of five turns, a gather of a matrix and a product with it."""
  text = """HloModule m

%body (t: (s32[], f32[8,4], f32[4,4])) -> (s32[], f32[8,4], f32[4,4]) {
  %t = (s32[], f32[8,4]{1,0}, f32[4,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = f32[8,4]{1,0} get-tuple-element(%t), index=1
  %part = f32[4,4]{1,0} get-tuple-element(%t), index=2
  %w = f32[4,4]{1,0} all-gather(%part), channel_id=1, dimensions={0}
  %y = f32[8,4]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %out = (s32[], f32[8,4]{1,0}, f32[4,4]{1,0}) tuple(%i, %y, %part)
}

%condition (t: (s32[], f32[8,4], f32[4,4])) -> pred[] {
  %t = (s32[], f32[8,4]{1,0}, f32[4,4]{1,0}) parameter(0)
  ROOT %more = pred[] constant(true)
}

ENTRY %main (t: (s32[], f32[8,4], f32[4,4])) -> (s32[], f32[8,4], f32[4,4]) {
  %t = (s32[], f32[8,4]{1,0}, f32[4,4]{1,0}) parameter(0)
  ROOT %loop = (s32[], f32[8,4]{1,0}, f32[4,4]{1,0}) while(%t), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"5"}}
}
"""  # noqa: E501
  run, num_devices = run_of(SMALL)
  found = program_ledger.quantities(
    run, num_devices, 'train', topology.Planned(text, 99)
  )
  # Useful: a token of 48 meets, in each of 2 blocks, Q, K, V, O and 3 matrices
  # of a gated FFN, and looks at all 48; then the logits. Backward is twice
  # that. A device has 4 of 32 texts.
  D, F, V, N, L = 64, 256, 64, 2, 48
  token = N * (2 * (4 * D * D + 3 * D * F) + 4 * L * D) + 2 * D * V
  assert found == {
    'executed FLOPs': 5 * 2 * 8 * 4 * 4,
    'useful FLOPs': 3 * L * token * 32 / 8,
    'peak HBM bytes': 99,
    'all-gather count': 5,
    'all-gather bytes': 5 * 4 * 4 * 4,
  }


@pytest.mark.parametrize(
  'arguments, message',
  [
    (['--gin_file=a.gin'], '--gin_file and --gin.NAME go with --write_ledger'),
    (['--topology=v5e:2x4'], 'goes with neither --topology nor --dry_run'),
    ([], 'has no ledger'),
  ],
)
def test_a_check_says_what_it_cannot_do(tmp_path, arguments, message):
  outcome = command.run('precompile', f'--check_ledgers={tmp_path}', *arguments)
  assert (outcome.code, outcome.stderr.count('\n')) == (2, 1)
  assert message in outcome.stderr


def test_twelve_recipes_are_kept():
  ledgers = [program_ledger.read(path) for path in KEPT]
  assert len(ledgers) == 12
  assert {ledger.versions['libtpu'] for ledger in ledgers} == {'0.0.52'}


@pytest.mark.slow
@pytest.mark.parametrize('path', KEPT, ids=lambda path: path.stem)
def test_useful_flops_are_what_is_kept(path):
  """All that can be told of a program without libtpu."""
  ledger = program_ledger.read(path)
  run, num_devices = run_of(ledger)
  useful = run.useful_flops(ledger.step) / num_devices
  assert useful == pytest.approx(ledger.quantities['useful FLOPs'], rel=0.02)


def precompile_alone(folder, *arguments):
  """`precompile` of a checkout as users have it, without the tests' flags."""
  environment = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith(('JAX_', 'XLA_'))
  }
  return subprocess.run(
    [sys.executable, '-m', 'sparse_experts', 'precompile', *arguments],
    cwd=folder,
    env=environment | {'PYTHONPATH': str(folder)},
    capture_output=True,
    text=True,
  )


@needs_libtpu
@pytest.mark.slow
def test_programs_are_what_is_kept():
  done = precompile_alone(ROOT, f'--check_ledgers={FOLDER}', '--json')
  assert done.returncode == 0, done.stderr
  assert set(json.loads(done.stdout)) == {path.stem for path in KEPT}


@needs_libtpu
@pytest.mark.slow
def test_a_rule_without_its_axis_is_found(tmp_path):
  """GLaM's logits, then whole on all four devices of `model`; it still fits."""
  checkout.copy(tmp_path)
  rules = tmp_path / 'sparse_experts/sharding/placement.py'
  before = rules.read_text()
  assert before.count("'vocab': 'model'") == 1
  rules.write_text(before.replace("'vocab': 'model'", "'vocab': None"))
  name = 'tests/data/ledgers/glam_64b_64e_v5p_8x8x8.json'
  done = precompile_alone(tmp_path, f'--check_ledgers={name}')
  assert done.returncode == 2, done.stderr
  assert done.stderr.count('\n') == 1
  assert '1 of 1 programs are not what is kept' in done.stderr
  assert name in done.stderr

"""bench step: its rows, and where it says that time goes."""

import json
import re

import command
import jax
import jax.numpy as jnp
import pytest

from sparse_experts import moe
from sparse_experts.bench import profile, step
from sparse_experts.layers.mlp import Mlp
from sparse_experts.moe.dispatchers import load, names

TINY = [
  f'--gin.{setting}'
  for setting in (
    'EXPERTS=(4,)',
    "TASK_FEATURE_LENGTHS={'inputs': 8, 'targets': 8}",
    'BATCH_SIZE=2',
    'NUM_EMBEDDINGS=64',
    'NUM_LAYERS=2',
    'EMBED_DIM=8',
    'NUM_HEADS=2',
    'HEAD_DIM=4',
    'MLP_DIM=16',
    'GROUP_SIZE=16',
    'DECODER_GROUP_SIZE=16',
    'ROUNDS=3',
  )
]


def test_rows_have_what_the_page_shows():
  outcome = command.run('bench', 'step', '--json', '--profile', *TINY)
  assert outcome.code == 0, outcome.stderr
  dense, sparse = json.loads(outcome.stdout)
  assert (dense['experts'], sparse['experts']) == (None, 4)
  for row in (dense, sparse):
    low, high = row['rate_iqr']
    assert 0 < low <= row['rate'] <= high
    assert sum(row['parts'].values()) == pytest.approx(1)
    assert {'attention', 'embedding and loss', 'optimizer'} <= {*row['parts']}
  assert {'experts', 'routing'} <= {*sparse['parts']}
  assert not {'experts', 'routing'} & {*dense['parts']}
  # A router of each stack, 2 x 8 x 4 for each of its 16 tokens, three times.
  assert sparse['useful_flops'] - dense['useful_flops'] == 3 * 32 * 2 * 8 * 4


def test_rates_are_of_a_round():
  """Rounds of 1 and 4 seconds beside products of 2 and 4: 2 and 1 times."""
  product = 2 * 4096 * 1024 * 4096
  row = step.row({'useful_flops': product}, [1.0, 4.0], [2.0, 4.0])
  assert row['rate'] == 1.5 and row['rate_iqr'] == [1.25, 1.75]
  assert row['seconds'] == 2.5
  assert row['machine_flops_per_second'] == product * (1 / 2 + 1 / 4) / 2


def test_a_table_for_people():
  alone = [*TINY[1:], '--gin.EXPERTS=()']
  outcome = command.run('bench', 'step', '--profile', *alone)
  heading, dense, blank, *parts = outcome.stdout.splitlines()
  assert heading.split()[:2] == ['model', 'seconds']
  assert dense.split()[0] == 'dense' and blank == ''
  assert parts[0].split() == ['part', 'of', 'the', 'time', 'dense']
  assert all(line.endswith('%') for line in parts[1:])


@pytest.mark.parametrize(
  'given',
  [
    ('bench', 'decode', '--profile'),
    ('bench', 'step', '--profile', '--topology=v5e:2x2'),
  ],
)
def test_what_is_not_timed_here_has_no_profile(given):
  outcome = command.run(*given)
  assert outcome.code == 2
  assert outcome.stderr == (
    'error: --profile is for bench step, timed on this machine.\n'
  )


@pytest.mark.parametrize('name', names())
def test_every_dispatcher_names_what_it_does(name):
  """Forward and backward, so that profiles can be read."""
  layer = moe.MoE(
    make_router=lambda **given: moe.TopK(num_experts=2, k=1, **given),
    make_expert=lambda **given: Mlp(hidden_width=3, **given),
    dispatch=load(name),
  )
  x_BxLxD = jax.ShapeDtypeStruct((1, 4, 2), 'float32')
  params = jax.eval_shape(layer.init, jax.random.key(0), x_BxLxD)

  def loss(params, x_BxLxD):
    y_BxLxD, _ = layer.apply(params, x_BxLxD, capacity_factor=1.0)
    return jnp.square(y_BxLxD).sum()

  lowered = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, x_BxLxD)
  paths = lowered.as_text(debug_info=True).splitlines()
  for scope in ('router', 'dispatch', 'experts', 'combine'):
    of_scope = [x for x in paths if scope in re.split(r'[/()"]', x)]
    assert any('transpose(' in path for path in of_scope), scope
    assert any('transpose(' not in path for path in of_scope), scope


def test_parts_of_a_program():
  """What is fused is of its products; only what computes nothing is a copy."""
  text = """HloModule jit_step

%dots (p: f32[2,2], q: f32[2,2]) -> f32[2] {
  %p = f32[2,2]{1,0} parameter(0)
  %q = f32[2,2]{1,0} parameter(1)
  %dot.1 = f32[2,2]{1,0} dot(%p, %q), metadata={op_name="jvp(M)/experts/dot"}
  ROOT %sum = f32[2]{0} reduce(%dot.1), metadata={op_name="jvp(M)/norm/sum"}
}

%adds (p: f32[2]) -> f32[2] {
  %p.2 = f32[2]{0} parameter(0)
  %copied = f32[2]{0} copy(%p.2)
  ROOT %add.2 = f32[2]{0} add(%copied), metadata={op_name="jvp(M)/norm/add"}
}

%fills (p: f32[]) -> f32[2] {
  %p.3 = f32[] parameter(0)
  ROOT %filled = f32[2]{0} broadcast(%p.3), metadata={op_name="M/norm/mul"}
}

ENTRY %main (a: f32[2,2]) -> f32[2] {
  %fused = f32[2]{0} fusion(%a), calls=%dots, metadata={op_name="M/norm/sum"}
  %copy_add = f32[2]{0} fusion(%b), calls=%adds, metadata={op_name="M/norm/add"}
  %wrapped = f32[2]{0} fusion(%c), calls=%fills, metadata={op_name="M/norm/mul"}
  %alone = (f32[2]{0}, s32[]) custom-call(%d)
  ROOT %add.7 = f32[] add(%d), metadata={op_name="transpose(jvp(loss))/add"}
}
"""
  parts = profile.operation_parts(text)
  expected = {
    'fused': 'experts',
    'copy_add': profile.OTHER,
    'wrapped': profile.COPIES,
    'alone': profile.UNNAMED,
    'add.7': 'embedding and loss',
  }
  assert {name: parts[name] for name in expected} == expected

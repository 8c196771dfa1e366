"""bench step: its rows, and where it says that time goes."""

import json
import re

import command
import jax
import jax.numpy as jnp
import pytest

from sparse_experts import moe
from sparse_experts.bench import profile
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
    assert row['rate'] == pytest.approx(
      row['useful_flops'] / row['seconds'] / row['machine_flops_per_second'],
      rel=2,  # A median of ratios, not the ratio of medians.
    )
    assert sum(row['parts'].values()) == pytest.approx(1)
    assert {'attention', 'embedding and loss', 'optimizer'} <= {*row['parts']}
  assert {'experts', 'routing'} <= {*sparse['parts']}
  assert not {'experts', 'routing'} & {*dense['parts']}
  # A router of each stack, 2 x 8 x 4 for each of its 16 tokens, three times.
  assert sparse['useful_flops'] - dense['useful_flops'] == 3 * 32 * 2 * 8 * 4


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
  text = '\n'.join(
    [
      'HloModule jit_step',
      '  %dot.1 = f32[4,2]{1,0} dot(%a, %b), metadata={op_name="jit(step)/'
      'jvp(Model)/layers_1/moe/experts/vmap(Mlp)/dot_general" id=3}',
      '  ROOT %add.7 = f32[] add(%c, %d), metadata={op_name="jit(step)/'
      'transpose(jvp(loss))/add"}',
      '  %copy.2 = f32[2]{0} copy(%e)',
    ]
  )
  scopes = profile.operation_scopes(text)
  assert {
    name: profile.part_of(name, scope) for name, scope in scopes.items()
  } == {
    'dot.1': 'experts',
    'add.7': 'embedding and loss',
  }
  assert profile.part_of('copy.2', '') == 'copies'
  assert (
    profile.part_of('add.1', 'jit(step)/jvp(Model)/norm/mul') == profile.OTHER
  )

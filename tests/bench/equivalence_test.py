"""Every legal router x dispatcher x mesh is the numpy oracle."""

import collections
import functools
import json

import command
import jax
import pytest

from sparse_experts import sharding
from sparse_experts.bench import equivalence
from sparse_experts.moe import TopK, dispatchers, gather

SOFT = {'soft_moe'}


@pytest.fixture(
  scope='module',
  params=[
    pytest.param(
      ("--gin.ROUTERS=('switch', 'st_moe', 'soft_moe')",), id='some'
    ),
    pytest.param((), id='all', marks=pytest.mark.slow),  # Two minutes.
  ],
)
def table(request):
  """What the command says."""
  outcome = command.run('equivalence', '--json', *request.param)
  assert outcome.code == 0, outcome.stderr
  return json.loads(outcome.stdout)


def test_no_legal_combination_differs(table):
  far = [
    row
    for row in table
    if row['legal']
    and not (
      row['output_difference'] < 1e-5 and row['gradient_difference'] < 1e-4
    )
  ]
  assert not far


def test_only_soft_weights_are_illegal_and_only_where_choices_are_meant(table):
  for row in table:
    soft = row['router'] in SOFT and row['dispatcher'] != 'einsum'
    assert row['legal'] == (not soft), row
    assert soft == ('soft weights' in row.get('reason', ''))


def test_the_table_is_wide(table):
  of_router, of_dispatcher = (collections.defaultdict(set) for _ in range(2))
  for row in table:
    if row['legal']:
      of_router[row['router']].add(row['dispatcher'])
      if row['mesh']['expert'] > 1:
        mesh = tuple(row['mesh'].values())
        of_dispatcher[row['dispatcher']].add(mesh)
  assert all(len(of_router[name]) >= 2 for name in of_router.keys() - SOFT)
  assert all(len(meshes) >= 3 for meshes in of_dispatcher.values())
  # Those have meshes in tests of their own.
  others = {'all_experts', 'gather_dropless'}
  assert set(of_dispatcher) >= set(dispatchers.names()) - others


@pytest.fixture(scope='module')
def comparison():
  return equivalence.Comparison(functools.partial(TopK, num_experts=8, k=2))


def one_device():
  return sharding.make_mesh(devices=jax.devices()[:1])


def test_a_wrong_gradient_shows(comparison):
  def no_gradient_of_gates(experts, x, assignment, capacity):
    gates = jax.lax.stop_gradient(assignment.gate_GxSxK)
    assignment = assignment.replace(gate_GxSxK=gates)
    return gather(experts, x, assignment, capacity)

  output, gradient = comparison.difference(no_gradient_of_gates, one_device())
  assert output < 1e-5 and gradient > 0.1


def test_a_misrouted_token_shows(comparison):
  def one_expert_further(experts, x, assignment, capacity):
    further = (assignment.expert_GxSxK + 1) % 8
    assignment = assignment.replace(expert_GxSxK=further)
    return gather(experts, x, assignment, capacity)

  output, gradient = comparison.difference(one_expert_further, one_device())
  assert output > 0.1 and gradient > 0.1


def test_what_is_not_finite_is_infinitely_far(comparison):
  def nan(experts, x, assignment, capacity):
    return (
      gather(experts, x, assignment, capacity).at[0, 0, 0].set(float('nan'))
    )

  output, _ = comparison.difference(nan, one_device())
  assert output == float('inf')


def test_experts_that_do_not_divide_are_illegal():
  (row,) = equivalence.rows(
    'six_experts',
    functools.partial(TopK, num_experts=6, k=1),
    [('gather', {'data': 2, 'expert': 4})],
  )
  assert not row['legal'] and 'does not divide' in row['reason']

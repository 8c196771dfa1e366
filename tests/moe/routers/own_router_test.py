"""A router of someone's own, beside the checkout, is a router as ours are."""

import json
import os
import subprocess
import sys

import command
import pytest
from paths import ROOT

MODULE = '''
"""Experts in turns."""

import jax.numpy as jnp

from sparse_experts.moe.assignment import Assignment, positions
from sparse_experts.moe.outputs import Aux
from sparse_experts.moe.router import Router


class InTurns(Router):
  """Position s goes to expert s modulo E."""

  exchangeable = False

  def __call__(self, x_GxSxD, *, mask_GxS=None, deterministic=True):
    G, S, _ = x_GxSxD.shape
    expert_GxS = jnp.broadcast_to(jnp.arange(S) % self.num_experts, (G, S))
    if mask_GxS is not None:
      expert_GxS = jnp.where(mask_GxS, expert_GxS, self.num_experts)
    expert_GxSxK = expert_GxS[..., None].astype(jnp.int32)
    return Assignment(
      expert_GxSxK=expert_GxSxK,
      gate_GxSxK=(expert_GxSxK < self.num_experts).astype(jnp.float32),
      position_GxSxK=positions(expert_GxSxK, self.num_experts),
      num_experts=self.num_experts,
    ), Aux(losses={}, metrics={})
'''

GIN = """
from __gin__ import dynamic_registration

import routers_of_mine.in_turns

ROUTER = @routers_of_mine.in_turns.InTurns
DECODER_ROUTER = @routers_of_mine.in_turns.InTurns
LOSS_WEIGHTS = {}

routers_of_mine.in_turns.InTurns.num_experts = %NUM_EXPERTS
"""


@pytest.fixture
def folder(python_folder):
  """On Python's path, with a module and gin/routers/in_turns.gin."""
  for file, text in {
    'routers_of_mine/in_turns.py': MODULE,
    'gin/routers/in_turns.gin': GIN,
  }.items():
    (python_folder / file).parent.mkdir(parents=True)
    (python_folder / file).write_text(text)
  return python_folder


def test_list_names_it(folder, monkeypatch):
  def listed(*arguments):
    outcome = command.run('list', '--json', *arguments)
    assert outcome.code == 0, outcome.stderr
    return json.loads(outcome.stdout)

  ours = listed()
  with_it = listed(f'--gin_search_paths={folder}')
  assert {*with_it['routers']} - {*ours['routers']} == {'in_turns'}
  new = {*with_it['recipes']} - {*ours['recipes']}
  assert new == {'gin/routers/in_turns.gin'}
  monkeypatch.chdir(folder)  # Where gin files are looked for first.
  assert listed() == with_it


def test_equivalence_has_it(folder):
  outcome = command.run(
    'equivalence',
    f'--gin_search_paths={folder}',
    "--gin.ROUTERS=('in_turns',)",
    "--gin.DISPATCHERS=('gather', 'grouped')",
    '--json',
  )
  assert outcome.code == 0, outcome.stderr
  rows = json.loads(outcome.stdout)
  assert [row['router'] for row in rows] == ['in_turns'] * 2
  assert all(row['output_difference'] < 1e-5 for row in rows)
  assert all(row['gradient_difference'] < 1e-4 for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize('promise', ['kept', 'broken'])
def test_the_conformance_test_asks_it(folder, promise):
  if promise == 'broken':  # Padding takes slots.
    file = folder / 'routers_of_mine/in_turns.py'
    file.write_text(file.read_text().replace('is not None', 'is 0'))
  done = subprocess.run(
    [
      *(sys.executable, '-m', 'pytest', '-k', 'in_turns'),
      'tests/moe/routers/every_router_test.py',
    ],
    cwd=ROOT,
    env={
      **os.environ,
      'PYTHONPATH': os.pathsep.join(map(str, (folder, ROOT))),
      'GIN_SEARCH_PATHS': str(folder),
    },
    capture_output=True,
    text=True,
  )
  kept = promise == 'kept'
  assert (done.returncode == 0) == kept, done.stdout
  assert (
    ' passed' if kept else 'test_an_assignment_is_well_formed'
  ) in done.stdout

"""Gin files of earlier versions, read as they were meant."""

import copy

from paths import TESTS

import gin
from sparse_experts import config
from sparse_experts.evaluation import evaluate
from sparse_experts.sharding import Placement
from sparse_experts.training import train

# As a run's config.gin and a file by hand had it: a long value has its own
# line, and a function may have a mesh that no other has.
EARLIER = """
from __gin__ import dynamic_registration
from sparse_experts.training import evaluate
from sparse_experts.training import train

MESH = {'data': 2, 'expert': 4}
RULES = {'embed': 'data'}
OPTIMIZER_RULES = {}

evaluate.Evaluation.mesh = {'data': 8}
train.train.mesh = %MESH
train.train.optimizer_rules = \\
    {'embed': 'data',
     'vocab': 'data'}
train.train.rules = %RULES
"""


def placement_of(function) -> Placement:
  references = gin.get_bindings(function, resolve_references=False)
  return copy.deepcopy(references['placement'])  # Gin evaluates it.


def test_mesh_and_rules_of_earlier_versions_are_a_placement(tmp_path):
  (tmp_path / 'config.gin').write_text(EARLIER)
  config.parse(['config.gin'], [], [str(tmp_path)])
  both = {'embed': 'data', 'vocab': 'data'}
  trained = Placement({'data': 2, 'expert': 4}, {'embed': 'data'}, both)
  assert placement_of(train.train) == trained
  assert placement_of(evaluate.Evaluation) == Placement({'data': 8})
  # What is written of it today is read again.
  (tmp_path / 'again.gin').write_text(config.text())
  config.parse(['again.gin'], [], [str(tmp_path)])
  assert placement_of(train.train) == trained


def test_macros_go_on_saying_mesh_and_rules(tmp_path):
  (tmp_path / 'config.gin').write_text(EARLIER)
  files = [str(TESTS / 'tiny.gin'), 'config.gin']
  bindings = ['MODEL_DIR=/tmp/run', "MESH={'data': 4, 'model': 2}", 'RULES={}']
  config.parse(files, bindings, [str(tmp_path)])
  assert placement_of(train.train).sizes == {'data': 4, 'model': 2}
  assert placement_of(train.train).rules == {}
  # This mesh is said by the file, its rules, as all rules now, by RULES.
  assert placement_of(evaluate.Evaluation) == Placement({'data': 8})

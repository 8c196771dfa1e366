"""Gin files of earlier versions, read as they were meant."""

import copy

import pytest
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


def test_a_model_of_another_run_leaves_what_was_parsed(tmp_path):
  """Bindings, imports, folders, values in use, and that all is locked."""
  (tmp_path / 'config.gin').write_text(
    f"include '{TESTS / 'tiny.gin'}'\nMODEL_DIR = '/other'\nEMBED_DIM = 24\n"
  )
  config.parse([str(TESTS / 'tiny.gin')], ['MODEL_DIR=/mine'], ['/folder'])
  mine = config.value('MODEL')

  def seen():
    state = gin.config
    return (
      config.text(),
      config.operative(),
      gin.config_is_locked(),
      list(state._LOCATION_PREFIXES),
      set(state._IMPORTS),
      dict(state._SINGLETONS),
    )

  before = seen()
  with gin.config_scope('decoder'):
    other = config.model_of_run(tmp_path)
    assert gin.current_scope() == ['decoder']
  assert seen() == before
  assert '/mine' in before[0] and 'EMBED_DIM = 16' in before[1]
  assert (mine.module.embed.width, other.module.embed.width) == (16, 24)
  # Also where it fails.
  (tmp_path / 'config.gin').write_text('MODEL = @no.Model()\n')
  with pytest.raises(ValueError):
    config.model_of_run(tmp_path)
  assert seen() == before
  with pytest.raises(FileNotFoundError, match='has no config.gin'):
    config.model_of_run(tmp_path / 'nobody')


def test_a_gin_file_names_the_model_of_a_run_and_is_read_again(tmp_path):
  """The teacher of a run that has a copy is the copy's."""
  for folder, width in (('run', 24), ('student/frozen/teacher', 40)):
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / 'config.gin').write_text(
      f"include '{TESTS / 'tiny.gin'}'\nMODEL_DIR = '/other'\n"
      f'EMBED_DIM = {width}\n'
    )
  files = [str(TESTS / 'tiny.gin'), 'gin/distillation.gin']
  for student, width in (('none', 24), ('student', 40)):
    bindings = [f'TEACHER={tmp_path}/run', f'MODEL_DIR={tmp_path}/{student}']
    config.parse(files, bindings, [])
    for model in (
      config.value('MODEL'),
      config.model_of(config.operative()),  # As a run writes what is in use.
    ):
      assert model.teacher.module.embed.width == width
      assert model.objective.module.embed.width == 16
      assert model.frozen['teacher'].directory == f'{tmp_path}/run'

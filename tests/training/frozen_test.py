"""Frozen parameters: copied once, never moved, in no checkpoint; a student's
run needs its teacher's no more."""

import json
import pathlib
import shutil

import command
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_experts import config
from sparse_experts.training import checkpoints, frozen
from sparse_experts.training import train as runner

# A dense student, half as wide as its teacher.
STUDENT = ('SPARSE_LAYERS=0', 'MLP_DIM=16', 'NUM_HEADS=1', 'LOG_PERIOD=1')


def parse(model_dir, teacher, *bindings) -> None:
  """Reads the student's recipe."""
  config.parse(
    [command.TINY.partition('=')[2], 'gin/distillation.gin'],
    [*STUDENT, f'MODEL_DIR={model_dir}', f'TEACHER={teacher}', *bindings],
    [],
  )


def train(model_dir, teacher, *bindings):
  """Trains a student without evaluation; returns the results."""
  parse(model_dir, teacher, *bindings)
  return config.bound(runner.train)(
    eval_dataset=None,
    on_start=lambda path: (path / 'config.gin').write_text(config.operative()),
  )


@pytest.fixture(scope='module')
def teacher(tmp_path_factory) -> pathlib.Path:
  """MODEL_DIR of a sparse model at steps 1 and 2."""
  model_dir = tmp_path_factory.mktemp('teacher')
  command.train(model_dir, '--gin.TRAIN_STEPS=2', '--gin.CHECKPOINT_PERIOD=1')
  return model_dir


@pytest.fixture(scope='module')
def whole(teacher, tmp_path_factory) -> pathlib.Path:
  """MODEL_DIR of a student of four steps in one go."""
  model_dir = tmp_path_factory.mktemp('whole')
  train(model_dir, teacher, 'TRAIN_STEPS=4')
  return model_dir


def test_the_copy_has_the_bits_of_the_teacher_and_checkpoints_have_none(
  teacher, whole
):
  expected, step = checkpoints.load_params(teacher)
  copy = frozen.copy_of(whole, 'teacher')
  found, at = checkpoints.load_params(copy)  # After four steps.
  assert at == step == 2
  assert checkpoints.digest(found) == checkpoints.digest(expected)
  assert (copy / 'config.gin').read_text() == (
    teacher / 'config.gin'
  ).read_text()
  saved = command.saved(whole, 4)
  assert saved and not [name for name in saved if 'teacher' in name]


def test_shapes_are_found_where_there_is_no_device(teacher, tmp_path):
  """A pod is compiled for where there is none."""
  parse(tmp_path, teacher)
  model = config.value('MODEL')
  sides = ('encoder_input', 'decoder_input', 'decoder_target')
  tokens = jax.ShapeDtypeStruct((2, 8), np.int32)
  with jax.transfer_guard('disallow'):
    found = frozen.abstract(model, {f'{side}_tokens': tokens for side in sides})
  expected, _ = checkpoints.load_params(teacher)
  assert jax.tree.map(jnp.shape, nn.unbox(found)) == jax.tree.map(
    jnp.shape, {'teacher': expected}
  )


def test_what_is_learned_is_of_both(whole):
  lines = (whole / 'metrics.jsonl').read_text().splitlines()
  metrics = [json.loads(line) for line in lines]
  assert len(metrics) == 4
  assert all(m['soft_loss'] > 0 for m in metrics)
  assert all(0 <= m['teacher_agreement'] <= 1 for m in metrics)


def test_a_run_goes_on_when_its_teacher_is_gone(teacher, whole, tmp_path):
  gone = tmp_path / 'teacher'
  shutil.copytree(teacher, gone)
  # What a kill left of a copy is made anew.
  partial = frozen.copy_of(tmp_path / 'run', 'teacher.partial')
  left = partial / 'checkpoints/2/params/left'
  left.parent.mkdir(parents=True)
  left.write_text('half')
  train(tmp_path / 'run', gone, 'TRAIN_STEPS=2')
  shutil.rmtree(gone)
  train(tmp_path / 'run', gone, 'TRAIN_STEPS=4')
  command.assert_same_bits(
    command.saved(whole, 4), command.saved(tmp_path / 'run', 4)
  )


def test_another_teacher_is_refused(teacher, whole):
  with pytest.raises(ValueError, match='at step 2, .*/1 is another one: give'):
    train(whole, teacher / 'checkpoints/1', 'TRAIN_STEPS=5')


def test_a_copy_that_is_lost_is_not_made_anew(teacher, whole, tmp_path):
  run = tmp_path / 'run'
  shutil.copytree(whole, run)
  shutil.rmtree(run / 'frozen')
  with pytest.raises(ValueError, match='has checkpoints, but not the teacher'):
    train(run, teacher, 'TRAIN_STEPS=5')
  assert not (run / 'frozen').exists()


def test_no_teacher_and_no_vocabulary_of_it_are_one_line(teacher, tmp_path):
  given = (
    command.TINY,
    '--gin_file=gin/distillation.gin',
    f'--gin.MODEL_DIR={tmp_path / "run"}',
  )
  nobody = f'--gin.TEACHER={tmp_path / "nobody"}'
  outcome = command.run('train', *given, nobody)
  assert outcome.code == 2
  assert 'nobody has no config.gin' in outcome.stderr.splitlines()[-1]
  outcome = command.run(
    'train', *given, f'--gin.TEACHER={teacher}', '--gin.NUM_EMBEDDINGS=400'
  )
  assert outcome.code == 2
  assert 'one of 400' in outcome.stderr and 'one of 384' in outcome.stderr
  assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_a_students_own_recipe_reads_its_checkpoint(whole):
  """Through the wrapper, of a teacher that is gone, and without any."""
  results = []
  for more in (('--gin_file=gin/distillation.gin', '--gin.TEACHER=/gone'), ()):
    shutil.rmtree(whole / 'evaluation', ignore_errors=True)
    outcome = command.run(
      *('evaluate', command.TINY, *more, f'--gin.MODEL_DIR={whole}', '--json'),
      *(f'--gin.{binding}' for binding in STUDENT),
    )
    assert outcome.code == 0, outcome.stderr
    results.append(json.loads(outcome.stdout)['metrics'])
  assert results[0] == results[1]

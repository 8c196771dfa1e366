"""A run that is stopped, killed and resumed is the run that never was."""

import json
import random
import re
import signal
import subprocess
import time

import command
import pytest

EVERY_STEP = '--gin.CHECKPOINT_PERIOD=1'

# All that a run without a terminal says on stderr.
LINE = re.compile(
  r'saved step \d+|resumed at step \d+|SIGTERM: stopping after step \d+'
  r'|step \d+/20  loss \d+\.\d{3}(  [\d,]+ tokens/s  \d+:\d\d left)?'
)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """MODEL_DIR of twenty steps in one go."""
  model_dir = tmp_path_factory.mktemp('whole')
  command.train(model_dir)
  return model_dir


@pytest.fixture(scope='module')
def half(tmp_path_factory):
  """MODEL_DIR of a run of ten steps."""
  model_dir = tmp_path_factory.mktemp('half')
  command.train(model_dir, '--gin.TRAIN_STEPS=10')
  return model_dir


def _start(model_dir) -> subprocess.Popen:
  model_dir = f'--gin.MODEL_DIR={model_dir}'
  return command.start(
    *('-m', 'sparse_experts', 'train', command.TINY, model_dir, '--json'),
    *(command.NO_EVALUATION, EVERY_STEP),
  )


def _wait_for_a_step(process: subprocess.Popen) -> tuple[int, str]:
  """The first step that the process says it has saved, and what came before."""
  heard = ''
  for line in process.stderr:
    heard += line
    if line.startswith('saved step '):
      return int(line.split()[-1]), heard
  raise AssertionError(f'it ended with {process.wait()}:\n{heard}')


def _latest(model_dir) -> int:
  outcome = command.run('inspect', '--json', f'--checkpoint={model_dir}')
  assert outcome.code == 0, outcome.stderr
  return json.loads(outcome.stdout)['step']


def test_no_schedule_knows_the_number_of_steps(whole, half):
  command.assert_same_bits(command.saved(whole, 10), command.saved(half, 10))


def test_ten_and_ten_steps_are_twenty(whole, half):
  outcome = command.train(half)
  assert 'resumed at step 10\n' in outcome.stderr
  command.assert_same_bits(command.saved(whole, 20), command.saved(half, 20))
  for folder in (whole, half):
    data = folder / 'checkpoints' / '20' / 'data' / 'batches.json'
    assert json.loads(data.read_text())['batches_drawn'] == 20


def test_terminated_killed_and_resumed(whole, tmp_path):
  process = _start(tmp_path)
  _, heard = _wait_for_a_step(process)
  process.send_signal(signal.SIGTERM)
  stdout, rest = process.communicate(timeout=60)
  assert process.returncode == 0
  lines = (heard + rest).splitlines()
  assert all(LINE.fullmatch(line) for line in lines), lines
  results = json.loads(stdout)
  step = results['step']
  assert results['preempted'] and 1 < step < 20
  assert f'SIGTERM: stopping after step {step}' in lines
  assert lines[-1] == f'saved step {step}'
  assert _latest(tmp_path) == step

  process = _start(tmp_path)
  saved, heard = _wait_for_a_step(process)
  assert heard.startswith(f'resumed at step {step}\n')
  assert saved == step + 1
  time.sleep(random.uniform(0, 0.5))
  process.kill()
  process.communicate()
  assert saved <= _latest(tmp_path) < 20

  command.train(tmp_path, EVERY_STEP)
  command.assert_same_bits(
    command.saved(whole, 20), command.saved(tmp_path, 20)
  )
  kept = {path.name for path in (tmp_path / 'checkpoints').iterdir()}
  assert kept == {'18', '19', '20'}


def test_sigterm_is_handed_back(half):
  before = signal.getsignal(signal.SIGTERM)
  command.train(half, '--gin.TRAIN_STEPS=10')
  assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.slow
def test_killed_at_any_moment(whole, tmp_path):
  """Also while it saves: there are twenty saves in a few seconds."""
  step = 0
  for _ in range(5):
    process = _start(tmp_path)
    saved, _ = _wait_for_a_step(process)
    assert saved == step + 1
    time.sleep(random.uniform(0, 0.3))
    process.kill()
    process.communicate()
    step = _latest(tmp_path)
    assert saved <= step < 20
  command.train(tmp_path, EVERY_STEP)
  command.assert_same_bits(
    command.saved(whole, 20), command.saved(tmp_path, 20)
  )

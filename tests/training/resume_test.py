"""A run that was stopped or killed and goes on is the run that never was."""

import concurrent.futures
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time

import command
import pytest

from sparse_experts.training import preemption

EVERY_STEP = '--gin.CHECKPOINT_PERIOD=1'
# The counts of a step are what the next goes on with.
BALANCE = '--gin.BALANCE_OVER=last_step'

# All that a run without a terminal says on stderr.
LINE = re.compile(
  r'saved step \d+|resumed at step \d+|SIGTERM: stopping after step \d+'
  r'|step \d+/20  loss \d+\.\d{3}'
  r'(  [\d,]+ tokens/s \([\d,]+ with padding\)  \d+:\d\d left)?'
)


def _start(model_dir) -> subprocess.Popen:
  model_dir = f'--gin.MODEL_DIR={model_dir}'
  return command.start(
    *('-m', 'sparse_experts', 'train', command.TINY, model_dir, '--json'),
    *(command.NO_EVALUATION, EVERY_STEP, BALANCE),
  )


def _wait_for_a_step(process: subprocess.Popen) -> tuple[int, str]:
  """The first step that the process says it has saved, and all it said."""
  heard = ''
  for line in process.stderr:
    heard += line
    if line.startswith('saved step '):
      return int(line.split()[-1]), heard
  raise AssertionError(f'it ended with {process.wait()}:\n{heard}')


def _terminate(process: subprocess.Popen) -> command.Outcome:
  """Sends SIGTERM once a step is saved."""
  _, heard = _wait_for_a_step(process)
  process.send_signal(signal.SIGTERM)
  stdout, rest = process.communicate()
  return command.Outcome(process.returncode, stdout, heard + rest)


def _kill(process: subprocess.Popen, within: float) -> int:
  """Sends SIGKILL some seconds after a step is saved; returns that step."""
  step, _ = _wait_for_a_step(process)
  time.sleep(random.uniform(0, within))
  process.kill()
  process.communicate()
  return step


def _latest(model_dir) -> int:
  outcome = command.run('inspect', '--json', f'--checkpoint={model_dir}')
  assert outcome.code == 0, outcome.stderr
  return json.loads(outcome.stdout)['step']


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """MODEL_DIR of twenty steps in one go."""
  model_dir = tmp_path_factory.mktemp('whole')
  command.train(model_dir, BALANCE)
  return model_dir


@pytest.fixture(scope='module')
def half(tmp_path_factory):
  """MODEL_DIR of a run of ten steps."""
  model_dir = tmp_path_factory.mktemp('half')
  command.train(model_dir, BALANCE, '--gin.TRAIN_STEPS=10')
  return model_dir


@pytest.fixture(scope='module')
def interrupted(tmp_path_factory):
  """Two runs at once: (MODEL_DIR, outcome of SIGTERM), (MODEL_DIR, step)."""
  terminated = tmp_path_factory.mktemp('terminated')
  killed = tmp_path_factory.mktemp('killed')
  with concurrent.futures.ThreadPoolExecutor() as executor:
    outcome = executor.submit(_terminate, _start(terminated))
    step = executor.submit(_kill, _start(killed), within=0.3)
  return (terminated, outcome.result()), (killed, step.result())


def test_no_schedule_knows_the_number_of_steps(whole, half):
  first, second = (command.saved(folder, 10) for folder in (whole, half))
  command.assert_same_bits(first, second)
  [counted] = [name for name in first if name.endswith('counted_GxE')]
  assert first[counted].sum() > 0


def test_ten_and_ten_steps_are_twenty(whole, half):
  outcome = command.train(half, BALANCE)
  assert 'resumed at step 10\n' in outcome.stderr
  command.assert_same_bits(command.saved(whole, 20), command.saved(half, 20))
  for folder in (whole, half):
    data = folder / 'checkpoints' / '20' / 'data' / 'batches.json'
    assert json.loads(data.read_text())['batches_drawn'] == 20


def test_sigterm_saves_and_ends_well(whole, interrupted):
  model_dir, (code, stdout, stderr) = interrupted[0]
  assert code == 0
  lines = stderr.splitlines()
  assert all(LINE.fullmatch(line) for line in lines), lines
  results = json.loads(stdout)
  step = results['step']
  assert results['preempted'] and 1 < step < 20
  assert f'SIGTERM: stopping after step {step}' in lines
  assert lines[-1] == f'saved step {step}'
  assert _latest(model_dir) == step

  outcome = command.train(model_dir, BALANCE)
  assert f'resumed at step {step}\n' in outcome.stderr
  command.assert_same_bits(
    command.saved(whole, 20), command.saved(model_dir, 20)
  )


def test_sigkill_costs_what_was_not_saved(whole, interrupted):
  model_dir, step = interrupted[1]
  assert step <= _latest(model_dir) < 20
  # As a kill leaves it in the middle of a save.
  (model_dir / 'checkpoints' / '19.orbax-checkpoint-tmp').mkdir()
  command.train(model_dir, BALANCE)
  command.assert_same_bits(
    command.saved(whole, 20), command.saved(model_dir, 20)
  )
  # Three steps are kept, and nothing half-written.
  kept = [path.name for path in (model_dir / 'checkpoints').iterdir()]
  assert len(kept) == 3 and all(name.isdigit() for name in kept)


def test_preemption_takes_sigterm_and_hands_it_back():
  before = signal.getsignal(signal.SIGTERM)
  with preemption.Preemption() as asked:
    asked.listen()
    assert not asked.reached(1)
    os.kill(os.getpid(), signal.SIGTERM)
    assert asked.reached(2)
  assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize('which', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_it_listens_ends_what_has_not_begun(which):
  heard = []
  before = signal.signal(which, lambda *_: heard.append('ended'))
  try:
    with preemption.Preemption() as asked:
      asked.leave_by(lambda: heard.append('left'))
      os.kill(os.getpid(), which)
    assert heard == ['left', 'ended']
  finally:
    signal.signal(which, before)


@pytest.mark.parametrize('failure', [OSError('full'), None])
def test_a_ctrl_c_after_the_last_step_hides_no_failure(failure):
  expected = type(failure) if failure else KeyboardInterrupt
  with pytest.raises(expected), preemption.Preemption() as asked:
    asked.listen(signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
    if failure:
      raise failure


def test_a_run_killed_before_its_first_checkpoint_begins_its_curve_anew(
  tmp_path,
):
  def lines(name):
    text = (tmp_path / name / 'metrics.jsonl').read_text()
    found = map(json.loads, text.splitlines())
    return [(line['step'], line['name'], line['loss']) for line in found]

  arguments = ('train', command.TINY, '--gin.TRAIN_STEPS=2')
  command.run(*arguments, f'--gin.MODEL_DIR={tmp_path / "whole"}')
  (tmp_path / 'killed').mkdir()  # Of it, this is all there is.
  shutil.copy(tmp_path / 'whole/metrics.jsonl', tmp_path / 'killed')
  command.run(*arguments, f'--gin.MODEL_DIR={tmp_path / "killed"}')
  assert lines('killed') == lines('whole')
  assert (0, 'eval') in {line[:2] for line in lines('whole')}

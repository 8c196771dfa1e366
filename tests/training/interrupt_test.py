"""Ctrl-C is SIGTERM: the run saves, says one line, and goes on later."""

import json
import pathlib
import signal
import time

import command
import pytest

EVERY_STEP = '--gin.CHECKPOINT_PERIOD=1'
STEPS = 8
MOMENTS = ('at the start', 'before a step', 'in a step', 'in a save', 'late')


def arguments(model_dir, *more: str) -> tuple[str, ...]:
  return (
    *('train', command.TINY, f'--gin.MODEL_DIR={model_dir}', EVERY_STEP),
    *(
      command.NO_EVALUATION,
      '--gin.LOG_PERIOD=1',
      f'--gin.TRAIN_STEPS={STEPS}',
    ),
    *more,
  )


def curve(model_dir) -> list[tuple[str, int, float]]:
  lines = (model_dir / 'metrics.jsonl').read_text().splitlines()
  return [(m['name'], m['step'], m['loss']) for m in map(json.loads, lines)]


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """MODEL_DIR of a run in one go."""
  model_dir = tmp_path_factory.mktemp('whole')
  outcome = command.run(*arguments(model_dir))
  assert outcome.code == 0, outcome.stderr
  return model_dir


def assert_goes_on(model_dir, whole) -> None:
  """To the end of the run that never was interrupted, and by its curve."""
  outcome = command.run(*arguments(model_dir))
  assert outcome.code == 0, outcome.stderr
  command.assert_same_bits(
    command.saved(model_dir, STEPS), command.saved(whole, STEPS)
  )
  assert curve(model_dir) == curve(whole)
  names = {path.name for path in model_dir.iterdir()}
  assert names == {path.name for path in whole.iterdir()}


def test_ctrl_c_saves_and_ends_with_130(whole, python_folder):
  (python_folder / 'pressing.gin').write_text(
    'from __gin__ import dynamic_registration\n'
    'import interrupt_hook\n'
    'HOOKS = [@interrupt_hook.interrupt]\n'
  )
  (python_folder / 'interrupt_hook.py').write_text(
    'import os, signal\n'
    'def interrupt(run):\n'
    '  if run.step == 3:\n'
    '    os.kill(os.getpid(), signal.SIGINT)\n'
  )
  before = signal.getsignal(signal.SIGINT)
  outcome = command.run(
    *arguments(
      python_folder / 'run', f'--gin_file={python_folder / "pressing.gin"}'
    )
  )
  assert signal.getsignal(signal.SIGINT) is before
  assert outcome.code == 130
  assert 'SIGINT: stopping after step 3\n' in outcome.stderr
  assert outcome.stderr.endswith('saved step 3\n')
  assert_goes_on(python_folder / 'run', whole)


@pytest.mark.parametrize(
  'which', ['SIGTERM', pytest.param('SIGINT', marks=pytest.mark.slow)]
)
def test_nothing_is_left_of_a_run_that_did_not_start(which, python_folder):
  """SIGTERM while it is built, Ctrl-C before the first step."""
  (python_folder / 'pressing.gin').write_text(
    'from __gin__ import dynamic_registration\n'
    'import start_hook\n'
    + (
      'HOOKS = [@start_hook.interrupt]\n'
      if which == 'SIGINT'
      else 'LEARNING_RATE = @start_hook.rate\n'
    )
  )
  (python_folder / 'start_hook.py').write_text(
    'import os, signal\n'
    'def interrupt(run):\n'
    '  assert (run.model_dir / "config.gin").exists()\n'
    '  os.kill(os.getpid(), signal.SIGINT)\n'
    'def rate(step):\n'
    '  os.kill(os.getpid(), signal.SIGTERM)\n'
    '  return 0.1\n'
  )
  # Else the process of the tests would end; or, in the background of a shell,
  # hear no Ctrl-C.
  before = {
    name: signal.signal(name, signal.default_int_handler)
    for name in (signal.SIGTERM, signal.SIGINT)
  }
  try:
    outcome = command.run(
      *arguments(
        python_folder / 'of' / 'run',
        f'--gin_file={python_folder / "pressing.gin"}',
      )
    )
    after = {signal.getsignal(name) for name in before}
  finally:
    for name, handler in before.items():
      signal.signal(name, handler)
  assert after == {signal.default_int_handler}
  assert (outcome.code, outcome.stderr) == (130, 'interrupted\n')
  assert not (python_folder / 'of').exists()


def _wait(moment: str, process, model_dir: pathlib.Path) -> None:
  """Until a process is there."""

  def there(pattern: str) -> bool:
    return any(model_dir.glob(pattern))

  if moment == 'at the start':
    return time.sleep(1)
  if moment == 'before a step':
    while not there('lease.json'):
      time.sleep(0.01)
    return None
  for line in process.stderr:
    if line.startswith(
      'saved step 1\n' if moment != 'late' else f'step {STEPS}/'
    ):
      break
  while moment == 'in a save' and not there('checkpoints/*tmp*'):
    time.sleep(0.001)
  return None


@pytest.mark.slow
@pytest.mark.parametrize('moment', MOMENTS)
def test_ctrl_c_at_any_moment(moment, whole, tmp_path):
  process = command.start(
    '-m', 'sparse_experts', *arguments(tmp_path), devices=8
  )
  _wait(moment, process, tmp_path)
  process.send_signal(signal.SIGINT)
  begun = time.monotonic()
  _, stderr = process.communicate()
  assert time.monotonic() - begun < 30
  assert 'Traceback' not in stderr
  codes = (130, 0) if moment == 'late' else (130,)
  assert process.returncode in codes, stderr
  if moment == 'before a step':
    assert list(tmp_path.iterdir()) == []
  assert_goes_on(tmp_path, whole)


@pytest.mark.slow
def test_the_second_ctrl_c_ends_at_once(whole, tmp_path):
  process = command.start(
    *('-m', 'sparse_experts'),
    *arguments(tmp_path, '--gin.TRAIN_STEPS=100000'),
    devices=8,
  )
  for line in process.stderr:
    if line == 'saved step 1\n':
      break
  process.send_signal(signal.SIGINT)
  process.send_signal(signal.SIGINT)
  for _ in range(50):
    if process.poll() is not None:
      break
    time.sleep(0.01)
    process.send_signal(signal.SIGINT)
  process.communicate()
  assert process.returncode in (-signal.SIGINT, 130)
  assert_goes_on(tmp_path, whole)

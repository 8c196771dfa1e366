"""What a run does where it cannot write."""

import json
import resource
import shutil
import subprocess
import types

import command
import jax.numpy as jnp
import optax
import pytest

from sparse_experts.training import lease, saver, state

EVERY_STEP = '--gin.CHECKPOINT_PERIOD=1'


def train(model_dir, *arguments: str) -> command.Outcome:
  return command.run(
    *('train', command.TINY, f'--gin.MODEL_DIR={model_dir}', EVERY_STEP),
    *(command.NO_EVALUATION, '--gin.LOG_PERIOD=1', *arguments),
  )


def error(outcome: command.Outcome) -> str:
  """The one line that says what went wrong, after those of a run."""
  assert outcome.code == 2, outcome
  lines = outcome.stderr.splitlines()
  assert [line for line in lines if line.startswith('error: ')] == lines[-1:]
  assert 'Traceback' not in outcome.stderr
  return lines[-1]


@pytest.fixture
def disk(tmp_path):
  """A file system of 3 MB."""
  folder = tmp_path / 'disk'
  folder.mkdir()
  mount = ['mount', '-t', 'tmpfs', '-o', 'size=3m', 'none', str(folder)]
  if subprocess.run(mount, capture_output=True).returncode:
    pytest.skip('a small file system needs the right to mount')
  yield folder
  subprocess.run(['umount', '--lazy', str(folder)], check=True)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """MODEL_DIR of six steps in one go."""
  model_dir = tmp_path_factory.mktemp('whole')
  outcome = train(model_dir, '--gin.TRAIN_STEPS=6')
  assert outcome.code == 0, outcome.stderr
  return model_dir


def losses(model_dir) -> list[tuple[int, float]]:
  lines = (model_dir / 'metrics.jsonl').read_text().splitlines()
  metrics = [json.loads(line) for line in lines]
  return [(m['step'], m['loss']) for m in metrics]


def test_a_full_disk_ends_a_run_which_goes_on_when_it_is_freed(disk, whole):
  ballast = disk / 'ballast'
  ballast.write_bytes(bytes(1_000_000))
  line = error(train(disk / 'run', '--gin.TRAIN_STEPS=6'))
  assert f' in {disk}/run' in line
  assert '(No space left on device)' in line
  assert 'is whole, and the same command goes on' in line
  ballast.unlink()
  subprocess.run(['mount', '-o', 'remount,size=30m', str(disk)], check=True)
  outcome = train(disk / 'run', '--gin.TRAIN_STEPS=6')
  assert outcome.code == 0 and 'resumed at step' in outcome.stderr
  command.assert_same_bits(
    command.saved(whole, 6), command.saved(disk / 'run', 6)
  )
  assert losses(disk / 'run') == losses(whole)
  names = {path.name for path in (disk / 'run').iterdir()}
  assert 'lease.json' not in names


def test_a_disk_that_is_read_only_is_named(disk):
  subprocess.run(['mount', '-o', 'remount,ro', str(disk)], check=True)
  line = error(train(disk / 'run'))
  assert f'{disk}/run cannot be written (Read-only file system)' in line


def test_a_file_that_may_not_grow_ends_a_save(whole, tmp_path):
  """No rights are needed for this one; the limit is of this process."""
  shutil.copytree(whole, tmp_path / 'run')
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  data = (tmp_path / 'run/checkpoints/6/data').glob('*.data*')
  most = max(file.stat().st_size for file in data)
  resource.setrlimit(resource.RLIMIT_FSIZE, (most // 2, before[1]))
  try:
    line = error(train(tmp_path / 'run', '--gin.TRAIN_STEPS=9'))
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
  assert f'step 7 in {tmp_path}/run/checkpoints cannot be written' in line
  assert '(File too large): step 6 is whole' in line
  outcome = train(tmp_path / 'run', '--gin.TRAIN_STEPS=7')
  assert outcome.code == 0 and 'resumed at step 6\n' in outcome.stderr


@pytest.mark.parametrize('anew', [False, True])
def test_a_model_dir_that_is_deleted_in_a_save_stays_so(anew, tmp_path):
  """Writes on their way make folders again."""
  run = tmp_path / 'run'
  held = lease.Lease(run)
  params = {'w': jnp.ones(2)}
  zero = jnp.int32(0)
  now = state.TrainState(zero, params, optax.sgd(0.1).init(params), zero)
  writer = saver.Saver(run, check=held.check)

  def delete(folder, streams):
    shutil.rmtree(run)
    folder.mkdir(parents=True)
    (folder / 'late').touch()
    if anew:
      (run / 'notes').touch()

  with pytest.raises(FileNotFoundError, match='was emptied, or made anew'):
    try:
      writer.save(now, saver.DataArgs(types.SimpleNamespace(save=delete)))
    finally:
      writer.close()
  held.close()
  left = [path.name for path in tmp_path.rglob('*')]
  assert sorted(left) == (['notes', 'run'] if anew else [])


def test_a_model_dir_that_is_deleted_ends_a_run(python_folder):
  (python_folder / 'deleter.py').write_text(
    'import shutil\n'
    'def delete(run):\n'
    '  if run.step == 2:\n'
    '    shutil.rmtree(run.model_dir)\n'
    '    run.model_dir.mkdir()\n'  # As a writer might.
  )
  (python_folder / 'deleter.gin').write_text(
    'from __gin__ import dynamic_registration\n'
    'import deleter\n'
    'HOOKS = [@deleter.delete]\n'
  )
  run = python_folder / 'run'
  line = error(
    train(
      *(run, f'--gin_file={python_folder / "deleter.gin"}'),
      *('--gin.LOG_PERIOD=100', '--gin.CHECKPOINT_PERIOD=2'),
    )
  )
  assert f'MODEL_DIR {run} was emptied, or made anew' in line
  assert not run.exists()

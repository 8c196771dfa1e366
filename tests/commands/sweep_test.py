"""sweep: runs of a grid, whatever ends it, and commands for other machines."""

import json
import os
import pathlib
import shlex
import signal
import time

import command
import pytest
import yaml

GRID = ('--grid.NUM_EXPERTS=2,4', '--seeds=2')
STEPS = (
  *('--gin.TRAIN_STEPS=4', '--gin.LOG_PERIOD=2', '--gin.EVAL_PERIOD=2'),
  '--gin.CHECKPOINT_PERIOD=1',
)


def arguments(folder, *more):
  return ('sweep', command.TINY, *GRID, *STEPS, f'--output={folder}', *more)


def test_print_has_the_commands_of_all_runs(tmp_path):
  folder = tmp_path / 'sweep'
  outcome = command.run(*arguments(folder, '--launch=print'))
  assert outcome.code == 0, outcome.stderr
  found = [shlex.split(line) for line in outcome.stdout.splitlines()]
  assert [words[:4] for words in found] == [
    ['python', '-m', 'sparse_experts', 'train']
  ] * 4
  grid = [words[-3:-1] for words in found]
  assert grid == [
    [f'--gin.NUM_EXPERTS={n}', f'--gin.SEED={seed}']
    for n in (2, 4)
    for seed in (0, 1)
  ]
  places = {words[-1] for words in found}
  assert len(places) == 4
  assert all(f'={folder}/runs/' in place for place in places)
  assert not folder.exists()
  # A command of these checks out, and a sweep's other values are other runs.
  outcome = command.run('show', *found[0][4:])
  assert outcome.code == 0, outcome.stderr
  other = command.run(
    *arguments(folder, '--launch=print', '--gin.BATCH_SIZE=16')
  )
  assert not places & {shlex.split(x)[-1] for x in other.stdout.splitlines()}


def test_jobsets_are_written_and_nothing_is_started(tmp_path):
  cluster = ('--image=me/image', '--queue=q', '--tpu=tpu-v5p-slice')
  given = arguments(tmp_path, '--launch=jobset', *cluster)
  outcome = command.run(*given)
  assert outcome.code == 2
  assert outcome.stderr == 'error: --launch=jobset needs --tpu_topology.\n'
  outcome = command.run(*given, '--tpu_topology=2x2x1')
  assert outcome.code == 0, outcome.stderr
  files = sorted((tmp_path / 'jobsets').iterdir())
  assert len(files) == 4 and [*tmp_path.iterdir()] == [tmp_path / 'jobsets']
  for file in files:
    found = yaml.safe_load(file.read_text())
    assert found['metadata']['name'].startswith(f'run-{file.stem}-')
    assert f'/runs/{file.stem}' in file.read_text()


@pytest.mark.parametrize(
  'more,message',
  [
    (['--seeds=0'], '--seeds must be at least 1, not 0'),
    (['--max_gb=0'], '--max_gb must be above 0'),
    (['--grid.NUM_EXPERTS=3'], '--grid.NUM_EXPERTS is there twice'),
    (['--grid.NO_MACRO=1,2'], 'NO_MACRO'),
    (['--grid.MLP_DIM=32,0b100000'], 'MLP_DIM=0b100000 seed 0 are one run'),
    (['--gin.NUM_EXPERTS=8'], '--gin.NUM_EXPERTS and --grid.NUM_EXPERTS'),
    (['--gin.train.train.model_dir="x"'], 'leave train.train.model_dir as'),
    (["--gin.RULES={'embd': 'data'}"], "'embd'"),
    (['--launch=jobset', '--dry_run'], '--launch=jobset needs --image'),
    (['--image=i', '--tpu=t'], '--image, --tpu: for --launch=jobset only'),
    (['--hosts=2'], '--hosts: for --launch=jobset only'),
    (['--grid.EMBED_DIM=a,b'], 'EMBED_DIM'),
    (
      ['--gin.train.train.seed=7'],
      'leave train.train.seed as %SEED',
    ),
    (['--launch=collect'], 'is not there, so nothing was run in it'),
    (['--gin.MODEL_DIR=x'], 'a sweep says MODEL_DIR of its runs'),
    (['--output=gs://bucket/x'], 'runs of this machine lie in a local folder'),
  ],
)
def test_wrong_sweeps_start_nothing(more, message, tmp_path):
  outcome = command.run(*arguments(tmp_path / 'sweep', *more))
  assert outcome.code == 2
  assert message in outcome.stderr and outcome.stderr.count('\n') == 1
  assert not (tmp_path / 'sweep').exists()


def _results(folder: pathlib.Path) -> list[dict]:
  """Without the time they took."""
  lines = (folder / 'results.jsonl').read_text().splitlines()
  return [{**json.loads(line), 'seconds': None} for line in lines]


def _processes(folder) -> list[int]:
  """Ids of those whose command line names a folder."""
  found = []
  for path in pathlib.Path('/proc').glob('[0-9]*/cmdline'):
    try:
      line = path.read_bytes().decode().replace('\0', ' ')
    except (FileNotFoundError, ProcessLookupError):
      continue
    if str(folder) in line:
      found.append(int(path.parent.name))
  return found


def _sweep(*arguments) -> tuple[str, str]:
  """In a process of its own, whose runs find the tests' modules."""
  process = command.start('-m', 'sparse_experts', *arguments)
  stdout, stderr = process.communicate()
  assert process.returncode == 0, stderr
  return stdout, stderr


@pytest.mark.slow
def test_a_sweep_killed_twice_is_one_never_killed(tmp_path):
  whole, killed = tmp_path / 'whole', tmp_path / 'killed'
  _sweep(*arguments(whole, '--parallel=2'))
  for steps in (2, 8):  # Saved of all runs when it is killed.
    process = command.start('-m', 'sparse_experts', *arguments(killed))
    while len([*killed.glob('runs/*/checkpoints/*/commit_success*')]) < steps:
      assert process.poll() is None, process.communicate()
      time.sleep(0.05)
      if len([*killed.glob('runs/*/checkpoints/[1-4]')]) >= steps // 2:
        break
    process.kill()
    process.communicate()
    for _ in range(600):  # Its runs save, and end.
      if not _processes(killed):
        break
      time.sleep(0.1)
    assert not _processes(killed)
  _sweep(*arguments(killed))
  assert _results(killed) == _results(whole)
  assert len(_results(whole)) == 4
  # All are finished: nothing starts.
  stdout, stderr = _sweep(*arguments(killed, '--json'))
  assert json.loads(stdout) == [
    json.loads(line)
    for line in (killed / 'results.jsonl').read_text().splitlines()
  ]
  assert stderr == ''


@pytest.mark.slow
def test_a_run_that_is_killed_is_named_and_goes_on(tmp_path):
  """Killed before its first checkpoint, which leaves an empty metrics.jsonl."""
  given = ('sweep', command.TINY, '--seeds=1', *STEPS, f'--output={tmp_path}')
  process = command.start('-m', 'sparse_experts', *given)
  while not (running := _processes(tmp_path / 'runs')):
    assert process.poll() is None, process.communicate()
    time.sleep(0.05)
  (run,) = running
  os.kill(run, signal.SIGKILL)
  _, stderr = process.communicate()
  assert process.returncode == 2
  assert '1 of 1 runs have not finished' in stderr
  (config,) = (tmp_path / 'configs').iterdir()
  folder = tmp_path / 'runs' / config.stem
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'metrics.jsonl').touch()  # As one that starts anew leaves it.
  _sweep(*given)
  assert len(_results(tmp_path)) == 1

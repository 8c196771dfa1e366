"""Eight fake devices, and two real processes, train as one device does."""

import json
import pathlib
import signal
import socket
import subprocess

import command
import jax
import numpy as np
import pytest

from sparse_experts.training import lease

EIGHT = "--gin.MESH={'data': 2, 'expert': 4}"
# Balance is of the whole batch, wherever its rows are.
STEPS = (
  '--gin.TRAIN_STEPS=4',
  '--gin.LOG_PERIOD=1',
  '--gin.BALANCE_OVER=batch',
)


def _losses(model_dir: pathlib.Path) -> list[float]:
  lines = (model_dir / 'metrics.jsonl').read_text().splitlines()
  return [json.loads(line)['loss'] for line in lines]


@pytest.fixture(scope='module')
def alone(tmp_path_factory) -> list[float]:
  """The losses of four steps on one device."""
  model_dir = tmp_path_factory.mktemp('alone')
  command.train_on(jax.devices()[:1], model_dir, *STEPS)
  losses = _losses(model_dir)
  assert len(losses) == 4
  return losses


def _unused_address() -> str:
  with socket.socket() as unused:
    unused.bind(('127.0.0.1', 0))
    return f'127.0.0.1:{unused.getsockname()[1]}'


def _start_two(
  *arguments: str, devices: int
) -> tuple[subprocess.Popen, subprocess.Popen]:
  """One command in two processes, connected over loopback."""
  coordinator = (f'--coordinator={_unused_address()}', '--num_processes=2')
  return tuple(
    command.start(
      *('-m', 'sparse_experts', *arguments),
      *(*coordinator, f'--process_id={i}'),
      devices=devices,
    )
    for i in range(2)
  )


def _end(processes) -> list[command.Outcome]:
  outcomes = []
  for process in processes:
    stdout, stderr = process.communicate()
    outcomes.append(command.Outcome(process.returncode, stdout, stderr))
  assert [outcome.code for outcome in outcomes] == [0, 0], outcomes
  return outcomes


def test_eight_devices_and_then_four_train_as_one(alone, tmp_path):
  command.train(tmp_path, EIGHT, *STEPS, '--gin.TRAIN_STEPS=2')
  command.train_on(jax.devices()[:4], tmp_path, *STEPS, expert=2)
  np.testing.assert_allclose(_losses(tmp_path), alone, rtol=1e-5)


@pytest.mark.parametrize(
  'devices,mesh',
  [
    (1, "--gin.MESH={'data': 1, 'expert': 2}"),
    pytest.param(1, "--gin.MESH={'data': 2}", marks=pytest.mark.slow),
    pytest.param(4, EIGHT, marks=pytest.mark.slow),
  ],
)
def test_two_processes_train_as_one(devices, mesh, alone, tmp_path):
  run = (command.TINY, f'--gin.MODEL_DIR={tmp_path}', mesh, *STEPS)
  first, second = _end(
    _start_two('train', *run, command.NO_EVALUATION, '--json', devices=devices)
  )
  np.testing.assert_allclose(_losses(tmp_path), alone, rtol=1e-5)
  # The first speaks for both.
  assert json.loads(first.stdout)['step'] == 4
  assert 'saved step 4\n' in first.stderr
  assert second.stdout == ''
  assert 'step' not in second.stderr

  # One process goes on, on another mesh.
  outcome = command.train(tmp_path, '--gin.TRAIN_STEPS=5')
  assert 'resumed at step 4\n' in outcome.stderr


def test_processes_that_would_read_different_data_stop():
  """All of them, before they read any; order of names is no difference."""
  address = _unused_address()
  program = f"""
import sys, jax
from sparse_experts.training import global_batch
i = int(sys.argv[1])
jax.distributed.initialize({address!r}, 2, i)
same = [('corpus', 'abc'), ('seed', 1)]
global_batch.check_same_on_all_processes(dict(same[:: 1 - 2 * i]))
try:
  global_batch.check_same_on_all_processes({{'seed': 1, 'corpus': 'abcd'[i:]}})
except ValueError as error:
  print(error)
"""
  outcomes = _end(
    [command.start('-c', program, str(i), devices=1) for i in range(2)]
  )
  for i, (outcome, corpus) in enumerate(zip(outcomes, ('abcd', 'bcd'))):
    assert outcome.stdout.splitlines()[-1] == (
      f'processes would read different data; process {i} reads {{"corpus": '
      f'"{corpus}", "seed": 1}}; give all hosts the same files and package '
      'versions.'
    )


@pytest.mark.slow
def test_two_processes_evaluate_and_infer_as_one(tmp_path):
  command.train(tmp_path, '--gin.TRAIN_STEPS=2')
  run = (command.TINY, f'--gin.MODEL_DIR={tmp_path}', '--json')
  single, both = (
    [
      json.loads(run_command('evaluate').stdout),
      json.loads(run_command('infer').stdout),
    ]
    for run_command in (
      lambda name: command.run(name, *run),
      lambda name: _end(_start_two(name, *run, devices=4))[0],
    )
  )
  assert single[0]['task_metrics'] == both[0]['task_metrics']
  np.testing.assert_allclose(
    single[0]['metrics']['loss'], both[0]['metrics']['loss'], rtol=1e-5
  )
  for one, other in zip(single[1], both[1], strict=True):
    assert one['prediction'] == other['prediction']
    np.testing.assert_allclose(one['log_prob'], other['log_prob'], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('terminated', [[0, 1], [1]])
def test_two_processes_stop_at_the_same_step(terminated, tmp_path):
  """Where a scheduler tells one of them, or both."""
  processes = _start_two(
    *('train', command.TINY, f'--gin.MODEL_DIR={tmp_path}', EIGHT),
    *(command.NO_EVALUATION, '--gin.TRAIN_STEPS=100000', '--json'),
    devices=4,
  )
  for line in processes[0].stderr:
    if line.startswith('saved step '):
      break
  for i in terminated:
    processes[i].send_signal(signal.SIGTERM)
  first, _ = _end(processes)
  results = json.loads(first.stdout)
  assert results['preempted']
  assert f'SIGTERM: stopping after step {results["step"]}\n' in first.stderr
  assert first.stderr.endswith(f'saved step {results["step"]}\n')
  inspect = command.run('inspect', '--json', f'--checkpoint={tmp_path}')
  assert json.loads(inspect.stdout)['step'] == results['step']


@pytest.mark.slow
def test_two_processes_are_one_owner_and_refused_as_one(tmp_path):
  """What one is told ends both."""
  held = lease.Lease(tmp_path)
  processes = _start_two(
    *('train', command.TINY, f'--gin.MODEL_DIR={tmp_path}', EIGHT),
    *(command.NO_EVALUATION, '--json'),
    devices=4,
  )
  for process in processes:
    _, stderr = process.communicate()
    assert process.returncode == 2
    assert f'error: MODEL_DIR {tmp_path} is being trained in, by' in stderr
  held.check()
  held.close()

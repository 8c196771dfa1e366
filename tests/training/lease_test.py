"""One trainer a MODEL_DIR; whoever is gone is no obstacle."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import types

import command
import pytest

from sparse_experts.training import lease
from sparse_experts.training import process as identity


@pytest.fixture
def brisk(monkeypatch):
  """Seconds instead of many."""
  monkeypatch.setattr(lease, 'RENEWED_EVERY', 0.1)
  monkeypatch.setattr(lease, 'EXPIRES_AFTER', 1.0)


def rewrite(path, **changes) -> None:
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def sleeper() -> subprocess.Popen:
  """A process that does nothing."""
  return subprocess.Popen([sys.executable, '-c', 'input()'], stdin=-1)


def test_a_second_is_refused_and_told_by_whom(tmp_path):
  first = lease.Lease(tmp_path)
  with pytest.raises(ValueError, match=f'process {os.getpid()} on ') as refused:
    lease.Lease(tmp_path)
  assert f'MODEL_DIR {tmp_path} is being trained in' in str(refused.value)
  first.check()
  first.close()
  assert list(tmp_path.iterdir()) == []
  lease.Lease(tmp_path).close()


def test_a_process_that_is_gone_is_followed_at_once(tmp_path):
  path = tmp_path / 'lease.json'
  with sleeper() as process:
    first = lease.Lease(tmp_path)
    rewrite(path, pid=process.pid, started=identity.started(process.pid))
    with pytest.raises(ValueError, match=f'process {process.pid} on '):
      lease.Lease(tmp_path)
    process.kill()
  second = lease.Lease(tmp_path)
  second.check()
  # A process that has its id, but began at another time, is another one.
  rewrite(path, pid=os.getpid(), started=1, owner='other')
  third = lease.Lease(tmp_path)
  for before in (first, second):
    with pytest.raises(ValueError, match='was taken over by process'):
      before.check()
    before.close()
  third.check()
  third.close()
  assert not path.exists()


def test_another_machine_is_watched(brisk, tmp_path, capsys):
  """Its process ids and its clock mean nothing here."""
  first = lease.Lease(tmp_path)
  first._holder['machine'] = 'another boot'
  first.check()
  rewrite(tmp_path / 'lease.json', machine='another boot', since='2099')
  with pytest.raises(ValueError, match='is being trained in'):
    lease.Lease(tmp_path)
  with first._mutex:  # No renewal is on its way.
    first._closed.set()  # As if it had died.
  second = lease.Lease(tmp_path)
  assert 'watching for 1 seconds' in capsys.readouterr().err
  second.close()


NO_LEASES = {
  'half a one': lambda path: path.write_text('{"pid": 1'),
  'no text': lambda path: path.write_bytes(b'\xff\xfe\x00'),
  'no object': lambda path: path.write_text('[1]'),
  'no process': lambda path: path.write_text('{"pid": "1\\u0000"}'),
  'deep': lambda path: path.write_text('[' * 100_000),
  'a folder': lambda path: path.mkdir(),
  'a link to nothing': lambda path: path.symlink_to('nowhere'),
  'a pipe': lambda path: os.mkfifo(path),
}


@pytest.mark.parametrize('what', NO_LEASES)
def test_what_is_no_lease_is_named(what, tmp_path, monkeypatch):
  monkeypatch.setattr(lease, '_SETTLES', 0.01)
  path = tmp_path / 'lease.json'
  NO_LEASES[what](path)
  with pytest.raises(ValueError, match='cannot be read as a lease') as refused:
    lease.Lease(tmp_path)
  line = str(refused.value)
  assert line.startswith(str(path)) and '\n' not in line
  assert line.endswith('remove it if no trainer runs there.')
  assert path.is_symlink() or path.exists()


@pytest.mark.parametrize('unknown', [{}, {'started': None}])
def test_a_process_of_unknown_start_is_known_by_its_id(unknown, tmp_path):
  path = tmp_path / 'lease.json'
  here = {'machine': identity.machine(), 'owner': 'other', **unknown}
  with sleeper() as process:
    path.write_text(json.dumps({'pid': process.pid, **here}))
    with pytest.raises(ValueError, match=f'process {process.pid} on '):
      lease.Lease(tmp_path)
    process.kill()
  lease.Lease(tmp_path).close()
  assert not path.exists()


def test_of_many_that_take_over_one_does(tmp_path):
  (tmp_path / 'lease.json').write_text(
    json.dumps({'machine': identity.machine(), 'pid': 2**30, 'started': 1})
  )
  outcomes = []

  def take():
    try:
      outcomes.append(lease.Lease(tmp_path))
    except ValueError as error:
      outcomes.append(str(error))

  threads = [threading.Thread(target=take) for _ in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  [owner] = [one for one in outcomes if isinstance(one, lease.Lease)]
  owner.check()
  assert sum('is being trained in' in str(one) for one in outcomes) == 7
  owner.close()


def test_a_signal_while_it_is_taken_leaves_nothing(tmp_path, monkeypatch):
  closes = []

  def end(_):  # As a signal's handler does, before the lease has its text.
    closes[0]()
    raise KeyboardInterrupt

  monkeypatch.setattr(lease.json, 'dumps', end)
  with pytest.raises(KeyboardInterrupt):
    lease.Lease(tmp_path / 'run', closes.append)
  assert list(tmp_path.iterdir()) == []


def test_a_model_dir_that_is_deleted_is_gone(brisk, tmp_path):
  held = lease.Lease(tmp_path / 'run')
  shutil.rmtree(tmp_path / 'run')
  with pytest.raises(FileNotFoundError, match='run is gone: put back'):
    held.check()
  held.close()
  assert not (tmp_path / 'run').exists()


def test_what_cannot_be_written_in_one_that_is_gone_is_that(tmp_path):
  with (
    pytest.raises(FileNotFoundError, match='run is gone: put back'),
    lease.Lease(tmp_path / 'run'),
  ):
    shutil.rmtree(tmp_path / 'run')
    raise OSError('metrics cannot be written')
  with pytest.raises(OSError, match='disk is full'), lease.Lease(tmp_path):
    raise OSError('the disk is full')
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('other', [None, 'no lease', '{"pid": 1}'])
def test_one_that_is_made_anew_is_lost_within_a_renewal(brisk, other, tmp_path):
  run = tmp_path / 'run'
  held = lease.Lease(run)
  held._mutex.acquire()  # Else it may be renewed in the middle of this.
  shutil.rmtree(run)
  run.mkdir()
  (run / 'notes').touch()
  if other is not None:
    (run / 'lease.json').write_text(other)
  before = sorted(run.iterdir())
  held._mutex.release()
  lost = FileNotFoundError if other is None else ValueError
  with pytest.raises(lost, match='was emptied, or made anew|was taken over by'):
    for _ in range(200):
      time.sleep(0.02)
      held()
  held.close()
  assert sorted(run.iterdir()) == before


def test_a_run_that_took_no_step_leaves_nothing(tmp_path):
  run = tmp_path / 'of' / 'run'
  held = lease.Lease(run)
  (run / 'config.gin').touch()
  (run / 'checkpoints').mkdir()
  held(types.SimpleNamespace(start=0, step=0))
  held.close()
  assert list(tmp_path.iterdir()) == []

  # What was there, and what a step is in, stays.
  for there, step in (True, 0), (False, 1):
    run.mkdir(parents=True)
    if there:
      (run / 'notes').touch()
    held = lease.Lease(run)
    (run / 'config.gin').touch()
    held(types.SimpleNamespace(start=0, step=step))
    held.close()
    names = {path.name for path in run.iterdir()}
    assert names == {'config.gin'} | ({'notes'} if there else set())
    shutil.rmtree(run)


@pytest.mark.slow
def test_two_trainers(tmp_path):
  """The first goes on; after a kill it may be followed."""
  arguments = (
    *('train', command.TINY, f'--gin.MODEL_DIR={tmp_path}'),
    *(command.NO_EVALUATION, '--gin.TRAIN_STEPS=100000'),
  )
  first = command.start('-m', 'sparse_experts', *arguments, devices=1)
  for line in first.stderr:
    if line.startswith('saved step'):
      break
  begun = time.monotonic()
  second = command.start('-m', 'sparse_experts', *arguments, devices=1)
  _, stderr = second.communicate()
  assert second.returncode == 2 and time.monotonic() - begun < 30
  assert stderr.count('\n') == 1
  assert f'process {first.pid} on ' in stderr
  assert first.poll() is None
  first.send_signal(signal.SIGKILL)
  first.communicate()
  outcome = command.train(tmp_path, '--gin.TRAIN_STEPS=1')
  assert 'resumed at step' in outcome.stderr
  assert not (tmp_path / 'lease.json').exists()

"""One trainer a MODEL_DIR; whoever is gone is no obstacle."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import command
import pytest

from sparse_experts.training import lease


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
    rewrite(path, pid=process.pid, started=lease._started(process.pid))
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
  first._closed.set()  # As if it had died.
  second = lease.Lease(tmp_path)
  assert 'watching for 1 seconds' in capsys.readouterr().err
  second.close()


def test_a_lease_that_cannot_be_read_expires(brisk, tmp_path):
  (tmp_path / 'lease.json').write_text('{"host": "a')
  lease.Lease(tmp_path).close()


def test_of_many_that_take_over_one_does(tmp_path):
  (tmp_path / 'lease.json').write_text(
    json.dumps({'machine': lease._machine(), 'pid': 2**30, 'started': 1})
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


def test_a_model_dir_that_is_deleted_is_gone(brisk, tmp_path):
  held = lease.Lease(tmp_path / 'run')
  (tmp_path / 'run' / 'lease.json').unlink()
  held.check()  # The lease alone is written again.
  (tmp_path / 'run' / 'lease.json').unlink()
  held._closed.set()
  (tmp_path / 'run').rmdir()
  held._closed.clear()
  with pytest.raises(ValueError, match='run is gone: put it back'):
    held.check()
  held.close()
  assert not (tmp_path / 'run').exists()


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

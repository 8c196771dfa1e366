"""Ctrl-C and pipes that nobody reads, in processes of their own."""

import signal
import time

import command
import pytest


@pytest.mark.parametrize('seconds', [0.3, 1.5, 4])
def test_ctrl_c_is_one_line(seconds, tmp_path):
  """While modules are imported, gin is read, a model is traced."""
  process = command.start(
    *('-m', 'sparse_experts', 'bench', 'layer', '--json'),
    devices=1,
    cwd=tmp_path,
  )
  time.sleep(seconds)
  process.send_signal(signal.SIGINT)
  stdout, stderr = process.communicate(timeout=60)
  assert (process.returncode, stdout) == (130, '')
  assert stderr == 'interrupted\n'


@pytest.mark.parametrize(
  'arguments',
  [('table', '--paper=t5_checkpoints'), ('--help',), ('list', '-h')],
)
def test_a_broken_pipe_is_silent(arguments, tmp_path):
  process = command.start('-m', 'sparse_experts', *arguments, cwd=tmp_path)
  process.stdout.close()  # As `| head -0`.
  assert process.stderr.read() == ''
  assert process.wait(60) in (0, 141)  # argparse minds no pipe.


def test_what_nobody_expected_is_one_line_and_a_file(monkeypatch, tmp_path):
  from sparse_experts.commands import list as listing

  def fail(args):
    raise TypeError('of no kind\nthat is known')

  monkeypatch.setattr(listing, 'run', fail)
  monkeypatch.setattr('tempfile.tempdir', str(tmp_path))
  outcome = command.run('list')
  assert (outcome.code, outcome.stdout) == (1, '')
  (file,) = tmp_path.iterdir()
  assert outcome.stderr == (
    'error: internal: TypeError: of no kind that is known (a fault of '
    f'sparse_experts; traceback in {file})\n'
  )
  assert 'in fail' in file.read_text()
  verbose = command.run('list', '--verbose').stderr
  assert verbose.startswith('Traceback') and 'in fail' in verbose


def test_out_of_memory_says_who_asked_for_how_much():
  """Tokens of 10^9 x 2^20 floats: 4 PB."""
  outcome = command.run(
    *('bench', 'layer', '--json', '--gin.TOKENS=1000000000'),
    *('--gin.EMBED_DIM=1048576', '--gin.MLP_DIM=8', '--gin.EXPERTS=(8,)'),
  )
  assert outcome.code == 2
  line = outcome.stderr
  assert line.startswith('error: out of memory in bench.layer.')
  assert line.count('\n') == 1
  assert 'bytes' in line and 'BATCH_SIZE' in line

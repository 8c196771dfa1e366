"""The limit of a run's time fails a run that takes longer."""

import subprocess
import sys

import pytest
from paths import ROOT

TESTS = 'import time\n\ndef test():\n  time.sleep(0.2)\n'


@pytest.mark.parametrize('limit', [0.1, 600])
def test_a_run_over_its_limit_fails(tmp_path, limit):
  for file in ('a_test.py', 'b_test.py'):
    (tmp_path / file).write_text(TESTS)
  (tmp_path / 'conftest.py').write_text('from durations import *\n')
  done = subprocess.run(
    [
      *(sys.executable, '-m', 'pytest', '-c', ROOT / 'pyproject.toml'),
      *(f'--rootdir={tmp_path}', '-n2', f'--seconds={limit}'),
      *('-p', 'no:cacheprovider', tmp_path),
    ],
    env={'PYTHONPATH': str(ROOT / 'tests'), 'PATH': ''},
    capture_output=True,
    text=True,
  )
  assert ' passed' in done.stdout and 'a_test.py' in done.stdout, done
  assert 'slowest 10 files' in done.stdout
  assert done.returncode == (1 if limit < 1 else 0), done.stdout
  assert ('and their limit is 0.1 s' in done.stdout) == (limit < 1)


def test_files_with_slow_tests_are_first(tmp_path):
  (tmp_path / 'a_test.py').write_text(TESTS)
  marked = TESTS.replace('def', 'import pytest\n\n@pytest.mark.slow\ndef')
  (tmp_path / 'b_test.py').write_text(marked)
  (tmp_path / 'conftest.py').write_text('from durations import *\n')
  done = subprocess.run(
    [
      *(sys.executable, '-m', 'pytest', '-c', ROOT / 'pyproject.toml'),
      *(f'--rootdir={tmp_path}', '--collect-only', tmp_path),
    ],
    env={'PYTHONPATH': str(ROOT / 'tests'), 'PATH': ''},
    capture_output=True,
    text=True,
  )
  assert 0 <= done.stdout.find('b_test.py') < done.stdout.find('a_test.py'), (
    done
  )

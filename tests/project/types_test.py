"""Types hold, but for a number of errors that only falls."""

import collections
import importlib.metadata
import json
import subprocess
import sys

import falling
import pytest
from paths import ROOT

KIND = 'type errors'

# The number is of these: other versions declare other types.
MADE_WITH = {'basedpyright': '1.40.2', 'jax': '0.10.2', 'python': '3.11'}


def installed():
  """The same of what is installed."""
  versions = {
    name: importlib.metadata.version(name) for name in ('basedpyright', 'jax')
  }
  return {**versions, 'python': '.'.join(map(str, sys.version_info[:2]))}


def errors(*files):
  """What the checker says, by file: of the package, or of given files."""
  done = subprocess.run(
    [
      *(sys.executable, '-m', 'basedpyright', '--outputjson'),
      *('--pythonpath', sys.executable, *map(str, files)),
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  found = collections.defaultdict(list)
  for each in json.loads(done.stdout)['generalDiagnostics']:
    if each['severity'] == 'error':
      file = each['file'].removeprefix(f'{ROOT}/')
      line = each['range']['start']['line'] + 1
      found[file].append(f'{line}: {each["message"].splitlines()[0]}')
  return found


@pytest.fixture(autouse=True)
def _same_checker():
  if installed() != MADE_WITH:
    pytest.skip(f'the numbers are of {MADE_WITH}, this is {installed()}')


@pytest.mark.slow  # Half a minute.
def test_no_file_has_more_errors():
  falling.check(KIND, errors())


def test_a_wrong_type_is_an_error(tmp_path):
  file = tmp_path / 'wrong.py'
  file.write_text(
    'from sparse_experts.moe.capacity import CapacityRule\n\n'
    "CapacityRule(minimum='four')\n"
  )
  ((_, (error,)),) = errors(file).items()
  assert error.startswith('3: ') and "'four'" in error

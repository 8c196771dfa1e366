"""How long the tests take: the ten slowest files, and a limit that is held.

Files with slow tests are run first, so that no process ends with one of them
while the others have nothing left.
"""

import collections
import time

import pytest

_START = time.monotonic()


def pytest_addoption(parser):
  parser.addoption(
    '--seconds',
    type=float,
    metavar='N',
    help='Fail where the run, up to the last test, takes longer.',
  )


@pytest.hookimpl(trylast=True)  # Once it is known what is run.
def pytest_collection_modifyitems(items):
  slow = collections.Counter(
    item.path for item in items if item.get_closest_marker('slow')
  )
  items.sort(key=lambda item: -slow[item.path])


def _by_file(reporter):
  """Seconds of all tests and their fixtures, by file, slowest first."""
  seconds = collections.Counter()
  for reports in reporter.stats.values():
    for report in reports:
      if isinstance(report, pytest.TestReport):
        seconds[report.nodeid.partition('::')[0]] += report.duration
  return seconds.most_common()


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session):
  """Before the summary, which reads the exit status."""
  limit = session.config.getoption('seconds')
  if limit is not None and time.monotonic() - _START > limit:
    session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
  files = _by_file(terminalreporter)
  if len(files) > 1:
    terminalreporter.section('slowest 10 files')
    for file, seconds in files[:10]:
      terminalreporter.line(f'{seconds:7.1f}s {file}')
  limit, taken = config.getoption('seconds'), time.monotonic() - _START
  if limit is not None and taken > limit:
    terminalreporter.line(
      f'error: the tests took {taken:.0f} s, and their limit is {limit:g} s; '
      'make some of the above cheaper, or mark what is rarely needed as slow.',
      red=True,
    )

"""Shows that the default tests fail where the code has a known bug.

A mutant is a file tests/mutants/NAME.patch: what the bug is, the one test that
fails with it, and the patch that makes it,

  Probabilities are returned as logits.
  Killed by: tests/moe/routing_test.py::test_route_is_the_oracle
  --- a/sparse_experts/moe/routers/top_k.py
  ...

A copy of the checkout is given one bug at a time. A mutant is killed if its
test runs and fails there; an error beside the test kills nothing. First all
named tests must pass without any bug. Ends with 1 unless all are killed.

  python scripts/mutants.py                # all, in minutes
  python scripts/mutants.py cumsum_axis    # one
"""

import argparse
import concurrent.futures
import dataclasses
import os
import pathlib
import queue
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / 'tests'))

import checkout  # noqa: E402

FOLDER = ROOT / 'tests' / 'mutants'
WORKERS = 2  # Copies that are tested at once.
LIMIT = 180  # Seconds of a test; a bug may make it endless.
COMPILED = '.pytest_cache/jax'  # Where tests/conftest.py keeps programs.


@dataclasses.dataclass(frozen=True)
class Mutant:
  """A known bug, and the test that finds it.

  Attributes:
    name: of its file.
    bug: what it is, in a sentence or two.
    test: that fails with it, `tests/x_test.py::test_y[parameters]`.
    patch: a unified diff from the checkout's root.
  """

  name: str
  bug: str
  test: str
  patch: str

  def apply(self, folder: pathlib.Path, *options: str) -> str:
    """Applies the patch to a checkout; returns git's complaint, '' for none."""
    # A folder inside of another checkout is not a part of that here.
    ceiling = {'GIT_CEILING_DIRECTORIES': str(folder.resolve().parent)}
    done = subprocess.run(
      ['git', 'apply', *options],
      input=self.patch,
      cwd=folder,
      env=os.environ | ceiling,
      capture_output=True,
      text=True,
    )
    return done.stderr.strip()


def read(path: pathlib.Path) -> Mutant:
  """The mutant of a file.

  Raises:
    ValueError: it does not say what the bug is or which test finds it.
  """
  header, mark, patch = path.read_text().partition('\n--- ')
  bug, killed_by, test = header.partition('\nKilled by: ')
  if not (mark and bug.strip() and killed_by and '::' in test):
    raise ValueError(
      f'{path} must be a sentence, a line `Killed by: tests/FILE::TEST` and a '
      'patch, in this order.'
    )
  return Mutant(path.stem, ' '.join(bug.split()), test.strip(), f'--- {patch}')


def mutants(names: Sequence[str] = ()) -> list[Mutant]:
  """Those of these names, or all, in the order of their names."""
  there = {path.stem: path for path in sorted(FOLDER.glob('*.patch'))}
  if unknown := set(names) - set(there):
    raise ValueError(
      f'no mutant {", ".join(sorted(unknown))}; there are {", ".join(there)}.'
    )
  return [
    read(path) for name, path in there.items() if name in names or not names
  ]


def copy(folder: pathlib.Path) -> None:
  """A copy of the checkout, which shares the programs that tests compiled.

  They are found by what they compute, so a mutant's are others.
  """
  checkout.copy(folder)
  (ROOT / COMPILED).mkdir(parents=True, exist_ok=True)
  (folder / COMPILED).parent.mkdir()
  (folder / COMPILED).symlink_to(ROOT / COMPILED)


def run(folder: pathlib.Path, *tests: str) -> dict[str, int] | str:
  """How many of these default tests were run, failed and had errors.

  Or why that is not known, the end of what pytest printed.
  """
  report = folder / 'report.xml'
  report.unlink(missing_ok=True)
  command = [sys.executable, '-m', 'pytest', '-m', 'not slow', '-p']
  command += ['no:cacheprovider', f'--junitxml={report}', *tests]
  environment = {
    'PYTHONPATH': os.pathsep.join([str(folder), str(folder / 'tests')]),
    # A file may change twice in a second, which its bytecode would not see.
    'PYTHONDONTWRITEBYTECODE': '1',
  }
  try:
    done = subprocess.run(
      command,
      cwd=folder,
      env=os.environ | environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      timeout=LIMIT * len(tests),
    )
  except subprocess.TimeoutExpired:
    return f'no end within {LIMIT} seconds'
  if done.returncode not in (0, 1) or not report.exists():
    return done.stdout.strip()[-2000:]
  (suite,) = ElementTree.parse(report).getroot().iter('testsuite')
  return {
    name: int(suite.get(name))
    for name in ('tests', 'failures', 'errors', 'skipped')
  }


def passes(folder: pathlib.Path, tests: Sequence[str]) -> str:
  """Why these tests do not all run and pass without a bug; '' if they do."""
  found = run(folder, *tests)
  if isinstance(found, str):
    return found
  if found['tests'] and not sum(found.values()) - found['tests']:
    return ''
  return f'without any bug: {found}'


def survives(folder: pathlib.Path, mutant: Mutant) -> str:
  """Why a mutant counts as one that survives; '' if it is killed."""
  if complaint := mutant.apply(folder):
    return f'the patch does not apply: {complaint}'
  try:
    found = run(folder, mutant.test)
  finally:
    mutant.apply(folder, '--reverse')
  if isinstance(found, str) or found['errors']:
    return f'no failure of a test: {found}'
  return '' if found['failures'] else f'{mutant.test} passes with it'


def main(argv: Sequence[str] | None = None) -> int:
  """Returns 1 unless all mutants are killed."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('names', nargs='*', help='of mutants', metavar='NAME')
  try:
    chosen = mutants(parser.parse_args(argv).names)
  except ValueError as error:
    parser.error(str(error))
  with tempfile.TemporaryDirectory() as temporary:
    folders = [pathlib.Path(temporary, str(i)) for i in range(WORKERS)]
    for folder in folders:
      copy(folder)
    idle = queue.SimpleQueue()
    for folder in folders:
      idle.put(folder)

    def on_a_copy(what, function, argument):
      folder, start = idle.get(), time.monotonic()
      try:
        complaint = function(folder, argument)
      finally:
        idle.put(folder)
      seconds = f'{time.monotonic() - start:.0f} s'
      print(f'{what}: {complaint or "yes"} ({seconds})', flush=True)
      return not complaint

    # A file's tests share what they make and compile.
    files = sorted({mutant.test.partition('::')[0] for mutant in chosen})
    tests = [
      sorted(
        {
          mutant.test
          for mutant in chosen
          if mutant.test.partition('::')[0] in files[i::WORKERS]
        }
      )
      for i in range(WORKERS)
    ]
    with concurrent.futures.ThreadPoolExecutor(WORKERS) as threads:
      whole = all(
        threads.map(
          lambda part: on_a_copy('named tests pass', passes, part),
          filter(None, tests),
        )
      )
      killed = sum(
        threads.map(
          lambda mutant: on_a_copy(f'{mutant.name} killed', survives, mutant),
          chosen,
        )
      )
  print(f'{len(chosen)} mutants, {killed} killed')
  return int(not (whole and killed == len(chosen) > 0))


if __name__ == '__main__':
  sys.exit(main())

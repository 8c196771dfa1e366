"""Shows that the default tests fail where the code has a known bug.

A mutant is a file tests/mutants/NAME.patch: what the bug is, where others had
it, if that can be said, the one test that fails with it, and a patch that makes
it,

  Logits against the tied table are not divided by the root of the width.
  Known from: https://github.com/ml-explore/mlx-examples/pull/591
  Killed by: tests/layers/layers_test.py::test_embedding_and_its_logits
  --- a/sparse_experts/layers/embed.py
  ...

Copies of the checkout are given one bug at a time. A mutant is killed if its
test runs there and fails; an error beside the test kills nothing. Before that
all named tests have to pass. Ends with 1 unless all mutants are killed.

  python scripts/mutants.py                         # all, in minutes
  python scripts/mutants.py tied_scale_forgotten    # one
"""

import argparse
import concurrent.futures
import dataclasses
import os
import pathlib
import queue
import re
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
WORKERS = 2  # Copies, and so mutants tested at once.
LIMIT = 300  # Seconds of a mutant's test; a bug may make it endless.
COMPILED = '.pytest_cache/jax'  # Where tests/conftest.py keeps programs.

HEADER = re.compile(
  r'(?P<bug>.+?)\n'
  r'(Known from: (?P<known>https://\S+)\n)?'
  r'Killed by: (?P<test>tests/\S+_test\.py::test_.+)\n'
  r'(?P<patch>--- a/.+)',
  re.DOTALL,
)


@dataclasses.dataclass(frozen=True)
class Mutant:
  """A known bug, and the test that finds it.

  Attributes:
    name: of its file.
    bug: what it is, a sentence or two.
    known: a page about others who had it; None: none that is exactly it.
    test: that fails with it, `tests/x_test.py::test_y[parameters]`.
    patch: a unified diff from the checkout's root.
  """

  name: str
  bug: str
  known: str | None
  test: str
  patch: str

  def apply(self, folder: pathlib.Path, *options: str) -> str:
    """Applies the patch to a checkout; returns git's complaint, '' for none."""
    # Inside of another checkout git would take the folder for a part of that.
    ceiling = {'GIT_CEILING_DIRECTORIES': str(folder.resolve().parent)}
    done = subprocess.run(
      ['git', 'apply', *options],
      input=self.patch,
      cwd=folder,
      env=os.environ | ceiling,
      capture_output=True,
      text=True,
    )
    return done.stderr.strip() if done.returncode else ''


def read(path: pathlib.Path) -> Mutant:
  """The mutant of a file.

  Raises:
    ValueError: it does not say what the bug is or which test finds it.
  """
  found = HEADER.fullmatch(path.read_text())
  if found is None:
    raise ValueError(
      f'{path} must be a sentence, a line `Known from: https://...` or none, a '
      'line `Killed by: tests/FILE::TEST`, and a patch.'
    )
  bug = ' '.join(found['bug'].split())
  return Mutant(path.stem, bug, found['known'], found['test'], found['patch'])


def mutants(names: Sequence[str] = ()) -> list[Mutant]:
  """Those of these names, or all, in the order of their names.

  Raises:
    ValueError: there is no such.
  """
  there = {path.stem: path for path in sorted(FOLDER.glob('*.patch'))}
  if unknown := set(names) - set(there):
    raise ValueError(
      f'no mutant {", ".join(sorted(unknown))}; there are {", ".join(there)}.'
    )
  return [read(there[name]) for name in there if name in names or not names]


def copy(folder: pathlib.Path) -> None:
  """Copies the checkout, but for the programs that its tests compiled.

  They are shared: they are found by what they compute, which a bug changes.
  """
  checkout.copy(folder)
  (ROOT / COMPILED).mkdir(parents=True, exist_ok=True)
  (folder / COMPILED).parent.mkdir()
  (folder / COMPILED).symlink_to(ROOT / COMPILED)


def run(folder: pathlib.Path, *tests: str) -> dict[str, int] | str:
  """How many of these tests ran, failed, had errors and were skipped.

  Of the default tests alone. A text, if pytest did not get so far.
  """
  report = folder / 'report.xml'
  report.unlink(missing_ok=True)
  environment = {
    'PYTHONPATH': os.pathsep.join([str(folder), str(folder / 'tests')]),
    # A file may change twice in a second, which its bytecode would not see.
    'PYTHONDONTWRITEBYTECODE': '1',
  }
  options = ['-m', 'not slow', '-p', 'no:cacheprovider']
  try:
    done = subprocess.run(
      [
        *(sys.executable, '-m', 'pytest', *options),
        *(f'--junitxml={report}', *tests),
      ],
      cwd=folder,
      env=os.environ | environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      timeout=LIMIT * len(tests),
    )
  except subprocess.TimeoutExpired:
    return f'no end within {LIMIT * len(tests)} seconds'
  if done.returncode not in (0, 1) or not report.exists():
    return done.stdout.strip()[-2000:]
  (suite,) = ElementTree.parse(report).getroot().iter('testsuite')
  counts = ('tests', 'failures', 'errors', 'skipped')
  return {name: int(suite.get(name)) for name in counts}


def passing(folder: pathlib.Path, tests: Sequence[str]) -> str:
  """'' if all of these tests run and pass without a bug, else what they do."""
  found = run(folder, *tests)
  if isinstance(found, str):
    return found
  bad = found['failures'] + found['errors'] + found['skipped']
  return '' if found['tests'] and not bad else f'without a bug: {found}'


def surviving(folder: pathlib.Path, mutant: Mutant) -> str:
  """'' if a mutant is killed, else why it is not."""
  if complaint := mutant.apply(folder):
    return f'its patch does not apply: {complaint}'
  try:
    found = run(folder, mutant.test)
  finally:
    mutant.apply(folder, '--reverse')
  if isinstance(found, str) or found['errors']:
    return f'its test could not run: {found}'
  return '' if found['failures'] else f'{mutant.test} passes'


def main(argv: Sequence[str] | None = None) -> int:
  """Returns 1 unless all mutants are killed."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('names', nargs='*', help='of all', metavar='NAME')
  try:
    chosen = mutants(parser.parse_args(argv).names)
  except ValueError as error:
    parser.error(str(error))
  # A file's tests share what they make.
  files = sorted({mutant.test.partition('::')[0] for mutant in chosen})
  tests = [
    sorted({m.test for m in chosen if m.test.partition('::')[0] in part})
    for part in (files[i::WORKERS] for i in range(WORKERS))
    if part
  ]
  with (
    tempfile.TemporaryDirectory() as temporary,
    concurrent.futures.ThreadPoolExecutor(WORKERS) as threads,
  ):
    copies = queue.SimpleQueue()
    for i in range(WORKERS):
      copy(pathlib.Path(temporary, str(i)))
      copies.put(pathlib.Path(temporary, str(i)))

    def fails(what: str, complain, argument) -> bool:
      """Says what a copy has to complain of."""
      folder, start = copies.get(), time.monotonic()
      complaint = complain(folder, argument)
      copies.put(folder)
      seconds = time.monotonic() - start
      print(f'{what} ({seconds:.0f} s) {complaint}'.strip(), flush=True)
      return bool(complaint)

    def failed(what, complain, arguments) -> int:
      return sum(
        threads.map(lambda each: fails(what(each), complain, each), arguments)
      )

    if failed(lambda part: f'{len(part)} tests', passing, tests):
      return 1
    survived = failed(lambda mutant: mutant.name, surviving, chosen)
  print(f'{len(chosen)} mutants, {len(chosen) - survived} killed')
  return int(survived > 0)


if __name__ == '__main__':
  sys.exit(main())

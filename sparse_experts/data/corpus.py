"""Documentation corpora: the docstrings of scientific Python packages.

Real English that is the same for everybody: the docstrings of wheels pinned by
SHA-256 (`wheels.py`), with one digest on every Python.

  small      24 packages; the tasks docs_...
  large      62 packages, those of small among them; docs_large_...
  installed  packages as they are installed (`installed.py`): for who has no
             package index, and other text with other versions;
             docs_installed_...

They are read with `ast`, never imported, once, into a folder of the user's
cache, and offline from then on.

    $SPARSE_EXPERTS_CACHE, else $XDG_CACHE_HOME/sparse_experts,
    else ~/.cache/sparse_experts
      wheels/              what `fetch` has fetched
      corpus-<key>/        key: what it is harvested from, and the format below
        corpus.json        digest, counts, versions, file sizes
        <split>.tfrecord   tf.train.Example of text, domain and name

A document is one docstring; its domain is the package it comes from. Of those
that say nearly the same one stays (`docstrings.without_near_duplicates`; in
`installed` only equal ones go). Documents that open with the same paragraph are
variants of one text (the old and new version of an API, a function and its
wrapper), so the hash of the opening paragraph decides the split: a variant of a
training document is never a validation document, nor is it in another corpus.

What is harvested, cached and opened again is one subject, hence the 380 lines.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping

import tqdm
from etils import epath

from sparse_experts.data import docstrings, host_tensorflow, installed, wheels

# What the tasks of each corpus begin with.
PREFIXES = {
  'small': 'docs',
  'large': 'docs_large',
  'installed': 'docs_installed',
}

# The one package about human language instead of arrays, so a change of subject
# and of authors; large enough (5% of the text of small) for a steady loss.
OUT_OF_DOMAIN = 'nltk'

SPLITS = ('train', 'validation', 'test', 'out_of_domain')

# Raise it when the documents or their files change for the same packages.
FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Document:
  """One docstring: its text, package (domain) and dotted path (name)."""

  text: str
  domain: str
  name: str

  @property
  def split(self) -> str:
    """Where it belongs: 96% train, 2% validation, 2% test, or held out."""
    if self.domain == OUT_OF_DOMAIN:
      return 'out_of_domain'
    opening = self.text.split('\n\n', 1)[0]
    percentile = int(_hash(opening)[:8], 16) % 100
    return {96: 'validation', 97: 'validation', 98: 'test', 99: 'test'}.get(
      percentile, 'train'
    )


@dataclasses.dataclass(frozen=True)
class Corpus:
  """A harvested corpus on disk.

  Attributes:
    path: its folder.
    digest: hash of all documents; equal digests mean equal data.
    counts: documents by split and domain.
    versions: the packages it was harvested from.
    files: the TFRecord file of each split.
  """

  path: epath.Path
  digest: str
  counts: Mapping[str, Mapping[str, int]]
  versions: Mapping[str, str]
  files: Mapping[str, epath.Path]


def domains(name: str = 'small') -> tuple[str, ...]:
  """The packages that documents may be from; a task id is an index of these.

  Args:
    name: of a corpus, one of `PREFIXES`.

  >>> domains()[:3], len(domains('large'))
  (('ase', 'darts', 'deepchem'), 62)
  """
  if name == 'installed':
    return installed.PACKAGES
  return tuple(wheel.domain for wheel in wheels.pinned(name))


def load(name: str = 'small') -> Corpus:
  """Returns a corpus, harvesting it first where it is not cached.

  Harvesting takes 15 seconds of a CPU, that of large 45. Several processes may
  do so at once: the first to finish provides the folder, the others discard
  theirs. Nothing is fetched, see `fetch`. Reading a cached corpus imports no
  TensorFlow.

  Args:
    name: of a corpus, one of `PREFIXES`.

  Raises:
    FileNotFoundError: the wheels are not here; none of `installed.PACKAGES`,
      or not the one held out, is installed; or they hold no documents.
    ValueError: the cached folder or a wheel is damaged; the message names it.
    OSError: the cache cannot be written; before anything is harvested.

  >>> load().counts['out_of_domain'].keys()
  dict_keys(['nltk'])
  """
  folder = _folder(name)
  if not folder.exists():
    harvest = (
      _of_installed
      if name == 'installed'
      else functools.partial(_of_wheels, name)
    )
    _write(harvest, _versions(name), folder, wheels.DIGESTS.get(name))
  return _open(folder)


def fetch(name: str = 'small') -> Corpus:
  """Returns a corpus, fetching its wheels first where they are needed.

  Args:
    name: of a corpus, one of `PREFIXES`.

  Raises:
    FileNotFoundError: pip cannot fetch them.
    (The others are those of `load`.)
  """
  if to_fetch(name):
    wheels.fetch(wheels.pinned(name), wheel_folder())
  return load(name)


def to_fetch(name: str = 'small') -> list[wheels.Wheel]:
  """The wheels that `fetch` would fetch; none for a corpus that is cached."""
  if name == 'installed' or _folder(name).exists():
    return []
  return wheels.missing(wheels.pinned(name), wheel_folder())


def wheel_folder() -> epath.Path:
  """Where the wheels are."""
  return _cache() / 'wheels'


def documents(split: str, name: str = 'small') -> Iterator[dict[str, str]]:
  """Yields the documents of a split as dicts of text, domain and name.

  Args:
    split: one of `SPLITS`.
    name: of a corpus, one of `PREFIXES`.

  >>> next(documents('out_of_domain'))['domain']
  'nltk'
  """
  if split not in SPLITS:
    raise ValueError(f'unknown split {split!r}; the splits are {SPLITS}')
  tf = host_tensorflow.load()
  file = os.fspath(load(name).files[split])
  for record in tf.data.TFRecordDataset(file).as_numpy_iterator():
    features = tf.train.Example.FromString(record).features.feature
    yield {k: v.bytes_list.value[0].decode() for k, v in features.items()}


def _cache() -> epath.Path:
  if folder := os.environ.get('SPARSE_EXPERTS_CACHE'):
    return epath.Path(folder).expanduser()
  root = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
  return epath.Path(root).expanduser() / 'sparse_experts'


def _versions(name: str) -> dict[str, str]:
  """Of the packages of a corpus."""
  if name == 'installed':
    return installed.versions(OUT_OF_DOMAIN)
  return {wheel.domain: wheel.version for wheel in wheels.pinned(name)}


def _folder(name: str) -> epath.Path:
  """Where a corpus is, or will be."""
  made_of = _versions(name)
  if name != 'installed':
    found = wheels.pinned(name)
    made_of = [wheels.DIGESTS[name], [wheel.sha256 for wheel in found]]
  key = [FORMAT, docstrings.MIN_CHARACTERS, OUT_OF_DOMAIN, made_of]
  return _cache() / f'corpus-{_hash(json.dumps(key))[:16]}'


def _of_installed() -> list[Document]:
  """The documents of installed packages, without exact duplicates."""
  names = _versions('installed')
  unique = {}
  for document in _harvest({name: installed.sources(name) for name in names}):
    unique.setdefault(document.text, document)
  if not unique:
    raise FileNotFoundError(
      f'no docstrings found in {sorted(names)}: install these packages with '
      'their .py sources'
    )
  return list(unique.values())


def _of_wheels(name: str) -> list[Document]:
  """The documents of a pinned corpus."""
  found, folder = wheels.pinned(name), wheel_folder()
  wheels.check(name, found, folder)
  packages = {wheel.domain: wheels.sources(wheel, folder) for wheel in found}
  harvest = _harvest(packages)
  return list(docstrings.without_near_duplicates(harvest, lambda d: d.text))


def _harvest(
  packages: Mapping[str, Iterable[tuple[str, bytes]]],
) -> Iterator[Document]:
  """All documents of packages, given as modules and their sources."""
  quiet = not sys.stderr.isatty()
  if quiet:
    what = f'harvesting the docstrings of {len(packages)} packages, once'
    print(what, file=sys.stderr)
  with docstrings.parsing():
    for package, sources in tqdm.tqdm(
      packages.items(), 'harvesting docstrings', unit=' packages', disable=quiet
    ):
      for module, source in sources:
        for name, text in docstrings.docstrings(source, module):
          yield Document(text=text, domain=package, name=name)


def _write(
  harvest: Callable[[], list[Document]],
  versions: Mapping[str, str],
  folder: epath.Path,
  digest: str | None = None,
) -> None:
  """Writes the folder whole or not at all; keeps one that is there by then.

  Args:
    harvest: finds all documents.
    versions: of the packages.
    folder: to be written.
    digest: that they must have.
  """
  temporary = folder.parent / f'{folder.name}.{uuid.uuid4().hex}'
  with wheels.writing_cache(
    folder
  ):  # A harvest is long: who cannot write knows before.
    made = [parent for parent in temporary.parents if not parent.exists()]
    temporary.mkdir(parents=True)
  try:
    documents = harvest()
    with wheels.writing_cache(folder):
      found = _write_files(documents, versions, temporary)
    if digest and found != digest:
      raise ValueError(
        f'Python {sys.version.split()[0]} harvests another corpus (digest '
        f'{found}) than the pinned one ({digest}), whose numbers could not be '
        f'compared: take another Python, or {wheels.INSTALLED}'
      )
    try:
      temporary.rename(folder)
    except OSError:
      if not folder.exists():
        raise
  finally:
    if temporary.exists():
      temporary.rmtree()
    with contextlib.suppress(OSError):  # What else is in them stays.
      for parent in made:
        pathlib.Path(parent).rmdir()


def _write_files(
  documents: list[Document], versions: Mapping[str, str], folder: epath.Path
) -> str:
  """Writes what a folder holds; returns the digest of the documents."""
  tf = host_tensorflow.load()
  digest = hashlib.sha256()
  counts = {split: {} for split in SPLITS}
  with contextlib.ExitStack() as stack:
    writers = {
      split: stack.enter_context(
        tf.io.TFRecordWriter(os.fspath(folder / f'{split}.tfrecord'))
      )
      for split in SPLITS
    }
    # In the order of their hashes packages mix, so a reader that does not
    # shuffle, or only a little, sees all of them.
    for document in sorted(documents, key=lambda d: _hash(d.text)):
      split, domain = document.split, document.domain
      counts[split][domain] = counts[split].get(domain, 0) + 1
      fields = dataclasses.asdict(document)
      digest.update(json.dumps([split, fields]).encode())
      features = {
        k: tf.train.Feature(
          # Python accepts lone surrogates in a literal, UTF-8 does not.
          bytes_list=tf.train.BytesList(value=[v.encode(errors='replace')])
        )
        for k, v in fields.items()
      }
      example = tf.train.Example(features=tf.train.Features(feature=features))
      writers[split].write(example.SerializeToString(deterministic=True))
  description = {
    'digest': digest.hexdigest()[:16],
    'counts': counts,
    'versions': versions,
    'bytes': {s: (folder / f'{s}.tfrecord').stat().length for s in SPLITS},
  }
  (folder / 'corpus.json').write_text(json.dumps(description, indent=2))
  return description['digest']


def _open(folder: epath.Path) -> Corpus:
  files = {split: folder / f'{split}.tfrecord' for split in SPLITS}
  try:
    description = json.loads((folder / 'corpus.json').read_text())
    sizes = {split: description['bytes'][split] for split in SPLITS}
    corpus = Corpus(
      path=folder,
      digest=description['digest'],
      counts=description['counts'],
      versions=description['versions'],
      files=files,
    )
  except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
    raise damaged(folder, 'no valid corpus.json') from error
  for split, file in files.items():
    found = file.stat().length if file.exists() else 0
    if found != sizes[split]:
      raise damaged(
        folder, f'{file.name} has {found} bytes instead of {sizes[split]}'
      )
  return corpus


def damaged(folder: epath.Path, reason: str) -> ValueError:
  """The error that names a cached corpus that cannot be read."""
  return ValueError(
    f'{folder} is damaged ({reason}): delete the folder and start again'
  )


def _hash(text: str) -> str:
  return hashlib.sha256(text.encode(errors='replace')).hexdigest()

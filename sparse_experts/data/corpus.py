"""The embedded corpus: the documentation of the packages this project uses.

Real English that is there wherever the project is installed, without a
download: the docstrings of the scientific Python packages it depends on, some
26,000 documents and 24 million characters. They are read with `ast`, never
imported, once per set of package versions, into a folder of the user's cache.

    $SPARSE_EXPERTS_CACHE, else $XDG_CACHE_HOME/sparse_experts,
    else ~/.cache/sparse_experts
      corpus-<key>/          key: package versions and the format below
        corpus.json          digest, counts, versions, file sizes
        <split>.tfrecord     tf.train.Example of text, domain and name

A document is one docstring; its domain is the package it comes from. Documents
that open with the same paragraph are variants of one text (the old and new
version of an API, a function and its wrapper), so the hash of the opening
paragraph decides the split: a variant of a training document is never a
validation document.
"""

import ast
import contextlib
import dataclasses
import gc
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import sys
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping

import tqdm
from etils import epath

from sparse_experts import storage
from sparse_experts.data import host_tensorflow

PACKAGES = (
  'absl', 'clu', 'einops', 'etils', 'flax', 'gin', 'h5py', 'jax', 'jaxlib',
  'keras', 'ml_collections', 'nltk', 'numpy', 'opt_einsum', 'optax', 'orbax',
  'pyglove', 'scipy', 'seqio', 'tensorboard', 'tensorflow',
  'tensorflow_datasets', 'tensorflow_text', 'treescope',
)  # fmt: skip

# The one package about human language instead of arrays, so a change of subject
# and of authors; large enough (5% of the text) for a steady loss.
OUT_OF_DOMAIN = 'nltk'

SPLITS = ('train', 'validation', 'test', 'out_of_domain')

# Raise it when the documents or their files change for the same packages.
FORMAT = 1

# Shorter docstrings are labels ('See base class.'), not text.
MIN_CHARACTERS = 100


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


def load() -> Corpus:
  """Returns the corpus, harvesting it first where it is not cached.

  Harvesting takes about half a minute. Several processes may do so at once:
  the first to finish provides the folder, the others discard theirs. Reading a
  cached corpus imports no TensorFlow.

  Raises:
    FileNotFoundError: none of `PACKAGES`, or not the one held out, is
      installed, or they hold no documents.
    ValueError: the cached folder is damaged; the message names it.
    OSError: the cache cannot be written; before anything is harvested.

  >>> load().counts['out_of_domain'].keys()
  dict_keys(['nltk'])
  """
  versions = _versions()
  key = _hash(json.dumps([FORMAT, MIN_CHARACTERS, OUT_OF_DOMAIN, versions]))
  folder = _cache() / f'corpus-{key[:16]}'
  if not folder.exists():
    _write(lambda: _harvest(versions), versions, folder)
  return _open(folder)


def documents(split: str) -> Iterator[dict[str, str]]:
  """Yields the documents of a split as dicts of text, domain and name.

  Args:
    split: one of `SPLITS`.

  >>> next(documents('out_of_domain'))['domain']
  'nltk'
  """
  if split not in SPLITS:
    raise ValueError(f'unknown split {split!r}; the splits are {SPLITS}')
  tf = host_tensorflow.load()
  file = os.fspath(load().files[split])
  for record in tf.data.TFRecordDataset(file).as_numpy_iterator():
    features = tf.train.Example.FromString(record).features.feature
    yield {k: v.bytes_list.value[0].decode() for k, v in features.items()}


def _cache() -> epath.Path:
  if folder := os.environ.get('SPARSE_EXPERTS_CACHE'):
    return epath.Path(folder).expanduser()
  root = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
  return epath.Path(root).expanduser() / 'sparse_experts'


def _versions() -> dict[str, str]:
  """The installed packages among `PACKAGES`, with their versions."""
  distributions = importlib.metadata.packages_distributions()
  versions = {
    package: importlib.metadata.version(distributions[package][0])
    for package in PACKAGES
    if package in distributions
  }
  if len(versions) < 2 or OUT_OF_DOMAIN not in versions:
    raise FileNotFoundError(
      f'the corpus needs {OUT_OF_DOMAIN!r} and at least one other package of '
      f'corpus.PACKAGES, but only {sorted(versions)} are installed: run '
      '`pip install sparse_experts` with its dependencies'
    )
  return versions


def _harvest(packages: Iterable[str]) -> list[Document]:
  """All documents of the packages, without exact duplicates, in their order."""
  files = [
    (package, root, file)
    for package in packages
    for root in importlib.util.find_spec(package).submodule_search_locations
    for file in sorted(pathlib.Path(root).rglob('*.py'))
  ]
  quiet = not sys.stderr.isatty()
  if quiet:
    print(
      f'harvesting docstrings from {len(files)} files (once, half a minute)',
      file=sys.stderr,
    )
  unique = {}
  with _without_garbage_collection(), warnings.catch_warnings():
    # Other people's invalid escapes.
    warnings.simplefilter('ignore')
    for package, root, file in tqdm.tqdm(
      files, desc='harvesting docstrings', unit=' files', disable=quiet
    ):
      for document in _docstrings(package, pathlib.Path(root), file):
        unique.setdefault(document.text, document)
  if not unique:
    raise FileNotFoundError(
      f'no docstrings found in {sorted(packages)}: install these packages with '
      'their .py sources'
    )
  return list(unique.values())


@contextlib.contextmanager
def _without_garbage_collection() -> Iterator[None]:
  """Syntax trees have no cycles, and looking for some takes a third longer."""
  gc.disable()
  try:
    yield
  finally:
    gc.enable()


def _docstrings(
  package: str, root: pathlib.Path, file: pathlib.Path
) -> Iterator[Document]:
  parts = file.relative_to(root).with_suffix('').parts
  module = '.'.join((package, *(p for p in parts if p != '__init__')))
  try:
    tree = ast.parse(file.read_bytes())
  except SyntaxError:
    # Templates and files for other versions of Python.
    return
  pending = [(module, tree)]
  while pending:
    name, node = pending.pop()
    if isinstance(
      node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    ):
      if node is not tree:
        name = f'{name}.{node.name}'
      lines = (ast.get_docstring(node) or '').splitlines()
      text = '\n'.join(line.rstrip() for line in lines).strip()
      if len(text) >= MIN_CHARACTERS:
        yield Document(text=text, domain=package, name=name)
    pending.extend(
      (name, child)
      for child in reversed(list(ast.iter_child_nodes(node)))
      if isinstance(child, ast.stmt | ast.ExceptHandler)
    )


def _write(
  harvest: Callable[[], list[Document]],
  versions: Mapping[str, str],
  folder: epath.Path,
) -> None:
  """Writes the folder whole or not at all; keeps one that is there by then."""
  temporary = folder.parent / f'{folder.name}.{uuid.uuid4().hex}'
  with _writing(folder):  # A harvest is long: who cannot write knows before.
    made = [parent for parent in temporary.parents if not parent.exists()]
    temporary.mkdir(parents=True)
  try:
    documents = harvest()
    with _writing(folder):
      _write_files(documents, versions, temporary)
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


def _writing(folder: epath.Path) -> contextlib.AbstractContextManager[None]:
  return storage.writing(
    folder,
    'free space there, or name another folder for what is cached by the '
    'environment variable SPARSE_EXPERTS_CACHE',
  )


def _write_files(
  harvest: list[Document], versions: Mapping[str, str], folder: epath.Path
) -> None:
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
    for document in sorted(harvest, key=lambda d: _hash(d.text)):
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

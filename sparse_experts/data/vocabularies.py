"""Vocabularies of the tasks; T5's conventions: pad 0, end of sequence 1, unk 2.

Each has 100 extra ids at its end, the sentinels of span corruption: the first
sentinel is the highest id (Raffel et al. 2020, section 3.1.4).
"""

import functools
import hashlib
import os
import typing

from etils import epath

from sparse_experts import storage

if typing.TYPE_CHECKING:
  import seqio

EXTRA_IDS = 100
DOCS_MODEL = epath.Path(__file__).parent / 'assets' / 'docs_8k.model'
DOCS_COUNTS = epath.Path(__file__).parent / 'assets' / 'docs_8k_counts.txt'
T5_MODEL = 'gs://t5-data/vocabs/cc_all.32000/sentencepiece.model'
MT5_MODEL = 'gs://t5-data/vocabs/mc4.250000/sentencepiece.model'


@functools.cache
def docs() -> 'seqio.SentencePieceVocabulary':
  """8,000 pieces trained on installed documentation, part of this package.

  Lossless: newlines, indentation and any other text survive a round trip, see
  scripts/train_vocabulary.py.

  >>> docs().vocab_size
  8100
  >>> docs().decode(docs().encode('Args:\\n  x: an array.'))
  'Args:\\n  x: an array.'
  """
  import seqio

  return seqio.SentencePieceVocabulary(os.fspath(DOCS_MODEL), EXTRA_IDS)


@functools.cache
def docs_counts() -> tuple[int, ...]:
  """How often a model sees each id of `docs`, from id 0; for balanced hashes.

  Of span corruption, sentinels included, see scripts/token_counts.py.

  >>> len(docs_counts())
  8100
  """
  return tuple(int(line) for line in DOCS_COUNTS.read_text().split())


@functools.cache
def t5() -> 'seqio.SentencePieceVocabulary':
  """The 32,000 pieces of T5, read from Google Cloud Storage when first used.

  It knows no newlines and no runs of spaces.
  """
  import seqio

  return seqio.SentencePieceVocabulary(T5_MODEL, EXTRA_IDS)


@functools.cache
def mt5() -> 'seqio.SentencePieceVocabulary':
  """The 250,000 pieces of mT5, for 101 languages; read as `t5` is."""
  import seqio

  return seqio.SentencePieceVocabulary(MT5_MODEL, EXTRA_IDS)


@functools.cache
def byte() -> 'seqio.ByteVocabulary':
  """UTF-8 bytes: no model file, any text, about 4 times as many tokens.

  >>> byte().vocab_size
  359
  """
  import seqio

  return seqio.ByteVocabulary(EXTRA_IDS)


def named(name: str) -> 'seqio.Vocabulary':
  """The vocabulary that a gin file's VOCABULARY names.

  Args:
    name: 'docs', 't5', 'mt5' or 'bytes', see above; or a file: a SentencePiece
      model (.model), or the tokenizer.json of Hugging Face's tokenizers.

  Raises:
    FileNotFoundError: it is none of these, and no file.
    ValueError: the file is no vocabulary, or has no padding or end of sequence
      that tasks could use.
  """
  import seqio

  known = {'docs': docs, 't5': t5, 'mt5': mt5, 'bytes': byte}
  if name in known:
    return known[name]()
  file = _file(name)
  if file.suffix == '.json':
    from sparse_experts.data import json_vocabulary

    return json_vocabulary.read(file)
  if file.suffix != '.model':
    raise ValueError(
      f'VOCABULARY = {name!r} is neither a SentencePiece .model nor a '
      f'tokenizer.json; other names are {", ".join(known)}.'
    )
  vocabulary = seqio.SentencePieceVocabulary(os.fspath(file), EXTRA_IDS)
  try:
    pieces = vocabulary.tokenizer
  except Exception as error:  # SentencePiece and protobuf raise what they like.
    raise ValueError(f'{file} is no SentencePiece model ({error}).') from error
  if pieces.pad_id() != vocabulary.pad_id or pieces.eos_id() < 0:
    raise ValueError(
      f'{file} has padding {pieces.pad_id()} and end of sequence '
      f'{pieces.eos_id()}, but tasks pad with 0 and end: take the '
      'tokenizer.json of such a model, or train one with pad_id=0, eos_id=1, '
      'as scripts/train_vocabulary.py does.'
    )
  return vocabulary


def digest(name: str) -> str:
  """Tells whether what `named` reads is the same; empty for our own."""
  if name in ('docs', 't5', 'mt5', 'bytes'):
    return ''
  file = _file(name)
  read = [file]
  if file.suffix == '.json':
    from sparse_experts.data import json_vocabulary

    read += [file.parent / beside for beside in json_vocabulary.SIDE_FILES]
  found = [each.read_bytes() if each.exists() else b'' for each in read]
  parts = (hashlib.sha256(each).digest() for each in found)
  return hashlib.sha256(b''.join(parts)).hexdigest()[:16]


def _file(name: str) -> epath.Path:
  file = storage.given(name, 'VOCABULARY')
  storage.check_regular(file, 'VOCABULARY')
  if not file.is_file():
    raise FileNotFoundError(
      f'VOCABULARY = {name!r} is no file, and none of docs, t5, mt5, bytes; '
      'paths are relative to the current folder, '
      f'{epath.Path().absolute()}.'
    )
  return file

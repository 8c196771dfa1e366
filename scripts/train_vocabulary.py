"""Trains a vocabulary: of the docs tasks, or of files of one's own.

    python scripts/train_vocabulary.py [OUTPUT]
    python scripts/train_vocabulary.py OUTPUT --input 'book/*.txt' [--pieces=N]
    python scripts/train_vocabulary.py OUTPUT --input a.csv --fields text,label

Without --input it is of docs_installed_lm's training split, and OUTPUT is
sparse_experts/data/assets/docs_8k.model unless given. Ids mean nothing without
their vocabulary: retrain under a new name, or every checkpoint is lost. Takes
less than a minute; the same texts give the same file.

Docstrings are laid out by newlines and indentation, which the usual
normalisation (NFKC, runs of spaces merged, newlines to spaces) destroys, and a
model trained on such text could not write one. So: no normalisation, spaces as
they are, pieces of several spaces (an indentation is one token), the newline as
a piece of its own, and bytes for characters too rare for a piece. Decoding what
was encoded gives the text back exactly.
"""

import argparse
import io
import itertools
import pathlib
import tempfile
from collections.abc import Iterable, Iterator, Sequence

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from sparse_experts.data import corpus, file_rows, vocabularies

PIECES = 8000

# From one code point that is no character to another, so as good as none. With
# no rule at all, every reader of the model logs that its table is empty.
RULES = 'FDD0\tFDD1\n'


def texts_of_files(
  patterns: Sequence[str], fields: Sequence[str]
) -> Iterator[str]:
  """Paragraphs of text files; the fields of rows of .csv and .jsonl."""
  for path in file_rows.find(patterns):
    if path.suffix not in ('.csv', '.jsonl'):
      if fields:
        raise ValueError(f'{path} has no fields: they are of .csv and .jsonl.')
      rows = file_rows.text_rows(path)
    elif not fields:
      raise ValueError(f'{path} has fields: say which by --fields text,label.')
    elif path.suffix == '.csv':
      rows = file_rows.csv_rows(path, fields)
    else:
      rows = file_rows.jsonl_rows(path, fields)
    yield from itertools.chain.from_iterable(row.values for row in rows)


def train(output: pathlib.Path, texts: Iterable[str], pieces: int) -> None:
  """Writes a vocabulary of the texts."""
  trained = io.BytesIO()
  with tempfile.NamedTemporaryFile('w') as rules:
    rules.write(RULES)
    rules.flush()
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=texts,
      model_writer=trained,
      model_type='unigram',
      vocab_size=pieces,
      # T5's conventions.
      pad_id=0,
      eos_id=1,
      unk_id=2,
      bos_id=-1,
      # Lossless.
      normalization_rule_tsv=rules.name,
      remove_extra_whitespaces=False,
      allow_whitespace_only_pieces=True,
      user_defined_symbols=['\n'],
      byte_fallback=True,
      character_coverage=0.9999,
      # Every document, whole (in bytes), always in the same order.
      max_sentence_length=1 << 20,
      shuffle_input_sentence=False,
      num_threads=2,
      minloglevel=1,
    )
  model = sentencepiece_model_pb2.ModelProto.FromString(trained.getvalue())
  model.normalizer_spec.normalization_rule_tsv = ''  # The temporary name.
  output.write_bytes(model.SerializeToString())


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('output', nargs='?', type=pathlib.Path)
  parser.add_argument('--input', nargs='+', metavar='FILE', help='also globs')
  parser.add_argument('--fields', default='', help='of CSV and JSON lines')
  parser.add_argument('--pieces', type=int, default=PIECES)
  args = parser.parse_args()
  try:
    if not args.input:
      documents = corpus.documents('train', 'installed')
      texts = (document['text'] for document in documents)
    elif args.output is None:
      raise ValueError('--input needs OUTPUT, such as mine.model.')
    else:
      fields = [name for name in args.fields.split(',') if name]
      # Read first: what is wrong in a file is no error of SentencePiece's.
      texts = iter(list(texts_of_files(args.input, fields)))
    output = args.output or pathlib.Path(vocabularies.DOCS_MODEL)
    train(output, texts, args.pieces)
  except (ValueError, OSError) as error:
    parser.exit(2, f'error: {error}\n')
  except RuntimeError as error:  # SentencePiece's: a place of its source, why.
    reason = ' '.join(str(error).rpartition('] ')[2].split())
    parser.exit(
      2,
      f'error: --pieces={args.pieces} is no size for this text ({reason}); '
      'take another --pieces.\n',
    )


if __name__ == '__main__':
  main()

"""Trains the vocabulary of the docs tasks from the embedded corpus.

    python scripts/train_vocabulary.py [OUTPUT]

OUTPUT is sparse_experts/data/assets/docs_8k.model unless given. Ids mean
nothing without their vocabulary: retrain under a new name, or every checkpoint
is lost. Takes less than a minute; the same corpus gives the same file. Made
from the training split only.

Docstrings are laid out by newlines and indentation, which the usual
normalisation (NFKC, runs of spaces merged, newlines to spaces) destroys, and a
model trained on such text could not write one. So: no normalisation, spaces as
they are, pieces of several spaces (an indentation is one token), the newline as
a piece of its own, and bytes for characters too rare for a piece. Decoding what
was encoded gives the text back exactly.
"""

import pathlib
import sys

import sentencepiece

from sparse_experts.data import corpus, vocabularies

PIECES = 8000


def main(output: pathlib.Path) -> None:
  texts = (document['text'] for document in corpus.documents('train'))
  with output.open('wb') as file:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=texts,
      model_writer=file,
      model_type='unigram',
      vocab_size=PIECES,
      # T5's conventions.
      pad_id=0,
      eos_id=1,
      unk_id=2,
      bos_id=-1,
      # Lossless.
      normalization_rule_name='identity',
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


if __name__ == '__main__':
  main(pathlib.Path(sys.argv[1] if sys.argv[1:] else vocabularies.DOCS_MODEL))

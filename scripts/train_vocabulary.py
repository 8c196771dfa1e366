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

import io
import pathlib
import sys
import tempfile

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from sparse_experts.data import corpus, vocabularies

PIECES = 8000

# From one code point that is no character to another, so as good as none. With
# no rule at all, every reader of the model logs that its table is empty.
RULES = 'FDD0\tFDD1\n'


def main(output: pathlib.Path) -> None:
  texts = (document['text'] for document in corpus.documents('train'))
  trained = io.BytesIO()
  with tempfile.NamedTemporaryFile('w') as rules:
    rules.write(RULES)
    rules.flush()
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=texts,
      model_writer=trained,
      model_type='unigram',
      vocab_size=PIECES,
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


if __name__ == '__main__':
  main(pathlib.Path(sys.argv[1] if sys.argv[1:] else vocabularies.DOCS_MODEL))

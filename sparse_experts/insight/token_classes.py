"""Classes of token pieces by their spelling: a part of speech without a model.

In the order below; the first that fits a piece is its class.
"""

from __future__ import annotations

import re

CLASSES = (
  'sentinel',  # <extra_id_0>
  'control',  # </s>, <pad>
  'space',  # Newlines and runs of spaces.
  'number',  # Digits and no letter: 32, [0,
  'punctuation',  # Neither.
  'identifier',  # of code: num_experts, float32, TopK, np.abs, f()
  'stop word',
  'capitalised',
  'word',
  'word piece',  # Goes on where the last token ended.
)

_STOP_WORDS = frozenset(
  """
  a about after all also an and any are as at be because been before but by can
  could did do does each either for from had has have he her his how i if in
  into is it its may more most must no nor not of on only or other our over
  shall she should so some such than that the their them then there these they
  this those to under until up upon was we were what when where whether which
  while who will with without would you your
  """.split()  # noqa: SIM905
)

_IDENTIFIER = re.compile(
  r'[a-z][A-Z]|[A-Za-z]\d|\d[A-Za-z]|[^\W_]_|_[^\W_]|[A-Za-z]\.[A-Za-z]|\w\(\)'
)


def visible(piece: str) -> str:
  """A piece with its spaces, newlines and control characters to be seen.

  >>> print(visible(' a\\n\\x1b'))
  ▁a⏎\\x1b
  """
  seen = piece.replace('\n', '⏎').replace(' ', '▁')
  return ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in seen)


def classify(piece: str) -> str:
  """The class of a piece, one of `CLASSES`.

  >>> [classify(p) for p in ('▁the', '▁0.5,', 'ing', '▁Gaussian', 'float32')]
  ['stop word', 'number', 'word piece', 'capitalised', 'identifier']
  """
  if re.fullmatch(r'▁?<extra_id_\d+>', piece):
    return 'sentinel'
  if re.fullmatch(r'</?[a-z]+>', piece):
    return 'control'
  text = piece.replace('▁', ' ')
  starts_word, text = text.startswith(' '), text.strip()
  if not text or text == '<0x0A>':
    return 'space'
  letters = any(c.isalpha() for c in text)
  if not letters:
    is_number = any(c.isdigit() for c in text)
    return 'number' if is_number else 'punctuation'
  if _IDENTIFIER.search(text):
    return 'identifier'
  word = re.sub(r'\W', '', text)
  if starts_word and word.lower() in _STOP_WORDS:
    return 'stop word'
  if word[0].isupper():
    return 'capitalised'
  return 'word' if starts_word else 'word piece'

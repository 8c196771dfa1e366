"""Hugging Face's tokenizer.json as a vocabulary of seqio's.

Ids are the file's own, so that a converted checkpoint knows them. What it does
not say, which of its tokens pad and end, is read from tokenizer_config.json or
special_tokens_map.json beside it, or known by the usual names.
"""

from __future__ import annotations

import json
import os

import numpy as np
import seqio
import tensorflow as tf
from etils import epath

from sparse_experts.data.special_tokens import NO_TOKEN

SIDE_FILES = ('tokenizer_config.json', 'special_tokens_map.json')
_USUAL = {
  'pad': ('<pad>', '[PAD]', '<|pad|>', '<|padding|>'),
  'eos': ('</s>', '<eos>', '<|endoftext|>', '<|end_of_text|>', '[SEP]'),
  'unk': ('<unk>', '[UNK]'),
}


class JsonVocabulary(seqio.Vocabulary):
  """A tokenizer of the `tokenizers` library.

  Texts that spell a special token are text, and no token of theirs is special.
  Sentinels of span corruption are those that the file has at its end,
  <extra_id_0> the last of all, as in T5's.

  Attributes:
    is_python: TensorFlow has no program for it, see `tasks.arrays`.
  """

  is_python = True

  def __init__(self, tokenizer, special: dict[str, int | None]):
    """A vocabulary of a `tokenizers.Tokenizer`.

    Args:
      tokenizer: is changed: it encodes all of a text and adds nothing.
      special: the ids of 'pad', 'eos' and 'unk'; None: there is none.
    """
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True
    self._tokenizer, self._special = tokenizer, special
    ids = tokenizer.get_vocab()
    self._size = max(ids.values()) + 1
    sentinels = 0
    while ids.get(f'<extra_id_{sentinels}>') == self._size - 1 - sentinels:
      sentinels += 1
    super().__init__(extra_ids=sentinels)

  @property
  def bos_id(self) -> int | None:
    return None

  @property
  def eos_id(self) -> int | None:
    return self._special['eos']

  @property
  def pad_id(self) -> int:
    """NO_TOKEN where it has none."""
    pad = self._special['pad']
    return NO_TOKEN if pad is None else pad

  @property
  def unk_id(self) -> int | None:
    return self._special['unk']

  @property
  def _base_vocab_size(self) -> int:
    return self._size - self.extra_ids

  def _encode(self, s: str) -> list[int]:
    return self._tokenizer.encode(s, add_special_tokens=False).ids

  def _decode(self, ids) -> str:
    known = [int(i) for i in ids if 0 <= i < self._size]
    return self._tokenizer.decode(known, skip_special_tokens=True)

  def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
    def encode(text):
      text = text if isinstance(text, bytes) else text.item()  # Eagerly.
      return np.array(self._encode(text.decode()), np.int32)

    s = tf.convert_to_tensor(s)
    return tf.ensure_shape(tf.numpy_function(encode, [s], tf.int32), [None])

  def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
    def decode(ids):
      return self._decode(ids.tolist()).encode()

    return tf.ensure_shape(tf.numpy_function(decode, [ids], tf.string), [])

  def id_to_piece(self, i: int) -> str:
    """The text of an id as the file spells it."""
    return self._tokenizer.id_to_token(i) or ''

  def __eq__(self, other) -> bool:
    return (
      isinstance(other, JsonVocabulary)
      and self._special == other._special
      and self._tokenizer.to_str() == other._tokenizer.to_str()
    )


def read(file: epath.Path) -> JsonVocabulary:
  """The vocabulary of a tokenizer.json.

  Raises:
    ImportError: the `tokenizers` library is not installed.
    ValueError: it is no such file, or nothing says which token ends a text.
  """
  try:
    import tokenizers
  except ImportError as error:
    raise ImportError(
      f'{file} needs the tokenizers library: pip install '
      "'sparse_experts[tokenizers]'."
    ) from error
  try:
    tokenizer = tokenizers.Tokenizer.from_str(file.read_text())
  except Exception as error:  # The library raises no other kind.
    raise ValueError(f'{file} is no tokenizer.json ({error}).') from error
  named = _named(file.parent)
  special = {
    kind: next(
      (
        tokenizer.token_to_id(token)
        for token in (named.get(kind), *usual)
        if token and tokenizer.token_to_id(token) is not None
      ),
      None,
    )
    for kind, usual in _USUAL.items()
  }
  if special['eos'] is None:
    raise ValueError(
      f'{file} does not say which token ends a text: it has none of '
      f'{", ".join(_USUAL["eos"])}; write {{"eos_token": "..."}} into '
      f'{os.fspath(file.parent / SIDE_FILES[0])}.'
    )
  return JsonVocabulary(tokenizer, special)


def _named(folder: epath.Path) -> dict[str, str]:
  """What the files beside say of 'pad', 'eos' and 'unk'."""
  named = {}
  for name in SIDE_FILES:
    file = folder / name
    if not file.is_file():
      continue
    try:
      said = json.loads(file.read_text())
      for kind in _USUAL:
        token = said.get(f'{kind}_token')
        token = token.get('content') if isinstance(token, dict) else token
        if token is not None and not isinstance(token, str):
          raise ValueError(f'{kind}_token is {token!r}, and no text')
        if token:
          named.setdefault(kind, token)
    except (ValueError, AttributeError) as error:
      raise ValueError(
        f'{file} is no JSON object of tokens by kind ({error}).'
      ) from error
  return named

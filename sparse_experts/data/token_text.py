"""The text of token ids, and whether a model knows those of a task."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from sparse_experts.data import host_tensorflow, tasks
from sparse_experts.data.special_tokens import NO_TOKEN, T5, SpecialTokens


def vocabulary_size(
  task_name: str, modules: Sequence[str] = (), feature: str | None = None
) -> int:
  """Number of token ids of a task.

  >>> vocabulary_size('docs_lm')
  8100

  Args:
    task_name: of a task or mixture.
    modules: further modules that register tasks.
    feature: whose; None: the largest number over all features.

  Raises:
    ValueError: there is no such task, or it has no such feature.
    FileNotFoundError: its vocabulary cannot be read.
  """
  features = tasks.find(task_name, modules).output_features
  asked = [feature] if feature else list(features)
  if feature and feature not in features:
    raise ValueError(
      f'the model reads {feature!r}, but task {task_name!r} has '
      f'{", ".join(sorted(features))}: take a task that was made for such '
      'models.'
    )
  tf = host_tensorflow.load()
  try:
    return max(features[name].vocabulary.vocab_size for name in asked)
  except tf.errors.OpError as error:
    raise FileNotFoundError(
      f"the vocabulary of task {task_name!r} cannot be read ({error}); T5's is "
      'on Google Cloud Storage and needs a network.'
    ) from error


def check_vocabulary(
  task_name: str,
  embeddings: int,
  modules: Sequence[str] = (),
  special_tokens: SpecialTokens = T5,
) -> None:
  """Checks that a model with so many embeddings knows all ids of a task.

  Args:
    task_name: of a task or mixture.
    embeddings: V, the number of ids that the model embeds.
    modules: further modules that register tasks.
    special_tokens: the model's, of which the task's texts know padding and EOS.

  Raises:
    ValueError: it does not (out-of-range ids would be clamped in silence), nor
      its own special tokens, or its answers end with another token than the
      task's texts.
  """
  size = vocabulary_size(task_name, modules)
  if size > embeddings:
    raise ValueError(
      f'task {task_name!r} has {size} token ids, but the model embeds only '
      f'{embeddings}: give the model a vocabulary of at least {size}, by '
      'NUM_EMBEDDINGS.'
    )
  if outside := special_tokens.outside(embeddings):
    raise ValueError(
      f'special tokens {", ".join(map(str, outside))} (EOS_IDS, START_ID, '
      f'PAD_ID, SUPPRESSED_IDS) are none of the {embeddings} ids that the '
      'model embeds.'
    )
  for name, feature in tasks.find(task_name, modules).output_features.items():
    pad = feature.vocabulary.pad_id
    if special_tokens.pad not in (pad, NO_TOKEN):
      raise ValueError(
        f'id {special_tokens.pad}, which pads the model, is a token of '
        f'{name!r} of task {task_name!r}: train it with PAD_ID = {pad}.'
      )
    eos = feature.vocabulary.eos_id
    if eos is not None and eos not in special_tokens.eos:
      raise ValueError(
        f'{name!r} of task {task_name!r} end with token {eos}, but answers of '
        f'the model with {" or ".join(map(str, special_tokens.eos)) or "none"}'
        f': take a task of its vocabulary, or train it with EOS_IDS = ({eos},).'
      )


def decode_tokens(
  task_name: str,
  feature: str,
  ids: Sequence[int] | np.ndarray,
  modules: Sequence[str] = (),
) -> str:
  """The text of token ids, sentinels included, without the padding.

  Args:
    feature: of the task, 'inputs' or 'targets'.
    ids: one row; several documents are separated by '</s>'.
  """
  output_features = tasks.find(task_name, modules).output_features
  vocabulary = output_features[feature].vocabulary
  ids = [int(i) for i in ids if i != vocabulary.pad_id]
  # seqio decodes no further than the first end of sequence.
  is_eos = [i == vocabulary.eos_id for i in ids]
  runs = itertools.groupby(range(len(ids)), is_eos.__getitem__)
  return ''.join(
    '</s>' * len(run) if eos else vocabulary.decode([ids[i] for i in run])
    for eos, run in ((eos, list(run)) for eos, run in runs)
  )


def token_pieces(
  task_name: str,
  feature: str,
  ids: Sequence[int] | np.ndarray,
  modules: Sequence[str] = (),
) -> dict[int, str]:
  """The text of each token id by itself.

  Of SentencePiece its pieces, where '▁' is the space before a word; control
  tokens are '<pad>', '</s>', '<unk>', sentinels '<extra_id_0>' and so on. What
  is embedded beyond the vocabulary is '<unk>', too.

  Args:
    task_name: of a task or mixture.
    feature: of the task, whose vocabulary it is.
    ids: integers [I]; a negative one is padding.
    modules: further modules that register tasks.

  >>> token_pieces('docs_lm', 'targets', [0, 8099])
  {0: '<pad>', 8099: '<extra_id_0>'}
  """
  output_features = tasks.find(task_name, modules).output_features
  vocabulary = output_features[feature].vocabulary
  # SentencePiece's own, or a vocabulary that knows pieces itself.
  processor = getattr(vocabulary, 'tokenizer', vocabulary)
  controls = {
    vocabulary.pad_id: '<pad>',
    vocabulary.eos_id: '</s>',
    vocabulary.unk_id: '<unk>',
  }

  def piece(i):
    if i < 0:  # Padding of a model that has no id of its own for it.
      return '<pad>'
    if i in controls:
      return controls[i]
    sentinel = vocabulary.vocab_size - 1 - i
    if sentinel < 0:
      return '<unk>'
    if sentinel < vocabulary.extra_ids:
      return f'<extra_id_{sentinel}>'
    if hasattr(processor, 'id_to_piece'):
      return processor.id_to_piece(i)
    return vocabulary.decode([i])

  return {int(i): piece(int(i)) for i in ids}

"""Text that is read, as seqio preprocessors: runs of documents, and masks.

Devlin et al. 2018 (https://arxiv.org/abs/1810.04805), section 3.1. Each takes a
dataset of examples with the feature 'tokens', ids of text. Sources shuffle
before, so that an epoch has other runs and other masks than the one before.
Randomness is stateless and seeded by seqio, see `preprocessors`.
"""

import seqio
import tensorflow as tf

from sparse_experts.data.preprocessors import Features, Lengths


def mask_tokens(
  dataset: tf.data.Dataset,
  output_features: Features,
  rate: float = 0.15,
  masked: float = 0.8,
  random: float = 0.1,
  mask_id: int | None = None,
) -> tf.data.Dataset:
  """Hides some of 'tokens'; 'targets' are what they were, where 'weights' is 1.

      targets  the cat sat on the mat EOS
      weights  0   1   0   0  0   1   0
      tokens   the <0> sat on the dog EOS

  Of the tokens of text (no EOS, no sentinel) round(rate * n) are chosen, one at
  least; of them a share `masked` becomes the mask, a share `random` any piece
  of text, and others stay. Each epoch draws anew. BERT's random tokens may be
  special ones, too.

  Args:
    dataset: examples of 'tokens', int32 [L]; other features stay.
    output_features: the vocabulary of 'tokens' says which are text.
    rate: share of tokens to predict.
    masked, random: shares of them.
    mask_id: of the mask; None: the first sentinel, the highest id.

  Raises:
    ValueError: shares are not between 0 and 1.
  """
  shares = {'rate': rate, 'masked + random': masked + random}
  for name, share in {**shares, 'masked': masked, 'random': random}.items():
    if not 0 <= share <= 1:
      raise ValueError(f'{name}={share} is a share: set it from 0 to 1.')
  vocabulary = output_features['tokens'].vocabulary
  text_ids = _text_ids(vocabulary)
  if mask_id is None:
    mask_id = vocabulary.vocab_size - 1

  @seqio.map_over_dataset(num_seeds=3)
  def mask(example, seeds):
    tokens = example['tokens']
    shape = tf.shape(tokens)
    is_text = (tokens >= text_ids.start) & (tokens < text_ids.stop)
    is_text |= tokens == vocabulary.unk_id
    count = tf.reduce_sum(tf.cast(is_text, tf.int32))
    # 64 bits, to round as Python does.
    wanted = tf.cast(tf.round(tf.cast(count, tf.float64) * rate), tf.int32)
    wanted = tf.minimum(tf.maximum(wanted, 1), count)
    order = tf.random.stateless_uniform(shape, seeds[0])
    rank = tf.argsort(tf.argsort(tf.where(is_text, order, 2.0)))
    is_chosen = rank < wanted
    other = tf.random.stateless_uniform(
      shape, seeds[1], text_ids.start, text_ids.stop, tf.int32
    )
    draw = tf.random.stateless_uniform(shape, seeds[2])
    shown = tf.where(draw < masked + random, other, tokens)
    shown = tf.where(draw < masked, mask_id, shown)
    return {
      **example,
      'tokens': tf.where(is_chosen, shown, tokens),
      'targets': tokens,
      'weights': tf.cast(is_chosen, tf.float32),
    }

  return mask(dataset)


def passages(
  dataset: tf.data.Dataset, sequence_length: Lengths, output_features: Features
) -> tf.data.Dataset:
  """A run of each document, elsewhere in each epoch: C tokens EOS.

  C, the second sentinel, is there for heads that read the first token.

  Args:
    dataset: examples of 'tokens', int32 [I]; other features stay.
    sequence_length: 'tokens' is filled by a document that is long enough.
    output_features: the vocabulary of 'tokens' provides C and EOS.
  """
  vocabulary = output_features['tokens'].vocabulary
  room = sequence_length['tokens'] - 2

  @seqio.map_over_dataset(num_seeds=1)
  def cut(example, seed):
    run = _random_run(example['tokens'], room, seed)
    return {**example, 'tokens': _joined(vocabulary, run)}

  return cut(dataset)


def sentence_pairs(
  dataset: tf.data.Dataset, sequence_length: Lengths, output_features: Features
) -> tf.data.Dataset:
  """C first EOS second EOS, and whether the second follows, 'next_sentence'.

  A run of each document is cut in the middle. Of two documents, one after the
  other in the dataset, both second halves are exchanged, or none is, by a coin.
  BERT's sentences are such runs, too.

  Args:
    dataset: examples of 'tokens', int32 [I], two at least. Other features are
      dropped, as a pair may be of two documents.
    sequence_length, output_features: as of `passages`.
  """
  vocabulary = output_features['tokens'].vocabulary
  room = sequence_length['tokens'] - 3
  none = -1

  @seqio.map_over_dataset(num_seeds=1)
  def halves(example, seed):
    run = _random_run(example['tokens'], room // 2 * 2, seed)
    middle = tf.size(run) // 2
    return {'first': run[:middle], 'second': run[middle:]}

  @seqio.map_over_dataset(num_seeds=1)
  def pair(two, seed):
    follows = tf.random.stateless_uniform([], seed, 0, 2, tf.int32)
    text = {
      name: tf.ragged.boolean_mask(x, x != none) for name, x in two.items()
    }
    tokens = [
      _joined(vocabulary, text['first'][i], text['second'][j])
      for i, j in ((0, 1 - follows), (1, follows))
    ]
    return {
      'tokens': tf.ragged.stack(tokens).to_tensor(none),
      'next_sentence': tf.fill([2], follows),
    }

  def without_none(example):
    tokens = example['tokens']
    return {**example, 'tokens': tf.boolean_mask(tokens, tokens != none)}

  two = halves(dataset).padded_batch(
    2, padding_values=none, drop_remainder=True
  )
  return pair(two).unbatch().map(without_none)


def _text_ids(vocabulary: seqio.Vocabulary) -> range:
  """Ids of text: none of padding, an end, what is unknown, or sentinels."""
  controls = (vocabulary.pad_id, vocabulary.eos_id, vocabulary.unk_id)
  return range(max(controls) + 1, vocabulary.vocab_size - vocabulary.extra_ids)


def _random_run(tokens: tf.Tensor, length: int, seed: tf.Tensor) -> tf.Tensor:
  """At most so many tokens, from anywhere."""
  places = tf.maximum(tf.size(tokens) - length, 0) + 1
  start = tf.random.stateless_uniform([], seed, 0, places, tf.int32)
  return tokens[start : start + length]


def _joined(vocabulary: seqio.Vocabulary, *texts: tf.Tensor) -> tf.Tensor:
  """The second sentinel, and each text with EOS."""
  parts = [[vocabulary.vocab_size - 2]]
  for text in texts:
    parts += [text, [vocabulary.eos_id]]
  return tf.concat(parts, 0)

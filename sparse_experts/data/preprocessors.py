"""T5's unsupervised objectives as seqio preprocessors.

Raffel et al. 2020 (https://arxiv.org/abs/1910.10683): span corruption, sections
3.1.4 and 3.3.4; prefix and plain language modelling, section 3.2. Each takes a
dataset of tokenized documents in the feature 'targets' and yields examples that
fill `sequence_length`: documents end with the end-of-sequence token, are joined
to one stream of tokens, and the stream is cut into chunks of equal length.

Documents that have a 'task_id', a number, give examples that say for every
token of a feature the task of its document: 'inputs_task_ids',
'targets_task_ids' (see `task_ids`).

Everything is tf.data and stateless randomness, seeded by seqio, so a pipeline
can be saved in the middle and continued exactly.
"""

import functools
from collections.abc import Callable, Mapping

import seqio
import tensorflow as tf

Lengths = Mapping[str, int]
Features = Mapping[str, seqio.Feature]


def from_text(
  objective: Callable, *, with_tasks: bool = False
) -> list[Callable]:
  """The preprocessors of an objective for examples that have a 'text'.

  Args:
    objective: `span_corruption`, `prefix_lm` or `lm`.
    with_tasks: examples have a 'task_id', too.
  """
  keys = {'targets': 'text'} | ({'task_id': 'task_id'} if with_tasks else {})
  return [
    functools.partial(seqio.preprocessors.rekey, key_map=keys),
    functools.partial(seqio.preprocessors.tokenize, copy_pretokenized=False),
    objective,
  ]


def tokenize(
  dataset: tf.data.Dataset,
  output_features: Features,
  copy_pretokenized: bool = True,
) -> tf.data.Dataset:
  """As seqio's, which keeps 256 examples in a saved position; here are few.

  Args:
    dataset: examples of texts.
    output_features: what is encoded, each by its vocabulary.
    copy_pretokenized: the text of feature x stays, as 'x_pretokenized'.
  """
  encode = functools.partial(
    seqio.preprocessors.tokenize_impl,
    output_features=output_features,
    copy_pretokenized=copy_pretokenized,
  )
  return dataset.map(encode, num_parallel_calls=tf.data.AUTOTUNE)


def span_corruption(
  dataset: tf.data.Dataset,
  sequence_length: Lengths,
  output_features: Features,
  noise_density: float = 0.15,
  mean_span: float = 3.0,
) -> tf.data.Dataset:
  """Replaces random spans by sentinels in `inputs`; `targets` spells them out.

      tokens   a b c d e f g h i j
      inputs   a b <0> e f g <1> j EOS
      targets  <0> c d <1> h i EOS

  Sentinel <0> is the highest id of the vocabulary, <1> the next lower one. As
  in T5's released code a chunk starts with a span that is kept and ends with
  one that is noise, and the targets end with EOS where figure 2 of the paper
  draws one more sentinel.

  Args:
    dataset: examples whose 'targets' are the tokens of a document, int32.
    sequence_length: 'inputs' is filled to its last position; 'targets' must
      hold what that yields, see `span_corruption_lengths`.
    output_features: the vocabulary of 'targets' provides EOS and sentinels.
    noise_density: fraction of tokens that is noise, T5's default.
    mean_span: mean length of the spans of noise, T5's default.

  Returns:
    Examples of 'inputs' and 'targets', both ending with EOS.

  Raises:
    ValueError: `sequence_length['targets']` is too small, or the vocabulary has
      fewer extra ids than a chunk has spans.
  """
  vocabulary = output_features['targets'].vocabulary
  raw_length, targets_length = span_corruption_lengths(
    sequence_length['inputs'], noise_density, mean_span
  )
  if targets_length > sequence_length['targets']:
    raise ValueError(
      f'span corruption of {sequence_length["inputs"]} inputs makes '
      f'{targets_length} targets, but the length of targets is '
      f'{sequence_length["targets"]}: set it to {targets_length}'
    )
  _, spans = _noise(raw_length, noise_density, mean_span)
  if spans > vocabulary.extra_ids:
    raise ValueError(
      f'span corruption of {sequence_length["inputs"]} inputs needs {spans} '
      f'sentinels, but the vocabulary has {vocabulary.extra_ids} extra ids: '
      'shorten the inputs or give the vocabulary more'
    )

  @seqio.map_over_dataset(num_seeds=2)
  def corrupt(example, seeds):
    tokens = example['targets']
    noise = _noise_mask(tf.size(tokens), noise_density, mean_span, seeds)
    eos = [vocabulary.eos_id]
    corrupted = {}
    for feature, mask in (('inputs', noise), ('targets', ~noise)):
      spans = _replace_spans(tokens, mask, vocabulary.vocab_size)
      corrupted[feature] = tf.concat([spans, eos], 0)
      if 'targets_task_ids' in example:
        ids = example['targets_task_ids']
        kept = tf.boolean_mask(ids, _starts(mask) | ~mask)
        corrupted[f'{feature}_task_ids'] = tf.concat([kept, ids[-1:]], 0)
    return corrupted

  return corrupt(concatenate_and_split(dataset, raw_length, vocabulary.eos_id))


def span_corruption_lengths(
  inputs_length: int, noise_density: float = 0.15, mean_span: float = 3.0
) -> tuple[int, int]:
  """The longest chunk whose corrupted inputs fit, and its targets' length.

  Args:
    inputs_length: length of 'inputs' with sentinels and EOS; at least 3.
    noise_density: fraction of tokens that is noise, in (0, 1).
    mean_span: mean length of the spans of noise, at least 1.

  Returns:
    (raw_length, targets_length): tokens of the chunk before corruption, and of
    'targets' with sentinels and EOS.

  The values of T5's pre-training:

  >>> span_corruption_lengths(512)
  (568, 114)
  """

  if not 0 < noise_density < 1 or mean_span < 1:
    raise ValueError(
      'span corruption needs 0 < noise_density < 1 and mean_span >= 1, not '
      f'{noise_density} and {mean_span}'
    )

  def inputs(raw_length):
    noise, spans = _noise(raw_length, noise_density, mean_span)
    return raw_length - noise + spans + 1

  # Two tokens are one kept, one noise: with sentinel and EOS three inputs.
  raw_length = 2
  if inputs_length < inputs(raw_length):
    raise ValueError(
      f'span corruption needs inputs of at least {inputs(raw_length)} tokens, '
      f'not {inputs_length}'
    )
  while inputs(raw_length + 1) <= inputs_length:
    raw_length += 1
  noise, spans = _noise(raw_length, noise_density, mean_span)
  return raw_length, noise + spans + 1


def prefix_lm(
  dataset: tf.data.Dataset, sequence_length: Lengths, output_features: Features
) -> tf.data.Dataset:
  """Cuts chunks at a random place into `inputs` and `targets` (section 3.2.3).

  A chunk is as long as the shorter of the two features, so that both parts fit
  wherever the cut falls; packing uses the room that is left. Both ends of a
  part are cuts and not ends of text, so no EOS is appended.

  Args:
    dataset: examples whose 'targets' are the tokens of a document, int32.
    sequence_length: of 'inputs' and 'targets', in tokens.
    output_features: the vocabulary of 'targets' provides EOS.

  Returns:
    Examples of 'inputs' and 'targets', at least one token each.

  Raises:
    ValueError: the shorter of the two has fewer than 2 tokens.
  """
  length = min(sequence_length['inputs'], sequence_length['targets'])
  if length < 2:
    raise ValueError(
      f'a prefix and its continuation need lengths of at least 2, not {length}'
    )

  @seqio.map_over_dataset(num_seeds=1)
  def split(example, seed):
    cut = tf.random.stateless_uniform(
      [], seed, minval=1, maxval=tf.size(example['targets']), dtype=tf.int32
    )
    inputs = {
      name.replace('targets', 'inputs'): x[:cut] for name, x in example.items()
    }
    return inputs | {name: x[cut:] for name, x in example.items()}

  eos = output_features['targets'].vocabulary.eos_id
  return split(concatenate_and_split(dataset, length, eos))


def lm(
  dataset: tf.data.Dataset, sequence_length: Lengths, output_features: Features
) -> tf.data.Dataset:
  """Chunks of exactly the length of `targets`, the only feature.

  EOS stands where a document ends, not at the end of a chunk.

  Args:
    dataset: examples whose 'targets' are the tokens of a document, int32.
    sequence_length: of 'targets', in tokens.
    output_features: the vocabulary of 'targets' provides EOS.
  """
  eos = output_features['targets'].vocabulary.eos_id
  return concatenate_and_split(dataset, sequence_length['targets'], eos)


def concatenate_and_split(
  dataset: tf.data.Dataset, length: int, eos_id: int
) -> tf.data.Dataset:
  """Joins documents, each followed by EOS, and cuts the stream into chunks.

  No token is lost but at the end of a finite dataset, where a last chunk of a
  single token is dropped: no objective can use it.

  Args:
    dataset: examples whose 'targets' are the tokens of a document, int32.
    length: tokens per chunk; only the last chunk may be shorter.
    eos_id: end-of-sequence id.

  >>> two = tf.data.Dataset.from_tensor_slices({'targets': [[5, 6, 7]] * 2})
  >>> chunks = concatenate_and_split(two, length=5, eos_id=1)
  >>> [chunk['targets'].tolist() for chunk in chunks.as_numpy_iterator()]
  [[5, 6, 7, 1, 5], [6, 7, 1]]
  """

  def document(example):
    tokens = tf.concat([example['targets'], [eos_id]], 0)
    if 'task_id' not in example:
      return {'targets': tokens}
    ids = tf.fill(tf.shape(tokens), example['task_id'])
    return {'targets': tokens, 'targets_task_ids': ids}

  stream = dataset.map(document, num_parallel_calls=tf.data.AUTOTUNE)
  # To tf.data a document is a batch of tokens.
  chunks = stream.rebatch(length)
  return chunks.filter(lambda chunk: tf.size(chunk['targets']) > 1)


@seqio.map_over_dataset
def task_ids(example):
  """Says for every token of 'inputs' and 'targets' the example's 'task_id'."""
  ids = {
    f'{feature}_task_ids': tf.fill(
      tf.shape(example[feature]), example['task_id']
    )
    for feature in ('inputs', 'targets')
  }
  return {**example, **ids}


def _noise(
  length: int, noise_density: float, mean_span: float
) -> tuple[int, int]:
  """Tokens of noise in a chunk, and the spans they form."""
  noise = min(max(round(length * noise_density), 1), length - 1)
  spans = max(round(noise / mean_span), 1)
  return noise, min(spans, length - noise)


def _noise_mask(
  length: tf.Tensor, noise_density: float, mean_span: float, seeds: tf.Tensor
) -> tf.Tensor:
  """Mask of `_noise` tokens in alternating spans, the first of them kept."""
  # 64 bits, to round as Python does.
  noise = tf.cast(
    tf.round(tf.cast(length, tf.float64) * noise_density), tf.int32
  )
  noise = tf.minimum(tf.maximum(noise, 1), length - 1)
  spans = tf.cast(tf.round(tf.cast(noise, tf.float64) / mean_span), tf.int32)
  spans = tf.minimum(tf.maximum(spans, 1), length - noise)
  lengths = tf.stack(
    [
      _random_parts(length - noise, spans, seeds[0]),
      _random_parts(noise, spans, seeds[1]),
    ],
    axis=1,
  )
  is_noise = tf.equal(tf.range(2 * spans) % 2, 1)
  return tf.repeat(is_noise, tf.reshape(lengths, [-1]))


def _random_parts(total: tf.Tensor, parts: tf.Tensor, seed: tf.Tensor):
  """`parts` positive integers that sum to `total`, uniform among all such."""
  # A composition is a choice of parts - 1 of the total - 1 places to cut.
  places = tf.argsort(tf.random.stateless_uniform([total - 1], seed))
  cuts = tf.sort(places[: parts - 1]) + 1
  edges = tf.concat([[0], cuts, [total]], 0)
  return edges[1:] - edges[:-1]


def _replace_spans(
  tokens: tf.Tensor, mask: tf.Tensor, vocab_size: int
) -> tf.Tensor:
  """Each run of masked tokens becomes one sentinel, numbered from the top."""
  starts = _starts(mask)
  sentinels = vocab_size - tf.cumsum(tf.cast(starts, tokens.dtype))
  return tf.boolean_mask(tf.where(starts, sentinels, tokens), starts | ~mask)


def _starts(mask: tf.Tensor) -> tf.Tensor:
  """The first of each run of masked tokens."""
  return mask & ~tf.concat([[False], mask[:-1]], 0)

"""Tasks on the documentation corpora: three objectives, and texts to texts.

Registering is cheap; a corpus is harvested when a task is first read.

  docs_span_corruption  T5's objective; inputs and targets
  docs_prefix_lm        a text and its continuation; inputs and targets
  docs_lm               language modelling; targets only
  docs_sentence         three words of an opening sentence -> the rest of it
  docs_summary          'summarize: ' + documentation -> its opening paragraph
  docs_domain           'domain: ' + documentation -> the package it is from

They read the small corpus. docs_large_lm and so on are the same tasks on the
large one, docs_installed_lm and so on on that of the installed packages; see
`corpus`.

The task id of a token, for routers that need it, is the domain of its document:
the index of its package in `corpus.domains`.
"""

import functools
import os
from collections.abc import Callable, Mapping, Sequence

import seqio
import tensorflow as tf

from sparse_experts.data import corpus, metrics, preprocessors, vocabularies
from sparse_experts.data.tasks import arrays

# Documents are shuffled all together; this separates the chunks of a long one.
SHUFFLE_BUFFER = 256


class DocumentSource(seqio.DataSource):
  """The documents of a corpus: examples of 'text', 'domain' and 'task_id'.

  All documents of a split are held in memory and shuffled by index, so a
  shuffle is complete and the state of an iterator holds no text.

  Attributes:
    task_names: what the task ids mean.
  """

  def __init__(self, name: str = 'small'):
    """A source of the corpus of that name, one of `corpus.PREFIXES`."""
    super().__init__(corpus.SPLITS, caching_permitted=False)
    self._name = name
    self.task_names = corpus.domains(name)

  @functools.cached_property
  def _corpus(self) -> corpus.Corpus:
    return corpus.load(self._name)

  @property
  def digest(self) -> str:
    """Identifies the data; see `corpus.Corpus`."""
    return self._corpus.digest

  @property
  def supports_arbitrary_sharding(self) -> bool:
    return True

  def list_shards(self, split: str) -> Sequence[str]:
    return [os.fspath(self._corpus.files[split])]

  def get_dataset(
    self,
    split: str = 'train',
    shuffle: bool = True,
    seed: int | None = None,
    shard_info: seqio.ShardInfo | None = None,
    **_,  # seqio's other arguments are for sources that cache.
  ) -> tf.data.Dataset:
    """Documents of a split: 'text', 'domain' and 'task_id', its number, int32.

    Args:
      split: one of the source's.
      shuffle, seed, shard_info: see `arrays.examples`.

    Raises:
      ValueError: a file of the corpus is damaged.
    """
    records = tf.data.TFRecordDataset(self.list_shards(split))
    try:
      columns = tf.io.parse_example(
        records.batch(1 << 20).get_single_element(),
        {k: tf.io.FixedLenFeature([], tf.string) for k in ('text', 'domain')},
      )
    except (tf.errors.DataLossError, tf.errors.InvalidArgumentError) as error:
      raise corpus.damaged(
        self._corpus.path, f'{split}.tfrecord is not what was written'
      ) from error
    is_it = columns['domain'][:, None] == tf.constant(self.task_names)[None]
    columns['task_id'] = tf.argmax(is_it, 1, tf.int32)
    return arrays.examples(columns, shuffle, seed, shard_info)


# One for all tasks on a corpus: it looks for the cached one once.
_SOURCES = {name: DocumentSource(name) for name in corpus.PREFIXES}


def add_docs_task(
  name: str,
  preprocessors: Sequence[Callable],
  vocabulary: seqio.Vocabulary,
  *,
  features: Sequence[str] | preprocessors.Features = ('inputs', 'targets'),
  metric_fns: Sequence[Callable] = (),
  corpus_name: str = 'small',
) -> seqio.Task:
  """Registers a task on the documents of a corpus.

  Args:
    name: of the task.
    preprocessors: seqio preprocessors, from examples of `DocumentSource` to
      examples of tokens.
    vocabulary: of all features.
    features: what the preprocessors yield; with what they are, where that is
      not tokens which end with EOS.
    metric_fns: seqio metrics, functions of (targets, predictions).
    corpus_name: one of `corpus.PREFIXES`.
  """
  return seqio.TaskRegistry.add(
    name,
    source=_SOURCES[corpus_name],
    preprocessors=preprocessors,
    output_features=dict(features)
    if isinstance(features, Mapping)
    else {f: seqio.Feature(vocabulary) for f in features},
    metric_fns=metric_fns,
    shuffle_buffer_size=SHUFFLE_BUFFER,
  )


def opening_sentence(dataset: tf.data.Dataset) -> tf.data.Dataset:
  """The first three words of a text's first sentence -> the rest of it.

  The sentence begins with a capital, ends with a full stop in the first
  paragraph and has six words at least; texts without one are left out.
  """

  def first(example):
    paragraph = tf.strings.split(example['text'], '\n\n', maxsplit=1)[0]
    paragraph = tf.strings.regex_replace(paragraph, r'\s+', ' ')
    sentence = tf.strings.regex_replace(paragraph, r'^(.*?\.) .*$', r'\1')
    return {**example, 'sentence': sentence}

  def fields(example):
    words = tf.strings.split(example['sentence'], ' ')
    return {
      'inputs': tf.strings.reduce_join(words[:3], separator=' '),
      'targets': tf.strings.reduce_join(words[3:], separator=' '),
      'task_id': example['task_id'],
    }

  return (
    dataset.map(first, num_parallel_calls=tf.data.AUTOTUNE)
    .filter(
      lambda x: tf.strings.regex_full_match(
        x['sentence'], r'[A-Z]\S*( \S+){5,}\.'
      )
    )
    .map(fields)
  )


def opening_paragraph(dataset: tf.data.Dataset) -> tf.data.Dataset:
  """'summarize: ' + a text without its opening paragraph -> that paragraph.

  Texts of one paragraph have nothing to summarise and are left out.
  """

  def split(example):
    paragraphs = tf.strings.split(example['text'], '\n\n', maxsplit=1)
    paragraphs = tf.pad(paragraphs, [[0, 2 - tf.size(paragraphs)]])
    return paragraphs, example['task_id']

  def fields(paragraphs, task_id):
    return {
      'inputs': tf.strings.join(['summarize: ', paragraphs[1]]),
      'targets': tf.strings.regex_replace(paragraphs[0], r'\s+', ' '),
      'task_id': task_id,
    }

  texts = dataset.map(split, num_parallel_calls=tf.data.AUTOTUNE)
  return texts.filter(lambda p, _: tf.strings.length(p[1]) > 0).map(fields)


def domain(dataset: tf.data.Dataset, names: Sequence[str]) -> tf.data.Dataset:
  """'domain: ' + a text -> the name of its package, of all packages' names."""

  def fields(example):
    return {
      'inputs': tf.strings.join(['domain: ', example['text']]),
      'targets': example['domain'],
      'task_id': example['task_id'],
      'options': tf.constant(names),
      'label': example['task_id'],
      'normalise': False,
    }

  return dataset.map(fields, num_parallel_calls=tf.data.AUTOTUNE)


_BOTH = ('inputs', 'targets')
for _corpus, _prefix in corpus.PREFIXES.items():
  _add = functools.partial(
    add_docs_task, vocabulary=vocabularies.docs(), corpus_name=_corpus
  )
  # A prefix and its continuation end anywhere, and not as texts do.
  for _name, _objective, _features, _ends in (
    ('span_corruption', preprocessors.span_corruption, _BOTH, True),
    ('prefix_lm', preprocessors.prefix_lm, _BOTH, False),
    ('lm', preprocessors.lm, ('targets',), True),
  ):
    _add(
      f'{_prefix}_{_name}',
      preprocessors.from_text(_objective, with_tasks=True),
      features=dict.fromkeys(
        _features, seqio.Feature(vocabularies.docs(), add_eos=_ends)
      ),
    )
  _add(
    f'{_prefix}_sentence',
    [
      opening_sentence,
      functools.partial(seqio.preprocessors.tokenize, copy_pretokenized=False),
      seqio.preprocessors.append_eos_after_trim,
      preprocessors.task_ids,
    ],
    features={
      'inputs': seqio.Feature(vocabularies.docs(), add_eos=False),
      'targets': seqio.Feature(vocabularies.docs()),
    },
  )
  for _name, _fields, _metric in (
    ('summary', opening_paragraph, metrics.rouge),
    (
      'domain',
      functools.partial(domain, names=corpus.domains(_corpus)),
      metrics.accuracy,
    ),
  ):
    _add(
      f'{_prefix}_{_name}',
      [
        _fields,
        functools.partial(seqio.preprocessors.tokenize, copy_pretokenized=True),
        seqio.preprocessors.append_eos_after_trim,
        preprocessors.task_ids,
      ],
      metric_fns=[_metric],
    )

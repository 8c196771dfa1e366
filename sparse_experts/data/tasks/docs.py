"""Tasks on the embedded corpus: three objectives, summaries, domains.

Registering is cheap; the corpus is harvested when a task is first read.

  docs_span_corruption  T5's objective; inputs and targets
  docs_prefix_lm        a text and its continuation; inputs and targets
  docs_lm               language modelling; targets only
  docs_summary          'summarize: ' + documentation -> its opening paragraph
  docs_domain           'domain: ' + documentation -> the package it is from

The task id of a token, for routers that need it, is the domain of its document:
the index of its package in `corpus.PACKAGES`.
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
  """The documents of the corpus: examples of 'text', 'domain' and 'task_id'.

  All documents of a split are held in memory and shuffled by index, so a
  shuffle is complete and the state of an iterator holds no text.

  Attributes:
    task_names: what the task ids mean.
  """

  task_names = corpus.PACKAGES

  def __init__(self):
    super().__init__(corpus.SPLITS, caching_permitted=False)

  @functools.cached_property
  def _corpus(self) -> corpus.Corpus:
    return corpus.load()

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
    is_it = columns['domain'][:, None] == tf.constant(corpus.PACKAGES)[None]
    columns['task_id'] = tf.argmax(is_it, 1, tf.int32)
    return arrays.examples(columns, shuffle, seed, shard_info)


# One for all tasks: it looks for the cached corpus once.
_SOURCE = DocumentSource()


def add_docs_task(
  name: str,
  preprocessors: Sequence[Callable],
  vocabulary: seqio.Vocabulary,
  *,
  features: Sequence[str] | Mapping[str, seqio.Feature] = ('inputs', 'targets'),
  metric_fns: Sequence[Callable] = (),
) -> seqio.Task:
  """Registers a task on the documents of the corpus.

  Args:
    name: of the task.
    preprocessors: seqio preprocessors, from examples of `DocumentSource` to
      examples of tokens.
    vocabulary: of all features.
    features: what the preprocessors yield; with what they are, where that is
      not tokens which end with EOS.
    metric_fns: seqio metrics, functions of (targets, predictions).
  """
  return seqio.TaskRegistry.add(
    name,
    source=_SOURCE,
    preprocessors=preprocessors,
    output_features=dict(features)
    if isinstance(features, Mapping)
    else {f: seqio.Feature(vocabulary) for f in features},
    metric_fns=metric_fns,
    shuffle_buffer_size=SHUFFLE_BUFFER,
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


@seqio.map_over_dataset
def domain(example):
  """'domain: ' + a text -> the name of its package, of all packages' names."""
  return {
    'inputs': tf.strings.join(['domain: ', example['text']]),
    'targets': example['domain'],
    'task_id': example['task_id'],
    'options': tf.constant(corpus.PACKAGES),
    'label': example['task_id'],
    'normalise': False,
  }


add_docs_task(
  'docs_span_corruption',
  preprocessors.from_text(preprocessors.span_corruption, with_tasks=True),
  vocabularies.docs(),
)
add_docs_task(
  'docs_prefix_lm',
  preprocessors.from_text(preprocessors.prefix_lm, with_tasks=True),
  vocabularies.docs(),
)
add_docs_task(
  'docs_lm',
  preprocessors.from_text(preprocessors.lm, with_tasks=True),
  vocabularies.docs(),
  features=('targets',),
)
for _name, _fields, _metric in (
  ('docs_summary', opening_paragraph, metrics.rouge),
  ('docs_domain', domain, metrics.accuracy),
):
  add_docs_task(
    _name,
    [
      _fields,
      functools.partial(seqio.preprocessors.tokenize, copy_pretokenized=True),
      seqio.preprocessors.append_eos_after_trim,
      preprocessors.task_ids,
    ],
    vocabularies.docs(),
    metric_fns=[_metric],
  )

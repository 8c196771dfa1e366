"""Tasks on the documentation corpora for masked language with a second head.

  docs_masked         a run of a documentation text; 'domain' int32 [], the
                      index of its package in `corpus.domains`
  docs_next_sentence  two runs; 'next_sentence' int32 [], 1 where the second
                      follows the first, 0 where it is another text's

Both have 'tokens', 'targets' and 'weights', see `masking.mask_tokens`.
"""

import functools

import seqio
import tensorflow as tf

from sparse_experts.data import corpus, masking, vocabularies
from sparse_experts.data.tasks import docs


@seqio.map_over_dataset
def domain(example):
  """The package of a text, of it and of each of its tokens."""
  ids = tf.fill(tf.shape(example['tokens']), example['task_id'])
  return {**example, 'domain': example['task_id'], 'tokens_task_ids': ids}


def add_masked_task(
  corpus_name: str, name: str, examples, label: str, num_classes: int
) -> seqio.Task:
  """Registers a task of masked text with one label.

  Args:
    corpus_name: one of `corpus.PREFIXES`.
    name: of the task, after that prefix.
    examples: seqio preprocessors, from a document's 'tokens' to rows with the
      label.
    label: its feature.
    num_classes: that it has.
  """
  vocabulary = vocabularies.docs()
  ids = functools.partial(seqio.Feature, add_eos=False)
  return docs.add_docs_task(
    f'{corpus.PREFIXES[corpus_name]}_{name}',
    [
      functools.partial(
        seqio.preprocessors.rekey,
        key_map={'tokens': 'text', 'task_id': 'task_id'},
      ),
      functools.partial(seqio.preprocessors.tokenize, copy_pretokenized=False),
      *examples,
      masking.mask_tokens,
    ],
    vocabulary,
    features={
      'tokens': ids(vocabulary),
      'targets': ids(vocabulary),
      'weights': seqio.ContinuousFeature(dtype=tf.float32, rank=1),
      label: ids(seqio.PassThroughVocabulary(num_classes), rank=0),
    },
    corpus_name=corpus_name,
  )


for _corpus in corpus.PREFIXES:
  add_masked_task(
    _corpus,
    'masked',
    [masking.passages, domain],
    'domain',
    len(corpus.domains(_corpus)),
  )
  add_masked_task(
    _corpus, 'next_sentence', [masking.sentence_pairs], 'next_sentence', 2
  )

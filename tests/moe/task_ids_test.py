"""Task ids of tokens, from documents to rows of batches."""

import numpy as np
import pytest
import seqio
import tensorflow as tf

from sparse_experts.data import (
  corpus,
  preprocessors,
  streams,
  token_text,
  vocabularies,
)
from sparse_experts.data.features.text import Text, TextToText

VOCABULARY = vocabularies.byte()
LENGTHS = {'inputs': 20, 'targets': 20}
NLTK = corpus.domains().index('nltk')


def documents():
  """Tokens 10 d + 10 to 10 d + 19 are of document d, whose task is d % 3."""
  random = np.random.default_rng(0)
  texts = [
    random.integers(10 * d + 10, 10 * d + 20, random.integers(1, 30))
    for d in range(15)
  ]
  return tf.data.Dataset.from_generator(
    lambda: (
      {'targets': text, 'task_id': d % 3} for d, text in enumerate(texts)
    ),
    output_signature={
      'targets': tf.TensorSpec([None], tf.int32),
      'task_id': tf.TensorSpec([], tf.int32),
    },
  )


def chunks(objective):
  features = {f: seqio.Feature(VOCABULARY) for f in LENGTHS}
  return list(objective(documents(), LENGTHS, features).as_numpy_iterator())


@pytest.mark.parametrize('name', ['span_corruption', 'prefix_lm', 'lm'])
def test_every_token_keeps_the_task_of_its_document(name):
  features = ('targets',) if name == 'lm' else ('inputs', 'targets')
  found = chunks(getattr(preprocessors, name))
  seen = set()
  for chunk in found:
    assert set(chunk) == {*features, *(f'{f}_task_ids' for f in features)}
    for feature in features:
      tokens, ids = chunk[feature], chunk[f'{feature}_task_ids']
      assert tokens.shape == ids.shape
      is_text = (tokens >= 10) & (tokens < 160)
      of_text = (tokens[is_text] - 10) // 10 % 3
      np.testing.assert_array_equal(ids[is_text], of_text)
      seen |= set(of_text)
      # An end or a sentinel in the midst of a document is of it.
      inside = ~is_text[1:-1] & (ids[:-2] == ids[2:])
      np.testing.assert_array_equal(ids[1:-1][inside], ids[2:][inside])
  assert seen == {0, 1, 2} and len(found) > 5


def test_an_end_is_of_its_document():
  # Two documents of three tokens: 5 6 7 EOS 5 6 7 EOS, of tasks 4 and 9.
  dataset = tf.data.Dataset.from_tensor_slices(
    {'targets': [[5, 6, 7]] * 2, 'task_id': [4, 9]}
  )
  joined = preprocessors.concatenate_and_split(dataset, length=6, eos_id=1)
  ids = [c['targets_task_ids'].tolist() for c in joined.as_numpy_iterator()]
  assert ids == [[4, 4, 4, 4, 9, 9], [9, 9]]


@pytest.mark.parametrize('features', [TextToText(), Text()])
@pytest.mark.parametrize('pack', [False, True])
def test_ids_stay_with_their_tokens(features, pack):
  # The task of a token is its tens; examples of different lengths.
  random = np.random.default_rng(1)
  texts = [
    {f: random.integers(1, 100, random.integers(2, 6)) for f in LENGTHS}
    for _ in range(12)
  ]
  examples = [
    {**text, **{f'{f}_task_ids': text[f] // 10 for f in LENGTHS}}
    for text in texts
  ]
  spec = tf.TensorSpec([None], tf.int32)
  dataset = tf.data.Dataset.from_generator(
    lambda: iter(examples), output_signature=dict.fromkeys(examples[0], spec)
  )
  plain, ours = (
    list(
      features.rows(
        dataset, LENGTHS, pack=pack, task_ids=task_ids
      ).as_numpy_iterator()
    )
    for task_ids in (False, True)
  )
  assert len(plain) == len(ours) and (len(ours) < 12) == pack
  for old, row in zip(plain, ours):
    np.testing.assert_array_equal(
      row['decoder_task_ids'], old['decoder_target_tokens'] // 10
    )
    if 'encoder_task_ids' in row:
      np.testing.assert_array_equal(
        row['encoder_task_ids'], old['encoder_input_tokens'] // 10
      )
    for name, values in old.items():
      np.testing.assert_array_equal(row[name], values, err_msg=name)


@pytest.mark.parametrize(
  'task, lengths, features',
  [
    ('docs_span_corruption', {'inputs': 64, 'targets': 20}, TextToText()),
    ('docs_summary', {'inputs': 64, 'targets': 20}, TextToText()),
    ('docs_prefix_lm', {'inputs': 32, 'targets': 32}, Text()),
    ('docs_lm', {'targets': 64}, Text()),
  ],
)
def test_the_docs_tasks_say_the_domain(task, lengths, features):
  def first(split, **options):
    return next(
      iter(
        streams.eval_batches(
          task, split, lengths, 8, features, pack=True, **options
        )
      )
    )

  batch = first('out_of_domain', task_ids=True)
  shapes = features.shapes(lengths, 8, pack=True, task_ids=True)
  assert {n: (x.shape, x.dtype) for n, x in batch.items()} == {
    n: (s.shape, s.dtype) for n, s in shapes.items()
  }
  plain = first('out_of_domain')
  for name, values in plain.items():
    np.testing.assert_array_equal(batch[name], values, err_msg=name)
  for name in set(batch) - set(plain):
    stack = name.removesuffix('_task_ids')
    tokens = {'encoder': 'encoder_input', 'decoder': 'decoder_target'}[stack]
    real = batch[f'{tokens}_tokens'] > 0
    assert (batch[name][real] == NLTK).all() and (batch[name][~real] == 0).all()
  ids = first('validation', task_ids=True)['decoder_task_ids']
  assert ids.max() < len(corpus.domains()) and len(set(ids.ravel())) > 3
  assert NLTK not in ids


def test_ids_are_the_domains():
  # The targets of this task spell the domain.
  batch = next(
    iter(
      streams.eval_batches(
        'docs_domain',
        'validation',
        {'inputs': 32, 'targets': 10},
        32,
        TextToText(),
        task_ids=True,
      )
    )
  )
  names = set()
  for row in range(32):
    text = token_text.decode_tokens(
      'docs_domain', 'targets', batch['decoder_target_tokens'][row]
    ).removesuffix('</s>')
    names.add(text)
    for stack in ('encoder', 'decoder'):
      assert corpus.domains()[batch[f'{stack}_task_ids'][row, 0]] == text
  assert len(names) > 3


def test_a_training_stream_continues_with_its_ids(tmp_path):
  def stream(**options):
    return streams.Batches(
      'docs_lm', 'train', {'targets': 32}, 4, Text(), seed=0, **options
    )

  ours = stream(task_ids=True)
  first = next(ours)
  for name, values in next(stream()).items():
    np.testing.assert_array_equal(first[name], values, err_msg=name)
  ours.save(tmp_path)
  expected = next(ours)
  continued = stream(task_ids=True)
  continued.restore(tmp_path)
  np.testing.assert_array_equal(
    next(continued)['decoder_task_ids'], expected['decoder_task_ids']
  )
  with pytest.raises(ValueError, match='have task_ids True, these have False'):
    stream().restore(tmp_path)


def test_tasks_without_ids_are_refused():
  with pytest.raises(ValueError, match=r'no inputs_task_ids, targets_task_ids'):
    next(
      iter(
        streams.eval_batches(
          'tiny_sums',
          'train',
          LENGTHS,
          2,
          TextToText(),
          task_ids=True,
          modules=('tiny_tasks',),
        )
      )
    )

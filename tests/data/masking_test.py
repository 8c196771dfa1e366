"""Masked text: what is hidden, pairs of runs, and rows, the same each time."""

import itertools

import numpy as np
import pytest
import seqio
import tensorflow as tf

from sparse_experts.data import masking, tasks
from sparse_experts.data.dataset import Dataset
from sparse_experts.data.features.masked_text import Label, MaskedText
from sparse_experts.data.special_tokens import NO_TOKEN, SpecialTokens
from sparse_experts.data.tasks import arrays
from sparse_experts.layers.embed import TokenEmbed
from sparse_experts.models.masked_language import MaskedLanguage
from sparse_experts.models.text_heads import Head, TextHeads

# Ids 0, 1, 2 are controls, 3 to 258 text, 259 to 358 sentinels.
VOCABULARY = seqio.ByteVocabulary(100)
IDS = {'tokens': seqio.Feature(VOCABULARY, add_eos=False)}
MASK, FIRST, EOS = 358, 357, 1
DOCS = Dataset('docs_masked', {'tokens': 32}, 8, pack=False)
FEATURES = MaskedText({'domain': Label()})


def run(preprocess, texts, seed=0, **arguments):
  """The examples of a preprocessor, as numpy."""
  ragged = tf.ragged.constant(texts, tf.int32)
  dataset = tf.data.Dataset.from_tensor_slices({'tokens': ragged})
  # As sources give them, not ragged.
  dataset = dataset.map(lambda example: {'tokens': example['tokens'] + 0})
  with seqio.utils.map_seed_manager(seed):
    made = preprocess(dataset, output_features=IDS, **arguments)
  return list(made.as_numpy_iterator())


def test_of_a_hundred_tokens_fifteen_are_chosen():
  """200 texts of 100 tokens and EOS: 3,000 are, 2,400 +- 22 of them masked."""
  text = np.arange(3, 103)
  texts = [[FIRST, *text, EOS]] * 200
  examples = run(masking.mask_tokens, texts)
  shown, targets, weights = (
    np.stack([example[name] for example in examples])
    for name in ('tokens', 'targets', 'weights')
  )
  np.testing.assert_array_equal(targets, texts)
  assert set(weights.ravel()) == {0, 1}
  np.testing.assert_array_equal(weights.sum(1), 15)
  assert not weights[:, [0, -1]].any()
  np.testing.assert_array_equal(shown[weights == 0], targets[weights == 0])
  chosen, was = shown[weights == 1], targets[weights == 1]
  is_mask = chosen == MASK
  is_other = ~is_mask & (chosen != was)
  # Five standard deviations; a random token is what was there once in 256.
  for found, share in ((is_mask, 0.8), (is_other, 0.1 * 255 / 256)):
    deviation = np.sqrt(3000 * share * (1 - share))
    assert abs(found.sum() - 3000 * share) < 5 * deviation
  others = chosen[is_other]
  assert others.min() >= 3 and others.max() < 259
  assert (others >= 103).any()  # Pieces that no text has.
  # Every place is chosen alike: 30 +- 5 times.
  assert abs(weights[:, 1:-1].sum(0) - 30).max() < 5 * 5.05


@pytest.mark.parametrize(
  'tokens,rate,chosen',
  [(3, 0.15, 1), (10, 0.25, 2), (14, 0.25, 4), (0, 0.5, 0)],
)
def test_how_many_are_chosen(tokens, rate, chosen):
  """Rounded as Python does, and one at least, of those there are."""
  texts = [[*range(3, 3 + tokens), EOS]]
  (example,) = run(masking.mask_tokens, texts, rate=rate)
  assert example['weights'].sum() == chosen


def test_shares_and_the_mask_may_be_said():
  texts = [[2, 50, 60, 70, EOS]]  # What is unknown is text, too.
  say = {'rate': 1.0, 'masked': 1.0, 'random': 0.0}
  (example,) = run(masking.mask_tokens, texts, mask_id=300, **say)
  assert example['tokens'].tolist() == [300, 300, 300, 300, EOS]
  say['masked'] = 0.0
  (example,) = run(masking.mask_tokens, texts, **say)
  assert example['tokens'].tolist() == texts[0]
  assert example['weights'].tolist() == [1, 1, 1, 1, 0]
  with pytest.raises(ValueError, match=r'masked \+ random=1.1 is a share'):
    run(masking.mask_tokens, texts, masked=0.8, random=0.3)


def test_passages_are_runs_of_a_document():
  texts = [list(range(3, 43))] * 50 + [[5, 6]]
  *long, short = run(masking.passages, texts, sequence_length={'tokens': 10})
  starts = []
  for example in long:
    first, *middle, last = example['tokens'].tolist()
    assert (first, last, len(middle)) == (FIRST, EOS, 8)
    assert np.diff(middle).tolist() == [1] * 7
    starts.append(middle[0])
  # 33 places to begin at, the first and last among them.
  assert min(starts) < 10 and max(starts) > 28 and len(set(starts)) > 15
  assert short['tokens'].tolist() == [FIRST, 5, 6, EOS]


def test_the_second_follows_the_first_or_is_another_s():
  """Documents of their own ten ids each, of which eight fit."""
  texts = [list(range(10 * i, 10 * i + 10)) for i in range(1, 21)]
  examples = run(masking.sentence_pairs, texts, sequence_length={'tokens': 11})
  assert len(examples) == 20
  labels = []
  for i, example in enumerate(examples):
    tokens = example['tokens'].tolist()
    assert (tokens[0], tokens[5], tokens[10]) == (FIRST, EOS, EOS)
    first, second = tokens[1:5], tokens[6:10]
    assert first[0] // 10 == i + 1
    if example['next_sentence']:
      assert first + second == list(range(first[0], first[0] + 8))
    else:
      other = i + 2 if i % 2 == 0 else i
      assert {token // 10 for token in second} == {other}
      assert np.diff(second).tolist() == [1] * 3 and second[0] % 10 >= 4
    labels.append(int(example['next_sentence']))
  assert labels[::2] == labels[1::2] and 0 < sum(labels) < 20


def test_rows_have_the_shapes_that_are_said():
  for task_ids in (False, True):
    said = FEATURES.shapes(DOCS.feature_lengths, 8, task_ids=task_ids)
    rows = FEATURES.rows(
      tasks.find('docs_masked').get_dataset(
        {'tokens': 32}, 'test', shuffle=False, num_epochs=1
      ),
      DOCS.feature_lengths,
      task_ids=task_ids,
    )
    spec = rows.batch(8, drop_remainder=True).element_spec
    assert {k: (x.shape, x.dtype.name) for k, x in said.items()} == {
      k: (tuple(x.shape), x.dtype.name) for k, x in spec.items()
    }


def test_masks_are_a_function_of_the_seed_and_of_the_epoch(forget_new_tasks):
  """One text for ever; a shuffle of one example changes nothing."""
  columns = {'text': np.array([' '.join(map(str, range(100)))])}
  source = arrays.ArraySource(lambda: {'train': columns}, ('train',))
  docs = seqio.TaskRegistry.get('docs_masked')
  label = lambda dataset: dataset.map(
    lambda example: {**example, 'task_id': tf.constant(3)}
  )
  seqio.TaskRegistry.add(
    'one_text',
    source=source,
    preprocessors=[label, *docs.preprocessors],
    output_features=docs.output_features,
    shuffle_buffer_size=2,
  )

  def rows(seed):
    data = Dataset('one_text', {'tokens': 400}, 1, pack=False, seed=seed)
    return list(itertools.islice(data.training(FEATURES, slice(None)), 3))

  first, again, other = rows(1), rows(1), rows(2)
  for name in first[0]:
    for x, y in zip(first, again):
      np.testing.assert_array_equal(x[name], y[name])
  masks = [row['weights'] for row in (*first, other[0])]
  for x, y in itertools.combinations(masks, 2):
    assert (x != y).any()
  for x, y in itertools.combinations(first, 2):
    np.testing.assert_array_equal(x['targets'], y['targets'])
  assert first[0]['domain'] == [3]


def test_evaluation_is_the_same_twice_and_fills_up():
  data = Dataset('docs_masked', {'tokens': 32}, 200, split='test', pack=False)
  *_, last = whole = list(data.evaluation(FEATURES))
  for x, y in zip(whole, data.evaluation(FEATURES)):
    np.testing.assert_array_equal(x['tokens'], y['tokens'])
  # 614 documents.
  assert (last['tokens'] != 0).any(1).sum() == 14
  assert not last['weights'][14:].any()


def test_padding_and_labels_of_any_kind():
  """Longer rows are cut; padding is the model's; a token may have a label."""
  features = MaskedText(
    {'tags': Label(of_tokens=True), 'scores': Label((2,), 'float32')},
    special_tokens=SpecialTokens(pad=NO_TOKEN),
  )
  examples = tf.data.Dataset.from_generator(
    lambda: [
      {
        'tokens': np.arange(n),
        'targets': np.arange(n),
        'weights': np.ones(n),
        'tags': np.arange(n) + 5,
        'scores': [0.5, -1.0],
      }
      for n in (2, 5)
    ],
    output_signature={
      **dict.fromkeys(
        ('tokens', 'targets', 'tags'), tf.TensorSpec([None], 'int32')
      ),
      'weights': tf.TensorSpec([None], 'float32'),
      'scores': tf.TensorSpec([2], 'float32'),
    },
  )
  short, long = features.rows(examples, {'tokens': 3}).as_numpy_iterator()
  assert {k: x.tolist() for k, x in short.items()} == {
    'tokens': [0, 1, -1],
    'targets': [0, 1, -1],
    'weights': [1, 1, 0],
    'tags': [5, 6, 0],
    'scores': [0.5, -1],
  }
  assert long['tags'].tolist() == [5, 6, 7]


@pytest.mark.parametrize(
  'embeddings,classes,said',
  [
    (8099, 24, '8100 token ids, but the model embeds only 8099'),
    (8100, 23, "24 classes of 'domain', but that head has 23"),
  ],
)
def test_the_model_must_know_the_tokens_and_the_classes(
  embeddings, classes, said
):
  def model(embeddings, classes):
    heads = {'masked': Head('masked'), 'domain': Head('softmax', classes)}
    embed = TokenEmbed(embeddings, 8)
    return MaskedLanguage(TextHeads(embed, encoder=None, heads=heads))

  with pytest.raises(ValueError, match=said):
    model(embeddings, classes).check_data(DOCS)
  model(8100, 24).check_data(DOCS)


def test_errors_are_one_line():
  with pytest.raises(ValueError, match="a length of 'tokens' alone"):
    FEATURES.shapes({'targets': 8}, 2)
  with pytest.raises(ValueError, match='set PACK = False'):
    FEATURES.shapes({'tokens': 8}, 2, pack=True)
  other = MaskedText({'domain': Label((4,))})
  with pytest.raises(ValueError, match='as int32 of rank 1, but .* of rank 0'):
    next(DOCS.training(other, slice(None)))
  two = Dataset('docs_next_sentence', {'tokens': 8}, 2, pack=False)
  with pytest.raises(ValueError, match="the model reads .*'domain'"):
    next(two.training(FEATURES, slice(None)))
  pairs = MaskedText({'next_sentence': Label()})
  asked = Dataset(
    'docs_next_sentence', {'tokens': 8}, 2, pack=False, task_ids=True
  )
  with pytest.raises(ValueError, match='set TASK_IDS = False'):
    next(asked.training(pairs, slice(None)))

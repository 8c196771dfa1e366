"""Tests of the registered tasks and their vocabularies."""

import pytest
import seqio
import tensorflow_datasets as tfds

from sparse_experts.data import (
  corpus,
  examples,
  metrics,
  preprocessors,
  streams,
  tasks,
  token_text,
  vocabularies,
)
from sparse_experts.data.features.text import Text, TextToText
from sparse_experts.data.tasks import c4, docs

LENGTHS = {
  'docs_span_corruption': {'inputs': 64, 'targets': 16},
  'docs_prefix_lm': {'inputs': 32, 'targets': 32},
  'docs_lm': {'targets': 64},
  'docs_sentence': {'inputs': 48, 'targets': 128},
  'docs_summary': {'inputs': 64, 'targets': 32},
  'docs_domain': {'inputs': 64, 'targets': 10},
}


def _texts(name, split='test', batch_size=8):
  """Decoded inputs (or '') and targets of the first rows of a task."""
  lengths = LENGTHS[name]
  features = TextToText() if 'inputs' in lengths else Text()
  (batch,) = streams.eval_batches(
    name, split, lengths, batch_size, features, num_batches=1
  )
  rows = {
    'inputs': batch.get('encoder_input_tokens', []),
    'targets': batch['decoder_target_tokens'],
  }
  return [
    [token_text.decode_tokens(name, feature, row) for row in rows[feature]]
    for feature in ('inputs', 'targets')
  ]


def test_every_docs_task_is_tested():
  masked = {'docs_masked', 'docs_next_sentence'}  # masking_test.py has these.
  found = {name for name in tasks.names() if name.startswith('docs_')}
  assert found == {
    prefix + name.removeprefix('docs')
    for prefix in corpus.PREFIXES.values()
    for name in {*LENGTHS, *masked}
  }


@pytest.mark.parametrize('name', ['large', 'installed'])
def test_tasks_on_other_corpora_know_their_packages(name):
  of_lm = tasks.find(f'{corpus.PREFIXES[name]}_lm').source
  assert of_lm.task_names == corpus.domains(name)
  masked = tasks.find(f'{corpus.PREFIXES[name]}_masked')
  classes = masked.output_features['domain'].vocabulary.vocab_size
  assert classes == len(corpus.domains(name))


def test_tasks_on_the_installed_packages_read_them():
  digests = examples.digests('docs_installed_lm')
  assert digests == {'docs_installed_lm': corpus.load('installed').digest}


@pytest.mark.parametrize('name', LENGTHS)
def test_docs_tasks_have_text(name):
  _, targets = _texts(name)
  assert all(target.removesuffix('</s>') for target in targets)


@pytest.mark.parametrize('split', corpus.SPLITS)
def test_every_split_has_text(split):
  _, targets = _texts('docs_lm', split)
  assert all(len(target) > 100 for target in targets)


def test_span_corruption_is_readable():
  inputs, targets = _texts('docs_span_corruption')
  for given, wanted in zip(inputs, targets):
    assert '<extra_id_0>' in given and given.endswith('</s>')
    assert wanted.startswith('<extra_id_0>') and wanted.endswith('</s>')


def test_a_sentence_opens_a_document_and_goes_on_after_three_words():
  texts = [' '.join(d['text'].split()) for d in corpus.documents('test')]
  for given, rest in zip(*_texts('docs_sentence')):
    assert given.count(' ') == 2 and '<' not in given  # No end, no sentinel.
    assert given[0].isupper() and rest.endswith('.</s>')
    sentence = f'{given} {rest.removesuffix("</s>")}'
    assert sentence.count(' ') >= 5
    assert any(text.startswith(sentence) for text in texts)


def test_summary_is_the_opening_paragraph_of_its_document():
  openings = {
    ' '.join(paragraphs[0].split()): paragraphs[1]
    for d in corpus.documents('test')
    if len(paragraphs := d['text'].split('\n\n', 1)) == 2
  }
  inputs, targets = _texts('docs_summary')
  for given, summary in zip(inputs, targets):
    body = given.removeprefix('summarize: ').removesuffix('</s>')
    assert given != body and openings[summary.removesuffix('</s>')].startswith(
      body
    )


def test_domain_is_the_package_of_its_document():
  domains = {d['text']: d['domain'] for d in corpus.documents('test')}
  inputs, targets = _texts('docs_domain')
  for given, domain in zip(inputs, targets):
    start = given.removeprefix('domain: ').removesuffix('</s>')
    assert given != start
    assert domain.removesuffix('</s>') in {
      d for text, d in domains.items() if text.startswith(start)
    }


def test_out_of_domain_targets_are_the_held_out_package_alone():
  _, held_out = _texts('docs_domain', 'out_of_domain')
  assert set(held_out) == {f'{corpus.OUT_OF_DOMAIN}</s>'}
  for split in ('train', 'validation', 'test'):
    assert corpus.OUT_OF_DOMAIN not in corpus.load().counts[split]


def test_every_epoch_has_every_document_in_another_order():
  def read(seed, shards):
    """Two epochs of the test split, shard after shard."""
    epochs = [[], []]
    for i in range(shards):
      dataset = docs.DocumentSource().get_dataset(
        'test', seed=seed, shard_info=seqio.ShardInfo(i, shards)
      )
      texts = [
        e['text'].decode() for e in dataset.repeat(2).as_numpy_iterator()
      ]
      epochs[0] += texts[: len(texts) // 2]
      epochs[1] += texts[len(texts) // 2 :]
    return epochs

  documents = sorted(d['text'] for d in corpus.documents('test'))
  for shards in (1, 3):
    first, second = read(0, shards)
    assert sorted(first) == sorted(second) == documents
    assert first != documents and first != second
  assert read(0, 1) == read(0, 1)
  assert read(0, 1) != read(1, 1)


def test_accuracy_counts_equal_strings():
  # Two of four.
  assert metrics.accuracy(
    ['jax', 'flax', 'keras', 'gin'], ['jax', 'jax', 'keras', '']
  ) == {'accuracy': 50.0}


def test_rouge_by_hand():
  # Unigrams: 2 of 3 predicted are right, 2 of 4 wanted are found: F1 is
  # 2 * 2 / (3 + 4). Bigrams: ('the', 'array') is 1 of 2 and 1 of 3: 2 / 5. The
  # longest common subsequence is of 2 words. The second pair scores 0.
  scores = metrics.rouge(
    ['sort the array twice', 'a b'], ['copy the array', 'c d']
  )
  assert scores == pytest.approx(
    {'rouge1': 200 / 7, 'rouge2': 20, 'rougeLsum': 200 / 7}
  )


def test_metrics_are_attached():
  assert tasks.find('docs_domain').metric_fns == [metrics.accuracy]
  assert tasks.find('docs_summary').metric_fns == [metrics.rouge]


def test_find_names_the_nearest_task():
  with pytest.raises(ValueError, match=r"'docs_lmm'; did you mean 'docs_lm'\?"):
    tasks.find('docs_lmm')
  with pytest.raises(ValueError, match="unknown task '#'; `python"):
    tasks.find('#')


def test_find_imports_the_modules_of_the_user(python_folder, forget_new_tasks):
  (python_folder / 'my_tasks.py').write_text(
    'import seqio\n'
    "seqio.MixtureRegistry.add('my_mixture', [('docs_domain', 1.0)])\n"
  )
  with pytest.raises(ValueError, match='unknown task'):
    tasks.find('my_mixture')
  assert tasks.find('my_mixture', ['my_tasks']).name == 'my_mixture'


def test_docs_tasks_take_any_vocabulary(forget_new_tasks):
  docs.add_docs_task(
    'docs_bytes',
    preprocessors.from_text(preprocessors.lm),
    vocabularies.byte(),
    features=['targets'],
  )
  (batch,) = streams.eval_batches(
    'docs_bytes', 'test', {'targets': 16}, 2, Text(), num_batches=1
  )
  text = ''.join(
    token_text.decode_tokens('docs_bytes', 'targets', row)
    for row in batch['decoder_target_tokens']
  )
  assert next(corpus.documents('test'))['text'].startswith(text)


@pytest.mark.parametrize(
  'name', ['c4_span_corruption', 'c4_prefix_lm', 'c4_lm']
)
def test_c4_tasks_read_c4(name, forget_new_tasks):
  # T5's vocabulary is on Google Cloud Storage; the source and the objective are
  # the same with another.
  objective = getattr(preprocessors, name.removeprefix('c4_'))
  task = tasks.find(name)
  assert task.output_features['targets'].vocabulary == vocabularies.t5()
  features = list(task.output_features)
  c4.add_c4_task(f'{name}_mock', objective, vocabularies.docs(), features)
  lengths = dict.fromkeys(features, 32)
  with tfds.testing.mock_data(num_examples=20):
    # A mock runs Python, which training refuses.
    (batch,) = streams.eval_batches(
      f'{name}_mock', 'train', lengths, 2, Text(), num_batches=1
    )
  assert batch['decoder_target_tokens'].shape == (2, 32 * len(features))
  assert batch['decoder_loss_weights'].any(axis=1).all()


def test_docs_vocabulary_is_lossless():
  vocabulary = vocabularies.docs()
  texts = ['Tabs\tand  spaces\n\n    indented ', 'ünïcödé 字 🙂', ' <b>&\\n']
  texts += [d['text'] for d in corpus.documents('out_of_domain')][:200]
  for text in texts:
    assert vocabulary.decode(vocabulary.encode(text)) == text


def test_docs_vocabulary_follows_t5():
  vocabulary = vocabularies.docs()
  assert (vocabulary.pad_id, vocabulary.eos_id, vocabulary.unk_id) == (0, 1, 2)
  assert vocabulary.vocab_size == 8100
  # The first sentinel is the highest id.
  assert vocabulary.decode([8099, 8000]) == '<extra_id_0> <extra_id_99>'
  assert vocabularies.DOCS_MODEL.stat().length < 400_000

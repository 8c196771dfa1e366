"""Tests of batches: what they are a function of, and that they resume."""

import hashlib
import json
import pathlib
import shutil
import subprocess
import sys

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

SPAN = {'inputs': 64, 'targets': 16}


def _span_batches(**changes):
  arguments = {
    'task_name': 'docs_span_corruption',
    'split': 'test',
    'feature_lengths': SPAN,
    'batch_size': 8,
    'features': TextToText(),
    'seed': 0,
  }
  return streams.Batches(**arguments | changes)


def _lm_batches(**changes):
  """The quickest to open."""
  arguments = {
    'task_name': 'docs_lm',
    'feature_lengths': {'targets': 32},
    'features': Text(),
    'pack': False,
  }
  return _span_batches(**arguments | changes)


def _take(stream, count):
  return [next(stream) for _ in range(count)]


def _assert_equal(some, others):
  assert len(some) == len(others)
  for one, other in zip(some, others):
    assert one.keys() == other.keys()
    for name in one:
      np.testing.assert_array_equal(one[name], other[name])


def _differ(some, others):
  return any(
    (one['decoder_target_tokens'] != other['decoder_target_tokens']).any()
    for one, other in zip(some, others)
  )


@pytest.mark.parametrize('pack', [True, False])
@pytest.mark.parametrize(
  'features,task,lengths',
  [
    (TextToText(), 'docs_domain', {'inputs': 32, 'targets': 8}),
    (Text(), 'docs_domain', {'inputs': 32, 'targets': 8}),
    (Text(), 'docs_lm', {'targets': 16}),
  ],
)
def test_shapes_are_what_seqio_yields(features, task, lengths, pack):
  (batch,) = streams.eval_batches(
    task, 'test', lengths, 2, features, pack=pack, num_batches=1
  )
  assert {name: (rows.shape, rows.dtype) for name, rows in batch.items()} == {
    name: (struct.shape, struct.dtype)
    for name, struct in features.shapes(lengths, 2, pack=pack).items()
  }


def test_shapes_refuses_lengths_of_other_features():
  with pytest.raises(ValueError, match='TextToText takes lengths of'):
    TextToText().shapes({'targets': 8}, 2)
  with pytest.raises(ValueError, match='Text takes lengths of'):
    Text().shapes({'inputs': 8}, 2)


def test_the_seed_decides_the_stream():
  once, again, other = (
    _take(_span_batches(seed=seed, pack=False), 3) for seed in (0, 0, 1)
  )
  _assert_equal(once, again)
  assert _differ(once, other)


# The test split is some 220 batches of 8 x 71 tokens, so 230 reach the next
# epoch.
@pytest.mark.parametrize('drawn,further', [(0, 10), (3, 10), (45, 230)])
def test_resumed_batches_equal_uninterrupted_ones(drawn, further, tmp_path):
  stream = _span_batches()
  _take(stream, drawn)
  stream.save(tmp_path)
  expected = _take(stream, further)
  resumed = _span_batches()
  resumed.restore(tmp_path)
  _assert_equal(expected, _take(resumed, further))


def test_a_fresh_process_resumes(tmp_path):
  def digest(stream):
    tokens = [b['encoder_input_tokens'].tobytes() for b in _take(stream, 20)]
    return hashlib.sha256(b''.join(tokens)).hexdigest()

  stream = _span_batches()
  _take(stream, 7)
  stream.save(tmp_path)
  script = f"""
import hashlib
from sparse_experts.data import streams
from sparse_experts.data.features.text import TextToText
stream = streams.Batches('docs_span_corruption', 'test', {SPAN}, 8,
                         TextToText(), seed=0)
stream.restore({str(tmp_path)!r})
tokens = [next(stream)['encoder_input_tokens'].tobytes() for _ in range(20)]
print(hashlib.sha256(b''.join(tokens)).hexdigest())
"""
  root = str(pathlib.Path(streams.__file__).parents[2])
  printed = subprocess.check_output(
    [sys.executable, '-c', script],
    env=streams.os.environ | {'PYTHONPATH': root},
    text=True,
  )
  assert printed == digest(stream) + '\n'


def test_mixtures_resume_too(tmp_path, forget_new_tasks):
  seqio.MixtureRegistry.add(
    'docs_mixture', [('docs_domain', 1.0), ('docs_summary', 2.0)]
  )

  def open_mixture():
    return streams.Batches(
      'docs_mixture', 'test', SPAN, 4, TextToText(), seed=0
    )

  stream = open_mixture()
  targets = np.concatenate(
    [b['decoder_target_tokens'] for b in _take(stream, 10)]
  )
  assert len(np.unique(targets)) > 50
  stream.save(tmp_path)
  resumed = open_mixture()
  resumed.restore(tmp_path)
  _assert_equal(_take(stream, 30), _take(resumed, 30))
  identity = json.loads((tmp_path / 'batches.json').read_text())
  assert set(identity['corpus']) == {'docs_domain', 'docs_summary'}


@pytest.mark.parametrize('num_shards', [1, 2])
def test_processes_split_the_rows_of_the_same_batches(num_shards):
  def draw(rows):
    stream = _lm_batches(rows=rows, num_shards=num_shards)
    return _take(stream, 21), stream.streams

  whole, opened = draw(slice(None))
  assert opened == range(num_shards)
  for processes in (2, 4):
    size = 8 // processes
    parts = [draw(slice(i * size, (i + 1) * size)) for i in range(processes)]
    joined = [
      {name: np.concatenate([p[name] for p in step]) for name in step[0]}
      for step in zip(*(part for part, _ in parts))
    ]
    _assert_equal(whole, joined)
    # Each needs the rows of one stream, and opens no other.
    assert [len(opened) for _, opened in parts] == [1] * processes


def test_streams_have_documents_and_noise_of_their_own():
  stream = _span_batches(
    task_name='docs_domain',
    feature_lengths={'inputs': 64, 'targets': 8},
    num_shards=2,
    pack=False,
  )
  # Less than an epoch of the 465 documents: no document on both sides.
  rows = np.stack([b['encoder_input_tokens'] for b in _take(stream, 40)])
  left = set(map(tuple, rows[:, :4].reshape(-1, 64).tolist()))
  right = set(map(tuple, rows[:, 4:].reshape(-1, 64).tolist()))
  assert len(left) > 100 and len(right) > 100
  # Different documents may share their first 64 tokens.
  assert len(left & right) < 10

  batch = next(_span_batches(num_shards=2, pack=False))
  corrupted = batch['encoder_input_tokens'] >= 8000
  assert (corrupted[:4] != corrupted[4:]).any()


def test_any_number_of_processes_may_continue(tmp_path):
  halves = [
    _lm_batches(rows=rows, num_shards=2) for rows in (slice(0, 4), slice(4, 8))
  ]
  for half in halves:
    _take(half, 5)
    half.save(tmp_path)
  expected = [
    {name: np.concatenate([left[name], right[name]]) for name in left}
    for left, right in zip(*(_take(half, 10) for half in halves))
  ]
  whole = _lm_batches(num_shards=2)
  whole.restore(tmp_path)
  _assert_equal(expected, _take(whole, 10))


def test_a_stream_that_two_processes_open_is_written_by_one(tmp_path):
  # Stream 1 has rows 4 to 7.
  first = _lm_batches(rows=slice(0, 6), num_shards=2)
  second = _lm_batches(rows=slice(6, 8), num_shards=2)
  assert (first.streams, second.streams) == (range(2), range(1, 2))
  first.save(tmp_path, streams=first.streams)
  second.save(tmp_path, streams=[])
  second.restore(tmp_path)
  expected = next(_lm_batches(num_shards=2))['decoder_target_tokens'][6:]
  np.testing.assert_array_equal(next(second)['decoder_target_tokens'], expected)


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """Batches of which none is drawn, and where they were saved."""
  directory = tmp_path_factory.mktemp('saved')
  stream = _span_batches()
  stream.save(directory)
  return stream, directory


@pytest.mark.parametrize(
  'key,value,message',
  [
    ('task', 'docs_domain', "task 'docs_domain', .* 'docs_span_corruption'"),
    ('split', 'train', "split 'train', these have 'test'"),
    ('seed', 1, 'seed 1, these have 0'),
    ('batch_size', 4, 'batch_size 4, these have 8'),
    ('pack', False, 'pack False, these have True'),
    ('num_shards', 2, 'num_shards 2, these have 1'),
    ('feature_lengths', {'targets': 8}, "{'targets': 8}, .* {'inputs': 64"),
    ('corpus', {}, "corpus {}, these have {'docs_span_corruption': '"),
  ],
)
def test_restoring_another_stream_is_refused(
  key, value, message, saved, tmp_path
):
  stream, directory = saved
  other = tmp_path / 'other'
  shutil.copytree(directory, other)
  identity = json.loads((other / 'batches.json').read_text())
  assert identity[key] != value
  (other / 'batches.json').write_text(json.dumps(identity | {key: value}))
  with pytest.raises(ValueError, match=message):
    stream.restore(other)


@pytest.mark.slow  # Harvests all that is installed.
def test_a_stream_of_the_installed_packages_continues_by_their_name(tmp_path):
  def stream(name):
    return _lm_batches(task_name=name)

  first = stream('docs_installed_lm')
  next(first)
  first.save(tmp_path)
  # As it was written when these tasks had no name of their own.
  file = tmp_path / 'batches.json'
  text = file.read_text()
  assert text.count('docs_installed_lm') == 2
  file.write_text(text.replace('docs_installed_lm', 'docs_lm'))
  with pytest.raises(
    ValueError, match='corpus .* what docs_lm was is docs_installed_lm now'
  ):
    stream('docs_lm').restore(tmp_path)
  again = stream('docs_installed_lm')
  again.restore(tmp_path)
  _assert_equal([next(first)], [next(again)])
  digest = first.identity['corpus']['docs_installed_lm']
  file.write_text(file.read_text().replace(digest, 'of another day'))
  with pytest.raises(ValueError, match='anew in another directory$'):
    stream('docs_lm').restore(tmp_path)


def test_the_corpus_is_part_of_the_identity(saved):
  stream, _ = saved
  digest = corpus.load().digest
  assert stream.identity['corpus'] == {'docs_span_corruption': digest}


def test_restoring_after_drawing_is_refused(saved):
  _, directory = saved
  stream = _span_batches()
  next(stream)
  with pytest.raises(
    ValueError, match='before the first is drawn, not after 1'
  ):
    stream.restore(directory)


def test_restoring_from_nowhere_is_an_error(tmp_path):
  with pytest.raises(FileNotFoundError, match='no saved batches'):
    _span_batches().restore(tmp_path)


def test_saved_iterators_are_small(saved):
  _, directory = saved
  # The shuffle buffer holds 256 examples and packing up to a few batches of 64;
  # the text of the documents is not part of it.
  assert sum(file.stat().st_size for file in directory.iterdir()) < 400_000


@pytest.mark.parametrize(
  'change,message',
  [
    ({'num_shards': 3}, 'batch size 8 is no multiple of num_shards 3'),
    ({'rows': slice(8, 12)}, 'rows must be a range of'),
    ({'rows': slice(0, 8, 2)}, 'rows must be a range of'),
    ({'split': 'dev'}, "has no split 'dev'; it has train, validation, test"),
    (
      {'task_name': 'docs_lm', 'feature_lengths': {'targets': 8}},
      r"TextToText takes lengths of \['inputs', 'targets'\], not of",
    ),
    (
      {'task_name': 'docs_lm'},
      r"has the features \['targets'\], but lengths are given for",
    ),
    ({'task_name': 'docs_spam'}, 'unknown task'),
  ],
)
def test_arguments_that_make_no_stream_are_refused(change, message):
  with pytest.raises(ValueError, match=message):
    _span_batches(**change)


def test_more_streams_than_files_are_refused(tmp_path, forget_new_tasks):
  path = str(tmp_path / 'one.tfrecord')
  with tf.io.TFRecordWriter(path) as writer:
    example = tf.train.Example()
    example.features.feature['text'].bytes_list.value.append(b'a text')
    writer.write(example.SerializeToString())
  seqio.TaskRegistry.add(
    'one_file',
    source=seqio.TFExampleDataSource(
      {'train': path}, {'text': tf.io.FixedLenFeature([], tf.string)}
    ),
    preprocessors=preprocessors.from_text(preprocessors.lm),
    output_features={'targets': seqio.Feature(vocabularies.byte())},
    metric_fns=[],
  )
  with pytest.raises(ValueError, match=r'has 1 for .* num_shards is 2'):
    streams.Batches(
      'one_file', 'train', {'targets': 4}, 2, Text(), seed=0, num_shards=2
    )


def test_eval_batches_are_the_split_once_in_order_and_padded():
  arguments = ('docs_domain', 'test', {'inputs': 16, 'targets': 10})
  all_batches = list(streams.eval_batches(*arguments, 50, TextToText()))
  count = sum(corpus.load().counts['test'].values())
  assert len(all_batches) == -(-count // 50)
  assert all(len(b['encoder_input_tokens']) == 50 for b in all_batches)
  targets = np.concatenate([b['decoder_target_tokens'] for b in all_batches])
  weights = np.concatenate([b['decoder_loss_weights'] for b in all_batches])
  assert not targets[count:].any() and not weights[count:].any()
  domains = [
    token_text.decode_tokens('docs_domain', 'targets', row)
    for row in targets[:count]
  ]
  assert domains == [f'{d["domain"]}</s>' for d in corpus.documents('test')]


def test_eval_batches_repeat_exactly_and_stop():
  def run():
    return list(
      streams.eval_batches(
        'docs_span_corruption', 'test', SPAN, 4, TextToText(),
        num_batches=3,
      )
    )  # fmt: skip

  once = run()
  assert len(once) == 3
  _assert_equal(once, run())


def test_a_vocabulary_that_does_not_fit_is_refused():
  assert token_text.vocabulary_size('docs_domain') == 8100
  token_text.check_vocabulary('docs_domain', 8100)
  with pytest.raises(ValueError, match=r'8100 token ids.*only 8099'):
    token_text.check_vocabulary('docs_domain', 8099)


def test_decode_tokens_shows_sentinels_and_document_ends():
  vocabulary = vocabularies.docs()
  ids = [*vocabulary.encode('one'), 8099, 1, *vocabulary.encode('two'), 1, 0, 0]
  text = token_text.decode_tokens('docs_lm', 'targets', np.array(ids))
  assert text == 'one <extra_id_0></s>two</s>'

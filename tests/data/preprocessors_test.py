"""Tests of the T5 objectives, by hand and by reconstruction."""

import collections

import numpy as np
import pytest
import seqio
import tensorflow as tf

from sparse_experts.data import preprocessors, vocabularies

# 359 ids: bytes are 3 to 258, the sentinels 358, 357, ... EOS is 1.
VOCABULARY = vocabularies.byte()
EOS = 1
FEATURES = {
  'inputs': seqio.Feature(VOCABULARY),
  'targets': seqio.Feature(VOCABULARY),
}


def _documents(*documents):
  return tf.data.Dataset.from_generator(
    lambda: ({'targets': np.array(d, np.int32)} for d in documents),
    output_signature={'targets': tf.TensorSpec([None], tf.int32)},
  )


def _run(objective, documents, lengths, seed=0, **kwargs):
  with seqio.map_seed_manager(seed):
    examples = objective(documents, lengths, FEATURES, **kwargs)
  return [
    {k: v.tolist() for k, v in example.items()}
    for example in examples.as_numpy_iterator()
  ]


def _merge(inputs, targets):
  """Undoes span corruption: each sentinel is replaced by what it stands for."""
  spans = {}
  for token in targets[:-1]:
    if token > 258:
      span = spans[token] = []
    else:
      span.append(token)
  tokens = []
  for token in inputs[:-1]:
    tokens.extend(spans[token] if token > 258 else [token])
  return tokens


def test_concatenate_and_split_keeps_every_token():
  documents = _documents([5, 6, 7], [8], [], [9, 10, 11, 12])
  chunks = preprocessors.concatenate_and_split(documents, 4, EOS)
  assert [c['targets'].tolist() for c in chunks.as_numpy_iterator()] == [
    [5, 6, 7, EOS], [8, EOS, EOS, 9], [10, 11, 12, EOS],
  ]  # fmt: skip


def test_concatenate_and_split_drops_a_last_single_token():
  documents = _documents([5, 6, 7, 8])
  chunks = preprocessors.concatenate_and_split(documents, 4, EOS)
  assert [c['targets'].tolist() for c in chunks.as_numpy_iterator()] == [
    [5, 6, 7, 8]
  ]


def test_span_corruption_of_one_span():
  # 4 raw tokens at density 0.25: one of them is noise, one span; the first span
  # is kept and the last is noise, so it must be the last token.
  # Inputs: 3 kept + 1 sentinel + EOS = 5. Targets: sentinel + 1 + EOS = 3.
  examples = _run(
    preprocessors.span_corruption,
    _documents([10, 11, 12]),
    {'inputs': 5, 'targets': 3},
    noise_density=0.25,
  )
  assert examples == [
    {'inputs': [10, 11, 12, 358, EOS], 'targets': [358, EOS, EOS]}
  ]


def test_span_corruption_of_two_spans_numbers_sentinels_downwards():
  # 4 raw tokens at density 0.5 and mean span 1: two noise, two kept, two spans
  # of each, so every span is one token: kept, noise, kept, noise.
  examples = _run(
    preprocessors.span_corruption,
    _documents([10, 11, 12]),
    {'inputs': 5, 'targets': 5},
    noise_density=0.5,
    mean_span=1.0,
  )
  assert examples == [
    {'inputs': [10, 358, 12, 357, EOS], 'targets': [358, 11, 357, EOS, EOS]}
  ]


def test_lengths_are_those_of_t5():
  # The published pre-training of T5: 512 inputs, 114 targets.
  assert preprocessors.span_corruption_lengths(512) == (568, 114)


@pytest.mark.parametrize(
  'density,mean_span', [(0.15, 3.0), (0.5, 1.0), (0.3, 10.0)]
)
def test_lengths_are_the_largest_that_fit_and_what_examples_have(
  density, mean_span
):
  def inputs_length(raw):
    noise = max(round(raw * density), 1)
    kept = raw - noise
    # Each span of noise follows one that is kept.
    return kept + min(max(round(noise / mean_span), 1), kept) + 1

  for inputs in (5, 16, 33, 100):
    raw, targets = preprocessors.span_corruption_lengths(
      inputs, density, mean_span
    )
    assert inputs_length(raw) <= inputs < inputs_length(raw + 1)
    example, *_ = _run(
      preprocessors.span_corruption,
      _documents(range(3, 3 + raw)),
      {'inputs': inputs, 'targets': targets},
      noise_density=density,
      mean_span=mean_span,
    )
    assert len(example['inputs']) == inputs_length(raw)
    assert len(example['targets']) == targets


def test_inputs_and_targets_merge_to_the_text():
  rng = np.random.default_rng(0)
  for inputs in range(4, 90, 8):
    raw, targets = preprocessors.span_corruption_lengths(inputs)
    # Two whole chunks and a shorter one.
    text = rng.integers(3, 259, size=2 * raw + raw // 2 + 1).tolist()
    examples = _run(
      preprocessors.span_corruption,
      _documents(text),
      {'inputs': inputs, 'targets': targets},
      seed=inputs,
    )
    merged = [_merge(**example) for example in examples]
    assert [t for chunk in merged for t in chunk] == [*text, EOS]
    for chunk, example in zip(merged, examples):
      assert example['inputs'][-1] == example['targets'][-1] == EOS
      sentinels = [t for t in example['targets'] if t > 258]
      assert sentinels == [358 - i for i in range(len(sentinels))]
      assert sentinels == [t for t in example['inputs'] if t > 258]
      noise = len(example['targets']) - 1 - len(sentinels)
      assert noise == max(round(0.15 * len(chunk)), 1)
      assert len(sentinels) == max(round(noise / 3), 1)


def test_spans_are_uniform_among_all_segmentations():
  # Five in three parts: 1+1+3, 1+3+1, 3+1+1, 1+2+2, 2+1+2, 2+2+1.
  draws = collections.Counter(
    tuple(preprocessors._random_parts(5, 3, [0, i]).numpy().tolist())
    for i in range(1200)
  )
  assert len(draws) == 6
  assert all(sum(parts) == 5 for parts in draws)
  # 200 each; a standard deviation is sqrt(1200 * 1/6 * 5/6) = 12.9.
  assert all(abs(count - 200) < 4 * 12.9 for count in draws.values())


def test_the_seed_decides_the_noise_and_chunks_differ():
  lengths = {'inputs': 30, 'targets': 9}
  raw, _ = preprocessors.span_corruption_lengths(30)

  def run(seed):
    documents = _documents([7] * (4 * raw))
    return _run(preprocessors.span_corruption, documents, lengths, seed)

  assert run(seed=1) == run(seed=1)
  assert run(seed=1) != run(seed=2)
  chunks = run(seed=1)[:4]
  assert any(chunk['inputs'] != chunks[0]['inputs'] for chunk in chunks)


def test_targets_too_short_are_refused_with_the_needed_length():
  with pytest.raises(ValueError, match=r'makes 114 targets.*set it to 114'):
    preprocessors.span_corruption(
      _documents([5]), {'inputs': 512, 'targets': 113}, FEATURES
    )


def test_too_many_spans_for_the_sentinels_are_refused():
  # 4,096 inputs have some 227 spans; the vocabulary has 100 extra ids.
  with pytest.raises(ValueError, match='has 100 extra ids'):
    preprocessors.span_corruption(
      _documents([5]), {'inputs': 4096, 'targets': 4096}, FEATURES
    )


@pytest.mark.parametrize('density,mean_span', [(0, 3), (1, 3), (0.15, 0.5)])
def test_impossible_noise_is_refused(density, mean_span):
  with pytest.raises(ValueError, match='0 < noise_density < 1'):
    preprocessors.span_corruption_lengths(100, density, mean_span)


def test_prefix_lm_cuts_chunks_in_two_anywhere():
  text = list(range(3, 250))
  examples = _run(
    preprocessors.prefix_lm, _documents(text), {'inputs': 5, 'targets': 4}
  )
  parts = [e['inputs'] + e['targets'] for e in examples]
  # 247 tokens and EOS are 62 chunks of four.
  assert parts == [[*text, EOS][i : i + 4] for i in range(0, 248, 4)]
  assert {len(e['inputs']) for e in examples} == {1, 2, 3}


def test_lm_fills_the_targets():
  examples = _run(
    preprocessors.lm, _documents([5, 6], [7, 8, 9]), {'targets': 3}
  )
  assert examples == [
    {'targets': [5, 6, EOS]}, {'targets': [7, 8, 9]},
  ]  # fmt: skip

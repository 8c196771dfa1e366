"""Rows of text by their definition, whatever the special tokens are."""

import numpy as np
import pytest
import seqio
import tensorflow as tf

from sparse_experts.data.features.converters import Converter, make
from sparse_experts.data.features.text import Text, TextToText
from sparse_experts.data.special_tokens import NO_TOKEN, SpecialTokens

LENGTHS = {'inputs': 7, 'targets': 5}
ALONE = {'targets': 6}
OTHERS = SpecialTokens(pad=NO_TOKEN, eos=2, start=3)


def examples_of(lengths, lowest, shortest, count=23):
  """Examples of random tokens and of random tasks of tokens."""
  random = np.random.default_rng(3)
  examples = []
  for _ in range(count):
    example = {}
    for f, most in lengths.items():
      size = random.integers(shortest, most + 1)
      example[f] = random.integers(lowest, 9, size).astype(np.int32)
      ids = random.integers(0, 4, size).astype(np.int32)
      example[f'{f}_task_ids'] = ids
    examples.append(example)
  return examples


def rows_of(converter, examples, lengths):
  spec = tf.TensorSpec([None], tf.int32)
  dataset = tf.data.Dataset.from_generator(
    lambda: iter(examples), output_signature=dict.fromkeys(examples[0], spec)
  )
  return list(converter(dataset, lengths).as_numpy_iterator())


def assert_rows(found, expected):
  assert len(found) == len(expected)
  for row, other in zip(found, expected):
    assert set(row) == set(other)
    for name, x in other.items():
      np.testing.assert_array_equal(row[name], x, err_msg=name)
      assert row[name].dtype == np.int32


def groups(examples, lengths, pack):
  """Which examples share a row: as many as fit, of `max(lengths)` at a time."""
  if not pack:
    return [[example] for example in examples]
  found = []
  size = max(lengths.values())
  for i in range(0, len(examples), size):
    found.append([])
    for example in examples[i : i + size]:
      together = [*found[-1], example]
      for f, most in lengths.items():
        if sum(len(e[f]) for e in together) > most:
          found.append([])
          break
      found[-1].append(example)
  return found


def slow_rows(features, examples, lengths, pack):
  """Rows token by token."""
  special_tokens = features.special_tokens
  alone = isinstance(features, Text)
  if alone:
    examples = [joined(e, lengths) for e in examples]
    names, lengths = set(lengths), {'targets': sum(lengths.values())}
  rows = []
  for group in groups(examples, lengths, pack):
    row = {}
    for f, most in lengths.items():
      columns = {
        name: np.zeros(most, np.int32)
        for name in ('segment_ids', 'positions', 'task_ids', 'causal_attention')
      }
      columns['loss_weights'] = np.zeros(most, np.int32)
      for name in ('target_tokens', 'input_tokens'):
        columns[name] = np.full(most, special_tokens.pad, np.int32)
      place = segment = 0
      for example in group:
        segment += any(len(example[name]) for name in lengths)
        width = example.get('width', 0)
        for position, token in enumerate(example[f]):
          columns['segment_ids'][place] = segment
          columns['positions'][place] = position
          columns['task_ids'][place] = example[f'{f}_task_ids'][position]
          columns['target_tokens'][place] = token
          before = example[f][position - 1] if position else 3
          columns['input_tokens'][place] = before
          columns['loss_weights'][place] = position >= width
          columns['causal_attention'][place] = position <= width
          place += 1
        if not pack and place:  # A row that is not packed reads its end, too.
          columns['input_tokens'][place : place + 1] = example[f][-1]
        if not pack:
          columns['causal_attention'] = np.arange(most) <= width
      if f == 'inputs':
        columns['input_tokens'] = columns['target_tokens']
      keep = ['input_tokens', 'task_ids']
      keep += ['segment_ids', 'positions'] * pack
      if f == 'targets':
        keep += ['target_tokens', 'loss_weights']
        keep += ['causal_attention'] * (alone and 'inputs' in names)
      side = {'inputs': 'encoder', 'targets': 'decoder'}[f]
      row |= {f'{side}_{name}': columns[name] for name in keep}
    rows.append(row)
  return rows


def joined(example, lengths):
  parts = [f for f in ('inputs', 'targets') if f in lengths]
  whole = {
    'targets' + end: np.concatenate([example[f + end] for f in parts])
    for end in ('', '_task_ids')
  }
  width = len(example['inputs']) if 'inputs' in parts else 0
  return {**whole, 'width': width}


CASES = [(TextToText, LENGTHS), (Text, LENGTHS), (Text, ALONE)]


@pytest.mark.parametrize('pack', [False, True])
@pytest.mark.parametrize('features, lengths', CASES)
def test_rows_are_those_of_seqio_where_those_are_right(features, lengths, pack):
  # Text has no 0, and no part of an example is empty.
  examples = examples_of(lengths, lowest=1, shortest=1)
  seqios = make(features(), pack=pack)
  assert not isinstance(seqios, Converter)
  ours = Converter(features(), pack, task_ids=False, task_id=None)
  expected = rows_of(seqios, examples, lengths)
  assert (len(expected) < len(examples)) == pack
  assert_rows(rows_of(ours, examples, lengths), expected)


@pytest.mark.parametrize('pack', [False, True])
@pytest.mark.parametrize('features, lengths', CASES)
def test_rows_are_the_definition(features, lengths, pack):
  # Token 0 is text, and some questions are empty.
  examples = examples_of(lengths, lowest=0, shortest=1)
  if 'inputs' in lengths:
    for example in examples[::3]:
      for name in ('inputs', 'inputs_task_ids'):
        example[name] = example[name][:0]
  features = features(OTHERS)
  found = rows_of(make(features, pack=pack, task_ids=True), examples, lengths)
  assert_rows(found, slow_rows(features, examples, lengths, pack))
  shapes = features.shapes(lengths, 1, pack=pack, task_ids=True)
  assert {n: x.shape for n, x in found[0].items()} == {
    n: x.shape[1:] for n, x in shapes.items()
  }


def test_the_inputs_of_an_example_are_read_by_its_targets():
  """By hand: seqio's numbers the second example's inputs as the first's."""
  examples = [
    {'inputs': [], 'targets': [5, 2]},
    {'inputs': [0, 8], 'targets': [6]},
    {'inputs': [7], 'targets': []},
  ]
  converter = make(TextToText(OTHERS), pack=True, task_ids=True, task_id=4)
  (row,) = rows_of(converter, examples, LENGTHS)
  assert {name: x.tolist() for name, x in row.items()} == {
    'encoder_input_tokens': [0, 8, 7, -1, -1, -1, -1],
    'encoder_segment_ids': [2, 2, 3, 0, 0, 0, 0],
    'encoder_positions': [0, 1, 0, 0, 0, 0, 0],
    'encoder_task_ids': [4, 4, 4, 0, 0, 0, 0],
    'decoder_target_tokens': [5, 2, 6, -1, -1],
    'decoder_input_tokens': [3, 5, 3, -1, -1],
    'decoder_loss_weights': [1, 1, 1, 0, 0],
    'decoder_segment_ids': [1, 1, 2, 0, 0],
    'decoder_positions': [0, 1, 0, 0, 0],
    'decoder_task_ids': [4, 4, 4, 0, 0],
  }


def test_a_question_without_an_answer_is_all_prompt():
  """What is read after its last token would write the answer."""
  converter = make(Text(OTHERS), pack=False)
  (row,) = rows_of(converter, [{'inputs': [0, 8], 'targets': []}], LENGTHS)
  assert row['decoder_input_tokens'].tolist()[:4] == [3, 0, 8, -1]
  assert row['decoder_causal_attention'].tolist()[:4] == [1, 1, 1, 0]
  assert not row['decoder_loss_weights'].any()


def test_it_is_a_converter_to_seqio():
  converter = make(Text(OTHERS), pack=True, task_ids=True)
  assert isinstance(converter, seqio.FeatureConverter) and converter.pack
  assert set(converter.TASK_FEATURES) == {'inputs', 'targets'}
  lengths = converter.get_model_feature_lengths(LENGTHS)
  assert set(lengths) == set(converter.MODEL_FEATURES)
  assert set(lengths.values()) == {7 + 5}
  examples = [{'targets': [1]}]
  with pytest.raises(ValueError, match='no targets_task_ids: .*mixture'):
    rows_of(converter, examples, {'targets': 2})
  with pytest.raises(ValueError, match='takes lengths of'):
    rows_of(converter, examples, {'inputs': 2})
  with pytest.raises(ValueError, match='START_ID'):
    make(Text(SpecialTokens(start=None)), pack=False)


def test_packed_rows_that_seqio_numbers_apart_are_refused():
  """Of three examples the first has no inputs: the second's would be its."""
  examples = [
    {'inputs': np.array(inputs, np.int32), 'targets': np.array([t], np.int32)}
    for inputs, t in (([], 3), ([4], 5), ([6], 7))
  ]
  features, lengths = TextToText(), {'inputs': 7, 'targets': 7}

  def batch(converter):
    (row,) = rows_of(converter, examples, lengths)
    return {name: x[None] for name, x in row.items()}

  wrong = batch(make(features, pack=True))
  meets = wrong['encoder_segment_ids'][0, 0] == wrong['decoder_segment_ids'][0]
  assert wrong['decoder_target_tokens'][0, meets].tolist() == [3]  # Not 5.
  with pytest.raises(
    ValueError, match='no inputs, or no targets.*PACK = False'
  ):
    features.check_rows(wrong)
  right = batch(make(features, pack=True, task_ids=True, task_id=0))
  features.check_rows(right)
  meets = right['encoder_segment_ids'][0, 0] == right['decoder_segment_ids'][0]
  assert right['decoder_target_tokens'][0, meets].tolist() == [5]

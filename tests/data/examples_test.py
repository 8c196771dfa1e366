"""Which task an example is of, and whether a position can be saved."""

import json

import numpy as np
import pytest
import seqio
import tensorflow as tf
import tiny_tasks  # noqa: F401 (registers its tasks)

from sparse_experts.data import examples, streams
from sparse_experts.data.dataset import Dataset
from sparse_experts.data.features.text import TextToText
from sparse_experts.data.special_tokens import NO_TOKEN, SpecialTokens
from sparse_experts.evaluation import task_evaluators

LENGTHS = {'inputs': 12, 'targets': 6}
PLUS, TIMES = (ord(c) + 3 for c in '+*')  # Byte b is token b + 3.
OTHERS = TextToText(SpecialTokens(pad=NO_TOKEN, eos=1, start=2))


@seqio.map_over_dataset
def times(example):
  return {**example, 'inputs': tf.strings.regex_replace(
    example['inputs'], r'\+', '*'
  )}  # fmt: skip


@seqio.map_over_dataset
def with_ids(example):
  """The task says of its tokens the tens of an input's byte."""
  return {
    **example,
    **{f'{f}_task_ids': example[f] // 10 for f in ('inputs', 'targets')},
  }


def add(name, first=(), last=(), source=None):
  sums = seqio.TaskRegistry.get('tiny_sums')
  seqio.TaskRegistry.add(
    name,
    source=source or sums.source,
    preprocessors=[*first, *sums.preprocessors, *last],
    output_features=sums.output_features,
    metric_fns=[],
  )


@pytest.fixture
def mixture(forget_new_tasks):
  """Sums and products; by name, products are task 0."""
  add('tiny_products', first=[times])
  seqio.MixtureRegistry.add(
    'tiny_numbers', [('tiny_sums', 1.0), ('tiny_products', 1.0)]
  )
  return 'tiny_numbers'


def assert_numbered(batch):
  """Of packed rows: an example's tokens have the number of its task."""
  seen = []
  for row in range(len(batch['encoder_input_tokens'])):
    segments = batch['encoder_segment_ids'][row]
    for segment in range(1, segments.max() + 1):
      inside = segments == segment
      tokens = batch['encoder_input_tokens'][row][inside]
      number = int(PLUS in tokens)
      assert number != (TIMES in tokens)
      answer = batch['decoder_segment_ids'][row] == segment
      assert (batch['encoder_task_ids'][row][inside] == number).all()
      assert (batch['decoder_task_ids'][row][answer] == number).all()
      seen.append(number)
  assert set(seen) == {0, 1} and len(seen) > 8


def test_tasks_of_a_mixture_are_numbered_before_they_are_packed(
  mixture, tmp_path
):
  def stream():
    return streams.Batches(
      mixture, 'train', LENGTHS, 8, OTHERS, seed=0, task_ids='mixture'
    )

  ours = stream()
  assert_numbered(next(ours))
  ours.save(tmp_path)
  continued = stream()
  continued.restore(tmp_path)
  expected = next(ours)
  for name, x in next(continued).items():
    np.testing.assert_array_equal(x, expected[name], err_msg=name)
  # A mixture of other tasks has other numbers.
  file = tmp_path / 'batches.json'
  saved = json.loads(file.read_text())
  names = ['tiny_products', 'tiny_sums']
  assert saved['task_names'] == names
  dataset = Dataset(mixture, LENGTHS, 8, task_ids='mixture')
  assert dataset.task_names() == tuple(names)
  file.write_text(json.dumps({**saved, 'task_names': names[1:]}))
  with pytest.raises(ValueError, match=r"task_names \['tiny_sums'\], these"):
    stream().restore(tmp_path)


def test_a_task_alone_is_task_0():
  (batch,) = streams.eval_batches(
    'tiny_sums', 'validation', LENGTHS, 20, TextToText(), task_ids='mixture'
  )
  assert batch['encoder_input_tokens'].all(1).sum() == 0
  assert not batch['encoder_task_ids'].any()
  dataset = Dataset('tiny_sums', LENGTHS, 20, task_ids='mixture')
  shapes = dataset.shapes(TextToText())
  assert dataset.task_names() == ('tiny_sums',)
  assert {'encoder_task_ids', 'decoder_task_ids'} <= set(shapes)


def test_a_mixture_keeps_what_its_tasks_say(forget_new_tasks):
  add('tiny_tens', last=[with_ids])
  seqio.MixtureRegistry.add('tiny_both', [('tiny_tens', 1.0)])
  (batch,) = streams.eval_batches(
    'tiny_both', 'validation', LENGTHS, 20, TextToText(), task_ids=True
  )
  tokens = batch['encoder_input_tokens']
  np.testing.assert_array_equal(batch['encoder_task_ids'], tokens // 10)


def test_a_task_is_evaluated_under_its_number(mixture):
  class Model:
    features = OTHERS

  dataset = Dataset(mixture, LENGTHS, 4, 'validation', task_ids='mixture')
  for number, name in enumerate(dataset.task_names()):
    task = seqio.TaskRegistry.get(name)
    convert = task_evaluators._converter(task, Model, dataset)
    read = task.get_dataset(LENGTHS, 'validation', shuffle=False)
    row = next(convert(read, LENGTHS).as_numpy_iterator())
    is_token = row['encoder_input_tokens'] != NO_TOKEN
    assert (row['encoder_task_ids'] == number * is_token).all()
    assert is_token.sum() == len('8+0') + 1


@pytest.mark.parametrize('wrong', ['mixtures', None, 2])
def test_other_task_ids_are_refused(wrong):
  with pytest.raises(ValueError, match="must be one of False, True, 'mixture'"):
    Dataset('tiny_sums', LENGTHS, 4, task_ids=wrong)


def generated(split, shuffle_files, seed=None):
  texts = [{'inputs': '1', 'targets': '2'}] * 9
  spec = tf.TensorSpec([], tf.string)
  return tf.data.Dataset.from_generator(
    lambda: iter(texts), output_signature={'inputs': spec, 'targets': spec}
  )


@seqio.map_over_dataset
def by_python(example):
  text = tf.py_function(lambda x: x, [example['inputs']], tf.string)
  return {**example, 'inputs': tf.ensure_shape(text, [])}


def refused(name):
  with pytest.raises(
    ValueError, match='stands in tiny_python cannot .*PyFunc is stateful'
  ) as error:
    streams.Batches(name, 'train', LENGTHS, 4, TextToText(), seed=0)
  assert 'from_tensor_slices' in str(error.value)
  assert '\n' not in str(error.value)


def test_a_source_that_cannot_be_saved_is_refused(forget_new_tasks):
  add(
    'tiny_python',
    source=seqio.FunctionDataSource(generated, splits=('train',)),
  )
  seqio.MixtureRegistry.add(
    'tiny_mixed', [('tiny_sums', 1.0), ('tiny_python', 1.0)]
  )
  refused('tiny_mixed')
  # An evaluation is not continued.
  batch = next(
    iter(streams.eval_batches('tiny_python', 'train', LENGTHS, 4, TextToText()))
  )
  assert len(batch['encoder_input_tokens']) == 4


def test_a_preprocessor_that_cannot_be_saved_is_refused(forget_new_tasks):
  add('tiny_python', first=[by_python])
  refused('tiny_python')


def test_a_position_under_other_steps_cannot_go_on(tmp_path):
  """Rows of seqio's own converter, which says nothing of tasks."""

  def stream(**options):
    return streams.Batches(
      'tiny_sums', 'train', LENGTHS, 4, TextToText(), seed=0, **options
    )

  before = stream()
  next(before)
  before.save(tmp_path)
  file = tmp_path / 'batches.json'
  saved = json.loads(file.read_text())
  names = {'task_ids': 'mixture', 'task_names': ['tiny_sums']}
  file.write_text(json.dumps({**saved, **names}))
  with pytest.raises(ValueError, match='made by other steps.*a new run'):
    stream(task_ids='mixture').restore(tmp_path)


def test_names_of_ids_are_the_source_s_or_the_tasks():
  assert examples.task_names('docs_domain', 'mixture') == ('docs_domain',)
  assert len(examples.task_names('docs_domain')) > 20
  assert examples.task_names('tiny_mixture', 'mixture') == (
    'tiny_choices',
    'tiny_sums',
  )
  assert examples.task_names('tiny_mixture') == ()

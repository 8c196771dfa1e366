"""Prompts with examples: drawn by seed and index, cut to what fits."""

import contextlib
import dataclasses
import functools

import numpy as np
import pytest
import seqio
import tensorflow as tf
import tensorflow_datasets as tfds

from sparse_experts.data import few_shot, tasks, vocabularies
from sparse_experts.data.tasks import benchmark, glam

pytestmark = pytest.mark.usefixtures('forget_new_tasks')

SUMS = [('1+1', '2'), ('2+2', '4'), ('3+3', '6'), ('4+4', '8'), ('2+3', '5')]


def asked(k, seed=0, length=100, questions=SUMS, ends=True, pool=SUMS):
  """The prompts of questions, of examples drawn from a pool."""
  inputs, targets = map(list, zip(*questions))
  data = tf.data.Dataset.from_tensor_slices(
    {'inputs': inputs, 'targets': targets}
  )
  found = few_shot._prompts(
    data,
    {'inputs': length},
    {'inputs': seqio.Feature(vocabularies.byte(), add_eos=ends)},
    pool=lambda: pool,
    k=k,
    seed=seed,
  )
  return [e['inputs'].decode() for e in found.as_numpy_iterator()]


def test_examples_are_others_than_the_question():
  for (question, _), text in zip(SUMS, asked(4)):
    *shown, last = text.split('\n\n')
    assert last == question
    others = {f'{q} {a}' for q, a in SUMS if q != question}
    assert set(shown) == others and len(shown) == 4


def test_a_question_that_is_drawn_from_several_times_is_shown_nowhere():
  """Neither with its answer, nor with another that is right too."""
  pool = [*SUMS, ('1+1', '2'), ('1+1', 'two'), ('3+3', '6')]
  for seed in range(8):
    for (question, _), text in zip(SUMS, asked(4, seed, pool=pool)):
      *shown, last = text.split('\n\n')
      assert last == question and len(shown) == 4
      assert not any(example.startswith(question) for example in shown)


def test_a_seed_says_which():
  assert asked(2) == asked(2)
  assert asked(2) != asked(2, seed=1)
  # Each question has its own, wherever it is asked again.
  (first, *_) = asked(2)
  assert asked(2, questions=SUMS[:1]) == [first]


@pytest.mark.parametrize(
  'length, shown', [(100, 3), (25, 3), (24, 2), (11, 1), (10, 0), (2, 0)]
)
def test_whole_examples_are_left_out_until_the_question_fits(length, shown):
  # Bytes: 3 of the question, 5 + 2 of an example, 1 for EOS: 4, 11, 18, 25.
  (text,) = asked(3, length=length, questions=[('9+9', '18')])
  *examples, question = text.split('\n\n')
  assert question == '9+9' and len(examples) == shown


def test_without_eos_there_is_room_for_one_token_more():
  arguments = {'questions': [('9+9', '18')], 'ends': False}
  texts = [asked(3, length=n, **arguments)[0] for n in (24, 23)]
  assert [text.count('\n\n') for text in texts] == [3, 2]


def test_shots_are_a_function_of_seed_and_index():
  draw = functools.partial(few_shot.draw, 10, 4)
  first = draw(seed=0, index=0)
  np.testing.assert_array_equal(draw(seed=0, index=0), first)
  assert len(set(first.tolist())) == 4
  others = [draw(seed=0, index=1), draw(seed=1, index=0)]
  assert not any(np.array_equal(first, other) for other in others)
  seen = {
    i for index in range(60) for i in draw(seed=0, index=index, exclude=[3, 8])
  }
  assert seen == set(range(10)) - {3, 8}
  with pytest.raises(ValueError, match='cannot show 4 examples: there are 3'):
    few_shot.draw(4, 4, seed=0, index=0, exclude=[0])


def test_a_prompt_with_examples():
  assert few_shot.prompt('Q: c', [('Q: a', 'A'), ('Q: b', 'B')]) == (
    'Q: a A\n\nQ: b B\n\nQ: c'
  )
  assert few_shot.prompt('Q: c', []) == 'Q: c'


# From the split 'shots', from train, and from the only one.
@pytest.mark.parametrize(
  'name, split',
  [
    ('glam_storycloze', 'shots'),
    ('glam_copa', 'train'),
    ('glam_winograd', 'validation'),
  ],
)
def test_a_benchmark_of_tfds(name, split, tmp_path):
  row = benchmark.ROWS[name]
  plain = dataclasses.replace(row, name=f'bytes_{name}')
  benchmark.add(plain, vocabularies.byte())
  made = few_shot.mixture(plain.name, shots=2, seed=3)
  assert made == f'bytes_{name}_2_shot_seed_3'
  with tfds.testing.mock_data(num_examples=4, data_dir=str(tmp_path)):
    pool = {
      f'{e["inputs"].decode()} {e["targets"].decode()}'
      for e in benchmark.texts(row, split).as_numpy_iterator()
    }
    (example, *_) = (
      tasks.find(made)
      .get_dataset(
        {'inputs': 9999, 'targets': 64},
        split='validation',
        shuffle=False,
        try_in_mem_cache=False,
      )
      .as_numpy_iterator()
    )
    (zero, *_) = benchmark.texts(row, 'validation').as_numpy_iterator()
  *shown, question = example['inputs_pretokenized'].decode().split('\n\n')
  assert question == zero['inputs'].decode()
  assert len(shown) == 2 and set(shown) <= pool
  assert example['options'].tolist() == zero['options'].tolist()
  assert example['inputs'].tolist() == vocabularies.byte().encode(
    example['inputs_pretokenized'].decode()
  )


def test_a_question_that_does_not_fit_keeps_its_end(tmp_path):
  row = dataclasses.replace(benchmark.ROWS['glam_copa'], name='bytes_copa')
  benchmark.add(row, vocabularies.byte())
  task = tasks.find(few_shot.mixture('bytes_copa', shots=2))
  with tfds.testing.mock_data(num_examples=4, data_dir=str(tmp_path)):
    examples = task.get_dataset(
      {'inputs': 3, 'targets': 8}, split='validation', try_in_mem_cache=False
    )
    # COPA's premises end with ' because' or ' so'.
    ends = {
      vocabularies.byte().decode(e['inputs'].tolist())
      for e in examples.as_numpy_iterator()
    }
  assert ends and ends <= {'use', ' so'}


def test_of_a_mixture():
  assert few_shot.mixture('glam', shots='zero') == 'glam'
  name = few_shot.mixture('glam', shots='few')
  assert name == 'glam_few_shot_seed_0'
  found = {task.name for task in tasks.find(name).tasks}
  rows = (*glam.NLG, *glam.NLU)
  assert found == {f'{row.name}_{row.shots}_shot_seed_0' for row in rows}
  assert min(row.shots for row in rows) > 0
  # A second time is the same; the averages are those of the benchmarks.
  assert few_shot.mixture('glam', shots='few') == name
  scores = {task: {'score': 60.0} for task in found}
  assert glam.averages(scores) == pytest.approx(
    {'nlg': 60, 'nlu': 60, 'all': 60}
  )


@pytest.mark.parametrize(
  'name, shots, message',
  [
    ('glam_copa', -1, "shots must be 'zero', 'one', 'few' or a number, not -1"),
    ('glam_copa', 'many', "not 'many'"),
    ('glam_cop', 1, "did you mean 'glam_copa'"),
    ('docs_domain', 1, 'docs_domain has no prompts of 1 shots'),
    ('squad', 'few', 'squad has no prompts of few shots'),
  ],
)
def test_what_has_no_prompts(name, shots, message):
  with pytest.raises(ValueError, match=message):
    few_shot.mixture(name, shots=shots)


def test_too_few_to_show(tmp_path):
  row = benchmark.ROWS['glam_copa']
  row = dataclasses.replace(row, name='bytes_copa')
  benchmark.add(row, vocabularies.byte())
  task = tasks.find(few_shot.mixture('bytes_copa', shots=3))
  with (
    tfds.testing.mock_data(num_examples=3, data_dir=str(tmp_path)),
    pytest.raises(ValueError, match="cannot show 3 .* split 'train' has 3"),
  ):
    task.get_dataset(
      {'inputs': 64, 'targets': 8}, split='validation', try_in_mem_cache=False
    )


@pytest.mark.parametrize('shots, enough', [(1, True), (2, False)])
def test_of_a_question_that_is_there_twice_nothing_is_left(
  shots, enough, monkeypatch, tmp_path
):
  row = dataclasses.replace(benchmark.ROWS['glam_copa'], name='bytes_copa')
  benchmark.add(row, vocabularies.byte())
  task = tasks.find(few_shot.mixture('bytes_copa', shots=shots))
  examples = {'inputs': ['Q', 'Q', 'P'], 'targets': ['A', 'A', 'B']}
  data = tf.data.Dataset.from_tensor_slices(examples)
  monkeypatch.setattr(benchmark, 'texts', lambda row, split: data)
  message = 'has 3, of which 2 may be the question'
  with (
    tfds.testing.mock_data(num_examples=3, data_dir=str(tmp_path)),
    contextlib.nullcontext()
    if enough
    else pytest.raises(ValueError, match=message),
  ):
    task.get_dataset(
      {'inputs': 64, 'targets': 8}, split='validation', try_in_mem_cache=False
    )

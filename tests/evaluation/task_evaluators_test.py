"""Metrics of tasks, against numbers derived by hand."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import seqio
import tensorflow as tf
import tensorflow_datasets as tfds
import tiny_tasks  # noqa: F401 (registers its tasks)

from sparse_experts import sharding
from sparse_experts.data import metrics, vocabularies
from sparse_experts.data.dataset import Dataset
from sparse_experts.data.features.text import TextToText
from sparse_experts.data.metrics import Member
from sparse_experts.data.special_tokens import T5
from sparse_experts.data.tasks import benchmark, finetuning, glue
from sparse_experts.evaluation import task_evaluators


def test_accuracy():
  assert metrics.accuracy(['ü', 'b', 'c', ''], ['ü', 'B', '', '']) == {
    'accuracy': 50
  }


@pytest.mark.parametrize(
  'targets,predictions,expected',
  [
    # 1 found, 2 wanted, 2 named.
    (['y', 'y', 'n'], ['y', 'n', 'y'], 100 * 2 / 4),
    # An illegal answer is a miss.
    (['y', 'y', 'n'], ['y', '', 'n'], 100 * 2 / 3),
    # Or it is named in vain: 1 found, 1 wanted, 4 named.
    (['y', 'n', 'n', 'n'], ['y', 'y .', '', 'maybe'], 100 * 2 / 5),
    (['n', 'n'], ['n', 'n'], 0),
    (['y'], ['y'], 100),
  ],
)
def test_f1(targets, predictions, expected):
  found = metrics.f1(targets, predictions, positive='y')
  assert found == {'f1': pytest.approx(expected)}


def test_macro_f1():
  """F1 of a: 2 x 1 / 3; b: 2 x 1 / 3; c, which nobody says: 0."""
  found = metrics.macro_f1(
    ['a', 'a', 'b'], ['a', 'b', 'b'], classes=['a', 'b', 'c']
  )
  assert found == {'macro_f1': pytest.approx(100 * (2 / 3 + 2 / 3) / 3)}
  # What is no class is a miss of its target's, and no other's: 2 x 1 / 3 each.
  found = metrics.macro_f1(
    ['a', 'a', 'b', 'b'], ['a', '', 'b', 'maybe'], classes=['a', 'b']
  )
  assert found == {'macro_f1': pytest.approx(100 * 2 / 3)}


@pytest.mark.parametrize(
  'targets,predictions,expected',
  [
    # True: 2 found, 1 missed, none said in vain; 1 rightly not said.
    ('yyyn', 'yynn', (2 * 1 - 0 * 1) / (2 * 3 * 1 * 2) ** 0.5),
    ('yynn', 'yynn', 1),
    ('yynn', 'nnyy', -1),
    ('yynn', 'yyyy', 0),
    # All that is illegal is one more class. Of 4, 2 are right; y, n and it are
    # wanted 2, 2, 0 times and said 1, 1, 2 times:
    # (4 x 2 - 2 - 2) / sqrt((16 - 4 - 4) (16 - 1 - 1 - 4)).
    ('yynn', 'yxzn', 4 / 80**0.5),
  ],
)
def test_matthews(targets, predictions, expected):
  """(tp tn - fp fn) / sqrt((tp + fp) (tp + fn) (tn + fp) (tn + fn)).

  Of classes wanted t and said p times, with c of s right:
  (s c - sum t p) / sqrt((s^2 - sum p^2) (s^2 - sum t^2)).
  """
  found = metrics.matthews(list(targets), list(predictions))
  assert found == {'matthews': pytest.approx(100 * expected)}


def test_correlations():
  targets = ['1', '2', '3', '4']
  assert metrics.pearson(targets, ['2', '4', '6', '8']) == {
    'pearson': pytest.approx(100)
  }
  # Deviations -1.5 -.5 .5 1.5 and -2 -1 0 3: 8 / sqrt(5 x 14).
  assert metrics.pearson(targets, ['0', '1', '2', '5']) == {
    'pearson': pytest.approx(100 * 8 / 70**0.5)
  }
  assert metrics.spearman(targets, ['0', '1', '2', '500']) == {
    'spearman': pytest.approx(100)
  }
  # Ranks 1.5 1.5 3 4 of ties: deviations -1 -1 .5 1.5: 4.5 / sqrt(5 x 4.5).
  assert metrics.spearman(targets, ['7', '7', '8', '9']) == {
    'spearman': pytest.approx(100 * 4.5 / 22.5**0.5)
  }


def test_what_is_no_number_is_minus_one():
  for text in ('', 'three', 'nan', 'inf', '½'):
    assert metrics.pearson(['0', '1'], [text, '1']) == {
      'pearson': pytest.approx(100)
    }
    assert metrics.pearson(['0', '1'], [text, '-1']) == {'pearson': 0}
    with pytest.raises(ValueError, match='are of numbers, but the target'):
      metrics.pearson(['0', text], ['0', '1'])


@pytest.mark.parametrize(
  'text,expected',
  [
    ('The  U.S. "army"', 'us army'),
    ('A an the', ''),
    ('theory', 'theory'),
    ('ÉTÉ - Straße', 'été straße'),
    ('北京。', '北京。'),
    ('', ''),
  ],
)
def test_normalisation_of_squad(text, expected):
  assert metrics.normalise_squad(text) == expected


@pytest.mark.parametrize(
  'text,expected',
  [
    ('The well-known \u2018army\u2019', 'well known army'),
    ('rock_n`roll', 'rock n roll'),
    ("d'Artagnan", 'd artagnan'),
    ('…', '…'),
  ],
)
def test_normalisation_of_trivia_qa(text, expected):
  assert metrics.normalise_trivia_qa(text) == expected


@pytest.mark.parametrize(
  'answers,prediction,em,f1',
  [
    (['the cat'], 'Cat!', 100, 100),
    # Common words a, b of 3 and 2: 2 x 2 / 5; c is another's.
    (['x y z', 'q'], 'x y', 0, 80),
    # Repeated words count as often as they are there: 2 x 1 / 3.
    (['x'], 'x x', 0, 100 * 2 / 3),
    (['x'], '', 0, 0),
    (['x'], 'the', 0, 0),
    # No words on both sides are equal, and have none in common, as in T5.
    ([''], 'the', 100, 0),
    (['The.', 'x y'], '', 100, 0),
    # The best of each is of different answers.
    (['an', 'x y'], 'x', 0, 100 * 2 / 3),
    (['Ünal'], 'ünal', 100, 100),
  ],
)
def test_squad(answers, prediction, em, f1):
  found = metrics.squad([answers, ['right']], [prediction, 'right'])
  assert found == {
    'em': pytest.approx((em + 100) / 2),
    'f1': pytest.approx((f1 + 100) / 2),
  }


def test_no_words_on_both_sides_have_none_in_common():
  """As `_f1_score` of T5's `qa_utils.py`, in all that use it."""
  nothing = {'em': 100, 'f1': 0}
  assert metrics.squad([['the']], ['...']) == nothing
  assert metrics.trivia_qa([['\u2018']], ['a `']) == nothing
  assert metrics.squad_by_group([Member('1', ['An'])], ['']) == nothing


def test_trivia_qa_and_squad_differ_in_hyphens():
  # One word against two, and two against two.
  assert metrics.squad([['well known']], ['well-known'])['em'] == 0
  assert metrics.trivia_qa([['well known']], ['well-known'])['em'] == 100


def test_multirc():
  """Question 1 is all right; of 3 True, 2 are found, and 3 are said."""
  targets = [
    Member('1', 'True'),
    Member('1', 'False'),
    Member('2', 'True'),
    Member('2', 'True'),
    Member('3', 'False'),
  ]
  predictions = ['True', 'False', 'True', '', 'True']
  assert metrics.multirc(targets, predictions) == {
    'f1a': pytest.approx(100 * 2 * 2 / 6),
    'em': pytest.approx(100 / 3),
  }


def test_illegal_answers_of_multirc():
  """Of 1 True 1 is found, and 2 are said: what is not False is True."""
  targets = [Member('1', 'True'), Member('1', 'False'), Member('2', 'False')]
  assert metrics.multirc(targets, ['True', 'False', 'Yes']) == {
    'f1a': pytest.approx(100 * 2 * 1 / 3),
    'em': 50,
  }
  # Two are said in vain.
  assert metrics.multirc(targets, ['True', '', 'Yes']) == {
    'f1a': pytest.approx(100 * 2 * 1 / 4),
    'em': 0,
  }


def test_record_counts_a_question_once():
  """Of three examples two are the same question, answered right and wrong."""
  both = Member('1', ['Ann', 'Bob'])
  targets = [both, both, Member('2', ['Eve'])]
  assert metrics.squad_by_group(targets, ['Bob', 'Joe', 'Joe']) == {
    'em': 50,
    'f1': 50,
  }


@pytest.mark.parametrize(
  'target,prediction,rouge1,rouge2,rouge_l',
  [
    # Words in common: 4 of 4 and 4; bigrams 1 of 3; longest "c d", 2.
    ('a b c d', 'c d b a', 1, 1 / 3, 1 / 2),
    # Sentences: "a b" and "c d" are in both; bigrams "a b", "c d" of 3.
    ('a b . c d', 'c d . a b', 1, 2 / 3, 1),
    ('a b\nc d', 'c d\na b', 1, 2 / 3, 1),
    # A point without spaces ends no sentence: "c d" of 4.
    ('a b. c d.', 'c d. a b.', 1, 2 / 3, 1 / 2),
    # Lin 2004, section 3.2: of w1 .. w5, "w1 w2" and "w1 w3 w5" are covered,
    # 4 of 5, by 4 of 10 words. Bigrams: "w1 w2" of 4 and 9.
    (
      'w1 w2 w3 w4 w5',
      'w1 w2 w6 w7 w8 . w1 w3 w8 w9 w5',
      2 * 4 / 15,
      2 * 1 / 13,
      2 * 4 / 15,
    ),
    # 1 of 2 and 4: 2 x 1 / 6.
    ('x y', 'x a b c', 1 / 3, 0, 1 / 3),
    ('x y', '', 0, 0, 0),
    ('same words', 'Same, WORDS!', 1, 1, 1),
  ],
)
def test_rouge(target, prediction, rouge1, rouge2, rouge_l):
  assert metrics.rouge([target], [prediction]) == pytest.approx(
    {
      'rouge1': 100 * rouge1,
      'rouge2': 100 * rouge2,
      'rougeLsum': 100 * rouge_l,
    }
  )


def test_rouge_is_a_mean_over_examples():
  """As T5's `rouge_mean`. A word has no bigrams."""
  found = metrics.rouge(['x y', 'x'], ['x a b c', 'x'])
  mean = pytest.approx(100 * (1 / 3 + 1) / 2)
  assert found == {'rouge1': mean, 'rouge2': 0, 'rougeLsum': mean}


def test_bleu():
  # Precisions 4/5, 3/4, 2/3, 1/2 of equal lengths: their geometric mean.
  found = metrics.bleu(['a b c d e'], ['a b c d x'])
  expected = (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
  assert found == {'bleu': pytest.approx(100 * expected)}
  # A prefix of 4 of 5 words: brevity penalty exp(1 - 5 / 4).
  found = metrics.bleu(['ä b c d e'], ['ä b c d'])
  assert found == {'bleu': pytest.approx(100 * np.exp(-0.25))}
  assert metrics.bleu(['a b c d'], ['']) == {'bleu': 0}


def test_average_is_of_tasks():
  scores = {
    'mrpc': {'f1': 80, 'accuracy': 90},
    'rte': {'accuracy': 65},
  }
  assert metrics.average(scores) == 75


@pytest.mark.parametrize('shots', ['', '_1_shot_seed_0'])
def test_mnli_is_one_task_of_two_test_sets(shots):
  scores = {
    f'glue_{name}{shots}': {'accuracy': 80.0}
    for name in ('cola', 'sst2', 'mrpc', 'qqp', 'stsb', 'qnli', 'rte')
  }
  scores[f'glue_mnli{shots}'] = {'accuracy': 88.0}
  scores[f'glue_mnli_mismatched{shots}'] = {'accuracy': 92.0}
  # (7 x 80 + (88 + 92) / 2) / 8; 82.22 if they were two.
  assert metrics.average(scores) == 81.25
  assert task_evaluators.flat(scores)['average'] == 81.25
  assert task_evaluators.score(scores, {'loss': 1.0}) == 81.25


@pytest.mark.parametrize(
  'metric',
  [metrics.accuracy, metrics.matthews, metrics.squad, metrics.rouge,
   metrics.bleu, metrics.pearson],
)  # fmt: skip
def test_nothing_to_judge(metric):
  with pytest.raises(ValueError, match='at least one example'):
    metric([], [])


def test_lengths_must_agree():
  with pytest.raises(ValueError):
    metrics.accuracy(['a', 'b'], ['a'])


# Tasks.


def test_the_target_of_trivia_qa_is_its_answer_and_aliases_are_right():
  (row,) = [r for r in finetuning.BENCHMARKS if r.name.endswith('trivia_qa')]
  row = dataclasses.replace(row, name='bytes_trivia_qa')
  answer = {'value': 'Sunset Boulevard', 'aliases': ['Sunset Blvd', 'Sunset']}
  data = tf.data.Dataset.from_tensors({'question': 'Q?', 'answer': answer})
  (example,) = benchmark.as_text(data, row).as_numpy_iterator()
  assert example['targets'] == b'Sunset Boulevard'
  assert example['answers'].tolist() == [b'Sunset Blvd', b'Sunset']


def validation(task):
  return Dataset(
    task.name, {'inputs': 64, 'targets': 8}, 4, 'validation', num_batches=1
  )


def ranked(task, may_be):
  """What a model is found to be that knows sums, of targets that may be."""

  def score(params, batch):
    inputs_BxL = batch['encoder_input_tokens'] - 51  # The byte '0'.
    targets_BxL = batch['decoder_target_tokens']
    value_B = 0
    for target_B in targets_BxL.T:
      digit_B = target_B - 51
      is_digit_B = (digit_B >= 0) & (digit_B <= 9)
      value_B = jnp.where(is_digit_B, 10 * value_B + digit_B, value_B)
    is_sum = value_B == inputs_BxL[:, 0] + inputs_BxL[:, 2]
    return jnp.where(may_be(targets_BxL) & is_sum, -1.0, -2.0)

  model = types.SimpleNamespace(
    features=TextToText(), special_tokens=T5, score=score, decode=score
  )
  mesh = sharding.make_mesh(data=1, devices=jax.devices()[:1])
  with sharding.use_mesh(mesh):
    judge = task_evaluators.TaskMetrics(
      model, validation(task), mesh, max_tokens=None, rank_options=True
    )
    found, rankings, _ = judge({})
  assert rankings == {task.name: {'examples': 4, 'ties': 0}}
  return found[task.name]['accuracy']


@pytest.mark.usefixtures('forget_new_tasks')
def test_options_begin_with_the_sentinel_that_targets_begin_with():
  """The model knows sums, if it may write the sentinel, 358, before."""
  seqio.experimental.add_task_with_sentinels('tiny_choices')
  task = seqio.TaskRegistry.get('tiny_choices_1_sentinel')
  # Else all options are equal, and the first is 0: right nowhere.
  assert ranked(task, lambda targets_BxL: targets_BxL[:, 0] == 358) == 100


@pytest.mark.usefixtures('forget_new_tasks')
@pytest.mark.parametrize('ends', [True, False])
def test_options_end_as_targets_do(ends):
  task = seqio.TaskRegistry.get('tiny_choices')
  feature = dataclasses.replace(task.output_features['targets'], add_eos=ends)
  task = seqio.TaskRegistry.add(
    'ends',
    source=task.source,
    preprocessors=task.preprocessors,
    output_features={**task.output_features, 'targets': feature},
    metric_fns=task.metric_fns,
  )
  eos = feature.vocabulary.eos_id
  accuracy = ranked(
    task, lambda targets_BxL: (targets_BxL == eos).any(1) == ends
  )
  assert accuracy == 100


@pytest.mark.usefixtures('forget_new_tasks')
def test_nouns_of_wsc_are_written_and_not_ranked(tmp_path):
  expected = {
    'bytes_super_glue_wsc_eval': False,
    'bytes_super_glue_wsc_1_sentinel_eval': False,
    'bytes_super_glue_boolq': True,
    'bytes_super_glue_boolq_1_sentinel': True,
  }
  for row in glue.SUPER_GLUE:
    name = f'bytes_{row.name}'
    if name in expected:
      row = dataclasses.replace(row, name=name)
      benchmark.add(row, vocabularies.byte())
      seqio.experimental.add_task_with_sentinels(name)
  with tfds.testing.mock_data(num_examples=1, data_dir=str(tmp_path)):
    for name, has_options in expected.items():
      task = seqio.TaskRegistry.get(name)
      assert task_evaluators._has_options(task, validation(task)) == has_options

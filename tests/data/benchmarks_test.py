"""The tables of tasks: fields that TFDS has, text, batches, metrics."""

import collections
import dataclasses
import json
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import seqio
import tensorflow as tf
import tensorflow_datasets as tfds

from sparse_experts import sharding
from sparse_experts.data import (
  bigbench,
  mixing,
  tasks,
  vocabularies,
)
from sparse_experts.data.dataset import Dataset
from sparse_experts.data.features.text import Text, TextToText
from sparse_experts.data.special_tokens import T5
from sparse_experts.data.tasks import benchmark, finetuning, glam, glue, mc4
from sparse_experts.evaluation import task_evaluators

pytestmark = pytest.mark.usefixtures('forget_new_tasks')

ROWS = {
  row.name: row
  for table in (glue.GLUE, glue.SUPER_GLUE, finetuning.BENCHMARKS)
  for row in table
} | {row.name: row for row in (*glam.NLG, *glam.NLU)}
# One of each kind; the others take another minute.
QUICK = ('glue_stsb', 'super_glue_record', 'squad', 'glam_coqa', 'glam_race_m')
LENGTHS = {'inputs': 48, 'targets': 16}


def in_bytes(row):
  """A copy of a row's task, whose vocabulary needs no file."""
  row = dataclasses.replace(row, name=f'bytes_{row.name}')
  return benchmark.add(row, vocabularies.byte())


def judged(task, examples, answer):
  """The task's metrics where predictions are `answer(text of the target)`."""
  judge = task.postprocess_fn
  texts = [e['targets_pretokenized'].decode() for e in examples]
  targets = [
    judge(text, example=e, is_target=True) for text, e in zip(texts, examples)
  ]
  predictions = [
    judge(answer(text), example=e, is_target=False)
    for text, e in zip(texts, examples)
  ]
  return {
    name: value
    for metric in task.metric_fns
    for name, value in metric(targets, predictions).items()
  }


@pytest.mark.parametrize(
  'name',
  [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
    for name in ROWS
  ],
)
def test_from_tfds_to_metrics(name, tmp_path):
  """Random examples of the fields that TFDS declares."""
  row = ROWS[name]
  task = in_bytes(row)
  split = next(s for s in ('validation', 'test', 'train') if s in task.splits)
  with tfds.testing.mock_data(num_examples=3, data_dir=str(tmp_path)):
    dataset = task.get_dataset(
      LENGTHS, split=split, shuffle=False, try_in_mem_cache=False
    )
    examples = list(dataset.as_numpy_iterator())
    rows = TextToText().rows(dataset, LENGTHS)
    (batch,) = rows.take(2).batch(2).as_numpy_iterator()
  right = judged(task, examples, lambda text: text)
  empty = judged(task, examples, lambda text: '')
  assert batch['encoder_input_tokens'].shape == (2, 48)
  assert batch['decoder_loss_weights'][0].any()
  assert right.keys() == empty.keys()
  for metric, value in right.items():
    assert math.isfinite(value) and math.isfinite(empty[metric])
    # Random texts can be of one class, or of none.
    if metric not in ('f1', 'f1a', 'macro_f1', 'matthews', 'pearson', 'bleu'):
      assert value >= empty[metric], metric


def text(row, **fields):
  """The text of one example of a row."""

  def tensor(value):
    is_ragged = isinstance(value, tf.RaggedTensor)
    return value if is_ragged else tf.convert_to_tensor(value)

  data = tf.data.Dataset.from_tensors(
    {k: tf.nest.map_structure(tensor, v) for k, v in fields.items()}
  )
  examples = benchmark.as_text(data, row).as_numpy_iterator()
  return [
    {
      key: value.decode() if isinstance(value, bytes) else value
      for key, value in example.items()
    }
    for example in examples
  ]


@pytest.mark.parametrize(
  'name,fields,inputs,targets',
  [
    # Raffel et al. 2020, appendix D.
    (
      'glue_mnli',
      {'hypothesis': 'H.', 'premise': 'P.', 'label': 2},
      'mnli hypothesis: H. premise: P.',
      'contradiction',
    ),
    (
      'glue_stsb',
      {'sentence1': 'A', 'sentence2': 'B', 'label': np.float32(3.25)},
      'stsb sentence1: A sentence2: B',
      '3.2',
    ),
    ('glue_cola', {'sentence': 'Ü', 'label': -1}, 'cola sentence: Ü', '<unk>'),
    (
      'super_glue_multirc',
      {
        'question': 'Q?',
        'answer': 'A',
        'paragraph': '<b>Sent 1: </b>One.<br>Two.',
        'label': 1,
        'idx': {'paragraph': 3, 'question': 4, 'answer': 5},
      },
      'multirc question: Q? answer: A paragraph: Sent 1: One. Two.',
      'True',
    ),
    (
      'super_glue_wsc_train',
      {
        'text': 'Bob asked Tom if he can lend some money.',
        'span1_text': 'Tom',
        'span2_text': 'he',
        'span2_index': 4,
        'label': 1,
      },
      'wsc: Bob asked Tom if *he* can lend some money.',
      'Tom',
    ),
    (
      'squad',
      {
        'question': "What's it?",
        'context': 'It (this).',
        'answers': {'text': ['a-b', 'c']},
      },
      "question: What ' s it ?  context: It ( this ) . ",
      'a - b',
    ),
    (
      'arc_easy',
      {
        'question': 'Q?',
        'answerKey': 2,
        'choices': {'text': ['x', 'y', 'z'], 'label': [0, 2, 1]},
      },
      'arc question: Q? options: x, y, z',
      'y',
    ),
    (
      'wmt16_enro',
      {'en': 'That is good.', 'ro': 'Asta e bine.'},
      'translate English to Romanian: That is good.',
      'Asta e bine.',
    ),
    ('glam_lambada', {'passage': 'one two three '}, 'one two', 'three'),
    (
      'glam_triviaqa',
      {'question': 'Who?', 'answer': {'aliases': ['b', 'a'], 'value': 'a'}},
      'Q: Who?\nA:',
      'a',
    ),
    (
      'glam_winograd',
      {
        'text': 'Zoë sees it here.',
        'pronoun_start': 9,
        'pronoun_end': 11,
        'option1': 'the cup',
        'option2': 'the bag',
        'label': 1,
      },
      'Zoë sees ',
      'the bag here.',
    ),
    (
      'glam_storycloze',
      {'context': 'C', 'endings': ['a', 'b'], 'label': 2},
      'C',
      'b',
    ),
    (
      'glam_squadv2',
      {
        'title': 'T',
        'question': 'Q?',
        'context': 'C',
        'answers': {'text': np.array([], object)},
      },
      'T\nC\nQ: Q?\nA:',
      'unanswerable',
    ),
    (
      'glam_record',
      {
        'passage': 'P.',
        'query': 'Then @placeholder left.',
        'entities': ['Ann', 'Bob'],
        'answers': ['Bob'],
      },
      'P.\nThen ',
      'Bob left.',
    ),
  ],
)
def test_text(name, fields, inputs, targets):
  (example,) = text(ROWS[name], **fields)
  assert (example['inputs'], example['targets']) == (inputs, targets)


def test_record_has_an_example_for_each_answer():
  fields = {
    'passage': 'Begin.\n@highlight\nOne\n@highlight\nTwo',
    'query': 'Q',
    'entities': ['a', 'b', 'c'],
    'answers': ['a', 'b'],
    'idx': {'passage': 1, 'query': 2},
  }
  one, two = text(ROWS['super_glue_record'], **fields)
  expected = 'record query: Q entities: a, b, c passage: Begin. One. Two'
  assert one['inputs'] == two['inputs'] == expected
  assert (one['targets'], two['targets']) == ('a', 'b')
  assert one['group'] == '1 2'


def test_turns_of_a_conversation():
  one, two = text(
    ROWS['glam_coqa'],
    story='S',
    questions=['q1', 'q2'],
    answers={'input_text': ['a1', 'a2']},
  )
  assert one['inputs'] == 'S\nQ: q1\nA:'
  assert two['inputs'] == 'S\nQ: q1\nA: a1\nQ: q2\nA:'
  assert two['targets'] == 'a2'


def test_questions_of_an_article():
  one, two = text(
    ROWS['glam_race_m'],
    article='A',
    questions=['q1', 'q2'],
    options=tf.ragged.constant([['a', 'b', 'c', 'd'], ['e', 'f', 'g']]),
    answers=['C', 'A'],
  )
  assert (one['inputs'], one['targets']) == ('A\nQ: q1\nA:', 'c')
  assert (two['inputs'], two['targets']) == ('A\nQ: q2\nA:', 'e')
  assert len(two['options']) == 3


def test_wrong_nouns_do_not_train():
  fields = {'text': 'a it', 'span1_text': 'a', 'span2_text': 'it'}
  row = ROWS['super_glue_wsc_train']
  assert not text(row, **fields, span2_index=1, label=0)


@pytest.mark.parametrize(
  'prediction,noun,expected',
  [
    ('The bunny', 'fuzzy bunny', 'True'),
    ('fuzzy bunny', 'the bunny', 'True'),
    ('dog', 'bunny', 'False'),
    ("Bob's", 'Bob', 'False'),
    ('', 'Bob', ''),
    ('the', 'Bob', ''),
    ('dog', 'her', 'False'),  # T5's `wsc_simple` of no noun: 0.
  ],
)
def test_same_noun(prediction, noun, expected):
  example = {'targets_pretokenized': noun.encode()}
  assert glue.same_noun(prediction, example) == expected


def test_metrics_see_the_label_of_wsc_and_not_its_noun():
  judge = in_bytes(ROWS['super_glue_wsc_eval']).postprocess_fn
  example = {'options': [b'False', b'True'], 'label': 0, 'answers': []}
  assert judge('Tom', example=example, is_target=True) == 'False'


def test_glam_is_29_benchmarks_with_one_number_each():
  assert (len(glam.NLG), len(glam.NLU)) == (8, 21)
  assert all(row.options for row in glam.NLU)
  assert not any(row.options for row in glam.NLG)
  assert all('validation' in row.splits for row in (*glam.NLG, *glam.NLU))
  assert {row.name for row in glam.NLU if not row.normalise} == {
    'glam_copa',
    'glam_record',
  }


# Texts that a decoder continues.


@pytest.fixture
def boolq(tmp_path):
  """BoolQ is one example, of label 0."""
  example = {'passage': 'P', 'question': 'Q', 'label': 0}

  def read(self, *args, **kwargs):
    return tf.data.Dataset.from_tensors(example)

  with tfds.testing.mock_data(as_dataset_fn=read, data_dir=str(tmp_path)):
    yield


@pytest.mark.parametrize(
  'name,inputs,targets',
  [
    # The last 10 of 'P\nquestion: Q?\nanswer:', and 'no'.
    ('glam_boolq', 'Q?\nanswer:', 'no'),
    # 9 of 'boolq passage: P question: Q' and EOS; 3 of 'False' and EOS.
    ('super_glue_boolq', 'boolq pas\1', 'Fal\1'),
  ],
)
def test_a_decoder_continues_the_end_of_the_question(
  name, inputs, targets, boolq
):
  lengths = {'inputs': 10, 'targets': 4}
  data = in_bytes(ROWS[name]).get_dataset(
    lengths, split='validation', try_in_mem_cache=False
  )
  rows = Text().rows(data, lengths)
  (row,) = rows.as_numpy_iterator()
  # Byte b is token b + 3, and EOS is 1.
  expected = [1 if c == '\1' else ord(c) + 3 for c in inputs + targets]
  expected += [0] * (14 - len(expected))
  assert row['decoder_target_tokens'].tolist() == expected


@pytest.mark.parametrize('ends,accuracy', [(False, 100.0), (True, 0.0)])
def test_what_options_end_with_is_ranked(ends, accuracy, boolq):
  """log p is -1 of 'a', -2 of 'b' and -6 of EOS, whatever is before them.

  Per token 'a' has -1 and 'bbb' -2; with EOS -7 / 2 and -12 / 4.
  """
  log_p = np.zeros(vocabularies.byte().vocab_size, np.float32)
  log_p[[ord('a') + 3, ord('b') + 3, 1]] = -1, -2, -6

  def score(params, batch):
    log_p_BxL = params[batch['decoder_target_tokens']]
    return (log_p_BxL * batch['decoder_loss_weights']).sum(1)

  row = dataclasses.replace(ROWS['glam_boolq'], options=('a', 'bbb'), ends=ends)
  dataset = Dataset(in_bytes(row).name, LENGTHS, 2, split='validation')
  model = types.SimpleNamespace(
    features=Text(), special_tokens=T5, score=score, decode=score
  )
  mesh = sharding.make_mesh(data=1, devices=jax.devices()[:1])
  with sharding.use_mesh(mesh):
    judge = task_evaluators.TaskMetrics(model, dataset, mesh, None, True)
    found, *_ = judge(jnp.asarray(log_p))
  assert found == {'bytes_glam_boolq': {'accuracy': accuracy}}


@pytest.mark.parametrize(
  'name,wrote,target',
  [
    ('glam_webqs', 'Paris Q: Who wrote Emma? A: Jane Austen', ['Paris']),
    ('glam_squadv2', ' FAQ: Emma\n\nTitle', ['FAQ: Emma']),
    ('glam_lambada', "don't. Then", "don't"),
    ('glam_lambada', '...', ''),
  ],
)
def test_what_is_read_of_what_goes_on(name, wrote, target):
  task = in_bytes(ROWS[name])
  (metric,) = task.metric_fns
  text = task.postprocess_fn(wrote, example={}, is_target=False)
  assert list(metric([target], [text]).values()) == [100]


def test_bigbench_asks_a_decoder(tmp_path):
  file = tmp_path / 'task.json'
  example = {'input': '1 + 1 =', 'target_scores': {'3': 0, '2': 1}}
  file.write_text(json.dumps({'examples': [example]}))
  name = bigbench.task(file, vocabularies.byte(), ends=False)
  lengths = {'inputs': 6, 'targets': 4}
  (example,) = (
    tasks.find(name).get_dataset(lengths, split='test').as_numpy_iterator()
  )
  decode = vocabularies.byte().decode
  assert decode(example['inputs'].tolist()) == ' =\nA: '
  assert example['targets'].tolist() == [ord('2') + 3]
  with pytest.raises(ValueError, match='ends=False; rename'):
    bigbench.task(file, vocabularies.byte())


def test_averages_of_glam():
  nlg = {row.name: {'em': 10.0 * i} for i, row in enumerate(glam.NLG)}
  nlu = {row.name: {'accuracy': 80.0} for row in glam.NLU}
  # 0 to 70 in eight steps: 35; all: (8 x 35 + 21 x 80) / 29.
  assert glam.averages({**nlg, **nlu}) == pytest.approx(
    {'nlg': 35.0, 'nlu': 80.0, 'all': 1960 / 29}
  )
  del nlg['glam_drop']
  assert glam.averages({**nlg, **nlu}) == {'nlu': 80.0}


def test_data_that_is_not_prepared(tmp_path, monkeypatch):
  monkeypatch.setattr(tfds.core.constants, 'DATA_DIR', str(tmp_path))
  task = in_bytes(ROWS['glam_boolq'])
  with pytest.raises(FileNotFoundError, match='tfds build super_glue/boolq'):
    task.get_dataset(LENGTHS, split='validation')


# Sentinels.


def test_a_sentinel_after_inputs_and_before_targets():
  task = in_bytes(ROWS['super_glue_copa'])
  seqio.experimental.add_task_with_sentinels(task.name)
  task = seqio.TaskRegistry.get(f'{task.name}_1_sentinel')
  with tfds.testing.mock_data(num_examples=1):
    (example,) = task.get_dataset(
      LENGTHS, split='validation', shuffle=False, try_in_mem_cache=False
    ).as_numpy_iterator()
  sentinel = vocabularies.byte().vocab_size - 1
  assert example['inputs'][-2:].tolist() == [sentinel, 1]
  assert example['targets'][0] == sentinel


# Mixtures.


@pytest.fixture
def two_tasks():
  """Of 4 and 16 examples, of 3 and 2 tokens with EOS, without validation."""

  def add(name, count, word):
    return seqio.TaskRegistry.add(
      name,
      source=seqio.FunctionDataSource(
        lambda split, shuffle_files, seed=None: tf.data.Dataset.from_tensors(
          {'inputs': '', 'targets': word}
        ).repeat(count),
        splits=('train',),
        num_input_examples={'train': count},
      ),
      preprocessors=[
        seqio.preprocessors.tokenize,
        seqio.preprocessors.append_eos,
      ],
      output_features={
        feature: seqio.Feature(vocabularies.byte())
        for feature in ('inputs', 'targets')
      },
    )

  # With inputs of EOS alone: 4 and 16 x 3 / 4 ... see the tests.
  return [add('few', 4, 'abcdef').name, add('many', 16, 'ab').name]


@pytest.mark.parametrize(
  'arguments,few,many',
  [
    ({}, 4, 16),
    ({'maximum': 8}, 4, 8),
    ({'temperature': 2}, 2, 4),
    ({'temperature': 3, 'maximum': 8}, 4 ** (1 / 3), 2),
    # Tokens of an example: 1 + 7, and 1 + 3.
    ({'by': 'tokens'}, 32, 64),
    ({'by': 'tokens', 'maximum': 48}, 32, 48),
    ({'by': 'equal'}, 1, 1),
  ],
)
def test_rates(arguments, few, many, two_tasks):
  name = mixing.mixture('mixed', two_tasks, **arguments)
  mixed = tasks.find(name)
  rates = {t.name: mixed.get_rate(t) for t in mixed.tasks}
  assert rates == pytest.approx({'few': few, 'many': many})
  # A second time is the same mixture.
  assert mixing.mixture('mixed', two_tasks, **arguments) == name


def test_a_mixture_is_read_in_its_proportions(two_tasks):
  mixed = tasks.find(mixing.mixture('mixed', two_tasks))
  data = mixed.get_dataset(LENGTHS, split='train', seed=0, num_epochs=None)
  drawn = collections.Counter(
    len(e['targets']) for e in data.take(400).as_numpy_iterator()
  )
  # Binomial of 400 and 1/5: 80 +- 8.
  assert drawn.keys() == {7, 3} and 48 < drawn[7] < 112


@pytest.mark.parametrize(
  'arguments,message',
  [
    ({'by': 'words'}, "'examples', 'tokens' or 'equal'"),
    ({'temperature': 0}, 'temperature must be above 0'),
    ({'maximum': -1}, 'maximum must be above 0'),
    ({'task_names': ['fewer']}, "did you mean 'few'"),
    ({'task_names': []}, 'at least one'),
  ],
)
def test_bad_mixtures(arguments, message, two_tasks):
  with pytest.raises(ValueError, match=message):
    mixing.mixture('bad', **{'task_names': two_tasks, **arguments})


def test_another_mixture_of_the_same_name(two_tasks):
  mixing.mixture('mixed', two_tasks)
  with pytest.raises(ValueError, match='another mixture'):
    mixing.mixture('mixed', two_tasks, maximum=8)


@pytest.mark.parametrize('name', ['glue', 'super_glue', 'anli', 'glam', 'mc4'])
def test_registered_mixtures_name_registered_tasks(name):
  assert len(tasks.find(name).tasks) > 1


def test_languages_are_those_of_tfds():
  from tensorflow_datasets.text import c4

  assert set(mc4.LANGUAGES) == set(c4.MC4_LANGUAGES)
